"""Start a server with several workers on a free loopback port, and stop it without leaving a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

HERE = Path(__file__).resolve().parent
SERVERS = ("gunicorn", "gunicorn-preload", "uvicorn")
THREADS_PER_WORKER = 32
START_SECONDS = 60.0
STOP_SECONDS = 20.0

_ANNOUNCEMENT = re.compile(r"http://127\.0\.0\.1:([0-9]+)")  # both servers log their address so


class ServerError(Exception):
    """The server did not start."""


def command(server: str, workers: int) -> list[str]:
    """Return the server's command line; port 0 lets the system choose a free one."""
    count = ["--workers", str(workers)]
    if server == "uvicorn":
        uvicorn = [sys.executable, "-m", "uvicorn", "--app-dir", str(HERE), "--host", "127.0.0.1", "--port", "0"]
        return [*uvicorn, "--no-access-log", *count, "asgi:application"]
    gunicorn = [sys.executable, "-m", "gunicorn", "-c", "python:llm_edge_cache.workers.gunicorn"]
    place = ["--chdir", str(HERE), "--bind", "127.0.0.1:0", "--threads", str(THREADS_PER_WORKER)]
    preload = ["--preload"] if server == "gunicorn-preload" else []
    return [*gunicorn, *place, *preload, *count, "wsgi:application"]


@contextmanager
def running(server: str, workers: int, environ: Mapping[str, str]) -> Iterator[int]:
    """Run the server for the length of the block.

    Yields:
        Its port on 127.0.0.1.

    Raises:
        ServerError: it ended, or did not announce a port in time; the message carries its log.
    """
    with TemporaryDirectory() as runtime:
        # gunicorn's control socket goes to the runtime directory, and away with it.
        process = subprocess.Popen(
            command(server, workers),
            env={**os.environ, "XDG_RUNTIME_DIR": runtime, **environ},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that whatever the server starts can be ended with it
        )
        try:
            yield _Log(process).wait_for_port()
        finally:
            _stop(process)


class _Log:
    """Reads the server's log to its end, lest a full pipe stop the server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self._lines: list[str] = []
        self._port: int | None = None
        self._told = threading.Event()  # set with the port, or at the log's end
        threading.Thread(target=self._read, args=(process.stderr,), daemon=True).start()

    def wait_for_port(self) -> int:
        self._told.wait(START_SECONDS)
        if self._port is None:
            raise ServerError("the server did not start:\n" + "".join(self._lines))
        return self._port

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.append(line)
            announced = _ANNOUNCEMENT.search(line)
            if announced is not None and self._port is None:
                self._port = int(announced[1])
                self._told.set()
        self._told.set()


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _end_group(process.pid)


def _end_group(group: int) -> None:
    """Kill what is left of the server's session, and wait until nothing is."""
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(0.01)
