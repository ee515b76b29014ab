"""Snapshots: what is saved comes back, each entry for the rest of its life, and nothing that had become void."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis_servers import RedisServer

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    L1Config,
    L2Config,
    SharedSlab,
    SlabConfig,
    SyncCacheManager,
    snapshot,
)
from llm_edge_cache.errors import SlabClosedError, SnapshotError
from llm_edge_cache.invalidation import Invalidation, Invalidator, tag_hash
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Counter, Word

MiB = 1 << 20


@pytest.fixture
def other(name: str) -> Iterator[SharedSlab]:
    """Another slab, of another size."""
    with SharedSlab(name + "-other", SlabConfig(memory_bytes=8 * MiB, ttl=None)) as made:
        yield made
        assert made.closed or made.check() == []
        made.unlink()


def contents(slab: SharedSlab) -> dict[bytes, bytes | None]:
    return {info.key: slab.get(info.key) for info in slab.scan()}


# ---- there and back ----


def test_what_was_saved_is_restored(slab: SharedSlab, other: SharedSlab, tmp_path: Path) -> None:
    wanted = {os.urandom(1 + number % 60): os.urandom(number * 7 % 5000) for number in range(300)}
    wanted |= {b"k" * 1024: b"", b"large": os.urandom(400_000), b"\0binary": b"\0"}
    slab.set_many(wanted)
    saved = snapshot.save(slab, tmp_path / "file")
    report = snapshot.restore(other, tmp_path / "file")
    assert contents(other) == wanted
    assert (saved.entries, report.restored) == (len(wanted), len(wanted))
    assert saved.payload_bytes == sum(len(key) + len(value) for key, value in wanted.items())
    assert saved.file_bytes == (tmp_path / "file").stat().st_size
    assert (report.present, report.expired, report.refused, report.lost, report.is_complete) == (0, 0, 0, 0, True)


def test_an_empty_slab_makes_a_file_too(slab: SharedSlab, other: SharedSlab, tmp_path: Path) -> None:
    assert snapshot.save(slab, tmp_path / "file").entries == 0
    assert snapshot.restore(other, tmp_path / "file") == (0, 0, 0, 0, 0, True)


def test_the_expiry_is_absolute(
    slab: SharedSlab, other: SharedSlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab.set(b"long", b"1", ttl=1000)
    slab.set(b"short", b"2", ttl=100)
    slab.set(b"eternal", b"3", ttl=None, tti=40)
    snapshot.save(slab, tmp_path / "file")
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns + 300 * 10**9)
    report = snapshot.restore(other, tmp_path / "file")
    assert (report.restored, report.expired) == (2, 1)
    found = {info.key: info for info in other.scan()}
    assert found[b"long"].ttl_left == pytest.approx(700, abs=2)
    assert found[b"eternal"].ttl_left is None
    other._advance_clock(39)
    assert b"eternal" in other
    other._advance_clock(2)
    assert b"eternal" not in other


def test_entries_of_the_cache_s_own_are_left_out(slab: SharedSlab, tmp_path: Path) -> None:
    slab.set_many({b"\0llm-edge-cache:journal": b"1", b"\0llm-edge-cache:log:1:2": b"2", b"key": b"3"})
    assert snapshot.save(slab, tmp_path / "file").entries == 1


def test_what_is_there_already_is_left_alone(slab: SharedSlab, tmp_path: Path) -> None:
    slab.set_many({b"a": b"old", b"b": b"old"})
    snapshot.save(slab, tmp_path / "file")
    slab.set(b"a", b"new")
    slab.delete(b"b")
    report = snapshot.restore(slab, tmp_path / "file")
    assert (report.restored, report.present) == (1, 1)
    assert contents(slab) == {b"a": b"new", b"b": b"old"}


def test_what_finds_no_room_is_counted(slab: SharedSlab, name: str, tmp_path: Path) -> None:
    slab.set_many({b"large": bytes(100_000), b"small": b"1"})
    snapshot.save(slab, tmp_path / "file")
    with SharedSlab(name + "-tiny", SlabConfig(memory_bytes=MiB, max_value_bytes=50_000)) as tiny:
        report = snapshot.restore(tiny, tmp_path / "file")
        tiny.unlink()
    assert (report.restored, report.refused) == (1, 1)


def test_a_file_describes_itself(slab: SharedSlab, tmp_path: Path) -> None:
    slab.set(b"key", b"value")
    before = time.time()
    saved = snapshot.save(slab, tmp_path / "file")
    info = snapshot.describe(tmp_path / "file")
    assert (info.name, info.entries, info.file_bytes) == (slab.name, 1, saved.file_bytes)
    assert info.config == slab.config
    assert before <= info.taken_at <= time.time()


def test_progress_ends_at_everything(slab: SharedSlab, other: SharedSlab, tmp_path: Path) -> None:
    slab.set_many({b"%d" % number: bytes(1000) for number in range(1500)})
    told: list[tuple[int, int]] = []
    snapshot.save(slab, tmp_path / "file", progress=lambda *step: told.append(step))
    assert told[-1] == (1500, 1500)
    assert len(told) > 2
    told.clear()
    report = snapshot.restore(other, tmp_path / "file", progress=lambda *step: told.append(step))
    assert report.restored == 1500
    size = (tmp_path / "file").stat().st_size
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# ---- what had become void ----


def test_tags_invalidated_before_the_snapshot_stay_void(slab: SharedSlab, other: SharedSlab, tmp_path: Path) -> None:
    invalidate = Invalidator(slab, None)
    for tag in ("a", "b", "a"):
        invalidate.apply(Invalidation("tag", tag))
    snapshot.save(slab, tmp_path / "file")
    snapshot.restore(other, tmp_path / "file")
    assert [other._tag(tag_hash(tag)) for tag in ("a", "b", "c")] == [3, 2, 0]


def test_tags_invalidated_afterwards_are_above_what_was_restored(
    slab: SharedSlab, other: SharedSlab, tmp_path: Path
) -> None:
    for _ in range(5):
        Invalidator(slab, None).apply(Invalidation("tag", "x"))
    epoch_of_an_entry = slab._word(Word.TAG_EPOCH)
    snapshot.save(slab, tmp_path / "file")
    snapshot.restore(other, tmp_path / "file")
    Invalidator(other, None).apply(Invalidation("tag", "y"))
    assert other._tag(tag_hash("y")) > epoch_of_an_entry


@pytest.mark.parametrize(("larger_first"), [True, False])
def test_tags_find_their_places_in_a_table_of_another_size(name: str, tmp_path: Path, larger_first: bool) -> None:
    sizes = [8 * MiB, MiB] if larger_first else [MiB, 8 * MiB]
    one, two = (SharedSlab(f"{name}-{size}", SlabConfig(memory_bytes=size)) for size in sizes)
    assert one._tags()[0] != two._tags()[0]
    for number in range(50):
        one._tag_raise(tag_hash(f"tag {number}"), number + 1)
    snapshot.save(one, tmp_path / "file")
    snapshot.restore(two, tmp_path / "file")
    # Too much, never too little.
    assert all(two._tag(tag_hash(f"tag {number}")) >= number + 1 for number in range(50))
    for slab in (one, two):
        slab.unlink()


def test_the_place_in_the_stream_of_invalidations_comes_along(
    slab: SharedSlab, other: SharedSlab, tmp_path: Path
) -> None:
    words = {Word.CURSOR: 50, Word.FOLLOWED: 7, Word.BEGIN: 60, Word.CLEARED: 40}
    for word, value in words.items():
        slab._word_set(word, value)
    snapshot.save(slab, tmp_path / "file")
    snapshot.restore(other, tmp_path / "file")
    assert {word: other._word(word) for word in words} == words


@pytest.mark.parametrize(("cursor", "followed"), [(51, 7), (50, 8), (10, 8)])
def test_a_slab_that_has_followed_beyond_the_snapshot_takes_it_only_when_told(
    slab: SharedSlab, other: SharedSlab, tmp_path: Path, cursor: int, followed: int
) -> None:
    slab.set(b"key", b"value")
    slab._word_set(Word.CURSOR, 50)
    slab._word_set(Word.FOLLOWED, 7)
    snapshot.save(slab, tmp_path / "file")
    other._word_set(Word.CURSOR, cursor)
    other._word_set(Word.FOLLOWED, followed)
    with pytest.raises(SnapshotError, match="followed the invalidations"):
        snapshot.restore(other, tmp_path / "file")
    assert len(other) == 0
    assert snapshot.restore(other, tmp_path / "file", accept_missed=True).restored == 1
    assert other._word(Word.CURSOR) == cursor


def test_a_slab_at_the_snapshot_s_place_takes_it(slab: SharedSlab, tmp_path: Path) -> None:
    slab.set(b"key", b"value")
    slab._word_set(Word.CURSOR, 50)
    slab._word_set(Word.FOLLOWED, 7)
    snapshot.save(slab, tmp_path / "file")
    slab.clear()
    assert snapshot.restore(slab, tmp_path / "file").restored == 1


# ---- with a manager ----


def _reborn(name: str, file: Path) -> SharedSlab:
    """The slab after a reboot of its host."""
    SharedSlab.attach(name).unlink()
    slab = SharedSlab(name, snapshot.describe(file).config)
    snapshot.restore(slab, file)
    return slab


def test_responses_are_hits_after_a_reboot_and_tags_still_void_them(name: str, tmp_path: Path) -> None:
    l1 = L1Config(name=name, memory_bytes=4 * MiB)
    tagged, plain, void = (CacheableRequest("m", prompt) for prompt in ("tagged", "plain", "void"))
    with SyncCacheManager(l1) as manager:
        manager.store(void, CachedResponse("0", "m"), tags=["gone"])
        manager.invalidate_tag("gone")
        manager.store(tagged, CachedResponse("1", "m"), tags=["tag"])
        manager.store(plain, CachedResponse("2", "m"))
        snapshot.save(manager.slab, tmp_path / "file")
    slab = _reborn(name, tmp_path / "file")
    with SyncCacheManager(l1) as manager:
        assert [manager.lookup(request).is_hit for request in (tagged, plain, void)] == [True, True, False]
        manager.invalidate_tag("tag")
        assert [manager.lookup(request).is_hit for request in (tagged, plain, void)] == [False, True, False]
    slab.close()


def test_what_another_host_invalidated_meanwhile_is_caught_up_on(
    name: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    here, there = (L1Config(name=name + which, memory_bytes=4 * MiB) for which in ("", "-there"))
    l2 = L2Config(redis_server.unix_url, key_prefix=f"{name}:", operation_timeout_ms=1000)
    stays, goes = CacheableRequest("m", "stays"), CacheableRequest("m", "goes")
    with SyncCacheManager(here, l2) as manager:
        manager.store(stays, CachedResponse("1", "m"))
        manager.store(goes, CachedResponse("2", "m"))
        _await(lambda: manager.slab._word(Word.CONTACT) != 0)
        snapshot.save(manager.slab, tmp_path / "file")
    with SyncCacheManager(there, l2) as manager:
        manager.invalidate(goes)
        manager.slab.unlink()
    slab = _reborn(name, tmp_path / "file")
    assert tier_key(goes) in slab
    with SyncCacheManager(here, l2) as manager:
        _await(lambda: tier_key(goes) not in slab)
        assert tier_key(stays) in slab
        assert not manager.lookup(goes).is_hit
        assert manager.slab._counter_sums()[Counter.STREAM_FLUSHES] == 0
    slab.close()


def _await(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- the file ----


def test_the_file_is_its_owner_s_alone(slab: SharedSlab, tmp_path: Path) -> None:
    snapshot.save(slab, tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_failure_leaves_the_old_file_and_no_other(slab: SharedSlab, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    slab.set_many({b"%d" % number: bytes(1000) for number in range(1500)})

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snapshot.save(slab, tmp_path / "file", progress=interrupt)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_link_is_followed(slab: SharedSlab, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    snapshot.save(slab, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert snapshot.describe(tmp_path / "file").entries == 0


def test_no_space_is_a_clear_error_and_leaves_nothing(
    slab: SharedSlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SnapshotError, match="there is no space for"):
        snapshot.save(slab, tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_limit_in_the_way_is_a_clear_error_and_leaves_nothing(slab: SharedSlab, tmp_path: Path) -> None:
    slab.set(b"large", bytes(400_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SnapshotError, match="cannot be written: File too large"):
            snapshot.save(slab, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["absent/file", ""])
def test_a_place_that_cannot_be_written_to_is_a_clear_error(slab: SharedSlab, tmp_path: Path, path: str) -> None:
    with pytest.raises(SnapshotError, match="cannot be written"):
        snapshot.save(slab, tmp_path / path)


def test_a_slab_that_is_replaced_meanwhile_is_a_clear_error(slab: SharedSlab, tmp_path: Path) -> None:
    slab.set_many({b"%d" % number: bytes(1000) for number in range(1500)})

    def replace(done: int, total: int) -> None:
        SharedSlab(slab.name, slab.config, replace=done < 1500).close()

    with pytest.raises(SnapshotError, match="replaced or unlinked meanwhile"):
        snapshot.save(slab, tmp_path / "file", progress=replace)
    assert os.listdir(tmp_path) == []


def test_a_closed_slab_is_refused(slab: SharedSlab, tmp_path: Path) -> None:
    slab.close()
    with pytest.raises(SlabClosedError):
        snapshot.save(slab, tmp_path / "file")
    assert os.listdir(tmp_path) == []


# ---- under load ----


def _value_of(number: int, generator: random.Random) -> bytes:
    body = b"%d:" % number + generator.randbytes(generator.randrange(3000))
    return body + zlib.crc32(body).to_bytes(4, "big")


def _write(name: str, seed: int, stop: threading.Event) -> None:
    generator = random.Random(seed)
    with SharedSlab.attach(name) as slab:
        while not stop.is_set():
            number = generator.randrange(300)
            slab.set(b"%d" % number, _value_of(number, generator))


def test_under_load_each_entry_is_whole_and_its_key_s(slab: SharedSlab, other: SharedSlab, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writers = [context.Process(target=_write, args=(slab.name, seed, stop)) for seed in range(4)]
    for writer in writers:
        writer.start()
    try:
        _await_entries(slab, 250)
        for _ in range(10):
            other.clear()
            saved = snapshot.save(slab, tmp_path / "file")
            # Scans are weakly consistent: an entry that moves meanwhile may come twice.
            assert snapshot.restore(other, tmp_path / "file")[:2] in {
                (saved.entries - twice, twice) for twice in range(saved.entries)
            }
            for key, value in contents(other).items():
                assert value is not None
                assert value.startswith(key + b":")
                assert zlib.crc32(value[:-4]).to_bytes(4, "big") == value[-4:]
    finally:
        stop.set()
        for writer in writers:
            writer.join(30)
    assert [writer.exitcode for writer in writers] == [0] * 4


def _await_entries(slab: SharedSlab, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(slab) < count and time.monotonic() < deadline:
        time.sleep(0.01)
