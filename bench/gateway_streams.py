"""Many clients ask one missing question as a stream: how long after the leader's does each follower's first byte come?

    python bench/gateway_streams.py [--quick]

Each round is a new question, asked by all clients at once over connections that are open already; the provider thinks
for a while, then streams. The times are taken in the workers, where the application hands the first part of the body to
the server (CLOCK_MONOTONIC, which all processes of a host share), so the load generator's own slowness does not count,
except that it shares the processor. A follower that asked after the leader's first byte counts from its own request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from gateway_servers import CHAT, Connection, Gateway, question, run_gateway  # noqa: E402
from provenance import RESULTS, Provenance, at_most, write_results  # noqa: E402
from stand_in_upstream import StandInUpstream  # noqa: E402

from llm_edge_cache.gateway.app import from_environment  # noqa: E402
from llm_edge_cache.gateway.stand_in import StandInSettings  # noqa: E402

STAMPS = "BENCH_STAMPS"  # an environment variable: the file that workers write to
MILLISECOND = 1_000_000


# ---- in the workers ----


def stamped() -> Callable[..., Awaitable[None]]:
    """The gateway, with a line written for each request of a round: when it came, and when its first byte went."""
    gateway = from_environment()
    file = os.open(os.environ[STAMPS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        number = next((value for name, value in scope.get("headers", ()) if name == b"x-round"), None)
        if number is None:
            await gateway(scope, receive, send)
            return
        came = time.monotonic_ns()
        cache = b""
        is_first = True

        async def send_stamped(message: dict[str, Any]) -> None:
            nonlocal cache, is_first
            if message["type"] == "http.response.start":
                cache = dict(message["headers"]).get(b"x-cache", b"")
            elif is_first:
                is_first = False
                row = [int(number), os.getpid(), cache.decode(), came, time.monotonic_ns()]
                await send(message)
                os.write(file, json.dumps(row).encode() + b"\n")
                return
            await send(message)

        await gateway(scope, receive, send_stamped)

    return application


# ---- measuring ----


async def one_round(connections: list[Connection], number: int) -> None:
    body = question(f"round {number}", stream=True)
    replies = await asyncio.gather(*(one.ask(CHAT, body, x_round=str(number)) for one in connections))
    assert len({reply.body for reply in replies}) == 1
    assert all(reply.is_whole and reply.status == 200 for reply in replies)


async def all_rounds(gateway: Gateway, clients: int, rounds: int) -> None:
    connections = [await Connection.open(gateway.port) for _ in range(clients)]
    for number in range(rounds):
        await one_round(connections, number)
    await asyncio.gather(*(one.close() for one in connections))


def delays(rows: list[list[Any]], rounds: int) -> tuple[list[float], int]:
    """Milliseconds from the leader's first byte to each follower's, of all rounds; and by how many workers answered."""
    found = []
    for number in range(rounds):
        of_round = [row for row in rows if row[0] == number]
        [leader] = [row for row in of_round if row[2] == "MISS"]
        found += [
            (first - max(leader[4], came)) / MILLISECOND for _, _, cache, came, first in of_round if cache != "MISS"
        ]
    return [max(0.0, delay) for delay in found], len({row[1] for row in rows})


def measure(workers: int, clients: int, rounds: int, directory: Path) -> dict[str, Any]:
    stamps = directory / "stamps"
    os.environ[STAMPS] = str(stamps)
    settings = StandInSettings(answers="different", words=20, first_delay=1.0, word_delay=0.02, jitter=0.0)
    application = f"{Path(__file__).stem}:{stamped.__name__}"
    options = ("--app-dir", str(Path(__file__).parent))
    with (
        StandInUpstream(settings) as upstream,
        run_gateway(directory, upstream, workers=workers, application=application, options=options) as gateway,
    ):
        before = gateway.calls()
        asyncio.run(all_rounds(gateway, clients, rounds))
        calls = gateway.calls() - before
    rows = [json.loads(line) for line in stamps.read_text().splitlines()]
    found, answering = delays(rows, rounds)
    ordered = sorted(found)
    return {
        "workers": workers,
        "workers_that_answered": answering,
        "clients": clients,
        "rounds": rounds,
        "provider_calls": calls,
        "followers": len(found),
        "median_ms": round(statistics.median(ordered), 3),
        "p90_ms": round(ordered[int(len(ordered) * 0.90)], 3),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)], 3),
        "longest_ms": round(ordered[-1], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=RESULTS / "gateway_streams.json")
    given = parser.parse_args()
    provenance = Provenance(None, ("aiohttp", "uvicorn", "httptools", "uvloop"))
    rounds = 2 if given.quick else given.rounds
    with tempfile.TemporaryDirectory() as directory:
        results = measure(given.workers, given.clients, rounds, Path(directory))
    print(results)
    bars = [
        at_most("first byte to a follower after the leader's, median ms", results["median_ms"], 20),
        at_most("first byte to a follower after the leader's, p99 ms", results["p99_ms"], 100),
        at_most("calls of the provider per question", results["provider_calls"] / rounds, 1),
    ]
    met = write_results(given.json, provenance, results, bars)
    return 0 if met or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
