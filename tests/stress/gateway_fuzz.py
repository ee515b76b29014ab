"""Random requests to a gateway, sound and broken: it never fails of its own making, never hangs, and does not grow.

    python tests/stress/gateway_fuzz.py --requests 100000 --json docs/results/gateway_fuzz.json

Each request is drawn from the seed: method, path, query, headers, framing and body, most of them near what is valid,
with faults of the provider among them; some clients leave before the answer or in its middle. Checked on every answer:
it is HTTP, whole, and no 5xx but where the provider failed. Checked at the end: no traceback was logged, the slab's
invariants hold, and in the second half of the run neither memory nor open files of any worker grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

import psutil  # noqa: E402
from gateway_servers import (  # noqa: E402
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    Connection,
    Gateway,
    Reply,
    question,
    run_gateway,
)
from provenance import RESULTS, Provenance, at_most, write_results  # noqa: E402
from stand_in_upstream import StandInUpstream  # noqa: E402

from llm_edge_cache.gateway.stand_in import StandInSettings  # noqa: E402
from llm_edge_cache.gateway.stand_in_faults import FAULTS  # noqa: E402

CACHED = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, MESSAGES)
ELSEWHERE = (
    "/v1/models",
    "/v1/echo",
    "/v1/echo/a%20b",
    "/healthz",
    "/readyz",
    "/metrics",
    "/",
    "/v2/x",
    "/v1/%ff%00",
    "*",
)
METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW")
VALUES: tuple[Any, ...] = (None, True, 0, -1, 1.5, 10**30, "", "x", "\u2028\u00e9", [], {}, [[]], {"a": {"b": [1]}})
FIELDS = (
    "stream",
    "store",
    "cache",
    "temperature",
    "n",
    "user",
    "metadata",
    "stream_options",
    "messages",
    "model",
    "\0",
)
QUICK_FAULTS = tuple(fault for fault in FAULTS if fault not in ("hang", "stall"))  # those take their time
SLOWEST = 60.0  # seconds; what takes longer hangs
HEADERS = (
    "authorization: Bearer {}",
    "x-api-key: {}",
    "cache-control: no-cache",
    "cache-control: no-store, max-age={}",
    'cache-control: max-age=", =,;',
    "cache-control: only-if-cached",
    "content-type: text/plain",
    "content-type: \u00e9",
    "accept-encoding: gzip",
    "connection: close",
    "connection: x-a, {}",
    "expect: 100-continue",
    "anthropic-beta: a,,b",
    "x-{}: {}",
    "range: bytes=0-1",
    "if-none-match: *",
    "cookie: a={}",
)


class Draw:
    """One request, and how its client behaves."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        self.path = self._draw_path()
        self.method = "POST" if generator.random() < 0.9 else generator.choice(METHODS)
        self.body = self._draw_body()
        self.leaves_after = generator.random() * 0.02 if generator.random() < 0.05 else None
        """Seconds after which the client hangs up."""
        self.is_broken = False
        """Is it hardly HTTP?"""
        self.data = self._frame()

    def _draw_path(self) -> str:
        generator = self._random
        path = generator.choice(CACHED) if generator.random() < 0.85 else generator.choice(ELSEWHERE)
        return path + generator.choice(("", "", "", "?a=1", "?", '?%ff&"='))

    def _draw_body(self) -> bytes:
        generator = self._random
        plain = self.path.partition("?")[0]
        body = question(f"number {generator.randrange(30)}", path=plain if plain in CACHED else CHAT)
        body["stream"] = generator.random() < 0.4
        for _ in range(generator.choice((0, 0, 0, 1, 3))):
            body[generator.choice(FIELDS)] = generator.choice(VALUES)
        data = json.dumps(body, ensure_ascii=generator.random() < 0.5).encode("utf-8", "replace")
        return data if generator.random() < 0.8 else self._spoil(data)

    def _spoil(self, data: bytes) -> bytes:
        generator = self._random
        at = generator.randrange(len(data))
        return generator.choice(
            (
                data[:at],
                data[:at] + generator.randbytes(generator.randrange(1, 9)) + data[at:],
                data[:at]
                + generator.choice((b"NaN", b"{", b'"', b"\\ud800", b"\xff", b",", b"1e999"))
                + data[at + 1 :],
                b'{"model":"m",' + data[1:],
                b"[" * generator.randrange(1, 3000),
                data + b" " * generator.randrange(100_000),
                b"",
            )
        )

    def _frame(self) -> bytes:
        generator = self._random
        lines = ["host: gateway", *self._draw_headers()]
        if generator.random() < 0.02:
            self.is_broken = True
            return self._head([*lines, generator.choice(("content-length: -1", "transfer-encoding: zip", "no colon"))])
        if generator.random() < 0.15:
            size = generator.randrange(1, 200)
            pieces = [self.body[start : start + size] for start in range(0, len(self.body), size)]
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
            return self._head([*lines, "transfer-encoding: chunked"]) + chunks + b"0\r\n\r\n"
        return self._head([*lines, f"content-length: {len(self.body)}"]) + self.body

    def _draw_headers(self) -> list[str]:
        generator = self._random
        lines = [generator.choice(HEADERS).format(generator.randrange(9), "v") for _ in range(generator.randrange(4))]
        if generator.random() < 0.15:
            lines.append(f"x-stand-in-fault: {generator.choice((*QUICK_FAULTS, '401', '429', '500', '529'))}")
        return lines

    def _head(self, lines: list[str]) -> bytes:
        return "\r\n".join([f"{self.method} {self.path} HTTP/1.1", *lines, "", ""]).encode("utf-8")


