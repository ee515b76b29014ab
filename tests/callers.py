"""Callers of the cache: both faces behind one, here or in processes of their own, and a provider that counts its calls.

with crew("asyncio", 4, l1) as workers:
    calls = [worker.call(provider, callers=50) for worker in workers]
    outcomes = [outcome for call in calls for outcome in call.result(LIVENESS)]
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

from processes import stop

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    CacheManager,
    L1Config,
    L2Config,
    SharedSlab,
    SyncCacheManager,
)
from llm_edge_cache.flight import Running
from llm_edge_cache.regions import Counter

FACES = ("asyncio", "threads")
LIVENESS = 60.0  # seconds after which something that takes two at most is given up

_fork = multiprocessing.get_context("fork")


class ProviderError(Exception):
    """What a provider raises that is told to."""


class Answered(NamedTuple):
    """A call of the provider."""

    pid: int
    at_ns: int
    """CLOCK_MONOTONIC."""


class Provider(NamedTuple):
    """A provider whose calls are counted in a file, across processes and their deaths."""

    log: Path
    seconds: float = 0.0
    """How long it takes."""
    gate: Path | None = None
    """It answers once there is a file of this name."""
    error: str | None = None
    """It raises ProviderError of this text."""
    content: str | None = "answer of {pid}"
    """What it answers; None for no answer."""
    repeat: int = 1
    """The content so many times over."""

    def calls(self) -> list[Answered]:
        """The calls so far."""
        if not self.log.exists():
            return []
        return [Answered(*map(int, line.split())) for line in self.log.read_text().splitlines()]

    def wait_called(self, count: int = 1) -> list[Answered]:
        """Wait until so many calls have begun."""
        wait_until(lambda: len(self.calls()) >= count, f"{count} calls of the provider")
        return self.calls()

    def open(self) -> None:
        """Let it answer."""
        assert self.gate is not None
        self.gate.touch()

    def _begin(self) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b"%d %d\n" % (os.getpid(), time.monotonic_ns()))  # one write: lines do not mix
        os.close(descriptor)

    def _is_shut(self) -> bool:
        return self.gate is not None and not self.gate.exists()

    def _answer(self) -> CachedResponse | None:
        if self.error is not None:
            raise ProviderError(self.error)
        return None if self.content is None else CachedResponse(self.content.format(pid=os.getpid()) * self.repeat, "m")

    def compute(self) -> CachedResponse | None:
        """The call, in a thread."""
        self._begin()
        time.sleep(self.seconds)
        while self._is_shut():
            time.sleep(0.002)
        return self._answer()

    async def compute_async(self) -> CachedResponse | None:
        """The call, on an event loop."""
        self._begin()
        await asyncio.sleep(self.seconds)
        while self._is_shut():
            await asyncio.sleep(0.002)
        return self._answer()


class Outcome(NamedTuple):
    """What came of one get_or_compute()."""

    content: str | None
    """The answer's; None where there is none."""
    error: str | None
    """The name of the exception's class."""
    at_ns: int
    """When the caller had it; CLOCK_MONOTONIC."""
    text: str = ""
    """The exception's."""


def wait_until(is_so: Callable[[], object], what: str, seconds: float = LIVENESS) -> None:
    """Ask until the answer is true."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.002)


def request(name: str = "question") -> CacheableRequest:
    return CacheableRequest("m", name)


# ---- one face for both ----


class Threads:
    """A SyncCacheManager; every call in a thread of its own."""

    def __init__(self, manager: SyncCacheManager) -> None:
        self.manager = manager
        self._pool = ThreadPoolExecutor(256)

    def open(self) -> None:
        self.manager.open()

    def start(self, provider: Provider, name: str = "question", **options: Any) -> Future[Any]:
        """Begin a get_or_compute()."""
        return self._pool.submit(self.manager.get_or_compute, request(name), provider.compute, **options)

    def do(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call any other method and return its result."""
        return getattr(self.manager, method)(*arguments, **options)

    def close(self) -> None:
        self.manager.close()
        self._pool.shutdown(wait=False)


class Loop:
    """A CacheManager on an event loop in a thread; every call is a task of its own."""

    def __init__(self, manager: CacheManager) -> None:
        self.manager = manager
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="callers' loop", daemon=True)
        self._thread.start()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LIVENESS)

    def open(self) -> None:
        self._run(self.manager.open())

    def start(self, provider: Provider, name: str = "question", **options: Any) -> Future[Any]:
        """Begin a get_or_compute()."""
        work = self.manager.get_or_compute(request(name), provider.compute_async, **options)
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def do(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call any other method and return its result."""

        async def call() -> Any:
            result = getattr(self.manager, method)(*arguments, **options)
            return await result if isinstance(result, Awaitable) else result

        return self._run(call())

    def close(self) -> None:
        self._run(self.manager.aclose())
        self.stop()

    def stop(self) -> None:
        """End the loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LIVENESS)
        self.loop.close()


Face = Threads | Loop


def close_copies(manager: CacheManager) -> None:
    """Do what the garbage collector of a forked child may do to its copy of the parent's tasks."""
    for state in list(manager._loops.values()):
        for task in state.tasks:
            with contextlib.suppress(ValueError):  # the fork came while the parent's loop executed it: it stays so here
                task.get_coro().close()  # type: ignore[union-attr]


