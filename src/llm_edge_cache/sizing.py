"""How much this cache keeps in Redis: an estimate from a sample of bounded cost, by one process of the host."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llm_edge_cache.effects import Steps
from llm_edge_cache.redis_client import Batch, Call
from llm_edge_cache.redis_commands import sound_answer
from llm_edge_cache.redis_records import HEADER_BYTES
from llm_edge_cache.redis_tier import RedisTier
from llm_edge_cache.regions import Word

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["INTERVAL_NS", "Size", "Sizer"]

INTERVAL_NS: Final = 60_000_000_000
_ROUNDS: Final = 32  # SCANs of one server in a sample
_COUNT: Final = 256  # places that a SCAN looks at
_GLOB: Final = re.compile(rb"([*?\[\]\\])")
_KEY_DIGITS: Final = b"[0-9a-f]" * 4 + b"*"  # of a cache key; no other name of ours begins with four of them


class Size(NamedTuple):
    """What a sample found."""

    entries: int
    bytes: int
    """Of the records; what Redis itself needs beside them is not in it."""


class Sizer:
    """Estimates the size of the tier."""

    def __init__(self, slab: SharedSlab, tier: RedisTier) -> None:
        """Keep the estimate in this slab's words."""
        self._slab = slab
        self._tier = tier

    def is_due(self, now_ns: int) -> bool:
        """Tell whether the last estimate is old."""
        return now_ns - self._slab._word(Word.L2_SIZED_AT) >= INTERVAL_NS

    def sample(self, now_ns: int) -> Steps[Size]:
        """Estimate the size and keep it: exact below some thousand keys in a server, else extrapolated.

        Raises:
            RedisTrouble: Redis did not answer.
        """
        self._slab._word_set(Word.L2_SIZED_AT, now_ns)
        entries = size = shard = 0
        with sound_answer("Redis"):
            while (part := (yield from self._sample_shard(shard))) is not None:
                entries, size, shard = entries + part.entries, size + part.bytes, shard + 1
        self._slab._word_set(Word.L2_ENTRIES, entries)
        self._slab._word_set(Word.L2_BYTES, size)
        return Size(entries, size)

    def _sample_shard(self, shard: int) -> Steps[Size | None]:
        """Estimate what one of the servers holds; None: there are not so many."""
        total = yield from self._tier.ask(Call((b"DBSIZE",), shard))
        if not isinstance(total, int):
            return None
        pattern = _GLOB.sub(rb"\\\1", self._tier.names.prefix) + _KEY_DIGITS
        cursor: Any = b"0"
        names: set[bytes] = set()
        looked_at = 0
        for _ in range(_ROUNDS):
            scan = (b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _COUNT)
            cursor, found = yield from self._tier.ask(Call(scan, shard))
            names.update(found)
            looked_at += _COUNT
            if int(cursor) == 0:
                break
        live, size = yield from self._weigh(sorted(names))
        share = 1.0 if int(cursor) == 0 else max(1.0, total / looked_at)
        return Size(round(live * share), round(size * share))

    def _weigh(self, names: list[bytes]) -> Steps[Size]:
        """Count the values among records: no tombstones, leases, or what a clear_all made void."""
        cleared = b"%016x" % self._slab._word(Word.CLEARED)
        live = size = 0
        for start in range(0, len(names), _COUNT):
            part = names[start : start + _COUNT]
            heads = [Call((b"GETRANGE", name, 0, HEADER_BYTES - 1)) for name in part]
            lengths = [Call((b"STRLEN", name)) for name in part]
            replies = yield from self._tier.ask(Batch((*heads, *lengths)))
            for head, length in zip(replies[: len(part)], replies[len(part) :], strict=True):
                if isinstance(head, bytes) and head[:1] == b"V" and head[1:17] >= cleared and isinstance(length, int):
                    live += 1
                    size += length
        return Size(live, size)
