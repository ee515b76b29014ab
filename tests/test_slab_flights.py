"""Flights: of all callers that miss one key, in whatever process or thread, one computes; and what befalls that one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from processes import ends_well, fork, write_for_ever

from llm_edge_cache import SharedSlab, SlabBusyError, SlabConfig
from llm_edge_cache.native import native

LED, TAKEN_OVER, JOINED, NONE = (
    native.FLIGHT_LED,
    native.FLIGHT_TAKEN_OVER,
    native.FLIGHT_JOINED,
    native.FLIGHT_NONE,
)
MiB = 1 << 20
SECOND = 10**9
MILLISECOND = 10**6
LONG = 60 * SECOND
#: How soon a waiter has to notice a death: 20 ms, on an idle machine.
NOTICED_SECONDS = 5.0


@contextmanager
def a_leader(slab: SharedSlab, key: bytes, lease_ns: int = LONG) -> Iterator[tuple[int, int, int]]:
    """Another process that leads the key's flight and then waits to be ended; gives pid, index and token."""
    reading, writing = os.pipe()

    def lead() -> None:
        os.write(writing, b"%d %d %d" % slab._flight_join(key, lease_ns))
        while True:
            signal.pause()

    child = fork(lead)
    role, index, token = map(int, os.read(reading, 100).split())
    os.close(reading)
    os.close(writing)
    assert role == LED
    try:
        yield child, index, token
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_first_leads_and_the_others_join(slab: SharedSlab) -> None:
    role, index, token = slab._flight_join(b"key", LONG)
    assert role == LED
    assert slab._flight_join(b"key", LONG) == (JOINED, index, token)
    assert slab._flight_join(b"other", LONG)[0] == LED


