"""The canonical encoding of a request: the bytes whose SHA-256 is the key.

The encoding is one MessagePack array of eight elements,

    [version, namespace, model, prompt, messages, temperature, max_tokens, parameters]

of the request's *normal form*:

- what is not given is nil; a parameter that is given as None is nil inside the map, which is not absence;
- the temperature is a string of two decimals (:func:`temperature_text`);
- a number with an integral value is that integer, whatever its Python type (`0`, `0.0` and `-0.0`; `1` and `1.0`); any
  other number is a binary64. Integers outside 64 bits are extension type 1, minimal big-endian two's complement;
- mappings are sorted by the UTF-8 of their keys, at every depth; sequences keep their order; strings are untouched.

**No two requests with different normal forms share an encoding.** MessagePack marks every value with its type and
every string, array, map and extension with its length, so reading an encoding from the left is deterministic and gives
back exactly one normal form: nothing in a string can end it or open another value, whatever separators it contains.
Each element of a normal form belongs to one family of marks (nil, true/false, integer, binary64, string, array, map,
extension 1), so values of different kinds never meet: True is not 1, "1" is not 1, nil is not "". The integral values
are integers always and the others binary64 always, so no number has two encodings and none is shared: 2**53 + 1 is not
its floating neighbour 2.0**53, which is 2**53. Conversely **equal normal forms have one encoding**: integers and
lengths are written in their shortest form and the entries of a map in one order.

NaN, infinities, lone surrogates, bytes and whatever else JSON does not know are refused with an error that names the
place, e.g. `messages[2]["content"]`, never the value.

Most requests *are* in normal form; one walk over the values (`native.are_plain`) proves it and then msgspec's encoder
does everything. Only what the walk doubts is rebuilt, slowly.

Sources: MessagePack specification (github.com/msgpack/msgpack); RFC 8785 for what a canonical form has to settle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from llm_edge_cache.native import native

__all__ = [
    "ENCODING_VERSION",
    "MAX_DEPTH",
    "RequestFields",
    "encode_fields",
    "encode_json",
    "encode_request",
    "temperature_text",
]

ENCODING_VERSION: Final = 1
"""The array's first element. Any change to what is above needs the next number, and makes every key a new one."""
MAX_DEPTH: Final = 100
"""Containers inside one another, a message or the value of a parameter being the first."""

_BIG_INTEGER: Final = 1  # extension type
_MOST_HEATS: Final = 1024
_LONGEST_NAME: Final = 40  # characters of a key that an error message quotes

_encode: Final = msgspec.msgpack.Encoder(order="sorted").encode
_binary32: Final = struct.Struct("<f")
_Path = tuple[object, ...]  # the field's name, then keys (str) and positions (int)


class RequestFields(Protocol):
    """What a key depends on, each field of the type that it names."""

    @property
    def namespace(self) -> str:
        """The tenant; may be empty."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def prompt(self) -> str | None:
        """A text, or None."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]] | None:
        """Chat messages, a list or tuple of dicts of JSON values; or None."""

    @property
    def temperature(self) -> float | None:
        """Any finite number that binary32 can hold, or None."""

    @property
    def max_tokens(self) -> float | None:
        """An integral number, or None."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Every further parameter by name, a dict of JSON values."""


def encode_request(request: RequestFields) -> bytes:
    """Return the canonical encoding of a request; as `encode_fields`."""
    return encode_fields(
        request.namespace,
        request.model,
        request.prompt,
        request.messages,
        request.temperature,
        request.max_tokens,
        request.parameters,
    )


def encode_fields(  # noqa: PLR0917 - the hot path, and keywords would cost it
    namespace: str,
    model: str,
    prompt: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    temperature: float | None,
    max_tokens: float | None,
    parameters: Mapping[str, Any],
) -> bytes:
    """Return the canonical encoding of a request with these fields (`RequestFields`).

    Raises:
        TypeError: something inside is no JSON value; the message names its place and type.
        ValueError: NaN, an infinity, a lone surrogate, or more than `MAX_DEPTH` containers inside one another.
    """
    heat = None if temperature is None else _heats.get(temperature) or _heat(temperature)
    said, limit, further = messages, max_tokens, parameters
    if said is not None and not _are_plain_dicts(said, MAX_DEPTH):
        said = _normal_messages(said)
    if type(limit) is float:
        limit = int(limit)
    if further and (type(further) is not dict or not _are_plain(further, MAX_DEPTH)):
        further = _normal_parameters(further)
    try:
        return _encode((ENCODING_VERSION, namespace, model, prompt, said, heat, limit, further))
    except (OverflowError, TypeError, UnicodeEncodeError):
        # What the walks do not look for, since the encoder cannot miss it: either it can be rebuilt, or this raises
        # again and names the place.
        normal = _normal_fields(
            namespace=namespace,
            model=model,
            prompt=prompt,
            messages=messages,
            max_tokens=max_tokens,
            parameters=parameters,
        )
        return _encode((ENCODING_VERSION, *normal[:4], heat, *normal[4:]))


_heats: Final[dict[float, str]] = {}  # texts of temperatures that were asked for; equal numbers have one text


def _heat(temperature: float) -> str:
    if len(_heats) >= _MOST_HEATS:
        _heats.clear()
    _heats[temperature] = text = temperature_text(temperature)
    return text


