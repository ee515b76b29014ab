"""The breaker: three failures in a row open it for the whole host, one success closes it, one process probes."""

from __future__ import annotations

from llm_edge_cache import SharedSlab
from llm_edge_cache.breaker import OPEN_FROM, PROBE_INTERVAL_NS, Breaker
from llm_edge_cache.regions import Counter, Word

NOW = 10**12


def opened(slab: SharedSlab) -> Breaker:
    breaker = Breaker(slab)
    for _ in range(3):
        breaker.fail(NOW)
    return breaker


def test_a_new_one_is_closed(slab: SharedSlab) -> None:
    assert Breaker(slab).is_closed()


def test_the_third_failure_in_a_row_opens_it_for_every_process(slab: SharedSlab) -> None:
    breaker, other = Breaker(slab), Breaker(slab)
    breaker.fail(NOW)
    other.fail(NOW)
    assert breaker.is_closed()
    breaker.fail(NOW)
    assert not breaker.is_closed()
    assert not other.is_closed()
    assert slab._counter_sums()[Counter.BREAKER_OPENED] == 1


def test_a_success_in_between_starts_the_count_anew(slab: SharedSlab) -> None:
    breaker = Breaker(slab)
    for _ in range(10):
        breaker.fail(NOW)
        breaker.fail(NOW)
        breaker.succeed()
    assert breaker.is_closed()
    assert slab._word(Word.BREAKER) == 0


def test_failures_of_an_open_one_change_nothing(slab: SharedSlab) -> None:
    breaker = opened(slab)
    due = slab._word(Word.BREAKER)
    breaker.fail(NOW + 1)
    assert slab._word(Word.BREAKER) == due
    assert slab._counter_sums()[Counter.BREAKER_OPENED] == 1


def test_a_success_closes_it(slab: SharedSlab) -> None:
    breaker = opened(slab)
    breaker.succeed()
    assert breaker.is_closed()


def test_one_process_probes_an_interval(slab: SharedSlab) -> None:
    breaker, other = opened(slab), Breaker(slab)
    assert not breaker.claim_probe(NOW + PROBE_INTERVAL_NS - 1)
    assert breaker.claim_probe(NOW + PROBE_INTERVAL_NS)
    assert not other.claim_probe(NOW + PROBE_INTERVAL_NS)
    assert other.claim_probe(NOW + 2 * PROBE_INTERVAL_NS)


def test_a_closed_one_needs_no_probe(slab: SharedSlab) -> None:
    breaker = Breaker(slab)
    breaker.fail(NOW)
    assert not breaker.claim_probe(NOW + 10 * PROBE_INTERVAL_NS)
    assert slab._word(Word.BREAKER) < OPEN_FROM
