"""What the gateway costs: its hits beside a bare ASGI application and LiteLLM's proxy, its misses, its memory.

    python bench/gateway.py [--quick] [--rounds N] [--seconds S] [--litellm PYTHON] [--json FILE]

All servers are uvicorn with uvloop, httptools and two workers, and are up all the time; in each round each of them is
loaded once (`load.py`), in an order that is turned round from one round to the next. A ratio is the median over the
rounds of the round's ratio, so that a slow spell of the machine meets both sides. Load generator and servers share the
machine: who took how much of it is part of the result.

- Hits: 64 questions of about 1 KB, all known, with the headers of the openai client; the bare application reads them
  and answers a constant of the same 1,024 bytes.
- Misses: one client, new questions, in turn straight to the provider (an application that answers at once) and through
  the gateway; the time to the first byte of the answer.
- Memory: the anonymous memory of each worker, which leaves out the slab, after 20,000, 110,000 and 200,000 requests, a
  tenth of them misses. Allocators take some 7 % more until about 100,000; then nothing may grow any more.

LiteLLM's proxy, with its cache in memory, is measured where PYTHON, or else this interpreter, has litellm[proxy].
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from bare_app import ANSWER_BYTES
from load import GENERATOR, Load, request_bytes, run_load, write_questions
from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results

from llm_edge_cache import SharedSlab
from llm_edge_cache.gateway.config import CONFIG_VARIABLE
from llm_edge_cache.gateway.log import LOG_SECONDS

BENCH = Path(__file__).resolve().parent
WORKERS = 2
CONNECTIONS = 32
QUESTIONS = 64
MISS_EVERY = 10  # in the measurement of memory
SETTLE_SECONDS = LOG_SECONDS + 1  # after which nothing is kept any more of an answer that was under way
PATIENCE_SECONDS = 120.0
DISTRIBUTIONS = ("uvicorn", "uvloop", "httptools", "aiohttp", "msgspec")
UVICORN = (
    *("-m", "uvicorn", "--app-dir", str(BENCH), "--host", "127.0.0.1", "--workers", str(WORKERS)),
    *("--loop", "uvloop", "--http", "httptools", "--log-level", "warning"),
    *("--no-access-log", "--no-server-header", "--no-date-header"),
)


def question(number: int, *, stream: bool = False) -> bytes:
    system = {"role": "system", "content": "You are a helpful assistant. " * 8}
    user = {"content": f"{number}: what is the capital of France? " + "Think about it. " * 36, "role": "user"}
    fields = {"model": "m", "messages": [user, system], "temperature": 0.7, "max_tokens": 500}
    return json.dumps({**fields, **({"stream": True} if stream else {})}, separators=(",", ":")).encode()


# ---- servers ----


class Running(NamedTuple):
    """A server that answers."""

    port: int
    process: psutil.Process

    def workers(self) -> list[psutil.Process]:
        """Its processes that serve; not multiprocessing's own helper."""
        return [child for child in self.process.children() if "spawn_main" in " ".join(child.cmdline())]

    def cpu_seconds(self) -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in self.workers())


