"""What the README says under "Library" is run as it is written there."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from redis_servers import RedisServer
from worker_servers import PATIENCE_SECONDS, bench

from llm_edge_cache import SharedSlab

ROOT = Path(__file__).resolve().parent.parent
NAME = "readme"  # of the slab in the snippets


def snippets(language: str) -> list[str]:
    """The section's code blocks, in their order."""
    (section,) = re.findall(r"^## Library\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def snippet(mark: str) -> str:
    """The one block with these words in it."""
    (found,) = [code for code in snippets("python") if mark in code]
    return found


@pytest.fixture
def alone() -> Iterator[None]:
    """No other run of these tests on this machine, and no slab of theirs before or after."""
    with (Path(tempfile.gettempdir()) / f"llm-edge-cache-readme-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _unlink()
        yield
        _unlink()


def _unlink() -> None:
    if SharedSlab.exists(NAME):
        SharedSlab.attach(NAME).unlink()


def run(code: str, **environ: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_all_snippets_are_run_here() -> None:
    assert (len(snippets("python")), len(snippets("sh"))) == (5, 1)


def test_the_async_face(alone: None) -> None:
    assert run(snippet("Capital of France")) == ["l1 Paris."]


def test_the_sync_face(alone: None) -> None:
    assert run(snippet("Capital of Italy")) == ["Rome.", "False"]


def test_get_or_compute(alone: None) -> None:
    assert run(snippet("Capital of Spain")) == ["asked the provider", "100 Madrid."]


def test_both_tiers(name: str, redis_server: RedisServer) -> None:
    said = run(
        snippet("Capital of Portugal"),
        LLM_EDGE_CACHE_NAME=name,
        LLM_EDGE_CACHE_REDIS_URL=redis_server.unix_url,
        LLM_EDGE_CACHE_KEY_PREFIX=f"{name}:",
    )
    assert said == ["Lisbon. True 0.0"]


def test_under_gunicorn(tmp_path: Path) -> None:
    (command,) = snippets("sh")
    *variables, program, flag, config, workers, count, application = command.split()
    assert (program, flag, workers) == ("gunicorn", "-c", "-w")
    (tmp_path / "app.py").write_text(snippet("# app.py"))
    environ = dict(variable.split("=", 1) for variable in variables)
    with bench(tmp_path) as tools:
        place = ["--chdir", str(tmp_path), "--bind", "127.0.0.1:0"]
        server = tools.start(["-m", "gunicorn", *place, flag, config, workers, count, application], environ)
        question = secrets.token_hex(4)
        for _ in range(3):
            with urlopen(f"http://127.0.0.1:{server.port}/?{question}", timeout=PATIENCE_SECONDS) as answer:
                assert answer.read() == b"An answer."
        with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=PATIENCE_SECONDS) as answer:
            scraped = answer.read().decode()
        assert "llm_edge_requests_total 3.0" in scraped
        assert "llm_edge_cache_computations_total 1.0" in scraped
