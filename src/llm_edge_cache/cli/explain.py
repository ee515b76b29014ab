"""`llm-edge-cache explain`: which fields of a request went into its key, and which make two requests differ."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from llm_edge_cache.cli.attach import UsageError
from llm_edge_cache.cli.output import columns, json_line, say
from llm_edge_cache.errors import CacheError
from llm_edge_cache.gateway.protocols import (
    PROTOCOLS,
    SHARED_SCOPE,
    BadRequestError,
    RequestBody,
    cache_key,
    caller_scope,
    parse_body,
)
from llm_edge_cache.gateway.protocols.body import EXCLUDED_FIELDS
from llm_edge_cache.gateway.protocols.cachekey import SIGNIFICANT_HEADERS
from llm_edge_cache.keys import generate_cache_key
from llm_edge_cache.model import CacheableRequest

__all__ = ["add_parsers"]

_FIELDS: Final = ("namespace", "model", "prompt", "messages", "temperature", "max_tokens", "parameters")
_ENVELOPE: Final = frozenset({"endpoint", "query", "upstream", "headers", "namespace", "body"})
_LONGEST_SHOWN: Final = 60
_LARGEST_FILE: Final = 64 << 20
_ABSENT: Final = object()

_DESCRIPTION: Final = """\
Tells which fields of a request went into its key, in the form in which they count, and what was left out. With a second
request it tells which fields make the two keys differ.

FILE holds one JSON object (- reads standard input):
  the fields of a CacheableRequest    {"model": "m", "prompt": "Hi", "temperature": 0.7}
  a request to the gateway            {"endpoint": "/v1/chat/completions", "body": {...}} and, where they are to count,
                                      "query", "upstream", "headers" and "namespace"
  only the body of one, with          --endpoint /v1/chat/completions

