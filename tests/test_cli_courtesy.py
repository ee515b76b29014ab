"""Long work rests while others want the processor, and only then."""

from __future__ import annotations

import time

import pytest

from llm_edge_cache.cli import courtesy
from llm_edge_cache.cli.courtesy import Courtesy


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was rested; nobody really sleeps, and this process keeps its priority."""
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    monkeypatch.setattr("os.nice", lambda _: 0)
    return taken


def steps(monkeypatch: pytest.MonkeyPatch, polite: Courtesy, count: int, *, work_ns: int, wait_ns: int) -> None:
    worked, waited = polite._worked, polite._waited
    for number in range(1, count + 1):
        monkeypatch.setattr(time, "thread_time_ns", lambda number=number: worked + number * work_ns)
        monkeypatch.setattr(courtesy, "_waited_ns", lambda number=number: waited + number * wait_ns)
        polite.step()


def test_work_that_never_waits_never_rests(monkeypatch: pytest.MonkeyPatch, rests: list[float]) -> None:
    steps(monkeypatch, Courtesy(is_on=True), 100, work_ns=1_000_000, wait_ns=1000)
    assert rests == []


def test_work_that_has_to_wait_works_for_2_percent(monkeypatch: pytest.MonkeyPatch, rests: list[float]) -> None:
    steps(monkeypatch, Courtesy(is_on=True), 10, work_ns=1_000_000, wait_ns=200_000)
    assert rests == [pytest.approx(0.05)] * 10


def test_it_goes_on_resting_for_a_while_after_it_had_to_wait(
    monkeypatch: pytest.MonkeyPatch, rests: list[float]
) -> None:
    polite = Courtesy(is_on=True)
    steps(monkeypatch, polite, 1, work_ns=1_000_000, wait_ns=200_000)
    steps(monkeypatch, polite, 200, work_ns=1_000_000, wait_ns=0)
    assert len(rests) == courtesy._REMEMBERED


def test_at_full_speed_it_never_rests(monkeypatch: pytest.MonkeyPatch, rests: list[float]) -> None:
    steps(monkeypatch, Courtesy(is_on=False), 10, work_ns=1_000_000, wait_ns=10**9)
    assert rests == []


def test_the_host_tells_how_long_one_waited() -> None:
    assert courtesy._waited_ns() >= 0
