"""Steps of the cache that need the world: what a decision asks for, and what performs it.

Every operation of the cache that goes beyond shared memory is written once, as a generator. It yields an effect where
it needs Redis, time or the caller's computation, and is sent the outcome, or has the exception thrown in. `perform`
runs such a generator with blocking calls; `perform_async` runs the same one on an event loop. So both faces make the
same decisions, and a test can interleave operations at every step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from llm_edge_cache.redis_client import Batch, Call, Script

if TYPE_CHECKING:
    from llm_edge_cache.redis_client import AsyncRedisClient, RedisClient

__all__ = [
    "AsyncWorld",
    "BlockingCall",
    "Compute",
    "Effect",
    "Pause",
    "Steps",
    "WaitForFlight",
    "World",
    "perform",
    "perform_async",
]

_T = TypeVar("_T")


class WaitForFlight(NamedTuple):
    """Wait until a flight is no more, or its time is up."""

    record: int
    token: int
    seconds: float


class BlockingCall(NamedTuple):
    """A command that the server answers when there is something to tell, after so many seconds at the latest."""

    call: Call
    seconds: float


class Pause(NamedTuple):
    """Wait."""

    seconds: float


class Compute(NamedTuple):
    """Call the caller's function; the outcome is what it returns."""


Effect = Call | Script | Batch | BlockingCall | WaitForFlight | Pause | Compute
Steps = Generator[Effect, Any, _T]
"""An operation that returns a _T once its effects have been performed."""


class World(NamedTuple):
    """What `perform` performs effects with."""

    redis: RedisClient | None
    wait: Callable[[WaitForFlight], object]
    compute: Callable[[], object] | None = None
    until: float | None = None
    """Reading of `time.monotonic` at which the last command to Redis ends; None: each has the operation timeout."""


class AsyncWorld(NamedTuple):
    """What `perform_async` performs effects with."""

    redis: AsyncRedisClient | None
    wait: Callable[[WaitForFlight], Awaitable[object]]
    compute: Callable[[], Awaitable[object]] | None = None
    until: float | None = None


def perform(steps: Steps[_T], world: World) -> _T:
    """Run an operation in this thread and return its result; raises what it raises."""
    outcome: object = None
    error: BaseException | None = None
    while True:
        try:
            effect = steps.send(outcome) if error is None else steps.throw(error)
        except StopIteration as stop:
            result: _T = stop.value
            return result
        outcome, error = None, None
        try:
            outcome = _perform_one(effect, world)
        except BaseException as raised:  # it goes on inside the operation
            error = raised


def _perform_one(effect: Effect, world: World) -> object:
    if isinstance(effect, Compute):
        assert world.compute is not None
        return world.compute()
    if isinstance(effect, WaitForFlight):
        return world.wait(effect)
    if isinstance(effect, Pause):
        time.sleep(effect.seconds)
        return None
    assert world.redis is not None
    if isinstance(effect, BlockingCall):
        return world.redis.run(effect.call, blocking=effect.seconds)
    return world.redis.run(effect, until=world.until)


async def perform_async(steps: Steps[_T], world: AsyncWorld) -> _T:
    """Run an operation on the running event loop and return its result; raises what it raises."""
    outcome: object = None
    error: BaseException | None = None
    while True:
        try:
            effect = steps.send(outcome) if error is None else steps.throw(error)
        except StopIteration as stop:
            result: _T = stop.value
            return result
        outcome, error = None, None
        try:
            outcome = await _perform_one_async(effect, world)
        except BaseException as raised:  # it goes on inside the operation, cancellation too
            error = raised


async def _perform_one_async(effect: Effect, world: AsyncWorld) -> object:
    if isinstance(effect, Compute):
        assert world.compute is not None
        return await world.compute()
    if isinstance(effect, WaitForFlight):
        return await world.wait(effect)
    if isinstance(effect, Pause):
        await asyncio.sleep(effect.seconds)
        return None
    assert world.redis is not None
    if isinstance(effect, BlockingCall):
        return await world.redis.run(effect.call, blocking=effect.seconds)
    return await world.redis.run(effect, until=world.until)
