"""Real servers for the tests: start one on a port of the system's choice, ask its workers, end all its processes.

Waits are generous, for slow machines: they end as soon as what they wait for is there.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any
from urllib.request import urlopen

import psutil
import uvicorn

from llm_edge_cache import SharedSlab, naming

DATA = Path(__file__).resolve().parent / "data"
PATIENCE_SECONDS = float(os.environ.get("TEST_PATIENCE_SECONDS", "100"))
GUNICORN = ["-m", "gunicorn", "--chdir", str(DATA), "--bind", "127.0.0.1:0"]
# The master kills a worker that does not answer it for 5 s: one that is stopped, or starved on a busy machine. It waits
# as long for one that is killed when it has just been asked, and replaces it only then.
_HAS_HEALTHCHECK = "timeout_worker_healthcheck" in signature(uvicorn.Config).parameters
PATIENT_MASTER = ["--timeout-worker-healthcheck", "30"] if _HAS_HEALTHCHECK else []
UVICORN = ["-m", "uvicorn", "--app-dir", str(DATA), "--host", "127.0.0.1", "--port", "0", *PATIENT_MASTER]
NOTHING: Mapping[str, str] = MappingProxyType({})
HOOKS = ["-c", "python:llm_edge_cache.workers.gunicorn"]
_ADDRESS = re.compile(r"http://(?:127\.0\.0\.1|0\.0\.0\.0):([0-9]+)")


def wait_until(is_so: Callable[[], Any], what: str) -> Any:
    """Return the first true value of `is_so`; fail after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = is_so()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_SECONDS} s: {what}")


class Server:
    """One server: a master and its workers."""

    def __init__(self, arguments: list[str], environ: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environ},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def port(self) -> int:
        found = wait_until(lambda: _ADDRESS.search(self.log) or self.process.poll() is not None, "a port in the log")
        assert not isinstance(found, bool), f"the server ended:\n{self.log}"
        return int(found[1])

    def ask(self, path: str) -> dict[str, Any]:
        """Return the answer of whichever worker takes the request; asks again while no one does."""
        try:
            return dict(wait_until(lambda: self._ask_once(path), f"an answer to {path}"))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def _ask_once(self, path: str) -> dict[str, Any] | None:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_SECONDS) as response:
                return dict(json.load(response))
        except (OSError, HTTPException):  # no one listens yet, or the worker was killed over it
            return None

    def ask_many(self, path: str, count: int) -> list[dict[str, Any]]:
        """Ask several times at once: of requests one by one, an idle worker might take all."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.ask, [path] * count))

    def pids(self, count: int) -> set[int]:
        """Wait until `count` different workers have answered; return their process ids."""
        seen: set[int] = set()

        def all_seen() -> bool:
            seen.update(answer["pid"] for answer in self.ask_many("/pid", 8))
            return len(seen) >= count

        wait_until(all_seen, f"answers of {count} workers")
        return seen

    def value_seen_by(self, key: str, count: int) -> dict[int, str | None]:
        """Return what each of `count` workers finds under a key, by process id."""
        seen: dict[int, str | None] = {}

        def all_seen() -> bool:
            seen.update((answer["pid"], answer["value"]) for answer in self.ask_many(f"/get?key={key}", 8))
            return len(seen) >= count

        wait_until(all_seen, f"answers of {count} workers")
        return seen

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the server and wait; return its exit status."""
        self.send(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def end_all(self) -> None:
        """Kill whatever is left of the server's session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not _is_group(self.pid), "the end of the server's processes")


def is_running(pid: int) -> bool:
    """Tell whether the process runs; a zombie that no one reaps does not, once its last other thread has ended."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    return False


def _is_group(group: int) -> bool:
    """Tell whether a process of this group runs."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == group and is_running(pid):
                return True
    return False


class Bench:
    """Servers of one test, all on one slab of the test's own."""

    def __init__(self, directory: Path, runtime: str) -> None:
        self.name = f"test-{os.getpid()}-{secrets.token_hex(6)}"
        self.servers: list[Server] = []
        self._directory = directory
        self._runtime = runtime  # where gunicorn puts its control socket

    def start(self, arguments: list[str], environ: Mapping[str, str]) -> Server:
        log = self._directory / f"server{len(self.servers)}.log"
        variables = {"LLM_EDGE_CACHE_NAME": self.name, "XDG_RUNTIME_DIR": self._runtime, **environ}
        server = Server(arguments, variables, log)
        self.servers.append(server)
        return server

    def gunicorn(self, *options: str, environ: Mapping[str, str] = NOTHING) -> Server:
        """Start gunicorn with two workers and our hooks, unless the options say otherwise."""
        return self.start([*GUNICORN, *HOOKS, "--workers", "2", *options, "slab_app:application"], environ)

    def uvicorn(self, environ: Mapping[str, str] = NOTHING) -> Server:
        """Start uvicorn with two workers."""
        return self.start([*UVICORN, "--workers", "2", "slab_app:asgi_application"], environ)

    def files(self) -> list[str]:
        """Return the slab's files in shared memory: segment and lock."""
        return glob.glob(f"{naming.DIRECTORY}/*{self.name}*")

    def attached(self) -> int:
        """Return how many live processes are attached, without this one."""
        with SharedSlab.attach(self.name) as slab:
            return slab.stats().attached_processes - 1

    def wait_attached(self, count: int) -> None:
        wait_until(lambda: self.attached() == count, f"{count} attached processes")


@contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    """Give a bench; then end its servers, unlink its slab, and see that nothing is left and no one complained."""
    with TemporaryDirectory() as runtime:
        tools = Bench(directory, runtime)
        try:
            yield tools
        finally:
            for server in tools.servers:
                server.end_all()
            if tools.files():
                # Created if need be, so that what a master killed over creating it left goes as well.
                SharedSlab(tools.name).unlink()
    assert tools.files() == []
    for server in tools.servers:
        assert "resource_tracker" not in server.log
        assert "leaked" not in server.log