def test_an_ended_flight_is_no_more_and_the_next_one_leads(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    assert slab._flight_state(index, token) == 0
    assert slab._flight_end(index, token) is True
    assert slab._flight_state(index, token) == -1
    role, _, later = slab._flight_join(b"key", LONG)
    assert role == LED
    assert later > token
    assert slab._flight_end(index, token) is False


def test_progress_only_grows(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    for progress, seen in ((5, 5), (3, 5), (5, 5), (2**63 - 1, 2**63 - 1)):
        assert slab._flight_advance(index, token, progress) is True
        assert slab._flight_state(index, token) == seen
    with pytest.raises(ValueError, match="progress"):
        slab._flight_advance(index, token, 2**63)


def test_a_flight_past_its_deadline_is_taken_over(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", 10 * SECOND)
    slab._advance_clock(11)
    assert slab._flight_state(index, token) == -1
    role, _, later = slab._flight_join(b"key", 10 * SECOND)
    assert role == TAKEN_OVER
    assert slab._flight_state(index, token) == -1
    assert not slab._flight_renew(index, token, LONG)
    assert not slab._flight_advance(index, token, 1)
    assert not slab._flight_end(index, token)
    assert slab._flight_state(index, later) == 0


def test_a_renewed_flight_goes_on(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", 10 * SECOND)
    slab._advance_clock(8)
    assert slab._flight_renew(index, token, 10 * SECOND) is True
    slab._advance_clock(8)
    assert slab._flight_join(b"key", 10 * SECOND) == (JOINED, index, token)


def test_the_fill_of_a_leader_that_was_replaced_is_refused(slab: SharedSlab) -> None:
    slab._flight_join(b"key", 10 * SECOND)
    _, late = slab.get_or_token(b"key")
    slab._advance_clock(11)
    assert slab._flight_join(b"key", 10 * SECOND)[0] == TAKEN_OVER
    _, current = slab.get_or_token(b"key")
    assert slab.fill(b"key", b"late", late) is False
    assert slab.fill(b"key", b"new", current) is True
    assert slab.get(b"key") == b"new"


def test_waiting_ends_with_the_flight(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    threading.Timer(0.05, slab._flight_end, (index, token)).start()
    assert slab._flight_wait(index, token, 0, 10 * SECOND) == -1


def test_waiting_ends_with_progress(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    assert slab._flight_wait(index, token, 4, 10 * SECOND) == 0  # it differs already
    threading.Timer(0.05, slab._flight_advance, (index, token, 7)).start()
    assert slab._flight_wait(index, token, 0, 10 * SECOND) == 7


def test_waiting_ends_when_time_is_up(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    begun = time.monotonic()
    assert slab._flight_wait(index, token, 0, 50 * MILLISECOND) == 0
    assert 0.05 <= time.monotonic() - begun < 30


def test_waiting_ends_at_the_deadline(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", 200 * MILLISECOND)
    begun = time.monotonic()
    assert slab._flight_wait(index, token, 0, 60 * SECOND) == -1
    assert time.monotonic() - begun < 30


def test_the_bell_moves_with_every_advance_and_end(slab: SharedSlab) -> None:
    before = slab._bell()
    _, index, token = slab._flight_join(b"key", LONG)
    assert slab._bell_wait(before, 10 * MILLISECOND) == before
    slab._flight_advance(index, token, 1)
    assert slab._bell_wait(before, 10 * SECOND) == slab._bell() == before + 1
    threading.Timer(0.05, slab._flight_end, (index, token)).start()
    assert slab._bell_wait(before + 1, 10 * SECOND) == before + 2


def _wait_with_alarm(wait: Callable[[], int]) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    wait()


def test_a_signal_handler_may_end_a_wait(slab: SharedSlab) -> None:
    def stop(number: int, frame: object) -> None:
        raise InterruptedError

    _, index, token = slab._flight_join(b"key", LONG)
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        for wait in (
            lambda: slab._flight_wait(index, token, 0, 60 * SECOND),
            lambda: slab._bell_wait(slab._bell(), 60 * SECOND),
        ):
            with pytest.raises(InterruptedError):  # which may come before the wait has begun, on a slow machine
                _wait_with_alarm(wait)
    finally:
        signal.signal(signal.SIGALRM, previous)


# ---- other processes ----


def test_a_flight_is_one_for_all_processes(slab: SharedSlab) -> None:
    with a_leader(slab, b"key") as (_, index, token):
        assert slab._flight_join(b"key", LONG) == (JOINED, index, token)
        assert slab._flight_state(index, token) == 0
        assert slab._flight_end(index, token) is False  # it is the other one's
        assert slab._flight_advance(index, token, 1) is False
        assert slab._flight_renew(index, token, 1) is False


def test_the_death_of_a_leader_is_noticed_at_once(slab: SharedSlab) -> None:
    with a_leader(slab, b"key") as (child, index, token):
        killed = []

        def kill() -> None:
            killed.append(time.monotonic())
            os.kill(child, signal.SIGKILL)

        threading.Timer(0.1, kill).start()
        assert slab._flight_wait(index, token, 0, 60 * SECOND) == -1  # nobody reaped it: a zombie is dead
        assert time.monotonic() - killed[0] < NOTICED_SECONDS
        role, _, later = slab._flight_join(b"key", LONG)
        assert role == TAKEN_OVER
        assert slab._flight_join(b"key", LONG) == (JOINED, index, later)


def test_a_stopped_leader_is_replaced_and_its_late_fill_refused(slab: SharedSlab) -> None:
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()

    def lead() -> None:
        role, index, token = slab._flight_join(b"key", 300 * MILLISECOND)
        _, fill_token = slab.get_or_token(b"key")
        os.write(from_child, b"%d %d %d" % (role, index, token))
        os.kill(os.getpid(), signal.SIGSTOP)
        late = (
            slab.fill(b"key", b"late", fill_token),
            slab._flight_renew(index, token, LONG),
            slab._flight_advance(index, token, 9),
            slab._flight_end(index, token),
        )
        os.write(from_child, b"%d" % sum(late))
        os.read(to_child, 1)

    child = fork(lead)
    role, index, token = map(int, os.read(to_parent, 100).split())
    assert role == LED
    os.waitpid(child, os.WUNTRACED)
    assert slab._flight_wait(index, token, 0, 60 * SECOND) == -1  # at the end of the lease
    role, _, later = slab._flight_join(b"key", LONG)
    assert role == TAKEN_OVER
    os.kill(child, signal.SIGCONT)
    assert os.read(to_parent, 100) == b"0"  # nothing of what it tried was done
    assert slab._flight_state(index, later) == 0
    _, fill_token = slab.get_or_token(b"key")
    assert slab.fill(b"key", b"new", fill_token) is True
    os.write(from_parent, b"x")
    os.waitpid(child, 0)
    for end in (to_child, from_parent, to_parent, from_child):
        os.close(end)


def test_a_reaper_frees_the_flights_of_the_dead(slab: SharedSlab) -> None:
    with a_leader(slab, b"key") as (child, index, token):
        bell = slab._bell()
        slab.reap()
        assert slab._flight_state(index, token) == 0  # alive: nothing to reap
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        slab.reap()
        assert slab._bell() == bell + 1
        assert slab._flight_join(b"key", LONG)[0] == LED


def test_a_forked_child_does_not_own_its_parents_flights(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)

    def child() -> None:
        assert not slab._flight_end(index, token)
        assert not slab._flight_renew(index, token, 1)
        assert slab._flight_join(b"key", LONG) == (JOINED, index, token)

    assert ends_well(fork(child))
    assert slab._flight_end(index, token) is True


def _compute_missing(slab: SharedSlab, keys: int, barrier: Any) -> int:
    """Gets each key as the manager does; the value is what a counter of its computations says."""
    computed = 0
    barrier.wait(60)
    for number in range(keys):
        key = b"key %d" % number
        while slab.get(key) is None:
            role, index, token = slab._flight_join(key, LONG)
            if role == JOINED:
                slab._flight_wait(index, token, 0, 60 * SECOND)
                continue
            found = slab.get(key)  # look again: the one before may have ended
            if found is None:
                running = slab.incr(b"running " + key)
                time.sleep(0)
                slab.set(key, b"%d" % running)
                computed += 1
            slab._flight_end(index, token)
    return computed


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_missing_key_is_computed_by_exactly_one_of_four_processes(slab: SharedSlab, method: str) -> None:
    keys = 300
    for number in range(keys):
        slab.set(b"running key %d" % number, b"0")
    context = multiprocessing.get_context(method)
    with context.Manager() as manager, context.Pool(4) as pool:
        barrier = manager.Barrier(4)
        started = [pool.apply_async(_compute_missing, (slab, keys, barrier)) for _ in range(4)]
        computed = [result.get(60) for result in started]
    assert sum(computed) == keys
    assert [slab.get(b"key %d" % number) for number in range(keys)] == [b"1"] * keys


def test_there_is_one_leader_at_a_time(slab: SharedSlab) -> None:
    """Four processes join one key over and over; whoever leads holds a word that nobody else may find taken."""

    def lead_often() -> int:
        led = 0
        for _ in range(3000):
            role, index, token = slab._flight_join(b"key", LONG)
            if role == JOINED:
                continue
            assert slab._word_exchange(0, 0, token)
            assert slab._word_exchange(0, token, 0)
            assert slab._flight_end(index, token)
            led += 1
        return led

    def child() -> None:
        assert lead_often() > 0

    children = [fork(child) for _ in range(4)]
    assert [ends_well(child) for child in children] == [True] * 4


def test_threads_join_each_others_flights(slab: SharedSlab) -> None:
    barrier = threading.Barrier(4)
    computed: list[int] = []
    for number in range(100):
        slab.set(b"running key %d" % number, b"0")
    threads = [threading.Thread(target=lambda: computed.append(_compute_missing(slab, 100, barrier))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(computed) == 100


# ---- limits ----


def test_where_all_records_are_taken_everybody_computes_for_himself(slab: SharedSlab) -> None:
    roles = [slab._flight_join(b"key %d" % number, 10 * SECOND)[0] for number in range(2000)]
    assert set(roles) == {LED, NONE}
    assert roles[:20] == [LED] * 20
    slab._advance_clock(11)  # all of them are spent, and make room
    assert slab._flight_join(b"one more", LONG)[0] == LED
    assert [slab._flight_join(b"new %d" % number, LONG)[0] for number in range(20)] == [LED] * 20


def test_a_spent_record_taken_for_another_key_refuses_its_former_owners_fill(slab: SharedSlab) -> None:
    keys = [b"key %d" % number for number in range(2000)]
    tokens = {}
    for key in keys:
        if slab._flight_join(key, 10 * SECOND)[0] == LED:
            tokens[key] = slab.get_or_token(key)[1]
    slab._advance_clock(11)
    for number in range(2000):
        slab._flight_join(b"new %d" % number, LONG)  # takes them all
    assert not [key for key, token in tokens.items() if slab.fill(key, b"late", token)]


def test_flights_survive_clear_and_their_fills_do_not(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    _, fill_token = slab.get_or_token(b"key")
    slab.clear()
    assert slab.fill(b"key", b"old", fill_token) is False
    assert slab._flight_end(index, token) is True


def test_a_lease_is_cut_to_an_hour(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", 2**63)
    assert slab._flight_state(index, token) == 0
    slab._advance_clock(3601)
    assert slab._flight_state(index, token) == -1


def test_tickets_of_nowhere_fit_no_flight(slab: SharedSlab) -> None:
    for index, token in ((0, 0), (2**32, 1), (2**64 - 1, 2**64 - 1)):
        assert slab._flight_state(index, token) == slab._flight_wait(index, token, 0, SECOND) == -1
        assert not slab._flight_end(index, token)
    with pytest.raises(ValueError, match="token"):
        slab._flight_end(0, -1)
    with pytest.raises(TypeError):
        slab._flight_end(0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="bytes-like"):
        slab._flight_join("key", 1)  # type: ignore[arg-type]


def test_a_ticket_does_not_fit_the_successor_of_its_segment(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    with SharedSlab(slab.name, SlabConfig(memory_bytes=5 * MiB), replace=True) as successor:
        assert slab._flight_state(index, token) == -1
        role, index_there, token_there = slab._flight_join(b"key", LONG)
        assert role == LED
        assert token_there != token
        assert slab._flight_end(index, token) is False
        assert successor._flight_join(b"key", LONG) == (JOINED, index_there, token_there)


def test_waiters_follow_a_retired_segment(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"key", LONG)
    timer = threading.Timer(0.1, slab.unlink)
    timer.start()
    assert slab._flight_wait(index, token, 0, 60 * SECOND) == -1
    assert slab._bell_wait(slab._bell(), 60 * SECOND) == 0
    timer.join()


def test_flights_whose_lock_is_held_by_a_stopped_process_are_not_to_be_had(slab: SharedSlab) -> None:
    _, index, token = slab._flight_join(b"mine", LONG)
    slab._set_lock_timeout(0.05)
    with _a_stopped_lock_holder(slab):
        assert slab._flight_join(b"key", LONG) == (NONE, 0, 0)
        assert slab._flight_end(index, token) is False
        assert slab._flight_state(index, token) == 0  # looking takes no lock
        assert slab._flight_join(b"mine", LONG) == (JOINED, index, token)
    assert slab._flight_end(index, token) is True


@contextmanager
def _a_stopped_lock_holder(slab: SharedSlab) -> Iterator[None]:
    """A child that is stopped inside of a critical section; found by trying."""
    child = fork(lambda: write_for_ever(slab, 8000))
    try:
        _stop_inside(slab, child)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _stop_inside(slab: SharedSlab, child: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        try:
            slab.delete(b"probe")
        except SlabBusyError:
            return
        os.kill(child, signal.SIGCONT)
        time.sleep(0.001)
    pytest.fail("the child was never stopped inside of a critical section")