No slab is needed. Values are shown shortened; what headers say about the caller is shown as a hash."""


class ExplainError(CacheError):
    """The request cannot be read, or is none."""


class Explained(NamedTuple):
    """A request, taken apart."""

    kind: str
    """"request" or "gateway"."""
    key: str
    fields: dict[str, Any]
    """What went into the key, by name, in normal form."""
    ignored: list[str]
    """Fields that are there and did not."""
    bypass: str | None
    """The field because of which the gateway does not cache this at all."""


def add_parsers(commands: Any) -> None:
    """Add this module's subcommand."""
    parser = commands.add_parser(
        "explain",
        help="what makes a request's key, and what makes two differ",
        description=_DESCRIPTION,
        epilog="Exit codes: 0 explained, and two requests have one key; 1 they have two, or a file cannot be read; "
        "2 wrong usage, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="a request")
    parser.add_argument("second", metavar="FILE2", nargs="?", help="another one to compare it with")
    parser.add_argument("--endpoint", metavar="PATH", help=f"FILE is a body sent there: {', '.join(PROTOCOLS)}")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.endpoint is not None and options.endpoint not in PROTOCOLS:
        raise UsageError(f"--endpoint must be one of {', '.join(PROTOCOLS)}, not {options.endpoint!r}")
    if options.file == options.second == "-":
        raise UsageError("standard input can be read once: one of the two requests must be a file")
    one = _explained(options.file, options.endpoint)
    if options.second is None:
        say(json_line(_as_json(one)) if options.json else "\n".join(_lines(one)))
        return 0
    other = _explained(options.second, options.endpoint)
    differences = list(_differences(_comparable(one), _comparable(other), ""))
    if options.json:
        say(json_line({"same_key": one.key == other.key, "keys": [one.key, other.key], "differences": differences}))
    else:
        say(*_comparison_lines(options, one, other, differences))
    return 0 if one.key == other.key else 1


# ---- reading requests ----


def _explained(path: str, endpoint: str | None) -> Explained:
    raw = _read(path)
    try:
        if endpoint is not None:
            return _explained_body({"endpoint": endpoint}, raw)
        fields = msgspec.json.decode(raw)
        if not isinstance(fields, dict):
            raise ExplainError(f"{path} must hold a JSON object, a request")
        if "endpoint" in fields:
            return _explained_envelope(fields, path)
        return _explained_request(fields, path)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ExplainError(f"{path} is not JSON: {error}") from None
    except BadRequestError as error:
        raise ExplainError(f"{path}: {error.message}") from None
    except RecursionError:
        raise ExplainError(f"{path} is nested too deep") from None


def _read(path: str) -> bytes:
    try:
        if path == "-":
            raw = sys.stdin.buffer.read(_LARGEST_FILE + 1)
        else:
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb") as file:
                raw = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ExplainError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > _LARGEST_FILE:
        raise ExplainError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB, too large for a request")
    return raw


def _explained_request(fields: dict[str, Any], path: str) -> Explained:
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise ExplainError(
            f"{path} has {', '.join(map(repr, unknown))}, which no CacheableRequest has (further parameters stand in "
            "'parameters'); a body for the gateway needs --endpoint"
        )
    try:
        request = CacheableRequest(**fields)
    except (TypeError, ValueError) as error:
        raise ExplainError(f"{path} is no request: {error}") from None
    _, *values = _decoded(request.canonical)
    given = {name: value for name, value in zip(_FIELDS, values, strict=True) if value is not None}
    for name, nothing in (("namespace", ""), ("parameters", {})):
        if given[name] == nothing:
            del given[name]
    return Explained("request", generate_cache_key(request), given, [], None)


def _explained_envelope(fields: dict[str, Any], path: str) -> Explained:
    unknown = sorted(set(fields) - _ENVELOPE)
    if unknown:
        raise ExplainError(
            f"{path} has {', '.join(map(repr, unknown))} beside its endpoint; known are {sorted(_ENVELOPE)}"
        )
    if not isinstance(fields["endpoint"], str) or fields["endpoint"] not in PROTOCOLS:
        raise ExplainError(f"{path}: endpoint must be one of {', '.join(PROTOCOLS)}, not {fields['endpoint']!r}")
    if not isinstance(fields.get("headers", {}), dict) or not all(
        isinstance(value, str)
        for value in (fields.get("query", ""), fields.get("upstream", ""), fields.get("namespace", ""))
    ):
        raise ExplainError(f"{path}: headers must be an object, query, upstream and namespace texts")
    return _explained_body(fields, json.dumps(fields.get("body")).encode())


def _explained_body(around: dict[str, Any], raw: bytes) -> Explained:
    body = parse_body(raw)
    protocol = PROTOCOLS[around["endpoint"]]
    headers = [(str(name).lower().encode(), str(value).encode()) for name, value in around.get("headers", {}).items()]
    query, upstream = around.get("query", "").encode(), around.get("upstream", "")
    caller = caller_scope(headers) if headers else SHARED_SCOPE
    scope = f"{caller}/{around.get('namespace', '')}"
    key = cache_key(protocol.path, query, upstream, headers, body, scope=scope)
    fields = {
        "endpoint": protocol.path,
        "upstream": upstream,
        "query": query.decode(),
        "namespace": around.get("namespace"),
    }
    significant = {name.decode(): value.decode() for name, value in headers if name in SIGNIFICANT_HEADERS}
    fields |= {"headers": significant, "caller": caller[:16]}
    counted = {name: value for name, value in fields.items() if value} | {"body": _decoded(body.canonical)}
    return Explained("gateway", key, counted, _ignored(body), protocol.bypass_reason(body))


def _ignored(body: RequestBody) -> list[str]:
    counted = _decoded(body.canonical)
    return sorted(name for name in body.fields if name in EXCLUDED_FIELDS or name not in counted)


def _decoded(canonical: bytes) -> Any:
    return msgspec.msgpack.decode(canonical)


# ---- telling ----


def _comparable(one: Explained) -> dict[str, Any]:
    """The fields by the names that users know; what the gateway adds to the body's under names that no body has."""
    if one.kind == "request":
        return one.fields
    around = {f"gateway: {name}": value for name, value in one.fields.items() if name != "body"}
    body: dict[str, Any] = one.fields["body"]
    return around | body


def _lines(one: Explained) -> list[str]:
    rows = [(name, _shown(value)) for name, value in _comparable(one).items()]
    lines = [f"key  {one.key}", "", "in the key:", *("  " + line for line in columns(rows))]
    if one.ignored:
        lines += ["", f"not in the key: {', '.join(one.ignored)}"]
    if one.bypass is not None:
        lines += ["", f"the gateway does not cache this request, because of {one.bypass!r}"]
    if one.kind == "gateway" and "caller" not in one.fields:
        lines += [
            "",
            "without headers: as if callers shared their answers; a gateway that does not has a key per caller",
        ]
    return lines


def _comparison_lines(
    options: argparse.Namespace, one: Explained, other: Explained, differences: list[dict[str, Any]]
) -> list[str]:
    lines = [f"{one.key}  {options.file}", f"{other.key}  {options.second}", ""]
    if one.key == other.key:
        return [*lines, "one key: whatever differs does not count"]
    rows = [("field", "first", "second")]
    rows += [(found["field"], found.get("first", "(absent)"), found.get("second", "(absent)")) for found in differences]
    return [*lines, "two keys, because of:", *("  " + line for line in columns(rows))]


def _as_json(one: Explained) -> dict[str, Any]:
    shown = {name: _shown(value) for name, value in _comparable(one).items()}
    return {"kind": one.kind, "key": one.key, "in_key": shown, "not_in_key": one.ignored, "bypass": one.bypass}


def _differences(one: Any, other: Any, path: str) -> Iterator[dict[str, Any]]:
    """Yield the smallest parts of two values in normal form that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs: Any = (
            (_member(path, name), one.get(name, _ABSENT), other.get(name, _ABSENT)) for name in {**one, **other}
        )
    elif isinstance(one, list) and isinstance(other, list):
        longest = range(max(len(one), len(other)))
        pairs = (
            (f"{path}[{at}]", *(side[at] if at < len(side) else _ABSENT for side in (one, other))) for at in longest
        )
    elif one is _ABSENT or other is _ABSENT or _encoded(one) != _encoded(other):
        sides = {"first": one, "second": other}
        yield {"field": path} | {side: _shown(value) for side, value in sides.items() if value is not _ABSENT}
        return
    else:
        return
    for place, left, right in pairs:
        yield from _differences(left, right, place)


def _member(path: str, name: str) -> str:
    return f"{path}[{name!r}]" if path else name


def _encoded(value: Any) -> bytes:
    """As bytes, since True == 1 in Python and not in a key."""
    return msgspec.msgpack.encode(value)


def _shown(value: Any) -> str:
    """A value, short."""
    text = (
        value
        if isinstance(value, str) and value.isprintable() and value
        else json.dumps(value, ensure_ascii=False, default=str)
    )
    if len(text) <= _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"
