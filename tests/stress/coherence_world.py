"""Two hosts over one real Redis, played by actors in a random order: what `interleavings` runs many of.

Two slabs stand for two hosts, with one or more processes each. Users look up, compute, store and invalidate; deferred
writes are sent by actors of their own, however late; one reader a host applies the stream. All of them are the real
code over stepped slab and Redis (`stepped`).
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import sys
import time
import types
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # redis_servers.py

import redis
from coherence_monitor import Monitor, What
from interleaver import Actor, Interleaver
from redis_servers import RedisServer
from stepped import SteppedRedis, SteppedSlab, stepped_threading

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    L1Config,
    L2Config,
    SharedSlab,
    SlabConfig,
    SyncCacheManager,
    effects,
    flight,
    follower,
    redis_tier,
    sync_manager,
)
from llm_edge_cache.deferred import Item
from llm_edge_cache.errors import ComputeError
from llm_edge_cache.keys import tier_key
from llm_edge_cache.redis_client import RedisClient, RedisTrouble, parse_redis_url
from llm_edge_cache.regions import Counter, Word
from llm_edge_cache.upkeep import Upkeep

MiB = 1 << 20
HOSTS = 2
TAGS_OF = {"a": (), "b": ("t",), "c": ("t", "u")}
"""The keys of every run, and their tags."""
ROUNDS_PER_SLAB = 500
SHORT_LIFE = 0.004  # s
SHORT_LEASE = 0.02  # s
COUNTED = {
    "L1 hits": Counter.L1_HITS,
    "L2 hits": Counter.L2_HITS,
    "computations": Counter.COMPUTATIONS,
    "coalesced": Counter.COALESCED,
    "fills refused": Counter.L1_FENCED,
    "deferred writes": Counter.L2_WRITES,
    "deferred writes refused": Counter.DROPPED_FENCED,
    "entries void by their tag": Counter.L1_EXPIRED_TAGS,
    "entries verified": Counter.UNVERIFIED,
    "invalidations applied for other hosts": Counter.INVALIDATED_REMOTE,
    "stale answers while revalidating": Counter.STALE_REVALIDATE,
    "flights taken over": Counter.TAKEOVERS,
    "places in the stream lost": Counter.STREAM_FLUSHES,
}


class ComputationFails(Exception):  # noqa: N818 - what happens
    """What a user's function raises now and then."""


class Plan(NamedTuple):
    """What one run is about."""

    keys: tuple[str, ...] = ("a", "b", "c")
    kinds: tuple[str, ...] = ("key", "tag", "all")
    """Invalidations that come up."""
    users: int = 4
    """On both hosts together."""
    operations: int = 3
    """Of each user."""
    processes: int = 1
    """Of each host."""
    stickiness: float = 0.0
    lateness: float = 1.0
    """How seldom it is the deferred writes' turn."""
    failing: float = 0.0
    """Share of commands that Redis does not answer."""
    loss: str = ""
    """What Redis loses on the way: "all" its data, its "stream", or the ids of "tags"."""
    kills: bool = False
    is_short: bool = False
    """Values live for milliseconds, and users wait for that."""
    out_of_contact: bool = False
    """Entries of L1 are not trusted without asking."""
    stores: float = 0.3
    """Share of lookup and store among the operations; `invalidations` as well; the rest is get_or_compute."""
    invalidations: float = 0.35
    script: tuple[tuple[str, ...], ...] = ()
    """What each user does, in place of anything: "key", "tag", "all" (invalidations), "store", "fetch", "nap". By then
    the first key is in both tiers of the first host."""


