"""What both faces of the application (WSGI and ASGI) do: look in the slab, else ask the provider and store.

Nothing here waits, so both faces share every decision:

    look_up  -> Answer (a hit), or None
    find     -> what the provider will answer, and after which delay; the face waits for it
    store    -> Answer (a miss)

Two requests for one key that miss at the same time both ask the provider.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from exchanges import Exchange, find_recordings, load_exchanges, request_key
from provider import RecordedProvider

from llm_edge_cache import SharedSlab
from llm_edge_cache.settings import load_settings

DELAY_VARIABLE = "SHARED_RESPONSES_DELAY_SCALE"


class Answer(NamedTuple):
    """One answer, and how it came about."""

    status: int
    content_type: str
    body: bytes
    is_hit: bool
    stored_by: int
    """Process that put the answer into the slab."""
    lookup_seconds: float
    """Time in the slab's get()."""

    def headers(self) -> list[tuple[str, str]]:
        """Return the response's headers."""
        return [
            ("Content-Type", self.content_type),
            ("Content-Length", str(len(self.body))),
            ("X-Cache", "HIT" if self.is_hit else "MISS"),
            ("X-Worker", str(os.getpid())),
            ("X-Stored-By", str(self.stored_by)),
            ("Server-Timing", f"slab;dur={self.lookup_seconds * 1000:.6f}"),
        ]


class SharedAnswers:
    """Recorded answers, served through the slab that all workers of the host share."""

    def __init__(self, slab: SharedSlab, provider: RecordedProvider) -> None:
        self._slab = slab
        self._provider = provider

    def key(self, path: str, query: str, body: bytes) -> bytes:
        """Return the key of a request; the path is percent-decoded."""
        return request_key(path, query, body)

    def look_up(self, key: bytes) -> Answer | None:
        """Return the answer that some worker stored, or None."""
        start = time.perf_counter()
        value = self._slab.get(key)
        seconds = time.perf_counter() - start
        return None if value is None else _decode(value, seconds)

    def find(self, key: bytes) -> tuple[Exchange, float] | None:
        """Return what the provider answers and the seconds that it takes; None: it knows no such request."""
        exchange = self._provider.find(key)
        return None if exchange is None else (exchange, self._provider.delay(exchange))

    def store(self, key: bytes, exchange: Exchange) -> Answer:
        """Put the provider's answer into the slab, marked with this worker's process id."""
        self._slab.set(key, _encode(exchange, os.getpid()))
        return Answer(exchange.status, exchange.content_type, exchange.response, False, os.getpid(), 0.0)


def open_answers() -> SharedAnswers:
    """Open the slab that the environment names, creating it where no one has; load the recordings."""
    slab = SharedSlab(*load_settings().slab)
    exchanges = load_exchanges(find_recordings())
    return SharedAnswers(slab, RecordedProvider(exchanges, float(os.environ.get(DELAY_VARIABLE, "1.0"))))


def ready() -> Answer:
    """Answer to a GET: this worker serves."""
    return Answer(200, "text/plain", b"ready\n", False, os.getpid(), 0.0)


def unknown_request() -> Answer:
    """Answer to a request that was never recorded."""
    return Answer(404, "text/plain", b"no recording of this request\n", False, os.getpid(), 0.0)


def _encode(exchange: Exchange, stored_by: int) -> bytes:
    return f"{stored_by} {exchange.status} {exchange.content_type}\n".encode("latin-1") + exchange.response


def _decode(value: bytes, seconds: float) -> Answer:
    head, _, body = value.partition(b"\n")
    stored_by, status, content_type = head.decode("latin-1").split(" ", 2)
    return Answer(int(status), content_type, body, True, int(stored_by), seconds)
