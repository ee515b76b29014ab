"""The examples under docs/examples, as a reader runs them. shared_responses has tests of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
from redis_servers import RedisServer
from worker_servers import PATIENCE_SECONDS, Bench, Server, bench

from llm_edge_cache import list_slabs

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
WORKERS = 4


def run(example: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run an example; see that it leaves no slab behind."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / example)],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, complaints = process.communicate(timeout=PATIENCE_SECONDS)
    assert [name for name in list_slabs() if f"-{process.pid}" in name] == []
    return subprocess.CompletedProcess(process.args, process.returncode, output, complaints)


def test_the_basic_cache() -> None:
    done = run("basic_cache.py")
    assert (done.returncode, done.stderr) == (0, "")
    key, short, *said = done.stdout.splitlines()
    assert len(key.split()[1]) == 64
    assert short.split()[0] == key.split()[1][:16]
    assert said == [
        "1st look-up: Miss",
        "2nd look-up: L1Hit, 'Paris.', TokenUsage(prompt_tokens=14, completion_tokens=2, total_tokens=16)",
        "at another temperature: Miss",
        "20 callers at once: 20 answers, 1 call of the provider",
        "after invalidate: Miss",
        "healthy: True; entries in L1: 1",
    ]


def test_the_distributed_cache(redis_server: RedisServer) -> None:
    prefix = f"example-{secrets.token_hex(4)}:"
    done = run("distributed_cache.py", LLM_EDGE_CACHE_REDIS_URL=redis_server.unix_url, LLM_EDGE_CACHE_KEY_PREFIX=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:4] == [
        "L1 healthy: True, L2 healthy: True",
        "one stores; one finds it in l1",
        "other finds it in l2, then in l1",
        "one invalidates the tag; it is gone from other as well",
    ]


def test_the_distributed_cache_says_that_it_needs_a_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_EDGE_CACHE_REDIS_URL", raising=False)
    done = run("distributed_cache.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "LLM_EDGE_CACHE_REDIS_URL" in done.stderr


def test_monitoring() -> None:
    done = run("metrics_monitoring.py")
    assert (done.returncode, done.stderr) == (0, "")
    figures = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[:6])
    hits, misses = int(figures["L1 hits"].replace(",", "")), int(figures["L1 misses"].replace(",", ""))
    assert hits + misses == int(figures["requests"].replace(",", "")) == 2_000
    assert f'llm_edge_cache_hits_total{{tier="l1"}} {float(hits)}' in done.stdout
    assert f'llm_edge_cache_tokens_saved_total{{kind="completion"}} {60.0 * hits}' in done.stdout


# ---- gunicorn ----


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path) as tools:
        yield tools


def start(tools: Bench, redis: RedisServer, *options: str) -> Server:
    folder = EXAMPLES / "gunicorn_library"
    place = ["--chdir", str(folder), "-c", str(folder / "gunicorn.conf.py"), "--bind", "127.0.0.1:0"]
    environ = {
        "LLM_EDGE_CACHE_L1_MEMORY": "8MiB",
        "LLM_EDGE_CACHE_REDIS_URL": redis.unix_url,
        "LLM_EDGE_CACHE_KEY_PREFIX": f"{tools.name}:",
    }
    return tools.start(["-m", "gunicorn", *place, *options, "app:application"], environ)


def scrape(server: Server) -> str:
    with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=PATIENCE_SECONDS) as answer:
        text: str = answer.read().decode()
        return text


@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_workers_under_gunicorn_are_one_cache(tools: Bench, redis_server: RedisServer, options: list[str]) -> None:
    server = start(tools, redis_server, *options)
    workers = server.pids(WORKERS)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(server.ask, ["/ask?question=why"] * 40))
    assert len({answer["content"] for answer in answers}) == 1
    assert len({answer["pid"] for answer in answers} & workers) > 1
    assert "llm_edge_cache_computations_total 1.0" in scrape(server)
    os.kill(next(iter(workers)), signal.SIGKILL)
    assert server.ask("/ask?question=why")["content"] == answers[0]["content"]
    server.pids(WORKERS)
    assert "llm_edge_requests_total 41.0" in scrape(server)
    assert "has ended" in server.log