def random_plan(generator: random.Random) -> Plan:
    """Return any plan; most are quiet apart from their interleaving."""
    chance = generator.random
    keys = tuple(generator.sample(sorted(TAGS_OF), generator.choice((1, 1, 2, 3))))
    has_tags = any(TAGS_OF[key] for key in keys)
    kills = chance() < 0.1
    return Plan(
        keys=keys,
        kinds=generator.choice((("key",), ("tag",), ("all",), ("key", "tag", "all"))) if has_tags else ("key", "all"),
        users=generator.choice((3, 4, 6)),
        operations=generator.choice((2, 3, 4)),
        processes=2 if kills else generator.choice((1, 1, 2)),
        stickiness=generator.choice((0.0, 0.5, 0.9)),
        lateness=generator.choice((1.0, 10.0, 100.0)),
        failing=generator.choice((0.05, 0.3)) if chance() < 0.15 else 0.0,
        loss=generator.choice(("all", "stream", "tags")) if chance() < 0.1 else "",
        kills=kills,
        is_short=chance() < 0.15,
        out_of_contact=chance() < 0.15,
        stores=generator.choice((0.1, 0.4)),
        invalidations=generator.choice((0.2, 0.4)),
    )


class Queue:
    """Deferred writes of one process; an actor sends them."""

    def __init__(self, interleaver: Interleaver) -> None:
        self.items: list[Item] = []
        self._interleaver = interleaver

    def put(self, item: Item) -> bool:
        self._interleaver.pause()
        self.items.append(item)
        return True


class Process:
    """One process of a host: the real manager over stepped slab and Redis."""

    def __init__(self, run: Run, host: int, number: int) -> None:
        self.name = f"host {host} process {number}"
        self.host = host
        plan, interleaver = run.plan, run.interleaver
        slab: Any = SteppedSlab(run.slabs[host], interleaver)
        l2 = L2Config(run.redis_url, key_prefix=run.prefix, staleness_seconds=1e-6 if plan.out_of_contact else 2.0)
        self.manager = SyncCacheManager(L1Config(tti_seconds=None), l2, slab=slab)
        self.engine: Any = self.manager._engine
        self.redis = SteppedRedis(run.client, interleaver, run.generator, 0.0, run.monitor.saw)
        self.queue = Queue(interleaver)
        self.engine.redis = self.redis
        self.engine.queue = self.queue
        self.engine._is_open = True
        redis: Any = self.redis
        self.upkeep: Any = Upkeep(slab, self.engine.flights, redis, self.engine.tier, self.engine.invalidator)
        self.upkeep._stop = stepped_threading(interleaver).Event()
        self.engine.upkeep = types.SimpleNamespace(start=lambda: None)
        self.engine.fetching.use(self.engine.flights, self.queue, self.engine.upkeep.start)

    def serve(self) -> None:
        """One round of what upkeep does."""
        if not self.engine.tier.breaker.is_closed():
            self.engine.tier.breaker.succeed()  # the probe
            return
        with contextlib.suppress(RedisTrouble):
            self.upkeep._serve(self.upkeep._follower, time.monotonic_ns())

    def send_some(self, generator: random.Random) -> None:
        """Send a few of the deferred writes, any of them."""
        items = self.queue.items
        batch = [items.pop(generator.randrange(len(items))) for _ in range(generator.randint(1, len(items)))]
        self.engine._send(batch)


