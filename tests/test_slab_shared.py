"""What processes count and share beside the entries: counters, histograms, words, tags, identities."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from processes import ends_well, fork

from llm_edge_cache import SharedSlab, SlabClosedError, SlabConfig
from llm_edge_cache.native import native

MiB = 1 << 20
COUNTERS = 96
HISTOGRAMS = 4
ROUNDS = 2000
HUGE = 2**64 - 1


def test_a_counter_adds_up(slab: SharedSlab) -> None:
    slab._count(0)
    slab._count(0, 41)
    slab._count(COUNTERS - 1, 7)
    assert slab._counter_sums() == (42, *[0] * (COUNTERS - 2), 7)


@pytest.mark.parametrize("index", [-1, COUNTERS, 10**30])
def test_there_is_no_other_counter(slab: SharedSlab, index: int) -> None:
    with pytest.raises(IndexError, match="0 to 95"):
        slab._count(index)
    with pytest.raises(IndexError, match="0 to 95"):
        slab._record(0, 0, 0, index, 1)
    assert sum(slab._counter_sums()) == 0  # nothing of the event was counted


def test_a_counter_never_falls(slab: SharedSlab) -> None:
    with pytest.raises(ValueError, match="amount"):
        slab._count(0, -1)
    with pytest.raises(TypeError):
        slab._count(0, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("elapsed_ns", "bucket"),
    [
        *[(0, 0), (1, 0), (250, 0), (251, 1), (500, 1), (501, 2), (1000, 2), (1001, 3)],
        *[(250 << 29, 29), ((250 << 29) + 1, 30), (250 << 30, 30), ((250 << 30) + 1, 30), (2**62, 30)],
    ],
)
def test_a_histogram_bucket_holds_what_took_at_most_its_bound(slab: SharedSlab, elapsed_ns: int, bucket: int) -> None:
    slab._observe(2, elapsed_ns)
    *counts, total = slab._histogram_sums()[2]
    assert counts == [int(at == bucket) for at in range(31)]
    assert total == elapsed_ns


def test_one_call_records_all_of_an_event(slab: SharedSlab) -> None:
    start = time.monotonic_ns()
    slab._record(1, 3, start, 10, 5, 11, 0, 12, 2**40)
    longest = time.monotonic_ns() - start
    sums = slab._counter_sums()
    assert (sums[1], sums[10], sums[11], sums[12]) == (1, 5, 0, 2**40)
    *counts, total = slab._histogram_sums()[3]
    assert sum(counts) == 1
    assert 0 < total <= longest


def test_an_event_may_be_untimed_or_begin_in_the_future(slab: SharedSlab) -> None:
    slab._record(1, -1, 0)
    assert sum(map(sum, slab._histogram_sums())) == 0
    slab._record(1, 0, time.monotonic_ns() + 10**12)
    assert slab._histogram_sums()[0] == (1, *[0] * 31)
    assert slab._counter_sums()[1] == 2


@pytest.mark.parametrize("arguments", [(), (0, 0), (0, 0, 0, 1), (0, 0, 0, *[1, 1] * 17)])
def test_an_event_is_counter_histogram_start_and_pairs(slab: SharedSlab, arguments: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match="_record"):
        slab._record(*arguments)


@pytest.mark.parametrize("histogram", [-2, HISTOGRAMS, 10**30])
def test_there_is_no_other_histogram(slab: SharedSlab, histogram: int) -> None:
    with pytest.raises(IndexError, match="0 to 3"):
        slab._record(0, histogram, 0)
    if histogram >= 0:
        with pytest.raises(IndexError if histogram < HUGE else ValueError):
            slab._observe(histogram, 1)


def _count_much(slab: SharedSlab, dies: bool) -> None:
    for _ in range(ROUNDS):
        slab._record(5, 1, time.monotonic_ns(), 6, 3)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_counts_of_all_processes_come_out_exactly_also_of_the_killed(slab: SharedSlab, method: str) -> None:
    context = multiprocessing.get_context(method)
    slab._count(5, 10)
    for generation in range(3):  # each generation adopts the records of the one before
        workers = [context.Process(target=_count_much, args=(slab, number % 2 == 0)) for number in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        done = (generation + 1) * 3 * ROUNDS
        sums = slab._counter_sums()
        assert (sums[5], sums[6]) == (10 + done, 3 * done)
        assert sum(slab._histogram_sums()[1][:31]) == done


def test_counts_of_threads_come_out_exactly(slab: SharedSlab) -> None:
    threads = [threading.Thread(target=_count_much, args=(slab, False)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slab._counter_sums()[5:7] == (4 * ROUNDS, 12 * ROUNDS)


def test_a_forked_child_counts_in_a_record_of_its_own(slab: SharedSlab) -> None:
    slab._count(0, 5)

    def child() -> None:
        slab._count(0, 7)
        assert slab._counter_sums()[0] == 12

    assert ends_well(fork(child))
    assert slab._counter_sums()[0] == 12


def test_words_are_shared_and_begin_at_zero(slab: SharedSlab, run_python: Callable[..., str]) -> None:
    assert [slab._word(index) for index in range(62)] == [0] * 62
    slab._word_set(7, HUGE)
    program = """
