"""How would the slab do at another size? An estimate from the accesses of sampled keys that the slab remembers.

Each shard keeps a ring of what happened to its sampled keys (`src/kernel/samples.h`). It is replayed here, in this
process's own memory, through the real policy at a size that is scaled down as the keys are (miniature simulation:
Waldspurger, Saemundsson, Ahmad, Park, USENIX ATC 2017). The replay is only asked how many *misses* there would be for
each one that there is; how many there are, and of how many look-ups, the slab has counted:

    misses(k) = measured misses * replayed misses at k times the size / replayed misses at the present size

Hits beyond a touch byte's limit go unseen, but their keys are in the cache at any size worth asking about; and what the
sample has too much or too little of, it has in both replays.
"""

from __future__ import annotations

import math
import operator
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter as Tally
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_edge_cache.native import native
from llm_edge_cache.regions import Counter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_edge_cache.slab import SharedSlab

__all__ = ["FACTORS", "Answer", "Estimate", "History", "Mark", "Shard", "estimate", "read_history"]

FACTORS: Final = (0.5, 1.0, 2.0, 4.0)
"""The sizes that are asked about, in units of the present one."""

_SHARDS_MOST: Final = 8  # shards are alike, keys are spread by hash: so many tell enough, and bound time and memory
_SEEDS: Final = (1, 2, 3, 4, 5)  # each replay runs with all of them: what the policy draws by lot is part of the error
_WARM_PART: Final = 3  # of a history without a beginning, this part only fills the caches
_TURNOVERS: Final = 2  # look-ups in units of the size asked about, below which nothing is said about it
_MISSES_LEAST: Final = 100  # replayed ones, below which their ratio tells less than their difference
_TAIL_MOST: Final = 2  # look-ups after the last mark, in units of those between two marks, that still count
_DRAWN: Final = 0.003  # of look-ups: so far two slabs of one size differ, since each draws its own seed
_FORGOTTEN: Final = {
    0.5: 0.01,
    1.0: 0.0,
    2.0: 0.01,
    4.0: 0.02,
}  # without a beginning; docs/sizing.md
_IS_FULL: Final = 0.95  # of max_entries: a slab that evicts below that lacks memory
_SAMPLE_ONE: Final = 1 << 32  # sample hashes are below this
_HASH_SHIFT: Final = 32  # of an event, see src/kernel/samples.h
_KIND_SHIFT: Final = 24
_INSERT: Final = 0
_LEFT_MASK: Final = 0xFFF
_MISS: Final = 2  # an outcome of native.replay()


class Mark(NamedTuple):
    """What the host had looked up at some moment."""

    number: int
    """Of the event that came next in this shard."""
    at_ns: int
    """CLOCK_MONOTONIC"""
    threshold: int
    """Keys were sampled whose sample hash did not exceed it."""
    hits: int
    misses: int
    counted_hits: int
    """The manager's, which does not count again when it looks again."""
    counted_misses: int


class Shard(NamedTuple):
    """What one shard remembers, since it was last empty or as far back as its ring goes."""

    marks: list[Mark]
    """Not empty; the first one is of the first event."""
    events: array[int]
    is_whole: bool
    """Nothing has been forgotten since the shard was empty."""


class History(NamedTuple):
    """What the slab remembers of its sampled keys."""

    shards: list[Shard]
    now: Mark
    threshold: int
    """Keys whose sample hash does not exceed it were sampled all the time."""
    entries: int
    """That the shards read may hold."""
    units: int
    """64 bytes each, that they may take."""
    part: float
    """Of the slab that the shards read are."""
    size: int
    """Entries that the whole slab may hold, or does hold where memory is what it lacks."""
    mean_bytes: float | None
    """Of memory that an entry takes; None while there are none."""
    tti_ns: int

    @property
    def share(self) -> float:
        """Which part of the keys is sampled."""
        return (self.threshold + 1) / _SAMPLE_ONE


class Estimate(NamedTuple):
    """The answer for one size."""

    factor: float
    hit_ratio: float | None
    """None: not known yet."""
    margin: float | None
    """Some 95 of 100 answers are no farther from the truth. 0 for the present size: that was counted."""
    lookups_missing: int
    """Look-ups before it will be known; 0 when it is."""


class Answer(NamedTuple):
    """The answers for all sizes, and what they rest on."""

    estimates: tuple[Estimate, ...]
    lookups: int
    """That the hit ratios are about: those since `since_ns`."""
    since_ns: int
    """CLOCK_MONOTONIC"""
    lookups_remembered: int
    """With those that only filled the replayed caches."""
    sampled_share: float
    sampled_keys: int
    is_whole: bool
    """Nothing has been forgotten since the slab was empty: the time in which it filled is part of the answer."""


# ---- reading ----