class Run:
    """One interleaving."""

    def __init__(self, world: World, number: int, plan: Plan, seed: str) -> None:
        self.plan = plan
        self.generator = random.Random(seed)
        self.prefix = f"i{number}:"
        self.number = number
        self.slabs = world.slabs
        self.client = world.client
        self.redis_url = world.server.unix_url
        self.interleaver = Interleaver(
            self.generator, stickiness=plan.stickiness, idle_seconds=0.0005 if plan.kills else 0.0
        )
        self.requests = {key: self.request(key) for key in plan.keys}
        names = redis_tier.Names(self.prefix)
        meaning: dict[bytes, What] = {names.cleared: ("all", "")}
        for key in plan.keys:
            meaning[names.value(tier_key(self.requests[key]))] = ("key", tier_key(self.requests[key]).decode())
            meaning.update({names.tag(self.tag(tag)): ("tag", self.tag(tag)) for tag in TAGS_OF[key]})
        self.names = names
        self.monitor = Monitor(self.slabs, list(plan.keys), self._affected, meaning)
        self._writers: list[Actor] = []
        self._unnoticed: dict[int, int] = {}
        self.processes: list[Process] = []

    def request(self, key: str) -> CacheableRequest:
        return CacheableRequest("model", f"{self.number}:{key}")

    def tag(self, tag: str) -> str:
        return f"{self.number}:{tag}"

    def tags(self, key: str) -> tuple[str, ...]:
        return tuple(self.tag(tag) for tag in TAGS_OF[key])

    def _affected(self, what: What) -> list[str]:
        kind, name = what
        if kind == "all":
            return list(self.plan.keys)
        if kind == "tag":
            return [key for key in self.plan.keys if name in self.tags(key)]
        return [key for key in self.plan.keys if tier_key(self.requests[key]).decode() == name]

    # ---- the actors ----

    def start(self) -> None:
        """Make the processes; every host knows its place in the stream."""
        numbers = range(self.plan.processes)
        self.processes = [Process(self, host, number) for host in range(HOSTS) for number in numbers]
        for process in self.processes:
            process.serve()

    def play(self) -> None:
        """Let all actors run, then look once more whether anything old is left anywhere."""
        for process in self.processes:
            process.redis.failing = self.plan.failing
            promptness = self.generator.choice((1.0, 0.2, 0.05))
            self.interleaver.spawn(
                f"upkeep {process.name}", process.name, lambda of=process: self._keep_up(of), weight=promptness
            )
            self._writers.append(
                self.interleaver.spawn(f"writes {process.name}", process.name, lambda of=process: self._write(of))
            )
        for writer in self._writers:
            writer.weight = 1 / self.generator.choice((1.0, self.plan.lateness))
        if self.plan.script:
            self._prime(self.processes[0], self.plan.keys[0])
        for number in range(len(self.plan.script) or self.plan.users):
            process = self.processes[number % len(self.processes)]
            haste = self.generator.choice((1.0, 1.0, 0.1))
            self.interleaver.spawn(
                f"user {number}", process.name, lambda of=process, n=number: self._use(of, n), weight=haste
            )
        self._schedule_mishaps()
        self.interleaver.run()
        self._look_at_the_end()

    def _prime(self, process: Process, key: str) -> None:
        process.manager.store(self.request(key), CachedResponse(f"{key}:1", "model"), tags=self.tags(key))
        process.engine._send(process.queue.items)
        process.queue.items.clear()

    def _keep_up(self, process: Process) -> None:
        while self.interleaver.living("user", "llm-edge-cache", "writes"):
            self.interleaver.pause(until=lambda: self._has_work(process))
            process.serve()
            if not self.interleaver.living("user"):
                for writer in self._writers:
                    writer.weight = 1.0

    def _has_work(self, process: Process) -> bool:
        """Tell whether upkeep has anything to do: an XREAD that blocks is no step."""
        word = self.slabs[process.host]._word
        is_behind = word(Word.CURSOR) < self.monitor.newest or word(Word.UNDELIVERED) != 0
        has_ended = not self.interleaver.living("user", "llm-edge-cache", "writes")
        is_lost = self._unnoticed.get(process.host) == self.monitor.starts_over(process.host)
        return is_behind or has_ended or is_lost or word(Word.BREAKER) != 0

    def _write(self, process: Process) -> None:
        def is_over() -> bool:
            return not self.interleaver.living("user", "llm-edge-cache")

        while not is_over() or process.queue.items:
            self.interleaver.pause(until=lambda: bool(process.queue.items) or is_over())
            if process.queue.items:
                process.send_some(self.generator)

    def _use(self, process: Process, number: int) -> None:
        for action in self.plan.script[number] if self.plan.script else self._any_actions():
            key = self.generator.choice(self.plan.keys)
            if action == "nap":
                for _ in range(10):
                    self.interleaver.pause()
                time.sleep(SHORT_LIFE)
            elif action == "store":
                self._lookup_and_store(process, key)
            elif action == "fetch":
                self._get_or_compute(process, key)
            else:
                self._invalidate(process, key, action)

    def _any_actions(self) -> Iterator[str]:
        plan, draw = self.plan, self.generator
        shares = (plan.invalidations, plan.stores, 1 - plan.invalidations - plan.stores)
        for _ in range(plan.operations):
            if plan.is_short and draw.random() < 0.3:
                yield "nap"
            (action,) = draw.choices((draw.choice(plan.kinds), "store", "fetch"), shares)
            yield action

    def _invalidate(self, process: Process, key: str, kind: str) -> None:
        manager, request = process.manager, self.request(key)
        tags = self.tags(key)
        if kind == "tag" and tags:
            tag = self.generator.choice(tags)
            what, call = ("tag", tag), lambda: manager.invalidate_tag(tag)
        elif kind == "all":
            what, call = ("all", ""), manager.clear_all
        else:
            what, call = ("key", tier_key(request).decode()), lambda: manager.invalidate(request)
        versions = self.monitor.called(what)
        call()
        self.monitor.returned(process.host, what, versions)

    def _compute(self, key: str) -> CachedResponse:
        for _ in range(self.generator.randrange(3)):
            self.interleaver.pause()
        version = self.monitor.source[key]
        self.interleaver.pause()
        if self.generator.random() < 0.1:
            raise ComputationFails
        return CachedResponse(f"{key}:{version}", "model")

    def _life(self) -> float | None:
        return SHORT_LIFE if self.plan.is_short and self.generator.random() < 0.6 else None

    def _lookup_and_store(self, process: Process, key: str) -> None:
        request, expected = self.request(key), self.monitor.expect(process.host)
        found = process.manager.lookup(request)
        self.monitor.judge(key, found.response and found.response.content, expected)
        if found.response is None:
            with contextlib.suppress(ComputationFails):
                process.manager.store(request, self._compute(key), l2_ttl=self._life(), tags=self.tags(key))

    def _get_or_compute(self, process: Process, key: str) -> None:
        request, expected = self.request(key), self.monitor.expect(process.host)
        stale = {"stale_while_revalidate": 60.0} if self.generator.random() < 0.3 else {"stale_if_error": 60.0}
        with contextlib.suppress(ComputationFails, ComputeError):
            response = process.manager.get_or_compute(
                request,
                lambda: self._compute(key),
                l2_ttl=self._life(),
                tags=self.tags(key),
                **(stale if self.generator.random() < 0.5 else {}),
            )
            self.monitor.judge(key, response and response.content, expected)

    # ---- mishaps ----

    def _schedule_mishaps(self) -> None:
        due: dict[int, Callable[[], None]] = {}
        within = 40 * (sum(map(len, self.plan.script)) or 3 * self.plan.users)
        if self.plan.loss:
            due[self.generator.randrange(within)] = self._lose
        if self.plan.kills:
            due[self.generator.randrange(within)] = self._kill
        self.interleaver.on_step = lambda step: due.pop(step, lambda: None)()

    def _lose(self) -> None:
        if self.plan.loss != "tags":
            self._unnoticed = {host: self.monitor.starts_over(host) for host in range(HOSTS)}
        with redis.Redis(unix_socket_path=self.redis_url.removeprefix("unix://")) as client:
            if self.plan.loss == "all":
                client.flushdb()
                self.monitor.lost()
            elif self.plan.loss == "tags":
                client.delete(*client.keys(self.names.prefix + b"tag:*") or [b"none"])
            else:
                client.xtrim(self.names.events, maxlen=0)

    def _kill(self) -> None:
        running = [process for process in self.processes if process.name == self.interleaver.group]
        victim = self.generator.choice(running * len(self.processes) + self.processes)
        self.interleaver.kill(victim.name)
        victim.queue.items.clear()
        self.processes = [process for process in self.processes if process is not victim]

    # ---- the end ----

    def _look_at_the_end(self) -> None:
        """Nothing is under way any more and both hosts are up to date: what L1 and then Redis alone still have."""
        for process in self.processes:
            process.redis.failing = 0.0
        for _ in range(3):
            for process in self.processes:
                process.serve()
        self.monitor.ended()
        for _ in ("with L1", "Redis alone"):
            for process in self.processes:
                for key in self.plan.keys:
                    found = process.manager.lookup(self.request(key))
                    self.monitor.judge(
                        key, found.response and found.response.content, self.monitor.expect(process.host)
                    )
            for slab in self.slabs:
                slab.clear()


