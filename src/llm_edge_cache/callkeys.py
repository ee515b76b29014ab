"""From a call of a function to its key: SHA-256 over the function's name and its arguments.

Arguments are encoded as MessagePack in a form in which no two that differ are equal: by parameter, so `f(1, 2)`,
`f(1, b=2)` and `f(a=1, b=2)` are one call, with the defaults filled in; dicts and sets in the order of their encoded
members; 1, 1.0 and True are three. What MessagePack knows by itself stands for itself, and a tuple is a list. All else
that msgspec can encode (datetimes, UUIDs, Decimals, enums, dataclasses, Structs ...) stands under its class's name.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec

__all__ = ["CallKey", "name_of"]

_ATOMS: Final = frozenset({type(None), bool, int, float, str, bytes})
_TYPED: Final = 1
"""The extension of MessagePack that holds the name of a class, and a value of it."""

_encode: Final = msgspec.msgpack.Encoder(order="deterministic").encode


class CallKey:
    """The keys of one function's calls.

    Args:
        function: the function.
        name: what stands for it; two functions of one name find each other's values.
        key: called with a call's arguments, returns what stands for them; None: the arguments themselves.
    """

    def __init__(self, function: Callable[..., Any], name: str, key: Callable[..., Any] | None) -> None:
        self._name: Final = name
        self._key: Final = key
        self._signature: Final = inspect.signature(function)
        parameters = self._signature.parameters.values()
        is_plain = all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)
        # The length of a call whose arguments are complete and in order; of no call, where there is no such thing.
        self._length: Final = len(parameters) if is_plain and key is None else -1
        # Self-delimiting, so that no name and arguments run into each other.
        self._prefix: Final = hashlib.sha256(_encode(("call", 1, name)))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """Return the key of a call, 64 hexadecimal digits.

        Raises:
            TypeError: the call does not fit the function, or an argument cannot be encoded.
        """
        if kwargs or len(args) != self._length:
            return self._digest(self._other(args, kwargs))
        for one in args:
            if type(one) not in _ATOMS:
                return self._digest(self._other(args, kwargs))
        return self._digest(args)

    def _digest(self, subject: Any) -> bytes:
        digest = self._prefix.copy()
        try:
            digest.update(_encode(subject))
        except (OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"{self._name}: an argument cannot be part of a key: {error}; use key=") from None
        return digest.hexdigest().encode()

    def _other(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if self._key is not None:
                return _unambiguous(self._key(*args, **kwargs))
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return _unambiguous(list(bound.arguments.values()))
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}") from None
        except RecursionError:
            raise ValueError(f"{self._name}: an argument is nested too deep to be part of a key; use key=") from None


def _unambiguous(value: Any) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in (list, tuple):
        return [_unambiguous(one) for one in value]
    if kind is dict:
        return msgspec.msgpack.Ext(_TYPED, _encode(["dict", _members_of(value)]))
    if kind in (set, frozenset):
        return msgspec.msgpack.Ext(_TYPED, _encode(["set", sorted(_encode(_unambiguous(one)) for one in value)]))
    try:
        return msgspec.msgpack.Ext(_TYPED, _encode([f"{kind.__module__}.{kind.__qualname__}", value]))
    except TypeError:
        raise TypeError(f"an argument of type {kind.__qualname__} cannot be part of a key; use key=") from None


def _members_of(mapping: dict[Any, Any]) -> list[tuple[bytes, Any]]:
    """Return the members of a dict, in the order of their keys as they are encoded."""
    pairs = [(_encode(_unambiguous(key)), _unambiguous(value)) for key, value in mapping.items()]
    return sorted(pairs, key=lambda pair: pair[0])


def name_of(function: Callable[..., Any]) -> str:
    """Return what tells a function from all others: its module and qualified name.

    Raises:
        ValueError: it has none, or is a lambda, of which there may be several.
    """
    name = getattr(function, "__qualname__", None)
    if name is None or "<lambda>" in name:
        raise ValueError(f"{function!r} has no name to keep its results under: give it one with prefix=")
    return f"{_module_of(function.__module__)}.{name}"


@functools.lru_cache(maxsize=64)
def _module_of(name: str) -> str:
    """Return a module's name; of a program its path, since they are all called __main__."""
    if name != "__main__":
        return name
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return name if path is None else os.path.realpath(path)
