"""One host's parts between slab and Redis, put together by hand and without threads, to be taken step by step."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

from redis_servers import RedisServer

from llm_edge_cache import CacheableRequest, L1Config, L2Config, SharedSlab, SlabConfig
from llm_edge_cache.codec import EntryCodec
from llm_edge_cache.core import Core
from llm_edge_cache.effects import Steps, World, perform
from llm_edge_cache.follower import Follower
from llm_edge_cache.invalidation import Invalidation, Invalidator
from llm_edge_cache.keys import tier_key
from llm_edge_cache.redis_client import Call, RedisClient, RedisTrouble, parse_redis_url
from llm_edge_cache.redis_tier import RedisTier
from llm_edge_cache.regions import Counter, Word

SMALL = SlabConfig(memory_bytes=2 << 20, max_entries=500)


class HostParts:
    """Slab, tier, core, invalidator and follower of one host.

    `is_cut`: every command fails as if the connection were broken.
    """

    def __init__(self, name: str, url: str, prefix: str, l1: L1Config | None = None, **l2: Any) -> None:
        l1 = l1 or L1Config()
        self.l2 = L2Config(url, key_prefix=prefix, **l2)
        self.slab = SharedSlab(name, SMALL)
        self.codec = EntryCodec()
        self.client = RedisClient(parse_redis_url(url), operation_timeout=5.0)
        self.is_cut = False
        self.tier = RedisTier(self.slab, self.l2, self.codec)
        self.core = Core(self.slab, l1, self.l2, self.tier, self.codec)
        self.invalidator = Invalidator(self.slab, self.tier)
        self.follower = Follower(self.slab, self.tier, self.invalidator)

    def run(self, command: Any, *, blocking: float = 0.0) -> Any:
        if self.is_cut:
            raise RedisTrouble("connection", "cut by the test")
        if blocking:
            at = command.args.index(b"BLOCK")
            command = Call(command.args[:at] + command.args[at + 2 :])  # where there are no news, nobody waits for them
        return self.client.run(command, blocking=blocking)

    def perform(self, steps: Steps[Any]) -> Any:
        redis: Any = self
        return perform(steps, World(redis, lambda _: None))

    def follow(self) -> None:
        self.perform(self.follower.follow())

    def invalidate(self, kind: Any, name: str = "") -> None:
        self.perform(self.invalidator.invalidate(Invalidation(kind, name)))

    def count(self, counter: Counter) -> int:
        return self.slab._counter_sums()[counter]

    def word(self, word: Word) -> int:
        return self.slab._word(word)

    def close(self) -> None:
        self.client.close()
        self.slab.unlink()
        self.slab.close()


@contextlib.contextmanager
def hosts(server: RedisServer, count: int = 1, *, follows: bool = True, **options: Any) -> Iterator[list[HostParts]]:
    """So many hosts over one Redis, under a prefix of their own; each knows its place in the stream."""
    prefix = f"t{secrets.token_hex(4)}:"
    made = [HostParts(f"test-{prefix[:-1]}-{at}", server.unix_url, prefix, **options) for at in range(count)]
    try:
        for host in made if follows else []:
            host.slab._word_set(Word.CURSOR, 0)
            host.follow()
        yield made
        for host in made:
            assert host.slab.check() == []
    finally:
        for host in made:
            host.close()


def request(text: str = "what?") -> CacheableRequest:
    return CacheableRequest("model", text)


def key_of(text: str = "what?") -> bytes:
    return tier_key(request(text))