def read_history(slab: SharedSlab, now_ns: int, share_most: float = 1.0) -> History | None:
    """Copy what a slab remembers. Takes no lock and stores nothing in it.

    Args:
        slab: a live one.
        now_ns: CLOCK_MONOTONIC.
        share_most: leave out sampled keys beyond this share of all keys.

    Returns:
        The history; None where nothing has been stored yet, or the slab is too small to have one.
    """
    mapping, config = slab._mapping, slab.config
    shard_count = mapping.samples(0)[0]
    rows = [mapping.samples(index) for index in range(min(shard_count, _SHARDS_MOST))]
    shards = [shard for row in rows if (shard := _shard_of(*row[4:], now_ns)) is not None]
    if len(shards) < len(rows):
        return None
    seen = (mark.threshold for shard in shards for mark in shard.marks)
    threshold = min(*seen, *(row[3] for row in rows), max(int(share_most * _SAMPLE_ONE) - 1, 0))
    totals, counters = mapping.totals(), slab._counter_sums()
    looked_up = (totals["hits"], totals["misses"], counters[Counter.L1_HITS], counters[Counter.L1_MISSES])
    entries = sum(row[1] for row in rows)
    return History(
        shards,
        Mark(0, now_ns, threshold, *looked_up),
        threshold,
        entries,
        sum(row[2] for row in rows),
        entries / (config.max_entries or 1),
        _size_of(totals, config.max_entries or 0),
        totals["used_bytes"] / totals["entries"] if totals["entries"] else None,
        round((config.tti or 0.0) * 1e9),
    )


def _size_of(totals: dict[str, int], max_entries: int) -> int:
    lacks_memory = totals["evictions"] > 0 and totals["entries"] < _IS_FULL * max_entries
    return max(totals["entries"], 1) if lacks_memory else max_entries


def _shard_of(first: int, begun: int, mark_bytes: bytes, event_bytes: bytes, now_ns: int) -> Shard | None:
    """Return what lies between the first mark and now; arbitrary bytes give a history that means nothing, no more."""
    events = array("Q", event_bytes)
    marks: list[Mark] = []
    for row in struct.iter_unpack("=7Q", mark_bytes):
        mark = Mark(*row)
        before = marks[-1] if marks else Mark(max(first, begun), 0, 0, 0, 0, 0, 0)
        in_order = before.number <= mark.number <= first + len(events) and before.at_ns <= mark.at_ns <= now_ns
        if in_order and mark.threshold < _SAMPLE_ONE:
            marks.append(mark)
    if not marks:
        return None
    start = marks[0].number
    marks = [mark._replace(number=mark.number - start) for mark in marks]
    return Shard(marks, events[start - first :], start == begun)


# ---- one stream of events ----


class _Stream(NamedTuple):
    """The sampled events of all shards, in order of time."""

    times: array[int]
    events: array[int]

    def from_(self, at_ns: int) -> _Stream:
        at = bisect_left(self.times, at_ns)
        return _Stream(self.times[at:], self.events[at:])


def _stream_of(history: History) -> _Stream:
    pairs = [pair for shard in history.shards for pair in _timed(shard, history)]
    if len(history.shards) > 1:
        pairs.sort(key=operator.itemgetter(0))  # stable: a shard's own order stays
    return _Stream(array("Q", [pair[0] for pair in pairs]), array("Q", [pair[1] for pair in pairs]))


def _timed(shard: Shard, history: History) -> Iterator[tuple[int, int]]:
    """Yield (time, event) of the keys that were sampled all the time. Between two marks time is taken to be even."""
    lives: dict[int, int] = {}
    end = history.now._replace(number=len(shard.events))
    for mark, following in pairwise((*shard.marks, end)):
        count = following.number - mark.number
        for at, event in enumerate(shard.events[mark.number : following.number]):
            if event >> _HASH_SHIFT <= history.threshold:
                yield mark.at_ns + (following.at_ns - mark.at_ns) * at // count, _with_whole_life(event, lives)


def _with_whole_life(event: int, lives: dict[int, int]) -> int:
    """A hit tells what is left of the entry's life; a cache that had it no more would get it with its whole life."""
    key = event >> _HASH_SHIFT
    if event >> _KIND_SHIFT & 3 == _INSERT:
        lives[key] = event & _LEFT_MASK
    return event & ~_LEFT_MASK | lives.get(key, event & _LEFT_MASK)


# ---- which part of it counts ----


class _Span(NamedTuple):
    """From one mark to another: what was looked up in between is known exactly."""

    begin: Mark
    end: Mark

    @property
    def looked_up(self) -> tuple[int, int]:
        """Hits and misses: the manager's where there is one."""
        begin, end = self.begin, self.end
        hits, misses = end.counted_hits - begin.counted_hits, end.counted_misses - begin.counted_misses
        if hits + misses <= 0:
            hits, misses = end.hits - begin.hits, end.misses - begin.misses
        return max(hits, 0), max(misses, 0)

    @property
    def lookups(self) -> int:
        return sum(self.looked_up)


def _span_of(history: History) -> _Span:
    """All that is remembered of every shard."""
    firsts = [shard.marks[0] for shard in history.shards]
    pick = min if _is_whole(history) else max
    begin = pick(firsts, key=lambda mark: mark.at_ns)
    return _Span(begin, _end_of(history, begin))


