"""Slab, Redis and threading as the actors of an interleaving see them: every access is a step."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

from interleaver import Interleaver

from llm_edge_cache import SharedSlab
from llm_edge_cache.redis_client import Batch, Call, RedisClient, RedisTrouble

_UNSTEPPED = frozenset({"_count", "_record", "_observe", "_mapping", "_counter_sums", "closed", "name", "config"})


class SteppedSlab:
    """A SharedSlab whose every operation on entries, words, tags and flights is one step; counting is none."""

    def __init__(self, slab: SharedSlab, interleaver: Interleaver) -> None:
        self._real = slab
        self._interleaver = interleaver

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name in _UNSTEPPED or not callable(found):
            return found
        pause = self._interleaver.pause

        def stepped(*args: Any, **options: Any) -> Any:
            pause()
            return found(*args, **options)

        self.__dict__[name] = stepped
        return stepped

    def __len__(self) -> int:
        return len(self._real)

    def __contains__(self, key: bytes) -> bool:
        self._interleaver.pause()
        return key in self._real

    def _flight_wait(self, record: int, token: int, progress: int, timeout_ns: int) -> int:
        self._interleaver.pause(idle=True)
        return self._real._flight_state(record, token)


class SteppedRedis:
    """A RedisClient that carries out one command a step, those of a Batch in any order, and fails on command.

    Args:
        client: Speaks to the real server.
        interleaver: Whose steps.
        generator: Decides orders and failures.
        failing: Share of the commands that fail: half of them before they are carried out, half after.
        saw: Told of every command that was carried out, and its reply.
    """

    def __init__(
        self,
        client: RedisClient,
        interleaver: Interleaver,
        generator: random.Random,
        failing: float,
        saw: Callable[[Any, Any], None],
    ) -> None:
        self._client = client
        self._interleaver = interleaver
        self._random = generator
        self.failing = failing
        self._saw = saw

    def run(self, command: Any, *, blocking: float = 0.0, until: float | None = None) -> Any:
        if isinstance(command, Batch):
            return self._run_batch(command)
        if blocking:
            at = command.args.index(b"BLOCK")
            command = Call(command.args[:at] + command.args[at + 2 :])
        return self._run_one(command)

    def close_blocking(self) -> None:
        """There is no connection apart from the others'."""

    def _run_batch(self, batch: Batch) -> list[Any]:
        replies: list[Any] = [None] * len(batch.commands)
        # They are said not to depend on each other: a script that the server does not know is sent again, at the end.
        for at in self._random.sample(range(len(replies)), len(replies)):
            try:
                replies[at] = self._run_one(batch.commands[at])
            except RedisTrouble as trouble:  # noqa: PERF203 - each command fails for itself
                if trouble.is_outage:
                    raise
                replies[at] = trouble
        return replies

    def _run_one(self, command: Any) -> Any:
        self._interleaver.pause()
        fails = self.failing and self._random.random() < self.failing
        if fails and self._random.random() < 0.5:
            raise RedisTrouble("connection", "it was not carried out")
        reply = self._client.run(command)
        self._saw(command, reply)
        if fails:
            raise RedisTrouble("timeout", "it was carried out, and the reply got lost")
        return reply

    def connect(self) -> None:
        self._interleaver.pause()

    def close(self) -> None:
        pass


class _Lock:
    def __init__(self, interleaver: Interleaver) -> None:
        self._interleaver = interleaver
        self._is_held = False

    def __enter__(self) -> None:
        self._interleaver.pause()
        if self._is_held:
            self._interleaver.pause(until=lambda: not self._is_held)
        self._is_held = True

    def __exit__(self, *_: object) -> None:
        self._is_held = False


class _Event:
    def __init__(self, interleaver: Interleaver) -> None:
        self._interleaver = interleaver
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def wait(self, timeout: float | None = None) -> bool:
        self._interleaver.pause(until=None if timeout is not None else self.is_set)
        return self._is_set


class _Thread:
    def __init__(self, interleaver: Interleaver, target: Any, args: Any, name: str, daemon: bool) -> None:
        self._start = lambda: interleaver.spawn(name, interleaver.group, lambda: target(*args))

    def start(self) -> None:
        self._start()


def stepped_threading(interleaver: Interleaver) -> Any:
    """What stands for the module `threading` in a module under test."""
    return types.SimpleNamespace(
        Lock=lambda: _Lock(interleaver),
        Event=lambda: _Event(interleaver),
        Thread=lambda target, args, name, daemon: _Thread(interleaver, target, args, name, daemon),
    )
