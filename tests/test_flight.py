"""The flights of one process: who leads, what is renewed, and what the others are told."""

from __future__ import annotations

import threading

import pytest
from processes import ends_well, fork

from llm_edge_cache import ComputeError, SharedSlab
from llm_edge_cache import flight as flight_module
from llm_edge_cache.flight import Flights, Lead, Running
from llm_edge_cache.regions import Counter

KEY = b"5" * 64


@pytest.fixture
def flights(slab: SharedSlab) -> Flights:
    """Of this process."""
    return Flights(slab)


@pytest.fixture
def others(slab: SharedSlab) -> Flights:
    """As another process would have them, but for its identity."""
    return Flights(slab)


def lead(flights: Flights) -> Lead:
    found = flights.join(KEY)
    assert isinstance(found, Lead)
    return found


def follow(flights: Flights) -> Running:
    found = flights.join(KEY)
    assert isinstance(found, Running)
    return found


def test_one_leads_and_the_others_follow_until_it_ends(flights: Flights, others: Flights) -> None:
    mine = lead(flights)
    running = follow(others)
    assert (running.record, running.token) == (mine.record, mine.token)
    assert others.is_running(running)
    flights.end(mine)
    assert not others.is_running(running)
    assert isinstance(others.join(KEY), Lead)


def test_waiting_ends_with_the_flight(flights: Flights, others: Flights) -> None:
    mine = lead(flights)
    running = follow(others)
    threading.Timer(0.02, flights.end, (mine,)).start()
    others.wait(running, 20)
    assert not others.is_running(running)


def test_waiting_ends_when_time_is_up(flights: Flights, others: Flights) -> None:
    lead(flights)
    running = follow(others)
    others.wait(running, 0.01)
    assert others.is_running(running)


def test_leads_are_held_from_join_to_end(flights: Flights) -> None:
    assert not flights.has_leads()
    mine = lead(flights)
    assert flights.holds(mine)
    assert flights.has_leads()
    flights.end(mine)
    assert not flights.holds(mine)
    flights.end(mine)
    assert not mine.lost


def test_renewal_keeps_a_flight_past_its_term(flights: Flights, slab: SharedSlab) -> None:
    mine = lead(flights)
    running = Running(mine.record, mine.token)
    slab._advance_clock(1.5)
    assert flights.renew() == []  # none with a lease
    slab._advance_clock(1.5)
    assert flights.is_running(running)
    mine.lease = b"lease"
    assert flights.renew() == [mine]


def test_a_flight_that_nobody_drives_is_not_renewed(flights: Flights, slab: SharedSlab) -> None:
    mine = flights.join(KEY, lambda: False)
    assert isinstance(mine, Lead)
    mine.lease = b"lease"
    slab._advance_clock(1.5)
    assert flights.renew() == []
    slab._advance_clock(1.5)
    assert not flights.is_running(Running(mine.record, mine.token))


def test_a_flight_that_was_taken_over_is_lost_and_counted_once(
    flights: Flights, others: Flights, slab: SharedSlab
) -> None:
    late = lead(flights)
    slab._advance_clock(3)
    lead(others)
    flights.renew()
    assert late.lost
    flights.end(late)
    sums = slab._counter_sums()
    assert (sums[Counter.TAKEOVERS], sums[Counter.FLIGHTS_LOST]) == (1, 1)


def test_a_take_over_is_not_ended_by_the_former_owner(flights: Flights, others: Flights, slab: SharedSlab) -> None:
    late = lead(flights)
    slab._advance_clock(3)
    current = lead(others)
    flights.end(late)
    assert flights.is_running(Running(current.record, current.token))


def test_the_others_learn_why_there_is_no_value(flights: Flights, others: Flights) -> None:
    mine = lead(flights)
    running = follow(others)
    flights.tell_failure(mine, ValueError("no credit" + "!" * 1000))
    flights.end(mine)
    with pytest.raises(ComputeError, match="ValueError: no credit!") as caught:
        others.left_nothing(running)
    assert len(str(caught.value)) < 600


def test_the_others_learn_that_a_value_cannot_be_kept(flights: Flights, others: Flights) -> None:
    mine = lead(flights)
    running = follow(others)
    flights.tell_uncacheable(mine)
    flights.end(mine)
    assert others.left_nothing(running)


def test_a_flight_that_ended_in_silence_left_nothing_to_know(flights: Flights, others: Flights) -> None:
    mine = lead(flights)
    running = follow(others)
    flights.end(mine)
    assert not others.left_nothing(running)


def test_what_is_scribbled_over_is_nothing_to_know(flights: Flights, slab: SharedSlab) -> None:
    mine = lead(flights)
    slab.set(flight_module._outcome_key(mine.token), b"\xff")
    assert not flights.left_nothing(Running(mine.record, mine.token))


def test_what_is_known_of_one_flight_is_not_known_of_the_next(flights: Flights, others: Flights) -> None:
    first = lead(flights)
    flights.tell_failure(first, ValueError("no credit"))
    flights.end(first)
    second = lead(flights)
    running = follow(others)
    flights.end(second)
    assert not others.left_nothing(running)


def test_where_no_record_is_to_be_had_everybody_leads(slab: SharedSlab, flights: Flights, others: Flights) -> None:
    busy = [key for number in range(5000) if isinstance(flights.join(key := b"%064d" % number), Lead)]
    assert slab._counter_sums()[Counter.UNCOORDINATED] > 0
    assert len(busy) == 5000
    alone = [found for found in flights._leads if not found.is_coordinated]
    again = others.join(alone[0].key)
    assert isinstance(again, Lead)
    assert not again.is_coordinated
    others.tell_failure(again, ValueError("nobody waits"))
    alone[0].lease = b"lease"
    assert flights.renew() == [alone[0]]  # its lease in Redis is worth keeping
    others.end(again)
    assert not again.lost


def test_abandoned_flights_are_the_others_at_once(flights: Flights, others: Flights, slab: SharedSlab) -> None:
    mine = lead(flights)
    running = follow(others)
    assert flights.abandon() == [mine]
    assert not others.is_running(running)
    assert isinstance(others.join(KEY), Lead)
    flights.end(mine)
    assert slab._counter_sums()[Counter.FLIGHTS_LOST] == 0


def test_ending_and_telling_once_the_slab_is_closed_does_nothing(flights: Flights, slab: SharedSlab) -> None:
    mine = lead(flights)
    slab.close()
    flights.tell_failure(mine, ValueError("no credit"))
    flights.end(mine)


def test_a_forked_child_does_not_end_its_parents_flight(flights: Flights, slab: SharedSlab) -> None:
    mine = lead(flights)

    def child() -> None:
        own = Flights(slab)  # what the engine makes after a fork
        own.end(mine)
        assert not own.holds(mine)
        assert isinstance(own.join(KEY), Running)

    assert ends_well(fork(child))
    assert flights.is_running(Running(mine.record, mine.token))
    assert slab._counter_sums()[Counter.FLIGHTS_LOST] == 0