def encode_json(value: object, name: str) -> bytes:
    """Return the canonical encoding of one JSON value: the same normal form, but no field is special, none is rounded.

    An encoding ends where its value ends, so several of them one after another are as unambiguous as one.

    Args:
        value: what a JSON parser returns; at most `MAX_DEPTH` containers inside one another.
        name: what error messages call it.

    Raises:
        TypeError: something inside is no JSON value; the message names its place and type.
        ValueError: NaN, an infinity, a lone surrogate, or nested too deep.
    """
    if _are_plain((value,), MAX_DEPTH):
        try:
            return _encode(value)
        except (OverflowError, TypeError, UnicodeEncodeError):
            pass  # as in encode_request
    return _encode(_normal(value, (name,), MAX_DEPTH))


def temperature_text(temperature: float) -> str:
    """Return a temperature with two decimals, as Rust's `format!("{:.2}", temperature as f32)` writes it.

    The number is rounded to binary32 first, and that binary value exactly to two decimals, ties to even: 0.995 gives
    "1.00" (its binary32 is 0.99500000477), 0.125 gives "0.12". Zero has no sign.

    Raises:
        ValueError: NaN, an infinity, or too large for binary32.
    """
    try:
        (rounded,) = _binary32.unpack(_binary32.pack(float(temperature)))
    except OverflowError:
        raise ValueError("temperature is too large for a 32-bit floating point number") from None
    if rounded - rounded != 0.0:
        raise ValueError("temperature must be a finite number")
    text = f"{rounded:.2f}"
    return "0.00" if text == "-0.00" else text


# The walk that proves a value to be in normal form already. It leaves to the encoder what that refuses by itself:
# integers outside 64 bits, subclasses of str, int and float, keys that are no strings, lone surrogates.
_are_plain: Final = native.are_plain
_are_plain_dicts: Final = native.are_plain_dicts


# ---- the normal form, built ----


def _normal_fields(
    *, namespace: str, model: str, prompt: str | None, messages: object, max_tokens: object, parameters: object
) -> tuple[Any, ...]:
    return (
        _normal(namespace, ("namespace",), 0),
        _normal(model, ("model",), 0),
        _normal(prompt, ("prompt",), 0),
        None if messages is None else _normal_messages(messages),
        _normal(max_tokens, ("max_tokens",), 0),
        _normal(parameters, ("parameters",), MAX_DEPTH + 1),
    )


def _normal_messages(messages: object) -> list[Any]:
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages must be a list or tuple of dicts, not {type(messages).__name__}")
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TypeError(f"messages[{position}] must be a dict, not {type(message).__name__}")
    return [_normal(message, ("messages", position), MAX_DEPTH) for position, message in enumerate(messages)]


def _normal_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    # A top_p of 1.0 or a penalty of 0.0 is what most often stands between a request and its normal form.
    normal: dict[str, Any] = {
        name: int(value) if type(value) is float and value.is_integer() else value for name, value in parameters.items()
    }
    if not _are_plain(normal, MAX_DEPTH):
        normal = _normal(parameters, ("parameters",), MAX_DEPTH + 1)
    return normal


def _normal(value: object, path: _Path, depth: int) -> Any:
    """Return the normal form of `value`; `depth` more containers may follow."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _normal_text(value, path)
    if isinstance(value, int):
        return _normal_integer(int.__index__(value))
    if isinstance(value, float):
        return _normal_float(float.__float__(value), path)
    if isinstance(value, (dict, list, tuple)):
        if depth == 0:
            raise ValueError(f"{_place(path[:8])}... is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            return dict(_normal_entries(value, path, depth - 1))
        return [_normal(item, (*path, position), depth - 1) for position, item in enumerate(value)]
    raise TypeError(f"{_place(path)} must be a JSON value, not {type(value).__name__}")


def _normal_entries(mapping: Mapping[Any, Any], path: _Path, depth: int) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise TypeError(f"{_place(path)} must have strings for keys, not {type(name).__name__}")
        text = _normal_text(name, path)
        if text in seen:  # two subclasses of str that call themselves unequal
            raise ValueError(f"{_place(path)} has a key twice")
        seen.add(text)
        yield text, _normal(value, (*path, text), depth)


def _normal_text(text: str, path: _Path) -> str:
    plain = str.__str__(text)
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_place(path)} contains a lone surrogate, which no UTF-8 text can") from None
    return plain


def _normal_integer(number: int) -> int | msgspec.msgpack.Ext:
    if -(2**63) <= number < 2**64:
        return number
    return msgspec.msgpack.Ext(
        _BIG_INTEGER, number.to_bytes((number + (number < 0)).bit_length() // 8 + 1, "big", signed=True)
    )


def _normal_float(number: float, path: _Path) -> float | int | msgspec.msgpack.Ext:
    if number.is_integer():
        return _normal_integer(int(number))
    if number - number != 0.0:
        raise ValueError(f"{_place(path)} must be a finite number, not {number}")
    return number


def _place(path: _Path) -> str:
    """Return a path as one would write it in Python."""
    return str(path[0]) + "".join(
        f"[{step!r}]" if not isinstance(step, str) or len(step) <= _LONGEST_NAME else f"[{step[:_LONGEST_NAME]!r}...]"
        for step in path[1:]
    )
