"""Runs actors one at a time, in an order that a seed decides, and switches wherever one of them calls pause().

Each actor is a thread, so that the code under test stays as it is; a baton sees to it that only one runs. What touches
shared state calls pause() first (`stepped` does that for slab, Redis, locks and events), so every order of such steps
can come up, and the same seed brings the same one again, as far as real time (leases, lives) plays no part.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

_IDLE_WEIGHT = 0.01


class Killed(BaseException):
    """Ends an actor as SIGKILL would: whatever it tries to do on its way out raises this again."""


class Stuck(AssertionError):  # noqa: N818 - what they are
    """The actors went on for too long."""


class Actor:
    """One thread; `group` is the process that it belongs to, `weight` how often its turn comes."""

    def __init__(self, name: str, group: str, weight: float, work: Callable[[], None]) -> None:
        self.name = name
        self.group = group
        self.weight = weight
        self.work = work
        self.turn = threading.Lock()
        self.turn.acquire()
        self.is_idle = False
        self.until: Callable[[], bool] | None = None
        self.is_killed = False
        self.is_done = False
        self.thread: threading.Thread | None = None


class Interleaver:
    """The actors of one interleaving.

    Args:
        generator: Decides everything.
        stickiness: 0 to 1, how likely the actor whose turn it is goes on.
        limit: Steps after which the run counts as stuck.
        idle_seconds: How long to sleep when nothing but time can make a difference.
    """

    def __init__(
        self, generator: random.Random, *, stickiness: float = 0.0, limit: int = 60_000, idle_seconds: float = 0.0
    ) -> None:
        self._random = generator
        self._stickiness = stickiness
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._actors: list[Actor] = []
        self._current: Actor | None = None
        self._finished = threading.Lock()
        self._finished.acquire()
        self._error: BaseException | None = None
        self._is_running = False
        self.steps = 0
        self.on_step: Callable[[int], None] = lambda _: None

    def spawn(self, name: str, group: str, work: Callable[[], None], *, weight: float = 1.0) -> Actor:
        """Add an actor; also while others run."""
        actor = Actor(name, group, weight, work)
        self._actors.append(actor)
        if self._is_running:
            self._start(actor)
        return actor

    def run(self) -> None:
        """Run until every actor has ended.

        Raises:
            Stuck: they did not.
            Whatever an actor raised, but for Killed.
        """
        self._is_running = True
        for actor in list(self._actors):
            self._start(actor)
        self._pass_on()
        self._finished.acquire()
        self._is_running = False
        self._current = None
        for actor in self._actors:
            assert actor.thread is not None
            actor.thread.join(10)
        if self._error is not None:
            raise self._error

    @property
    def group(self) -> str:
        """The process whose actor it is that runs now."""
        return self._current.group if self._current is not None else ""

    def kill(self, group: str) -> None:
        """Kill a process: none of its actors does anything from now on."""
        for actor in self._actors:
            if actor.group == group:
                actor.is_killed = True

    def living(self, *names: str) -> bool:
        """Tell whether an actor whose name begins with one of these has not ended."""
        return any(not actor.is_done and actor.name.startswith(names) for actor in self._actors)

    def pause(self, *, idle: bool = False, until: Callable[[], bool] | None = None) -> None:
        """Let others go first, perhaps.

        Args:
            idle: It makes little sense to go on before others have done something.
            until: Go on only when this is true.

        Raises:
            Killed: this actor was killed.
        """
        me = self._current
        if not self._is_running or me is None or me.thread is not threading.current_thread():
            return
        if me.is_killed:
            raise Killed
        self.steps += 1
        if self.steps > self._limit:
            self._give_up(Stuck(f"{self._limit} steps, and still going: {[a.name for a in self._alive()]}"))
            raise Killed
        self.on_step(self.steps)
        me.is_idle, me.until = idle, until
        if idle or until is not None or self._random.random() >= self._stickiness:
            self._pass_on()
            me.turn.acquire()
        me.is_idle, me.until = False, None
        if me.is_killed:
            raise Killed

    # ---- the baton ----

    def _alive(self) -> list[Actor]:
        return [actor for actor in self._actors if not actor.is_done]

    def _pass_on(self) -> None:
        alive = self._alive()
        if not alive:
            self._finished.release()
            return
        able = [actor for actor in alive if actor.is_killed or actor.until is None or actor.until()]
        if not able:
            self._give_up(Stuck(f"each waits for another: {[actor.name for actor in alive]}"))
            able = alive
        if self._idle_seconds and all(actor.is_idle for actor in able):
            time.sleep(self._idle_seconds)
        weights = [actor.weight * (_IDLE_WEIGHT if actor.is_idle else 1.0) for actor in able]
        self._current = self._random.choices(able, weights)[0]
        self._current.turn.release()

    def _start(self, actor: Actor) -> None:
        actor.thread = threading.Thread(target=self._live, args=(actor,), name=actor.name, daemon=True)
        actor.thread.start()

    def _live(self, actor: Actor) -> None:
        actor.turn.acquire()
        try:
            if not actor.is_killed:
                actor.work()
        except Killed:
            pass
        except BaseException as error:
            self._give_up(error)
        actor.is_done = True
        self._pass_on()

    def _give_up(self, error: BaseException) -> None:
        self._error = self._error or error
        for actor in self._actors:
            actor.is_killed = True
