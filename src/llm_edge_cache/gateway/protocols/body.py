r"""A request's body: the JSON object that a client sent, refused where parsers could read it differently.

The upstream parses the same bytes with a parser of its own. If it took the first of two equal keys and we the last, the
answer to one question could be kept under another's key. So duplicate keys are refused, not only what is no JSON.

How duplicates are found without a slow parser: msgspec keeps the last of equal keys, so whatever it dropped is missing
when the result is written again. Written again, every string has its two quotes, and every quote inside a string is
`\"`. Received, a quote inside a string is `\"` as well, unless it was written `\u0022`, its only other spelling.
Hence, in a body without `\u0022`, both texts have the same number of quotes exactly if nothing was dropped: a dropped
member takes at least the two quotes of its key along, and nothing adds any. Only bodies with `\u0022` or with a
difference go through the standard library's parser, which reports keys one by one.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec

from llm_edge_cache.canonical import MAX_DEPTH, encode_json
from llm_edge_cache.errors import CacheError

__all__ = ["EXCLUDED_FIELDS", "BadRequestError", "RequestBody", "parse_body"]

EXCLUDED_FIELDS: Final = frozenset(
    {"cache", "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"}
)
"""Top-level fields that do not change what is answered, so they are no part of the key. `cache` only if an object."""

_LONGEST_NAME: Final = 40  # characters of a key that an error message quotes
_ESCAPED_QUOTE: Final = b"\\u0022"
_OFFSET: Final = re.compile(r"\(byte (\d+)\)")
_NOT_NUMBERS: Final = (b"NaN", b"Infinity", b"-Infinity")


def _number(literal: str) -> float | int:
    """Return the normal form of a number that is written with a point or an exponent: 1.0 is 1.

    The canonical encoding would do that too, but by rebuilding the whole body, at several times the price.
    """
    number = float(literal)
    if number.is_integer():
        return int(number)
    if number - number != 0.0:
        raise ValueError("a number is too large")
    return number


_decode: Final = msgspec.json.Decoder(float_hook=_number).decode
_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode: Final = msgspec.json.Encoder().encode


class BadRequestError(CacheError):
    """The client's request cannot be used. Answer with the protocol's own error body.

    Attributes:
        message: for the client; names what was wrong and where. Quotes no value, at most a key.
        code: a short name of the fault ("invalid_json", "duplicate_key", "not_an_object", "too_deep").
        status: the HTTP status, always 400.
    """

    status: Final = 400

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message: Final = message
        self.code: Final = code


class RequestBody(msgspec.Struct, frozen=True, eq=False):
    """What a client asks for. Its repr shows no prompt, so that no log does."""

    raw: bytes
    """As received."""
    fields: dict[str, Any]
    """The JSON object, numbers in normal form. Not to be changed."""
    canonical: bytes
    """The canonical encoding of the fields that count (`llm_edge_cache.canonical`); part of the key."""

    @property
    def is_stream(self) -> bool:
        """Does the client ask for a stream of events?"""
        return self.fields.get("stream") is True

    @property
    def model(self) -> str | None:
        """The model's name, where there is one."""
        name = self.fields.get("model")
        return name if isinstance(name, str) else None

    @property
    def cache_controls(self) -> dict[str, Any] | None:
        """A LiteLLM-style `cache` object, where there is one."""
        controls = self.fields.get("cache")
        return controls if isinstance(controls, dict) else None

    def forward(self) -> bytes:
        """Return the bytes for the upstream: as received, or without the `cache` object, all else byte for byte."""
        if self.cache_controls is None:
            return self.raw
        members = _decode_members(self.raw)
        del members["cache"]
        return _encode(members)

    def __repr__(self) -> str:
        return f"<RequestBody model={self.model!r}, {len(self.raw)} bytes>"


def parse_body(raw: bytes) -> RequestBody:
    """Parse a request's body.

    Args:
        raw: the body, decoded from whatever `Content-Encoding` it had.

    Raises:
        BadRequestError: it is no JSON (NaN and infinities are none), no UTF-8, no object; it has a key twice, a lone
            surrogate, a number too large for binary64, or more than `canonical.MAX_DEPTH` containers inside one
            another.
    """
    try:
        fields = _decode(raw)
        if type(fields) is not dict:
            raise BadRequestError(f"the request body must be a JSON object, not {_kind(fields)}", "not_an_object")
        if raw.count(b'"') != _encode(fields).count(b'"') or _ESCAPED_QUOTE in raw:
            _refuse_duplicates(raw)
        return RequestBody(raw, fields, encode_json(_significant(fields), "body"))
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise BadRequestError("the request body is not valid UTF-8", "invalid_json") from None
    except msgspec.MsgspecError as error:
        raise BadRequestError(
            f"the request body is not valid JSON: {_diagnose(raw, str(error))}", "invalid_json"
        ) from None
    except ValueError as error:
        # The canonical encoding names the place. Whatever else it refuses, no parser of JSON lets through.
        raise BadRequestError(f"the request {error}", "too_deep") from None


def _significant(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that count for the key."""
    options = fields.get("stream_options")
    if EXCLUDED_FIELDS.isdisjoint(fields) and options is None:
        return fields
    kept = {name: value for name, value in fields.items() if name not in EXCLUDED_FIELDS}
    if "cache" in fields and type(fields["cache"]) is not dict:
        kept["cache"] = fields["cache"]  # not LiteLLM's, so nobody strips it: an unknown field, which counts
    if type(options) is dict and "include_obfuscation" in options:
        kept["stream_options"] = {name: value for name, value in options.items() if name != "include_obfuscation"}
        if not kept["stream_options"]:
            del kept["stream_options"]  # it held nothing else, so it is as if it was not there
    return kept


def _refuse_duplicates(raw: bytes) -> None:
    json.loads(raw, object_pairs_hook=_members)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise BadRequestError(f"the request body has the key {name[:_LONGEST_NAME]!r} twice", "duplicate_key")
            seen.add(name)
    return members


def _diagnose(raw: bytes, complaint: str) -> str:
    """Return what is wrong with a body that msgspec refused, in terms that its author understands."""
    offset = _OFFSET.search(complaint)
    if offset is not None and raw.startswith(_NOT_NUMBERS, int(offset[1])):
        return f"NaN and infinities are not JSON numbers (byte {offset[1]})"
    if offset is None and b"\\u" in raw:
        # msgspec calls the text truncated that ends in half a surrogate pair, even if only the string ends there.
        try:
            json.loads(raw)
        except (ValueError, RecursionError):
            return complaint
        return "it contains a lone surrogate, which no UTF-8 text can"
    return complaint.removeprefix("JSON is malformed: ")


def _too_deep() -> BadRequestError:
    return BadRequestError(f"the request body is nested more than {MAX_DEPTH} deep", "too_deep")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
