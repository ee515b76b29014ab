"""Recorded exchanges with LLM providers: where they are, what one holds, and the key of its request."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "sample.jsonl"
# Recordings may lie beside the repository; three levels up is its top.
BESIDE_REPOSITORY = HERE.parents[2].parent / "shared" / "cassettes"
RECORDINGS_VARIABLE = "SHARED_RESPONSES_CASSETTES"

# Response headers in which a provider tells how long it worked, in milliseconds.
TIMING_HEADERS = ("openai-processing-ms", "x-envoy-upstream-service-time", "x-amzn-bedrock-invocation-latency")
USUAL_SECONDS = 0.6  # for recordings that do not tell: the median of those that do


class Exchange(NamedTuple):
    """One recorded request and its answer."""

    key: bytes
    """Of the request: 64 hex digits."""
    path: str
    """``/provider/path``, percent-encoded, without the query."""
    query: str
    request: bytes
    """The request's body."""
    status: int
    content_type: str
    response: bytes
    """The answer's body."""
    seconds: float
    """How long the provider took, or would have taken."""


def request_key(path: str, query: str, body: bytes) -> bytes:
    """Hash what the request asks for: equal JSON is an equal key, whatever its spacing and order.

    Args:
        path: ``/provider/path``, percent-decoded.
        query: as sent.
        body: the request's body; hashed as it is where it is not JSON.

    Returns:
        SHA-256 as 64 hex digits.
    """
    try:
        asked: Any = {"json": json.loads(body)}
    except ValueError:
        asked = {"bytes": body.hex()}
    canonical = json.dumps([path, query, asked], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest().encode("ascii")


def find_recordings(given: str | None = None) -> Path:
    """Choose recordings: the ones given, the environment's, the ones beside the repository, or else our sample.

    Raises:
        FileNotFoundError: the one given, or named by the environment, does not exist.
    """
    named = given or os.environ.get(RECORDINGS_VARIABLE)
    if named is not None:
        if not Path(named).exists():
            raise FileNotFoundError(f"no recordings at {named} (from --cassettes or {RECORDINGS_VARIABLE})")
        return Path(named)
    return BESIDE_REPOSITORY if BESIDE_REPOSITORY.is_dir() else SAMPLE


def load_exchanges(recordings: Path) -> list[Exchange]:
    """Load the answered requests, each once: the first answer recorded for a request is its answer here.

    Args:
        recordings: a ``.jsonl`` or ``.jsonl.gz`` file, or a folder of them.
    """
    files = sorted(recordings.glob("*.jsonl*")) if recordings.is_dir() else [recordings]
    by_key: dict[bytes, Exchange] = {}
    for file in files:
        for row in _rows(file):
            if _is_cacheable(row):
                exchange = _exchange(row)
                by_key.setdefault(exchange.key, exchange)
    return list(by_key.values())


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    # Only "\n" ends a line: bodies hold other characters that str.splitlines() takes for line ends.
    return (json.loads(line) for line in data.split(b"\n") if line)


def _is_cacheable(row: Mapping[str, Any]) -> bool:
    has_body = row["request_json"] is not None or row["request_text"] is not None
    return row["method"] == "POST" and row["status"] == 200 and has_body


def _exchange(row: Mapping[str, Any]) -> Exchange:
    path = f"/{row['provider']}{row['path']}"
    text = row["request_text"] if row["request_json"] is None else json.dumps(row["request_json"])
    request = text.encode("utf-8")
    recorded = row["response_body"]
    response = base64.b64decode(recorded) if row["body_encoding"] == "base64" else recorded.encode("utf-8")
    return Exchange(
        key=request_key(unquote(path), row["query"], request),
        path=path,
        query=row["query"],
        request=request,
        status=row["status"],
        content_type=row["response_headers"].get("content-type", "application/octet-stream"),
        response=response,
        seconds=_seconds(row["response_headers"]),
    )


def _seconds(headers: Mapping[str, str]) -> float:
    for header in TIMING_HEADERS:
        if header in headers:
            return float(headers[header]) / 1000
    return USUAL_SECONDS
