"""`whatif`: the answers beside real replays, when nothing is said yet, and that asking disturbs nobody."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest

from llm_edge_cache import SharedSlab, SlabConfig
from llm_edge_cache.native import native
from llm_edge_cache.regions import Counter
from llm_edge_cache.whatif import Answer, History, Mark, Shard, _shard_of, estimate, read_history

MiB = 1 << 20
ENTRIES = 1000
CONFIG = SlabConfig(memory_bytes=16 * MiB, max_entries=ENTRIES, ttl=None, max_value_bytes=4096)


def zipf_and_loop(seed: int, requests: int = 60_000) -> Sequence[int]:
    """Two thirds Zipf(0.8) over 8,000 keys, one third a loop of 1,500 keys."""
    generator = random.Random(seed)
    weights = list(accumulate((rank + 1) ** -0.8 for rank in range(8000)))
    keys = generator.choices(range(8000), cum_weights=weights, k=requests)
    looped = iter(range(requests))
    return [key if generator.random() < 2 / 3 else 8000 + next(looped) % 1500 for key in keys]


def replay(slab: SharedSlab, keys: Sequence[int], size: int = 1) -> list[bool]:
    """Each miss is followed by a set; returns what was a hit."""
    hits = []
    for key in keys:
        hits.append(slab.get(b"%d" % key) is not None)
        if not hits[-1]:
            slab.set(b"%d" % key, b"x" * size)
    return hits


def ask(slab: SharedSlab, ahead: float = 0.0) -> Answer:
    history = read_history(slab, time.monotonic_ns() + int(ahead * 1e9))
    assert history is not None
    return estimate(history)


@pytest.fixture
def cache(name: str) -> Iterator[SharedSlab]:
    with SharedSlab(name, CONFIG) as slab:
        yield slab


def real_ratios(name: str, keys: Sequence[int], config: SlabConfig, last: int) -> dict[float, float]:
    """Of real slabs at the sizes that are asked about, over the last requests."""
    found = {}
    for factor in (0.5, 2.0, 4.0):
        sized = SlabConfig(
            memory_bytes=int(config.memory_bytes * max(factor, 1)),
            max_entries=int((config.max_entries or 0) * factor),
            ttl=config.ttl,
            max_value_bytes=config.max_value_bytes,
        )
        with SharedSlab(f"{name}-{factor}", sized) as slab:
            try:
                hits = replay(slab, keys)
            finally:
                slab.unlink()
        found[factor] = sum(hits[-last:]) / last
    return found


def assert_close(answer: Answer, real: dict[float, float], bound: float) -> None:
    for one in answer.estimates:
        if one.factor in real:
            assert one.hit_ratio is not None
            assert one.hit_ratio == pytest.approx(real[one.factor], abs=bound), f"at {one.factor} times the size"


# ---- the answers ----


@pytest.mark.parametrize("seed", [1, 2])
def test_the_answers_are_near_real_replays(name: str, cache: SharedSlab, seed: int) -> None:
    keys = zipf_and_loop(seed)
    hits = replay(cache, keys)
    answer = ask(cache)
    assert answer.is_whole
    assert answer.lookups == pytest.approx(len(keys), abs=1)
    assert answer.estimates[1].hit_ratio == pytest.approx(sum(hits) / len(hits), abs=1e-3)  # counted
    real = real_ratios(name, keys, CONFIG, len(keys))
    assert real[4.0] - real[0.5] > 0.25  # far more than the bound below: a constant would not do
    assert_close(answer, real, 0.04)


def test_a_history_without_a_beginning_is_about_its_own_time(name: str) -> None:
    config = SlabConfig(memory_bytes=2 * MiB, max_entries=400, ttl=None, max_value_bytes=4096)
    keys = [*(100_000 + key for key in zipf_and_loop(3, 20_000)), *zipf_and_loop(4, 60_000)]
    with SharedSlab(name, config) as slab:
        hits = replay(slab, keys)
        answer = ask(slab)
    assert not answer.is_whole
    assert answer.lookups <= answer.lookups_remembered < len(keys)  # equal where all marks are of one tick of the clock
    assert answer.estimates[1].hit_ratio == pytest.approx(sum(hits[-answer.lookups :]) / answer.lookups, abs=0.01)
    real = real_ratios(name, keys, config, answer.lookups)
    del real[4.0]  # its history is shorter than that takes
    assert_close(answer, real, 0.06)


def test_many_shards_are_one_cache(name: str) -> None:
    config = SlabConfig(memory_bytes=80 * MiB, max_entries=32_768, ttl=None, max_value_bytes=4096)
    keys = [int(60_000 * random.Random(key).random() ** 2) for key in range(200_000)]
    with SharedSlab(name, config) as slab:
        replay(slab, keys)
        history = read_history(slab, time.monotonic_ns())
        assert history is not None
        assert len(history.shards) == 2
        answer = estimate(history)
    assert answer.sampled_share < 0.03
    assert_close(answer, {0.5: real_ratios(name, keys, config, len(keys))[0.5]}, 0.04)


def test_what_expires_is_a_miss_at_any_size(cache: SharedSlab) -> None:
    """A loop that any of the sizes would hold, but for a life that ends before its next turn."""
    ahead = 0.0
    for _ in range(12):
        for key in range(600):
            if cache.get(b"%d" % key) is None:
                cache.set(b"%d" % key, b"x", ttl=30)
        cache._advance_clock(60)
        ahead += 60
    answer = ask(cache, ahead)
    known = [one.hit_ratio for one in answer.estimates if one.hit_ratio is not None]
    assert len(known) >= 3
    assert max(known) < 0.02


def test_where_memory_is_what_lacks_its_part_is_asked_about(name: str) -> None:
    config = SlabConfig(memory_bytes=4 * MiB, max_entries=4000, ttl=None, max_value_bytes=65536)
    with SharedSlab(name, config) as slab:
        replay(slab, zipf_and_loop(5), size=4000)
        history = read_history(slab, time.monotonic_ns())
        assert history is not None
        assert history.size == len(slab) < 1000
        answer = estimate(history)
    below, now, above = (one.hit_ratio for one in answer.estimates[:3])
    assert below is not None
    assert now is not None
    assert above is not None
    assert below < now - 0.02
    assert above > now + 0.02


def test_the_managers_counts_come_first(cache: SharedSlab) -> None:
    """It looks again before it computes, which the slab counts as another miss."""
    replay(cache, [1])
    for key in zipf_and_loop(6, 8000):
        if cache.get(b"%d" % key) is None:
            cache.get(b"%d" % key)
            cache.set(b"%d" % key, b"x")
            cache._count(Counter.L1_MISSES)
        else:
            cache._count(Counter.L1_HITS)
    sums = cache._counter_sums()
    answer = ask(cache)
    assert answer.lookups == 8000
    assert answer.estimates[1].hit_ratio == sums[Counter.L1_HITS] / 8000


# ---- when nothing is said ----


def test_nothing_is_remembered_of_an_empty_slab(cache: SharedSlab) -> None:
    assert read_history(cache, time.monotonic_ns()) is None


def test_what_is_missing_is_said_and_is_enough(cache: SharedSlab) -> None:
    keys = zipf_and_loop(7, 9000)
    for _ in range(
        20
    ):  # on a slow machine marks are of several ticks of the clock: then what came before them only warms
        cache.clear()
        replay(cache, keys[:2500])
        answer = ask(cache)
        if [one.hit_ratio is None for one in answer.estimates] != [False, False, True, True]:
            continue
        assert answer.estimates[2].lookups_missing == 2 * 2 * ENTRIES - answer.lookups_remembered
        replay(cache, keys[2500 : 2500 + answer.estimates[2].lookups_missing])
        if ask(cache).estimates[2].hit_ratio is not None:
            return
    pytest.fail("what was said to be missing was never enough")


def test_a_clear_begins_anew(cache: SharedSlab) -> None:
    replay(cache, zipf_and_loop(8, 9000))
    cache.clear()
    assert read_history(cache, time.monotonic_ns()) is None or ask(cache).lookups == 0
    replay(cache, range(100))
    assert ask(cache).lookups <= 100


# ---- what it rests on may be anything ----


def test_asking_stores_nothing_in_the_slab(cache: SharedSlab) -> None:
    replay(cache, zipf_and_loop(9, 9000))
    assert cache._segment is not None
    before = hashlib.sha256(cache._segment.memory.view).digest()
    ask(cache)
    assert hashlib.sha256(cache._segment.memory.view).digest() == before


@pytest.mark.parametrize("seed", range(20))
def test_arbitrary_bytes_give_some_answer(seed: int) -> None:
    generator = random.Random(seed)
    now = Mark(0, 1 << generator.randrange(64), 0, *(generator.getrandbits(64) for _ in range(4)))
    shards = []
    for _ in range(generator.choice((1, 3))):
        numbers = sorted(generator.randrange(300) for _ in range(5))
        marks = b"".join(
            array("Q", [generator.choice((number, generator.getrandbits(64))), at, *words]).tobytes()
            for at, number in enumerate(numbers)
            for words in [[generator.getrandbits(generator.choice((31, 32, 64))) for _ in range(5)]]
        )
        shard = _shard_of(0, 0, marks, generator.randbytes(8 * 300), now.at_ns)
        shards.append(shard or Shard([now._replace(number=0, at_ns=0)], array("Q", [1, 2, 3]), True))
    history = History(shards, now, (1 << 32) - 1, 100, 5000, 1.0, 100, None, generator.choice((0, 1000)))
    answer = estimate(history)
    assert all(one.hit_ratio is None or 0 <= one.hit_ratio <= 1 for one in answer.estimates)


def test_replay_refuses_what_is_no_cache() -> None:
    assert native.replay(b"", b"", 1, 1, 0, 0) == b""
    with pytest.raises(ValueError, match="as many words"):
        native.replay(bytes(8), bytes(16), 1, 1, 0, 0)
    with pytest.raises(ValueError, match="as many words"):
        native.replay(bytes(7), bytes(7), 1, 1, 0, 0)
    for entries, units in ((0, 1), (1, 0), (1 << 31, 1), (1, 1 << 31)):
        with pytest.raises(ValueError, match="no cache"):
            native.replay(bytes(8), bytes(8), entries, units, 0, 0)


# ---- the command ----


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-m", "llm_edge_cache", "stats", "--name", name, "--what-if", *arguments]
    return subprocess.run(given, capture_output=True, text=True, check=False, timeout=100, env=dict(os.environ))


def test_the_command_prints_a_table(cache: SharedSlab) -> None:
    replay(cache, zipf_and_loop(10, 20_000), size=500)
    ran = command(cache.name)
    assert ran.returncode == 0, ran.stderr
    head, *rows = ran.stdout.splitlines()
    assert head.split() == ["entries", "hit", "ratio", "memory"]
    assert [row.split()[0] for row in rows[:4]] == ["500", "1,000", "2,000", "4,000"]
    assert "now: counted" in rows[1]
    assert "points" in rows[2]
    assert "20,000 look-ups" in ran.stdout or "19,999 look-ups" in ran.stdout


def test_the_commands_json_says_the_same(cache: SharedSlab) -> None:
    replay(cache, zipf_and_loop(11, 5000), size=500)
    ran = command(cache.name, "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert [size["entries"] for size in told["what_if"]] == [500, 1000, 2000, 4000]
    assert [size["hit_ratio"] is None for size in told["what_if"]] == [False, False, False, True]
    assert told["what_if"][3]["lookups_missing"] > 0
    assert told["is_whole"] is True


def test_the_memory_told_is_enough(name: str, cache: SharedSlab) -> None:
    replay(cache, zipf_and_loop(12, 20_000), size=500)
    size = json.loads(command(cache.name, "--json").stdout)["what_if"][2]
    sized = SlabConfig(
        memory_bytes=size["memory_bytes"], max_entries=size["entries"], ttl=None, max_value_bytes=CONFIG.max_value_bytes
    )
    with SharedSlab(f"{name}-sized", sized) as slab:
        try:
            replay(slab, range(10_000), size=500)
            assert len(slab) == size["entries"]
            assert size["memory_bytes"] < 2 * slab.stats().used_bytes
        finally:
            slab.unlink()


def test_the_command_says_that_nothing_is_known(cache: SharedSlab) -> None:
    ran = command(cache.name)
    assert ran.returncode == 1
    assert "nothing is remembered" in ran.stdout
    assert json.loads(command(cache.name, "--json").stdout) == {"name": cache.name, "what_if": None}
