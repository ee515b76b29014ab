"""Load over HTTP: each connection asks its next question when it has the answer to the last one.

wrk (github.com/wg/wrk) where it is installed, with one thread; else this program itself, which costs several times as
much of the machine. Either prints the same figures as JSON. Closed loops: under overload, latencies are those of as
many clients as there are connections, not those of a fixed rate of arrivals.

    python bench/load.py PORT QUESTIONS EVERY SECONDS CONNECTIONS      own load; see `questions.lua` for the file
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

PATH = "/v1/chat/completions"
# What a current openai client sends.
HEADERS = {
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "authorization": "Bearer sk-00000000000000000000000000000000",
    "content-type": "application/json",
    "user-agent": "OpenAI/Python 2.8.0",
    "x-stainless-arch": "x64",
    "x-stainless-async": "false",
    "x-stainless-lang": "python",
    "x-stainless-os": "Linux",
    "x-stainless-package-version": "2.8.0",
    "x-stainless-runtime": "CPython",
}
_WRK = shutil.which("wrk")
GENERATOR = "wrk, one thread" if _WRK else "bench/load.py: asyncio"
_WRK_SCRIPT = Path(__file__).with_name("questions.lua")


class Load(NamedTuple):
    """One spell of load."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    generator_cpu: float
    """Seconds of a core that the generator took."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def write_questions(path: Path, bodies: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(bodies) + b"\n")
    return path


def run_load(port: int, questions: Path, *, seconds: float, connections: int, every: int = 0) -> Load:
    """Ask for so many seconds; every n-th question is a new one."""
    if _WRK:
        command = [_WRK, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "30s"]
        command += ["-s", str(_WRK_SCRIPT)]
        command += [part for name, value in HEADERS.items() for part in ("-H", f"{name}: {value}")]
        command += [f"http://127.0.0.1:{port}{PATH}", "--", str(questions), str(every)]
    else:
        command = [sys.executable, __file__, *map(str, (port, questions, every, seconds, connections))]
    before = _children_cpu()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60)
    figures: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return Load(**figures, generator_cpu=_children_cpu() - before)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- the load of our own ----


def request_bytes(body: bytes) -> bytes:
    head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    return f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode() + body


class _Questions:
    """Questions in turn, as wrk's script has them."""

    def __init__(self, path: Path, every: int) -> None:
        self._bodies = path.read_bytes().splitlines()
        self._requests = itertools.cycle(map(request_bytes, self._bodies))
        self._every = every
        self._sent = 0
        self._run = time.time_ns()

    def next(self) -> bytes:
        self._sent += 1
        if self._every and self._sent % self._every == 0:
            mark = b'"content":"'
            return request_bytes(self._bodies[0].replace(mark, mark + b"%d-%d " % (self._run, self._sent), 1))
        return next(self._requests)


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, questions: _Questions, until: float) -> None:
        self.times: list[float] = []
        self.errors = 0
        self.ended = asyncio.get_running_loop().create_future()
        self._questions = questions
        self._until = until
        self._received = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.errors += 1
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            return
        self.times.append(time.perf_counter() - self._asked)
        self.errors += not head.startswith(b"HTTP/1.1 200")
        self._received = b""
        self._ask()

    def _ask(self) -> None:
        self._asked = time.perf_counter()
        if self._asked < self._until:
            self._transport.write(self._questions.next())
        else:
            self.ended.set_result(None)
            self._transport.close()


async def _load(port: int, questions: _Questions, seconds: float, connections: int) -> dict[str, float]:
    start = time.perf_counter()
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: _Client(questions, start + seconds), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*(client.ended for client in clients))
    times = sorted(itertools.chain.from_iterable(client.times for client in clients))
    return {
        "requests": len(times),
        "seconds": time.perf_counter() - start,
        "p50_ms": times[len(times) // 2] * 1e3,
        "p99_ms": times[len(times) * 99 // 100] * 1e3,
        "errors": sum(client.errors for client in clients),
    }


def main() -> None:
    port, questions, every, seconds, connections = sys.argv[1:]
    run = _load(int(port), _Questions(Path(questions), int(every)), float(seconds), int(connections))
    print(json.dumps(asyncio.run(run)))


if __name__ == "__main__":
    main()
