"""Send recorded requests concurrently and compare every answer with its recording."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from itertools import accumulate
from typing import NamedTuple

from exchanges import Exchange

ZIPF_EXPONENT = 0.9
TIMEOUT_SECONDS = 60.0
READY_SECONDS = 60.0
PROBES = 4  # at a time: of single ones, one idle worker might take them all


class Outcome(NamedTuple):
    """What one request came to."""

    worker: int
    """Process that answered; 0: none did."""
    stored_by: int
    """Process that had put the answer into the slab."""
    is_hit: bool
    is_identical: bool
    """Status, content type and every byte are the recording's."""
    seconds: float
    """From connecting to the last byte, as the client saw it."""
    lookup_seconds: float
    """Time in the slab's get(), as the worker saw it; valid for hits."""


NO_ANSWER = Outcome(0, 0, False, False, 0.0, 0.0)


def wait_for_workers(port: int, workers: int) -> int:
    """Wait until as many different workers answer, or READY_SECONDS have passed.

    Returns:
        How many different workers have answered.
    """
    seen: set[int] = set()
    deadline = time.monotonic() + READY_SECONDS
    with ThreadPoolExecutor(PROBES) as pool:
        while len(seen) < workers and time.monotonic() < deadline:
            seen |= set(pool.map(_probe, [port] * PROBES)) - {0}
            time.sleep(0.02)
    return len(seen)


def _probe(port: int) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=READY_SECONDS)
    try:
        connection.request("GET", "/", headers={"Connection": "close"})
        return int(connection.getresponse().headers.get("X-Worker", "0"))
    except (OSError, HTTPException):
        return 0  # the port is bound before the first worker listens
    finally:
        connection.close()


def choose(exchanges: Sequence[Exchange], count: int, seed: int) -> list[Exchange]:
    """Draw requests with a popularity like that of real prompts: few are asked often, many rarely (Zipf)."""
    rng = random.Random(seed)
    ranked = rng.sample(exchanges, len(exchanges))
    weights = list(accumulate(1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(len(ranked))))
    return rng.choices(ranked, cum_weights=weights, k=count)


def send_all(port: int, requests: Sequence[Exchange], clients: int) -> list[Outcome]:
    """Send the requests, as many at a time as there are clients, in about this order; an exception cancels the rest."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda exchange: _send(port, exchange), requests))


def _send(port: int, exchange: Exchange) -> Outcome:
    # A connection for each request: any worker may take it.
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    target = f"{exchange.path}?{exchange.query}" if exchange.query else exchange.path
    start = time.perf_counter()
    try:
        connection.request("POST", target, exchange.request, {"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
    except (OSError, HTTPException):
        return NO_ANSWER
    finally:
        connection.close()
    seconds = time.perf_counter() - start
    answered = (response.status, response.headers.get("Content-Type"), body)
    return Outcome(
        worker=int(response.headers.get("X-Worker", "0")),
        stored_by=int(response.headers.get("X-Stored-By", "0")),
        is_hit=response.headers.get("X-Cache") == "HIT",
        is_identical=answered == (exchange.status, exchange.content_type, exchange.response),
        seconds=seconds,
        lookup_seconds=float(response.headers.get("Server-Timing", "slab;dur=0").partition("dur=")[2]) / 1000,
    )