import sys
from llm_edge_cache import SharedSlab
slab = SharedSlab.attach(sys.argv[1])
print(slab._word(7))
slab._word_set(0, 5)
"""
    assert run_python(program, slab.name) == str(HUGE)
    assert slab._word(0) == 5


def test_a_word_is_exchanged_only_if_it_is_as_expected(slab: SharedSlab) -> None:
    assert slab._word_exchange(3, 0, 9) is True
    assert slab._word_exchange(3, 0, 8) is False
    assert slab._word(3) == 9


def test_a_word_is_only_raised(slab: SharedSlab) -> None:
    assert [slab._word_raise(3, value) for value in (5, 5, 4, 6, HUGE, HUGE)] == [True, False, False, True, True, False]
    assert slab._word(3) == HUGE


@pytest.mark.parametrize("index", [62, 63, 64, 2**40])
def test_the_kernels_words_are_its_own(slab: SharedSlab, index: int) -> None:
    for change in (slab._word_set, slab._word_raise):
        with pytest.raises(IndexError, match="0 to 61"):
            change(index, 1)
    with pytest.raises(IndexError, match="0 to 61"):
        slab._word_exchange(index, 0, 1)


def test_values_of_words_are_unsigned_64_bits(slab: SharedSlab) -> None:
    for value in (-1, 2**64):
        with pytest.raises(ValueError, match=r"0 to 2\*\*64 - 1"):
            slab._word_set(0, value)
    with pytest.raises(TypeError, match="str"):
        slab._word_set(0, "1")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="0 to 63"):
        slab._word(64)


def test_a_tag_raised_is_raised_for_all_and_never_lowered(slab: SharedSlab, run_python: Callable[..., str]) -> None:
    assert slab._tag_raise(HUGE, 5)
    program = """
