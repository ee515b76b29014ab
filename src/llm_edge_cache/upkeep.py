"""What a process does for the cache beside its requests, in one thread: renew what it leads, probe, deliver, follow.

The thread starts with the first need for it: a flight that this process leads, or a Redis behind the slab. Every step
is bounded by the operation timeout (a probe: by the connection timeout), so that leases are renewed in time.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from llm_edge_cache.effects import Steps, World, perform
from llm_edge_cache.errors import SlabClosedError, SlabError
from llm_edge_cache.flight import Flights, Running
from llm_edge_cache.follower import Follower
from llm_edge_cache.invalidation import Invalidator
from llm_edge_cache.redis_client import Batch, Call, RedisTrouble
from llm_edge_cache.redis_tier import LEASE_MS, RedisTier
from llm_edge_cache.regions import Word
from llm_edge_cache.sizing import Sizer

if TYPE_CHECKING:
    from llm_edge_cache.redis_client import RedisClient
    from llm_edge_cache.slab import SharedSlab

__all__ = ["Upkeep"]

_log = logging.getLogger("llm_edge_cache")

_RENEWAL_NS: Final = 500_000_000
_TICK_SECONDS: Final = 0.1


class Upkeep:
    """The upkeep of one process, for one slab and the Redis behind it."""

    def __init__(
        self,
        slab: SharedSlab,
        flights: Flights,
        redis: RedisClient | None,
        tier: RedisTier | None,
        invalidator: Invalidator,
    ) -> None:
        """Look after these; without a tier there are only flights to renew."""
        self._slab = slab
        self._flights = flights
        self._redis = redis
        self._tier = tier
        self._invalidator = invalidator
        self._follower = None if tier is None else Follower(slab, tier, invalidator)
        self._sizer = None if tier is None else Sizer(slab, tier)
        self._renewed_ns = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._established = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llm-edge-cache-upkeep", daemon=True)
        self._has_started = False

    def start(self) -> None:
        """See to it that the thread runs."""
        with self._lock:
            if not self._has_started and not self._stop.is_set():
                self._thread.start()
                self._has_started = True

    def wait_established(self, seconds: float) -> bool:
        """Wait until this host has read the invalidation stream once, or Redis turned out to be away."""
        return self._established.wait(seconds)

    def stop(self, seconds: float) -> None:
        """End the thread; another process reads the stream from now on."""
        self._stop.set()
        self._established.set()
        if self._has_started:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._tick()
                except SlabClosedError:  # noqa: PERF203 - a round lasts a tenth of a second
                    return
                except RedisTrouble:
                    self._pause()
                except SlabError as error:
                    _log.debug("upkeep: %s", error)
                    self._pause()
                except Exception:
                    _log.exception("upkeep: it goes on")
                    self._pause()
            if self._follower is not None and not self._slab.closed:
                self._follower.resign()
        except SlabError as error:
            _log.debug("upkeep ends: %s", error)

    def _pause(self) -> None:
        self._established.set()
        self._stop.wait(_TICK_SECONDS)

    def _tick(self) -> None:
        """One round; the follower's wait for news is its pause."""
        now_ns = time.monotonic_ns()
        self._renew_if_due()
        if self._tier is None or self._follower is None:
            self._stop.wait(_TICK_SECONDS)
        elif not self._tier.breaker.is_closed():
            self._probe(now_ns)
            self._pause()
        else:
            self._serve(self._follower, now_ns)

    def _serve(self, follower: Follower, now_ns: int) -> None:
        """What a host does while Redis answers."""
        if self._slab._word(Word.UNDELIVERED):
            self._perform(self._invalidator.deliver())
        is_elected = follower.elect(now_ns)
        if is_elected and not follower.has_place:
            self._perform(follower.follow(waits=False))
        if self._slab._word(Word.CURSOR):  # whoever waits for that need not wait for news
            self._established.set()
        if is_elected:
            self._perform(follower.follow())
            if self._sizer is not None and self._sizer.is_due(now_ns):
                self._perform(self._sizer.sample(now_ns))
        else:
            if self._redis is not None:
                self._redis.close_blocking()  # it may have been the reader before: a host keeps one such connection
            self._stop.wait(_TICK_SECONDS)

    def _renew_if_due(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._renewed_ns >= _RENEWAL_NS:
            self._renewed_ns = now_ns
            self._renew(now_ns)

    def _renew(self, now_ns: int) -> None:
        held = [(lead, lead.lease) for lead in self._flights.renew()]
        leases = [(lead, lease) for lead, lease in held if lease is not None]  # it may have been given up by now
        tier = self._tier
        if not leases or tier is None or not tier.breaker.is_closed():
            return
        commands = [tier.renew_command(lead.key, lease) for lead, lease in leases]
        try:
            replies = perform(tier.ask(Batch(tuple(commands))), self._world())
        except RedisTrouble as trouble:
            _log.debug("leases not renewed: %s", trouble)
            return
        for (lead, _), reply in zip(leases, replies, strict=True):
            if reply == 1:
                lead.lease_until_ns = now_ns + LEASE_MS * 1_000_000

    def _probe(self, now_ns: int) -> None:
        assert self._tier is not None
        assert self._redis is not None
        if not self._tier.breaker.claim_probe(now_ns):
            return
        try:
            self._redis.connect()
            # Connecting has more time than a request: what can only do that much is not back. And a Cluster that is
            # down answers PING.
            self._redis.run(Call((b"GET", self._tier.names.cleared)))
        except RedisTrouble as trouble:
            if trouble.is_outage:
                _log.debug("Redis is still away: %s", trouble)
                return
        self._tier.breaker.succeed()

    def _perform(self, steps: Steps[object]) -> None:
        perform(self._renewing(steps), self._world())

    def _renewing(self, steps: Steps[object]) -> Steps[object]:
        """Renew what is due between any two of the steps: a thousand of a tenth of a second must cost no flight."""
        try:
            effect = next(steps)
            while True:
                self._renew_if_due()
                try:
                    outcome = yield effect
                except RedisTrouble as trouble:
                    effect = steps.throw(trouble)
                else:
                    effect = steps.send(outcome)
        except StopIteration as stop:
            return stop.value

    def _world(self) -> World:
        return World(self._redis, lambda flight: self._flights.wait(Running(*flight[:2]), flight.seconds))