def _is_whole(history: History) -> bool:
    return all(shard.is_whole for shard in history.shards)


def _end_of(history: History, begin: Mark) -> Mark:
    """Now; or the last mark, if there were so many hits since that a poll cannot have seen them."""
    last = max((shard.marks[-1] for shard in history.shards), key=lambda mark: mark.at_ns)
    gaps = max(len(shard.marks) - 1 for shard in history.shards)
    tail = _Span(last, history.now).lookups
    return last if gaps and tail > _TAIL_MOST * _Span(begin, last).lookups / gaps else history.now


def _counted_part(history: History, whole: _Span, stream: _Stream) -> _Span:
    """What follows the filling of the replayed caches; all, if the history has the filling of the slab itself."""
    if _is_whole(history) or not stream.times:
        return whole
    warm_ns = stream.times[len(stream.times) // _WARM_PART]
    marks = (mark for shard in history.shards for mark in shard.marks if warm_ns <= mark.at_ns < whole.end.at_ns)
    return _Span(min(marks, key=lambda mark: mark.at_ns, default=whole.begin), whole.end)


# ---- replaying ----


class _Replayed(NamedTuple):
    """Misses in the part that counts, at one size."""

    by_key: Tally[int]
    """Summed over the seeds."""
    by_seed: list[int]

    @property
    def misses(self) -> float:
        return sum(self.by_seed) / len(_SEEDS)


def _replay(history: History, stream: _Stream, counted: slice, factor: float) -> _Replayed:
    entries = max(round(history.entries * history.share * factor), 1)
    units = max(round(history.units * history.share * factor), 1)
    keys = [event >> _HASH_SHIFT for event in stream.events[counted]]
    result = _Replayed(Tally(), [])
    for seed in _SEEDS:
        outcomes = native.replay(stream.events, stream.times, entries, units, history.tti_ns, seed)[counted]
        result.by_key.update(compress(keys, [outcome == _MISS for outcome in outcomes]))
        result.by_seed.append(outcomes.count(_MISS))
    return result


# ---- the answer ----


def estimate(history: History) -> Answer:
    """Replay a history at all sizes."""
    whole = _span_of(history)
    stream = _stream_of(history).from_(whole.begin.at_ns)
    span = _counted_part(history, whole, stream)
    counted = slice(bisect_left(stream.times, span.begin.at_ns), bisect_right(stream.times, span.end.at_ns))
    present = _replay(history, stream, counted, 1.0)
    estimates = []
    for factor in FACTORS:
        missing = max(math.ceil(_TURNOVERS * factor * history.size) - whole.lookups, 0)
        if missing or not span.lookups:
            estimates.append(Estimate(factor, None, None, max(missing, 1)))
        elif factor == 1.0:
            estimates.append(Estimate(factor, span.looked_up[0] / span.lookups, 0.0, 0))
        else:
            there = _replay(history, stream, counted, factor)
            hit_ratio, margin = _scaled(history, span, present, there)
            margin += _DRAWN + (0.0 if _is_whole(history) else _FORGOTTEN[factor])
            estimates.append(Estimate(factor, hit_ratio, margin, 0))
    return Answer(
        tuple(estimates),
        span.lookups,
        span.begin.at_ns,
        whole.lookups,
        history.share,
        len({event >> _HASH_SHIFT for event in stream.events[counted]}),
        _is_whole(history),
    )


def _scaled(history: History, span: _Span, present: _Replayed, there: _Replayed) -> tuple[float, float]:
    """Return the hit ratio at another size, and two standard errors of it."""
    sampled = history.share * history.part
    misses, lookups = span.looked_up[1], span.lookups
    if present.misses >= _MISSES_LEAST:
        ratio, weight = there.misses / present.misses, misses / present.misses / lookups
        miss_ratio = misses * ratio / lookups
    else:  # hardly any misses: those that come to them
        ratio, weight = 1.0, 1.0 / sampled / lookups
        miss_ratio = misses / lookups + (there.misses - present.misses) * weight
    error = weight * math.hypot(_sample_error(present, there, ratio, sampled), _seed_error(present, there, ratio))
    return min(max(1.0 - miss_ratio, 0.0), 1.0), 2.0 * error


def _sample_error(present: _Replayed, there: _Replayed, ratio: float, sampled: float) -> float:
    """Standard error of `there - ratio * present`, in misses: keys are what was drawn, and each has its own."""
    keys = present.by_key.keys() | there.by_key.keys()
    squares = sum((there.by_key[key] - ratio * present.by_key[key]) ** 2 for key in keys)
    return math.sqrt(squares * max(1.0 - sampled, 0.0)) / len(_SEEDS)


def _seed_error(present: _Replayed, there: _Replayed, ratio: float) -> float:
    """The same of what the policy draws by lot; the slab itself has drawn once as well."""
    differences = [two - ratio * one for one, two in zip(present.by_seed, there.by_seed, strict=True)]
    mean = sum(differences) / len(differences)
    return math.sqrt(sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1))