class World:
    """What all interleavings share: the server, and two slabs that are wiped between them."""

    def __init__(self) -> None:
        self.server = RedisServer()
        self.slabs: list[SharedSlab] = []
        self.counts: Tally[str] = Tally()
        self.steps = self.answers = self.hits = 0

    def __enter__(self) -> World:
        self.server.__enter__()
        self.client = RedisClient(parse_redis_url(self.server.unix_url), operation_timeout=10.0)
        self._bare = self.server.client()
        return self

    def __exit__(self, *_: object) -> None:
        self._drop_slabs()
        self._bare.close()
        self.client.close()
        self.server.__exit__(None, None, None)

    def _drop_slabs(self) -> None:
        for slab in self.slabs:
            sums = slab._counter_sums()
            self.counts.update({name: sums[counter] for name, counter in COUNTED.items()})
            assert slab.check() == []
            slab.unlink()
            slab.close()
        self.slabs = []

    def _wipe(self, number: int) -> None:
        if number % ROUNDS_PER_SLAB == 0 or not self.slabs:
            self._drop_slabs()
            config = SlabConfig(memory_bytes=2 * MiB, max_entries=500)
            self.slabs = [
                SharedSlab(f"interleavings-{os.getpid()}-{secrets.token_hex(3)}", config) for _ in range(HOSTS)
            ]
        self._bare.flushdb()
        for slab in self.slabs:
            slab.clear()
            for word in Word:
                if word is not Word.TAG_EPOCH:
                    slab._word_set(word, 0)
            slab._word_set(Word.L2_SIZED_AT, 1 << 62)

    def play(self, number: int, seed: int, plan: Plan | None = None) -> None:
        """Run one interleaving.

        Raises:
            Violation: an answer was wrong.
        """
        name = f"{seed}:{number}"
        plan = plan or random_plan(random.Random(f"plan {name}"))
        self._wipe(number)
        run = Run(self, number, plan, name)
        with _stepped_modules(run.interleaver, plan):
            try:
                run.start()
                run.play()
            except AssertionError as error:
                raise type(error)(f"{error}; seed {seed}, number {number}, {plan}") from None
        self.steps += run.interleaver.steps
        self.answers += run.monitor.answers
        self.hits += run.monitor.hits

    def count(self) -> dict[str, int]:
        """What the runs so far have met."""
        self._drop_slabs()
        return dict(self.counts)


@contextlib.contextmanager
def _stepped_modules(interleaver: Interleaver, plan: Plan) -> Iterator[None]:
    """What modules would wait for becomes a step; leases are short where that is to be met."""
    replaced = [
        (effects, "time", types.SimpleNamespace(sleep=lambda _: interleaver.pause(idle=True))),
        (sync_manager, "threading", stepped_threading(interleaver)),
    ]
    if plan.kills:
        replaced += [
            (redis_tier, "LEASE_MS", round(SHORT_LEASE * 1000)),
            (flight, "FLIGHT_LEASE_NS", round(SHORT_LEASE * 1e9)),
            (follower, "_SILENCE_NS", 0),
        ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