def make_face(kind: str, l1: L1Config, l2: L2Config | None = None) -> Face:
    """kind: one of FACES."""
    return Loop(CacheManager(l1, l2)) if kind == "asyncio" else Threads(SyncCacheManager(l1, l2))


def outcome_of(call: Future[Any]) -> Outcome:
    """Wait for a call and return what came of it."""
    try:
        response = call.result(LIVENESS)
    except Exception as error:
        return Outcome(None, type(error).__name__, time.monotonic_ns(), str(error))
    return Outcome(None if response is None else response.content, None, time.monotonic_ns())


# ---- callers in processes of their own ----


def _at(done: Future[Any], outcomes: list[Outcome]) -> None:
    outcomes.append(outcome_of(done))


def _call(face: Face, provider: Provider, callers: int, name: str, options: dict[str, Any]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    calls = [face.start(provider, name, **options) for _ in range(callers)]
    for call in calls:
        call.add_done_callback(lambda done: _at(done, outcomes))  # at once, in the thread that ends it
    wait_until(lambda: len(outcomes) == callers, "all callers are served", 2 * LIVENESS)
    return outcomes


def _count_joins(face: Face, joined: Synchronized[int]) -> None:
    """Count how often this process finds a flight of another one, and is going to wait for it."""
    flights = face.manager._engine.flights
    join = flights.join

    def counted(*arguments: Any) -> Any:
        found = join(*arguments)
        if isinstance(found, Running):
            with joined.get_lock():
                joined.value += 1
        return found

    flights.join = counted  # type: ignore[method-assign]


def _serve(pipe: Connection, kind: str, l1: L1Config, l2: L2Config | None, joined: Synchronized[int]) -> None:
    face = make_face(kind, l1, l2)
    _count_joins(face, joined)
    face.open()
    pipe.send((0, os.getpid()))
    lock = threading.Lock()

    def answer(number: int, what: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            result = _call(face, *arguments, options) if what == "call" else face.do(what, *arguments, **options)
        except BaseException as error:
            result = error
        with lock:
            pipe.send((number, result))

    while True:
        try:
            command = pipe.recv()
        except (EOFError, OSError):
            break
        if command is None:
            break
        threading.Thread(target=answer, args=command, daemon=True).start()
    face.close()


class Worker:
    """A process with a cache manager; ended by `end` or `kill`."""

    def __init__(self, kind: str, l1: L1Config, l2: L2Config | None = None) -> None:
        self.slab_name = l1.name
        self._pipe, theirs = _fork.Pipe()
        self._joined = _fork.Value("i", 0)
        self._process = _fork.Process(target=_serve, args=(theirs, kind, l1, l2, self._joined), daemon=True)
        self._process.start()
        theirs.close()
        self._waiting: dict[int, Future[Any]] = {}
        self._number = 0
        assert self._pipe.poll(LIVENESS), "the worker did not start"
        self.pid: int = self._pipe.recv()[1]
        threading.Thread(target=self._listen, name="worker's answers", daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, result = self._pipe.recv()
                future = self._waiting.pop(number)
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _send(self, what: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Future[Any]:
        self._number += 1
        future = self._waiting[self._number] = Future()
        self._pipe.send((self._number, what, arguments, options))
        return future

    def call(
        self, provider: Provider, callers: int = 1, name: str = "question", **options: Any
    ) -> Future[list[Outcome]]:
        """Begin so many concurrent get_or_compute() of one request; the outcomes come once all are served."""
        return self._send("call", (provider, callers, name), options)

    def do(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call another method of the manager and return its result."""
        return self._send(method, arguments, options).result(LIVENESS)

    @property
    def joined(self) -> int:
        """How often it has found a flight of another process, and waits or waited for it."""
        return self._joined.value

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(LIVENESS)

    def is_alive(self) -> bool:
        """Tell whether it runs."""
        return self._process.is_alive()

    def pause(self) -> None:
        """SIGSTOP."""
        stop(self.pid)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def begin_end(self) -> None:
        """Tell it to close the manager."""
        with contextlib.suppress(OSError):
            self.resume()
            self._pipe.send(None)

    def end(self) -> None:
        """Close the manager and end the process."""
        self.begin_end()
        self._process.join(LIVENESS)
        self.kill()
        self._pipe.close()


@contextlib.contextmanager
def crew(kind: str, count: int, l1: L1Config, l2: L2Config | None = None) -> Iterator[list[Worker]]:
    """So many workers over one slab."""
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(count):
            worker = Worker(kind, l1, l2)
            stack.callback(worker.end)
            workers.append(worker)
        yield workers
        for worker in workers:  # all at once: each may have a read of the stream under way
            worker.begin_end()


def wait_joined(workers: list[Worker], callers: int) -> None:
    """Wait until one of these workers computes and all other callers, so many in all, have joined it.

    In each process one caller joins the flight of the other process, and the others join that one.
    """
    wait_until(lambda: sum(worker.joined for worker in workers) >= len(workers) - 1, "the processes join")
    with SharedSlab.attach(workers[0].slab_name) as slab:
        alone = callers - len(workers)
        wait_until(lambda: slab._counter_sums()[Counter.COALESCED] >= alone, "the callers join")