class Run:
    """What a run has found."""

    def __init__(self, gateway: Gateway, seed: int) -> None:
        self.gateway = gateway
        self.generator = random.Random(seed)
        self.problems: list[str] = []
        self.statuses: Counter[str] = Counter()
        self.caches: Counter[str] = Counter()
        self.slowest = 0.0
        self.done = 0

    async def client(self, until: int) -> None:
        """Ask until so many requests were made by all."""
        connection = await Connection.open(self.gateway.port)
        while self.done < until:
            self.done += 1
            draw = Draw(self.generator)
            begin = time.monotonic()
            try:
                stays = await asyncio.wait_for(self._ask(connection, draw), SLOWEST)
            except asyncio.TimeoutError:
                stays = False
                self.problems.append(f"no answer within {SLOWEST} s: {draw.data[:300]!r}")
            except (ConnectionError, asyncio.IncompleteReadError):
                stays = False
                self.statuses["cut"] += 1
            if draw.leaves_after is None:
                self.slowest = max(self.slowest, time.monotonic() - begin)
            if not stays:
                await connection.close()
                connection = await Connection.open(self.gateway.port)
        await connection.close()

    async def _ask(self, connection: Connection, draw: Draw) -> bool:
        """Returns whether the connection can be used for another request."""
        await connection.send(draw.data)
        if draw.leaves_after is not None:
            await asyncio.sleep(draw.leaves_after)
            connection.writer.transport.abort()
            return False
        reply = await connection.body(await connection.head(), method=draw.method)
        self.statuses[str(reply.status)] += 1
        self.caches[str(reply.cache)] += 1
        self._check(draw, reply)
        return reply.is_whole and not draw.is_broken and reply.get("connection") != "close"

    def _check(self, draw: Draw, reply: Reply) -> None:
        if b"x-stand-in-fault" in draw.data or (reply.cache == "COALESCED" and reply.status == 502):
            return  # the provider's doing: to this request, or to those that it waited for
        if reply.status >= 500 and not (reply.status == 504 and b"only-if-cached" in draw.data):
            self.problems.append(f"{reply!r} to {draw.data[:300]!r}")
        if not reply.is_whole:
            self.problems.append(f"cut: {reply!r} to {draw.data[:300]!r}")

    def measure(self) -> dict[int, tuple[int, int]]:
        """Resident bytes beyond shared memory, and open files, of each worker."""
        found = {}
        for pid in self.gateway.worker_pids():
            process = psutil.Process(pid)
            memory = process.memory_info()
            found[pid] = (memory.rss - memory.shared, process.num_fds())
        return found


def growth(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]], part: int) -> int:
    """The most that any worker grew by."""
    return max(after[pid][part] - before[pid][part] for pid in before)


def run(requests: int, clients: int, seed: int, directory: Path) -> dict[str, Any]:
    settings = StandInSettings(words=8, first_delay=0.0, word_delay=0.0)
    with StandInUpstream(settings) as upstream, run_gateway(directory, upstream, workers=2) as gateway:
        found = Run(gateway, seed)

        async def phase(until: int) -> dict[int, tuple[int, int]]:
            await asyncio.gather(*(found.client(until) for _ in range(clients)))
            await asyncio.sleep(1.0)  # what was left is read to its end, and closed
            return found.measure()

        asyncio.run(phase(requests // 2))
        before = found.measure()
        after = asyncio.run(phase(requests))
        if before.keys() != after.keys():
            found.problems.append("a worker died")
            after = before
        return {
            "requests": found.done,
            "statuses": dict(found.statuses),
            "caches": dict(found.caches),
            "slowest_seconds": round(found.slowest, 3),
            "provider_calls": gateway.calls(),
            "growth_bytes": growth(before, after, 0),
            "growth_files": growth(before, after, 1),
            "problems": found.problems[:20],
            "problem_count": len(found.problems),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "gateway_fuzz.json")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    provenance = Provenance(given.seed, ("aiohttp", "uvicorn", "httptools"))
    with tempfile.TemporaryDirectory() as directory:
        results = run(given.requests, given.clients, given.seed, Path(directory))
    for problem in results["problems"]:
        print(problem)
    bars = [
        at_most("requests that failed, hung or were cut", results["problem_count"], 0),
        at_most("growth of a worker over the second half, MiB", results["growth_bytes"] / (1 << 20), 16),
        at_most("more open files of a worker after the second half", results["growth_files"], 8),
    ]
    return 0 if write_results(given.json, provenance, results, bars) else 1


if __name__ == "__main__":
    sys.exit(main())
