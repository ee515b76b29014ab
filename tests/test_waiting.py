"""How coroutines wait for the flights of other processes."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from processes import fork

from llm_edge_cache import SharedSlab, SlabClosedError
from llm_edge_cache.waiting import FlightWaiters

SECOND = 10**9
LONG = 20.0  # seconds; a liveness deadline
THREAD = "llm-edge-cache-waiters"


def begin(slab: SharedSlab, key: bytes = b"key") -> tuple[int, int]:
    _, record, token = slab._flight_join(key, 60 * SECOND)
    return record, token


def threads() -> int:
    return [thread.name for thread in threading.enumerate()].count(THREAD)


def wait_no_thread() -> None:
    end = time.monotonic() + LONG
    while threads():
        assert time.monotonic() < end, "the waiting thread does not end"
        time.sleep(0.002)


@pytest.fixture
def waiters(slab: SharedSlab) -> Iterator[FlightWaiters]:
    """Of this process; its thread ends once nobody waits."""
    yield FlightWaiters(slab)
    wait_no_thread()


def test_a_flight_that_is_over_is_not_waited_for(slab: SharedSlab, waiters: FlightWaiters) -> None:
    record, token = begin(slab)
    slab._flight_end(record, token)
    assert asyncio.run(waiters.wait(record, token, LONG)) == -1


def test_the_end_of_a_flight_wakes_all_who_wait_for_it_and_nobody_else(
    slab: SharedSlab, waiters: FlightWaiters
) -> None:
    ending, going_on = begin(slab), begin(slab, b"other")

    async def wait() -> list[int]:
        tasks = [asyncio.ensure_future(waiters.wait(*ending, LONG)) for _ in range(50)]
        other = asyncio.ensure_future(waiters.wait(*going_on, LONG))
        await asyncio.sleep(0.02)
        slab._flight_end(*ending)
        states = await asyncio.gather(*tasks)
        assert not other.done()
        other.cancel()
        return states

    assert asyncio.run(wait()) == [-1] * 50
    assert not waiters._waiters


def test_progress_wakes_too(slab: SharedSlab, waiters: FlightWaiters) -> None:
    flight = begin(slab)

    async def wait() -> int:
        task = asyncio.ensure_future(waiters.wait(*flight, LONG))
        await asyncio.sleep(0.02)
        slab._flight_advance(*flight, 7)
        return await task

    assert asyncio.run(wait()) == 7


def test_waiting_ends_when_time_is_up(slab: SharedSlab, waiters: FlightWaiters) -> None:
    assert asyncio.run(waiters.wait(*begin(slab), 0.02)) == 0


def test_an_owner_that_dies_rings_no_bell_and_is_noticed(slab: SharedSlab, waiters: FlightWaiters) -> None:
    reading, writing = os.pipe()

    def lead() -> None:
        os.write(writing, b"%d %d" % begin(slab))
        signal.pause()

    child = fork(lead)
    record, token = map(int, os.read(reading, 100).split())

    async def wait() -> int:
        task = asyncio.ensure_future(waiters.wait(record, token, LONG))
        await asyncio.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        return await task

    assert asyncio.run(wait()) == -1
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


def test_loops_in_several_threads_wait_with_one_thread(slab: SharedSlab, waiters: FlightWaiters) -> None:
    flight = begin(slab)
    states: list[int] = []
    loops = [threading.Thread(target=lambda: states.append(asyncio.run(waiters.wait(*flight, LONG)))) for _ in range(4)]
    for loop in loops:
        loop.start()
    end = time.monotonic() + LONG
    while len(waiters._waiters) < 4:
        assert time.monotonic() < end
        time.sleep(0.002)
    assert threads() == 1
    slab._flight_end(*flight)
    for loop in loops:
        loop.join(LONG)
    assert states == [-1] * 4


def test_a_loop_that_was_closed_meanwhile_does_not_end_the_thread(slab: SharedSlab, waiters: FlightWaiters) -> None:
    flight = begin(slab)
    loop = asyncio.new_event_loop()
    task = loop.create_task(waiters.wait(*flight, LONG))
    loop.run_until_complete(asyncio.sleep(0.01))
    kept = set(waiters._waiters)  # a loop that is closed with a task on it leaves its waiter behind
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    waiters._waiters |= kept

    async def wait() -> int:
        other = asyncio.ensure_future(waiters.wait(*flight, LONG))
        await asyncio.sleep(0.02)
        slab._flight_end(*flight)
        return await other

    assert asyncio.run(wait()) == -1
    waiters._waiters.clear()


def test_the_thread_ends_when_nobody_waits_and_starts_again(slab: SharedSlab, waiters: FlightWaiters) -> None:
    flight = begin(slab)
    for _ in range(3):
        assert asyncio.run(waiters.wait(*flight, 0.01)) == 0
        wait_no_thread()


def test_who_waits_when_the_slab_is_closed_is_told(slab: SharedSlab, waiters: FlightWaiters) -> None:
    flight = begin(slab)

    async def wait() -> None:
        task = asyncio.ensure_future(waiters.wait(*flight, LONG))
        await asyncio.sleep(0.02)
        slab.close()
        with pytest.raises(SlabClosedError):
            await task

    asyncio.run(wait())