@contextlib.contextmanager
def running(log: Path, command: list[str], port: int, environ: dict[str, str] | None = None) -> Iterator[Running]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **(environ or {})}, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        _wait_served(process, port, log)
        yield Running(port, psutil.Process(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_served(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), Client(port) as client:
            if client.ask(question(0)).status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server does not answer:\n{log.read_text(errors='replace')[-2000:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def bare(directory: Path, application: str) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, *UVICORN, "--port", str(port), f"bare_app:{application}"]
    with running(directory / f"{application}.log", command, port) as server:
        yield server


class Gateway(NamedTuple):
    server: Running
    slab: SharedSlab


@contextlib.contextmanager
def gateway(directory: Path, upstream: Running) -> Iterator[Gateway]:
    name, port = f"bench-gateway-{os.getpid()}-{time.monotonic_ns()}", free_port()
    environ = {CONFIG_VARIABLE: json.dumps({"upstream": f"http://127.0.0.1:{upstream.port}", "name": name})}
    command = [
        sys.executable,
        *UVICORN,
        "--port",
        str(port),
        "--factory",
        "llm_edge_cache.gateway.app:from_environment",
    ]
    with running(directory / "gateway.log", command, port, environ) as server, SharedSlab(name) as slab:
        try:
            yield Gateway(server, slab)
        finally:
            slab.unlink()


_LITELLM = """
model_list: [{{model_name: m, litellm_params: {{model: openai/m, api_base: "{url}/v1", api_key: none}}}}]
litellm_settings: {{cache: true, cache_params: {{type: local}}, telemetry: false}}
"""


@contextlib.contextmanager
def litellm(directory: Path, upstream: Running, python: str) -> Iterator[Running]:
    port, config = free_port(), directory / "litellm.yaml"
    config.write_text(_LITELLM.format(url=f"http://127.0.0.1:{upstream.port}"))
    command = [python, "-c", "from litellm import run_server; run_server()", "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", str(WORKERS)]
    environ = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing from the network
        "LITELLM_LOG": "ERROR",  # and no access log, as for the others
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no key to be checked: its fastest way
    }
    with running(directory / "litellm.log", command, port, environ) as server:
        yield server


def litellm_version(python: str) -> str | None:
    """None: it cannot be measured with this interpreter."""
    program = (
        "import httptools, uvloop, litellm.proxy.proxy_server, importlib.metadata as m; print(m.version('litellm'))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.split()[-1] if done.returncode == 0 else None


# ---- a client that looks at the clock ----


class Reply(NamedTuple):
    status: int
    first_ms: float
    """From the question to the first byte of the answer."""
    head: bytes


class Client:
    """One connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, body: bytes) -> Reply:
        started = time.perf_counter_ns()
        self._socket.sendall(request_bytes(body))
        received = self._receive()
        first_ms = (time.perf_counter_ns() - started) / 1e6
        while not _is_whole(received):
            received += self._receive()
        return Reply(int(received[9:12]), first_ms, received.partition(b"\r\n\r\n")[0])

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data


def _is_whole(received: bytes) -> bool:
    head, separator, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    return bool(separator) and (body.endswith(b"0\r\n\r\n") if length is None else len(body) >= int(length[1]))


# ---- measurements ----


class Spell(NamedTuple):
    """One server under load for one spell."""

    load: Load
    server_cpu: float
    """Seconds of a core that the server's workers took."""

    def as_dict(self) -> dict[str, float]:
        whole = self.load.seconds * (os.cpu_count() or 1)
        return {
            "requests": self.load.requests,
            "rate": round(self.load.rate, 1),
            "p50_ms": round(self.load.p50_ms, 3),
            "p99_ms": round(self.load.p99_ms, 3),
            "server_us_per_request": round(self.server_cpu / self.load.requests * 1e6, 1),
            "server_share": round(self.server_cpu / whole, 3),
            "generator_share": round(self.load.generator_cpu / whole, 3),
        }


def spell(server: Running, questions: Path, seconds: float) -> Spell:
    before = server.cpu_seconds()
    load = run_load(server.port, questions, seconds=seconds, connections=CONNECTIONS)
    assert load.errors == 0, load
    return Spell(load, server.cpu_seconds() - before)


def warm(server: Running, questions: Path) -> None:
    """Ask every question often enough for workers that keep answers each for itself."""
    asked = 0
    while asked < 8 * QUESTIONS:
        asked += spell(server, questions, 1.0).load.requests


def measure_hits(
    servers: dict[str, Running], slab: SharedSlab, questions: Path, rounds: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    for server in servers.values():
        warm(server, questions)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    before = slab.stats()
    for number in range(rounds):
        order = list(servers)[:: -1 if number % 2 else 1]
        for name in order:
            found[name].append(spell(servers[name], questions, seconds).as_dict())
    after = slab.stats()
    asked = sum(row["requests"] for row in found["gateway"])
    assert after.misses == before.misses, "there were misses among the hits"
    assert after.hits - before.hits >= asked, "not every request was answered from the slab"
    return found


def measure_misses(upstream: Running, through: Running, pairs: int, *, stream: bool) -> dict[str, float]:
    """Milliseconds to the first byte at the median: straight, through the gateway, and how much that is more."""
    straight, added = [], []
    first = time.time_ns()
    with Client(upstream.port) as one, Client(through.port) as other:
        for number in range(first, first + pairs):
            body = question(number, stream=stream)
            straight.append(one.ask(body).first_ms)
            reply = other.ask(body)
            assert b"\r\nx-cache: MISS" in reply.head, reply
            added.append(reply.first_ms - straight[-1])
    alone = statistics.median(straight)
    return {"pairs": pairs, "straight_ms": round(alone, 3), "added_ms": round(statistics.median(added), 3)}


def anonymous_kib(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])


def measure_memory(served: Running, questions: Path, counts: tuple[int, int, int], settle: float) -> dict[str, Any]:
    """KiB of each worker's own memory after so many requests, and how much the one that grew most grew."""
    asked, found = 0, []
    for count in counts:
        while asked < count:
            load = run_load(served.port, questions, seconds=2, connections=CONNECTIONS, every=MISS_EVERY)
            assert load.errors == 0, load
            asked += load.requests
        time.sleep(settle)
        found.append({"requests": asked, "kib": [anonymous_kib(worker) for worker in served.workers()]})
    first, middle, last = (sample["kib"] for sample in found)
    return {"samples": found, "growth_percent": _growth(first, last), "late_growth_percent": _growth(middle, last)}


def _growth(before: list[int], after: list[int]) -> float:
    return round(max(100.0 * (late - early) / early for early, late in zip(before, after, strict=True)), 3)


# ---- results ----


def ratio(rows: dict[str, list[dict[str, float]]], one: str, other: str, figure: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a[figure] / b[figure] for a, b in zip(rows[one], rows[other], strict=True))


def bars_of(hits: dict[str, list[dict[str, float]]], misses: dict[str, Any], memory: dict[str, Any]) -> list[Bar]:
    bars = [
        at_least("hits: requests/s, of the bare application's", ratio(hits, "gateway", "bare", "rate"), 0.6),
        at_most("hits: p99, times the bare application's", ratio(hits, "gateway", "bare", "p99_ms"), 3.0),
    ]
    if "litellm" in hits:
        bars.append(
            at_least("hits: requests/s, times LiteLLM's proxy's", ratio(hits, "gateway", "litellm", "rate"), 10)
        )
    bars += [
        at_most(f"misses: added to the first byte, {kind}, ms", row["added_ms"], 1.0) for kind, row in misses.items()
    ]
    return [
        *bars,
        at_most("memory: a worker's growth from 20,000 to 200,000 requests, %", memory["growth_percent"], 10.0),
        at_most("memory: a worker's growth from 110,000 to 200,000 requests, %", memory["late_growth_percent"], 1.0),
    ]


_COLUMNS = ("rate", "p50_ms", "p99_ms", "server_us_per_request", "server_share", "generator_share")


def print_table(hits: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'median of the rounds':20}" + "".join(f"{column:>23}" for column in _COLUMNS))
    for name, rows in hits.items():
        medians = [statistics.median(row[column] for row in rows) for column in _COLUMNS]
        print(f"{name:20}" + "".join(f"{median:>23,.3f}" for median in medians))


def run(arguments: argparse.Namespace, python: str | None, directory: Path) -> tuple[dict[str, Any], list[Bar]]:
    quick: bool = arguments.quick
    rounds, seconds = (1, 1.0) if quick else (max(arguments.rounds, 5), arguments.seconds)
    questions = write_questions(directory / "questions", [question(number) for number in range(QUESTIONS)])
    with bare(directory, "provider") as upstream:
        with contextlib.ExitStack() as stack, gateway(directory, upstream) as served:
            servers = {"bare": stack.enter_context(bare(directory, "constant")), "gateway": served.server}
            if python is not None:
                servers["litellm"] = stack.enter_context(litellm(directory, upstream, python))
            hits = measure_hits(servers, served.slab, questions, rounds, seconds)
            pairs = 50 if quick else 1000
            misses = {
                kind: measure_misses(upstream, served.server, pairs, stream=kind == "stream")
                for kind in ("whole", "stream")
            }
        with gateway(directory, upstream) as served:
            counts, settle = ((500, 1_000, 2_000), 0.0) if quick else ((20_000, 110_000, 200_000), SETTLE_SECONDS)
            memory = measure_memory(served.server, questions, counts, settle)
    print_table(hits)
    print(f"misses: {misses}\nmemory: {memory}")
    return {"hits": hits, "misses": misses, "memory": memory}, bars_of(hits, misses, memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="little work, no LiteLLM: shows that it runs, not how fast"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load on each server in each round")
    parser.add_argument("--litellm", metavar="PYTHON", help="an interpreter that has litellm[proxy]")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "gateway.json", help="result file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    provenance = Provenance(distributions=DISTRIBUTIONS)
    python = arguments.litellm or sys.executable
    version = None if arguments.quick else litellm_version(python)
    if version is None:
        print(f"litellm: left out; {python} would need litellm[proxy], httptools and uvloop")
    settings = {
        "load": GENERATOR,
        "connections": CONNECTIONS,
        "workers": WORKERS,
        "answer_bytes": ANSWER_BYTES,
        "litellm": version,
    }
    with tempfile.TemporaryDirectory() as directory:
        results, bars = run(arguments, None if version is None else python, Path(directory))
    met = write_results(arguments.json, provenance, {"quick": arguments.quick, **settings, **results}, bars)
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
