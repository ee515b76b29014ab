"""From a call of a function to its key: BLAKE2b, of 256 bits, over the function's name and its arguments.

Arguments are encoded as MessagePack in a form in which no two that differ are equal: by parameter, so `f(1, 2)`,
`f(1, b=2)` and `f(a=1, b=2)` are one call, with the defaults filled in; dicts and sets in the order of their encoded
members; 1, 1.0 and True are three. What MessagePack knows by itself stands for itself, and a tuple is a list. All else
that msgspec can encode (datetimes, UUIDs, Decimals, enums, dataclasses, Structs ...) stands under its class's name.

BLAKE2b and not SHA-256, as for requests, because its hashing of short texts costs half as much in Python, and a hit has
little else to do.

Source: RFC 7693.
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

__all__ = ["call_key", "name_of"]

_ATOMS: Final = frozenset({type(None), bool, int, float, str, bytes})
_TYPED: Final = 1
"""The extension of MessagePack that holds the name of a class, and a value of it."""

_DIGEST_BYTES: Final = 32

_encode: Final = msgspec.msgpack.Encoder(order="deterministic").encode


KeyOf = Callable[[tuple[Any, ...], dict[str, Any]], bytes]
"""From positional and named arguments to the key, 64 hexadecimal digits."""


def call_key(function: Callable[..., Any], name: str, key: Callable[..., Any] | None) -> KeyOf:
    """Return what gives the keys of a function's calls.

    Args:
        function: the function.
        name: what stands for it; two functions of one name find each other's results.
        key: called with a call's arguments, returns what stands for them; None: the arguments themselves.

    Returns:
        A function that raises TypeError where a call does not fit the function, or an argument cannot be encoded, and
        ValueError where an argument's value cannot be.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    is_plain = key is None and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)
    # The length of a call whose arguments are complete and in order; of no call, where there is no such thing.
    length = len(parameters) if is_plain else -1
    # Self-delimiting, so that no name and arguments run into each other.
    begin = hashlib.blake2b(_encode(("call", 1, name)), digest_size=_DIGEST_BYTES).copy
    encode, atoms = _encode, _ATOMS

    def key_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        subject: Any = args
        if kwargs or len(args) != length:
            subject = _subject_of(signature, name, key, args, kwargs)
        else:
            for one in args:
                if type(one) not in atoms:
                    subject = _subject_of(signature, name, key, args, kwargs)
                    break
        digest = begin()
        try:
            digest.update(encode(subject))
        except (OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"{name}: an argument cannot be part of a key: {error}; use key=") from None
        return digest.hexdigest().encode()

    return key_of


def _subject_of(
    signature: inspect.Signature, name: str, key: Callable[..., Any] | None, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Return what stands for a call's arguments, in a form of which the encoding says everything."""
    try:
        if key is not None:
            return _unambiguous(key(*args, **kwargs))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _unambiguous(list(bound.arguments.values()))
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f"{name}: an argument cannot be part of a key: {error}; use key=") from None


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
