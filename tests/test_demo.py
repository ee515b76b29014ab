"""`llm-edge-cache demo`, run as a user runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("openai")
COMMAND = [sys.executable, "-m", "llm_edge_cache", "demo", "--workers", "3"]


def _left_behind(pid: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").iterdir() if f".demo-{pid}-" in path.name]


def _processes_of(pid: int) -> list[str]:
    """The commands of the processes that serve this demonstration's slab."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if f"demo-{pid}-".encode() in command:
            found.append(command.decode(errors="replace"))
    return found


def test_it_shows_a_table_of_cross_worker_hits_and_leaves_nothing_behind() -> None:
    with subprocess.Popen([*COMMAND, "--exit", "--requests", "24"], stdout=subprocess.PIPE, text=True) as process:
        printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0, printed
    rows = re.findall(r"^ +\d+  .{34} +\d+ ", printed, re.MULTILINE)
    assert len(rows) == 24, printed
    calls = re.search(r"24 requests, (\d+) calls of the provider: (\d+) calls saved", printed)
    assert calls is not None, printed
    assert (int(calls[1]), int(calls[2])) == (5, 19)
    assert re.search(r"^\d+ answers came from the cache", printed, re.MULTILINE)
    assert "curl -si http://127.0.0.1:" in printed
    assert _left_behind(process.pid) == []
    assert _processes_of(process.pid) == []


def _printed_until_up(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    printed = ""
    while "Ctrl-C ends it" not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return printed


def test_the_gateway_stays_up_until_it_is_interrupted() -> None:
    with subprocess.Popen([*COMMAND, "--requests", "4"], stdout=subprocess.PIPE, text=True) as process:
        url = re.search(r"curl -si (http://\S+/chat/completions)", _printed_until_up(process))
        assert url is not None
        dashboard = url[1].replace("/v1/chat/completions", "/dashboard")
        with urllib.request.urlopen(dashboard, timeout=30) as answer:
            assert b"<title>llm-edge-cache</title>" in answer.read()
        body = b'{"model": "stand-in", "messages": [{"role": "user", "content": "Hello?"}]}'
        request = urllib.request.Request(url[1], body, {"content-type": "application/json"})
        for expected in ("MISS", "HIT"):
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.headers["x-cache"] == expected
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    deadline = time.monotonic() + 10
    while _processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes_of(process.pid) == []
    assert _left_behind(process.pid) == []


def test_without_its_extra_it_says_so() -> None:
    program = (
        "import sys; sys.modules['openai'] = None; from llm_edge_cache.cli.main import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'llm-edge-cache[demo]'" in done.stderr