import sys
from llm_edge_cache import SharedSlab
slab = SharedSlab.attach(sys.argv[1])
print(slab._tag(2**64 - 1), slab._tag_raise(2**64 - 1, 5), slab._tag_raise(2**64 - 1, 7))
"""
    assert run_python(program, slab.name) == "5 False True"
    assert slab._tag(HUGE) == 7
    assert slab._tag(HUGE - 1) == 0  # another one


def test_a_word_is_added_to_by_all(slab: SharedSlab, run_python: Callable[..., str]) -> None:
    assert slab._word_add(1, 2) == 2
    program = "import sys; from llm_edge_cache import SharedSlab; print(SharedSlab.attach(sys.argv[1])._word_add(1, 3))"
    assert run_python(program, slab.name) == "5"
    assert slab._word(1) == 5


def test_a_fence_is_moved_by_deletes_and_clears_but_not_by_sets(slab: SharedSlab) -> None:
    fence = slab._fence(b"key")
    slab.set(b"key", b"1")
    assert slab._fence(b"key") == fence
    assert slab._fill_fenced(b"key", b"2", fence)
    slab.delete(b"key")
    assert not slab._fill_fenced(b"key", b"3", fence)
    fence = slab._fence(b"key")
    slab.delete(b"key")  # absent: a fill that began before is refused all the same
    assert not slab._fill_fenced(b"key", b"3", fence)
    fence = slab._fence(b"key")
    slab.clear()
    assert not slab._fill_fenced(b"key", b"3", fence)
    assert slab.get(b"key") is None


def test_a_take_over_moves_the_fence(slab: SharedSlab) -> None:
    slab._flight_join(b"key", 1)
    time.sleep(0.02)  # its lease is over, by the coarse clock too
    fence = slab._fence(b"key")
    assert slab._flight_join(b"key", 10**9)[0] == native.FLIGHT_TAKEN_OVER
    assert not slab._fill_fenced(b"key", b"value", fence)


def test_an_identity_is_alive_as_long_as_its_process(slab: SharedSlab) -> None:
    reading, writing = os.pipe()

    def tell() -> None:
        os.write(writing, b"%d" % slab._identity())
        signal.pause()

    child = fork(tell)
    identity = int(os.read(reading, 100))
    assert identity != slab._identity()
    assert slab._is_alive(slab._identity())
    assert slab._is_alive(identity)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not slab._is_alive(identity)  # a zombie
    os.waitpid(child, 0)
    assert not slab._is_alive(identity)
    assert not slab._is_alive(0)
    os.close(reading)
    os.close(writing)


def test_a_retired_segment_is_followed(slab: SharedSlab) -> None:
    slab._count(0)
    slab._word_set(0, 5)
    with SharedSlab(slab.name, SlabConfig(memory_bytes=5 * MiB), replace=True) as successor:
        slab._count(0, 3)
        slab._word_set(1, 6)
        assert slab._counter_sums()[0] == successor._counter_sums()[0] == 3
        assert (successor._word(0), successor._word(1)) == (0, 6)


def test_without_a_segment_nothing_is_done(slab: SharedSlab) -> None:
    slab._count(0)
    slab.unlink()
    slab._count(0)
    slab._record(0, 0, 0, 1, 1)
    slab._observe(0, 1)
    slab._word_set(0, 1)
    assert slab._counter_sums() == (0,) * COUNTERS
    assert slab._histogram_sums() == ((0,) * 32,) * HISTOGRAMS
    assert (slab._word(0), slab._tag(0), slab._word_add(0, 1), slab._identity(), slab._bell()) == (0, 0, 0, 0, 0)
    assert (slab._tag_raise(0, 1), slab._fence(b"key"), slab._fill_fenced(b"key", b"", 0)) == (False, 0, False)
    assert (slab._word_exchange(0, 0, 1), slab._word_raise(0, 1)) == (False, False)
    assert slab._flight_join(b"key", 10**9) == (native.FLIGHT_NONE, 0, 0)
    assert (slab._flight_renew(0, 1, 1), slab._flight_advance(0, 1, 1), slab._flight_end(0, 1)) == (False, False, False)
    assert slab._flight_state(0, 1) == slab._flight_wait(0, 1, 0, 10**10) == -1
    assert slab._bell_wait(0, 10**7) == 0


def test_a_closed_slab_says_so(name: str) -> None:
    slab = SharedSlab(name, SlabConfig(memory_bytes=4 * MiB))
    slab.close()
    for call in (
        lambda: slab._count(0),
        lambda: slab._record(0, 0, 0),
        lambda: slab._observe(0, 0),
        slab._counter_sums,
        slab._histogram_sums,
        lambda: slab._word(0),
        lambda: slab._word_set(0, 0),
        lambda: slab._tag(0),
        slab._identity,
        lambda: slab._flight_join(b"key", 1),
        lambda: slab._flight_end(0, 1),
        lambda: slab._flight_state(0, 1),
        lambda: slab._flight_wait(0, 1, 0, 0),
        slab._bell,
        lambda: slab._bell_wait(0, 0),
    ):
        with pytest.raises(SlabClosedError):
            call()
