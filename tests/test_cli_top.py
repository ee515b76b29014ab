"""`top`: rates between two looks, the hottest keys, and the frames that it draws."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_edge_cache import CacheableRequest, CachedResponse, L1Config, SharedSlab, SyncCacheManager
from llm_edge_cache.cli.main import main
from llm_edge_cache.cli.top import HotKeys, Step
from llm_edge_cache.reading import look, quantile

MiB = 1 << 20


def test_rates_are_those_of_the_interval(slab: SharedSlab) -> None:
    slab.set(b"key", b"value")
    slab.get(b"key")
    before = look(slab)
    for _ in range(30):
        slab.get(b"key")
    for _ in range(10):
        slab.get(b"absent")
    step = Step(before, look(slab)._replace(at=before.at + 2.0))
    assert step.hit_ratio == 0.75
    assert step.rate(sum(step.now.lookups), sum(before.lookups)) == 20.0
    assert step.total_rate("evictions") == 0.0
    assert [(process.pid, rate) for process, rate in step.processes()] == [(os.getpid(), 20.0)]


def test_nothing_asked_has_no_hit_ratio(slab: SharedSlab) -> None:
    assert Step(look(slab), look(slab)).hit_ratio is None


def test_a_slab_that_was_replaced_has_no_negative_rates(slab: SharedSlab) -> None:
    for _ in range(5):
        slab.get(b"absent")
    before = look(slab)
    SharedSlab(slab.name, slab.config, replace=True).close()
    step = Step(before, look(slab))
    assert step.rate(sum(step.now.lookups), sum(before.lookups)) == 0.0
    assert step.hit_ratio is None


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    counts = (98, 1, 1, *[0] * 28, 12345)
    assert (quantile(counts, 0.5), quantile(counts, 0.99), quantile(counts, 0.999)) == (250e-9, 500e-9, 1e-6)
    assert quantile((0,) * 32, 0.5) is None


def test_the_hottest_keys_are_those_that_were_asked_for_most(slab: SharedSlab) -> None:
    slab.set_many({b"%03d" % number: b"" for number in range(500)})
    for number, times in ((7, 9), (300, 6), (450, 3)):
        for _ in range(times):
            slab.get(b"%03d" % number)
    hot = HotKeys(slab)
    deadline = time.monotonic() + 30
    while not hot._last and time.monotonic() < deadline:
        hot.advance()
    assert [key for key, _ in hot.hottest(3)] == [b"007", b"300", b"450"]


def _printed(capsys: pytest.CaptureFixture[str], name: str, *options: str) -> str:
    assert main(["top", "--name", name, "--once", "--interval", "1", *options]) == 0
    return capsys.readouterr().out


def _until(ask: Callable[[], Any], is_enough: Callable[[Any], bool]) -> Any:
    for _ in range(30):
        answer = ask()
        if is_enough(answer):
            break
    return answer


def test_one_frame_names_everything(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB)) as manager:
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                manager.get_or_compute(CacheableRequest("m", "Hello?"), lambda: CachedResponse("Hi.", "m"))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            # Hot keys are sought for 10 ms a frame, of which a busy machine may leave nothing.
            printed = _until(lambda: _printed(capsys, name), lambda printed: "hottest keys" in printed)
            found = _until(lambda: json.loads(_printed(capsys, name, "--json")), lambda found: bool(found["hottest"]))
        finally:
            stop.set()
            asking.join()
    for word in ("hit ratio", "look-ups", "entries", "memory", "window", "breaker", "evictions", "computations",
                 "coalesced", "p99", "l1 look-up", "pid", "share", "hottest keys"):  # fmt: skip
        assert word in printed
    assert "\x1b" not in printed
    assert found["hit_ratio"] > 0.9
    assert found["per_second"]["lookups"] > 0
    assert found["processes"][0]["pid"] == os.getpid()
    assert found["hottest"][0]["frequency"] >= 1
    assert found["latency_seconds"]["l1"]["p99"] > 0


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_it_goes_on_until_ctrl_c(slab: SharedSlab, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "llm_edge_cache", "top", "--name", slab.name, "--interval", "0.05", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0
    if arguments:
        assert all(json.loads(line)["name"] == slab.name for line in lines)


def test_it_outlives_the_slab(slab: SharedSlab) -> None:
    command = [sys.executable, "-m", "llm_edge_cache", "top", "--name", slab.name, "--interval", "0.05", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        slab.unlink()
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
