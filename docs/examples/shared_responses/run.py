"""Workers that share their answers: several processes of one application, one slab, recorded LLM exchanges.

    python docs/examples/shared_responses/run.py [--server gunicorn|gunicorn-preload|uvicorn] [--workers N]

Starts the server on a free loopback port, sends recorded requests to it from many clients at a time, and prints,
worker by worker, how many of its hits had been put into the slab by *another* worker. Exits with 0 only if there were
such hits and every answer was the recorded one, byte for byte. Unlinks its slab and leaves no process behind.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from client import Outcome, choose, send_all, wait_for_workers
from exchanges import RECORDINGS_VARIABLE, SAMPLE, Exchange, find_recordings, load_exchanges
from report import complaints, latencies, table, tally
from servers import SERVERS, ServerError, running

from llm_edge_cache import SharedSlab

SLAB_MEMORY = "64MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; return its exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` cleans up
    try:
        outcomes = _run(options)
    except (FileNotFoundError, ServerError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    found = complaints(outcomes)
    for complaint in found:
        print(f"FAILED: {complaint}", file=sys.stderr)
    return 1 if found else 0


def _run(options: argparse.Namespace) -> list[Outcome]:
    recordings = find_recordings(options.cassettes).resolve()
    exchanges = load_exchanges(recordings)
    if not exchanges:
        raise FileNotFoundError(f"{recordings} holds no POST request that was answered with 200")
    requests = choose(exchanges, options.requests, options.seed)
    print(f"{options.server}, {options.workers} workers; {_describe(recordings)}: {len(exchanges)} exchanges")
    with _fresh_name() as name:
        outcomes, seconds = _serve(options, name, recordings, requests)
        _print_report(name, outcomes, seconds)
    return outcomes


def _serve(
    options: argparse.Namespace, name: str, recordings: Path, requests: Sequence[Exchange]
) -> tuple[list[Outcome], float]:
    environ = {
        "LLM_EDGE_CACHE_NAME": name,
        "LLM_EDGE_CACHE_L1_MEMORY": SLAB_MEMORY,
        RECORDINGS_VARIABLE: str(recordings),
        "SHARED_RESPONSES_DELAY_SCALE": str(options.delay_scale),
    }
    with running(options.server, options.workers, environ) as port:
        if wait_for_workers(port, options.workers) == 0:
            raise ServerError("no worker answered")
        start = time.perf_counter()
        outcomes = send_all(port, requests, options.clients)
        return outcomes, time.perf_counter() - start


def _print_report(name: str, outcomes: Sequence[Outcome], seconds: float) -> None:
    tallies = tally(outcomes)
    hits = sum(worker.hits for worker in tallies)
    misses = len(outcomes) - hits
    print(table(tallies))
    print(f"{len(outcomes)} requests in {seconds:.1f} s; {misses} provider calls, {hits / len(outcomes):.1%} hits")
    print(latencies(outcomes))
    with SharedSlab.attach(name) as slab:
        stats = slab.stats()
        print(f"slab: {stats.entries} entries, {stats.payload_bytes:,} bytes; {stats.hits} hits, {stats.misses} misses")


@contextmanager
def _fresh_name() -> Iterator[str]:
    """Give a slab name that no one else uses, and unlink what was created under it."""
    name = f"shared-responses-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield name
    finally:
        # Created if need be: what a server left that was killed over creating it goes as well.
        SharedSlab(name).unlink()


def _describe(recordings: Path) -> str:
    return "our own sample of invented exchanges" if recordings == SAMPLE else f"recordings in {recordings}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--server", choices=SERVERS, default=SERVERS[0])
    parser.add_argument("--workers", type=_at_least(2), default=2, metavar="N", help="worker processes (default 2)")
    parser.add_argument("--requests", type=_at_least(1), default=2000, metavar="N", help="default 2000")
    parser.add_argument("--clients", type=_at_least(1), default=32, metavar="N", help="requests at a time (default 32)")
    parser.add_argument("--cassettes", metavar="PATH", help=f"recordings; also ${RECORDINGS_VARIABLE}")
    parser.add_argument("--delay-scale", type=float, default=1.0, metavar="X", help="of recorded delays (default 1)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the order of the requests (default 1)")
    return parser.parse_args(arguments)


def _at_least(smallest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        number = int(text)
        if number < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}")
        return number

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
