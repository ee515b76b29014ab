"""A slab's entries in a file (`snapshot_file`), and back: a warm cache over a reboot, or for another host.

The expiry is wall time: an entry lives on for what is left of its life, however long the file lay about. What the
manager keeps beside the entries comes along as far as their validity rests on it:

- the generations of tags, so that what an invalidated tag made void stays void, and later invalidations are above them;
- the place in the stream of invalidations, so that those of other hosts that came after the snapshot are caught up on.

Entries are read as a reader without a lock reads them, one by one: each is consistent in itself, the whole is not of
one moment, and nobody waits. Entries of the cache's own (flights, logs, journals) are left out.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

import msgspec

from llm_edge_cache.errors import SnapshotError
from llm_edge_cache.regions import Word
from llm_edge_cache.slabconfig import SlabConfig
from llm_edge_cache.snapshot_file import (
    BATCH_BYTES,
    SYNC_BYTES,
    Record,
    Records,
    Source,
    State,
    closed_by,
    opened,
    opened_by,
    packed,
    replaced,
)

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["Progress", "RestoreReport", "SaveReport", "SnapshotInfo", "describe", "restore", "save"]

_SCAN_END: Final = (1 << 64) - 1
_INTERNAL: Final = b"\0llm-edge-cache:"
_NS: Final = 1_000_000_000

Progress = Callable[[int, int], None]
"""Is told now and then how much is done, and of how much: entries when saving, bytes when restoring."""


class SaveReport(NamedTuple):
    """What was written."""

    entries: int
    payload_bytes: int
    """Keys and values."""
    file_bytes: int


class RestoreReport(NamedTuple):
    """What became of the file's entries."""

    restored: int
    present: int
    """Not stored because the slab had the key already: its value is the newer one."""
    expired: int
    """Their lives ended while the file lay about."""
    refused: int
    """Too large for this slab, or no memory to be had."""
    lost: int
    """Damaged. At least so many where `is_complete` is False."""
    is_complete: bool
    """The end of the file was there, so it is known how many entries it had."""


class SnapshotInfo(NamedTuple):
    """What a file says about itself."""

    name: str
    """The slab that it was taken of."""
    taken_at: float
    """Seconds since the epoch."""
    entries: int | None
    """None: the end of the file is damaged or missing."""
    config: SlabConfig
    file_bytes: int


# ---- saving ----


def save(slab: SharedSlab, path: str | os.PathLike[str], *, progress: Progress | None = None) -> SaveReport:
    """Write a slab's entries to a file. The file is there, whole and on disk, or what was there before still is.

    Args:
        slab: a live slab; it is read without a lock and without a trace.
        path: the file, readable by its owner alone. A link is followed.
        progress: is called with the entries so far and about how many there are.

    Raises:
        SnapshotError: the file cannot be written, or the slab was replaced or unlinked meanwhile.
        SlabClosedError: the slab is closed.
    """
    nonce = slab._mapping.nonce
    state = _opening_state(slab)
    with replaced(Path(os.path.realpath(path))) as file:
        file.write(opened_by(state))
        entries, payload_bytes = _write_entries(slab, file, state.sync, progress)
        mapping = slab._mapping
        if mapping.nonce != nonce or mapping.retired:
            raise SnapshotError(f"slab {slab.name!r} was replaced or unlinked meanwhile: nothing was written")
        file.write(closed_by(_with_tags(slab, msgspec.structs.replace(state, entries=entries))))
        file_bytes = file.tell()
    return SaveReport(entries, payload_bytes, file_bytes)


def _opening_state(slab: SharedSlab) -> State:
    word = slab._word
    state = State(
        sync=secrets.token_bytes(SYNC_BYTES),
        name=slab.name,
        taken_at=time.time(),
        config=slab._mapping.config,
        cursor=word(Word.CURSOR),
        followed=word(Word.FOLLOWED),
        begin=word(Word.BEGIN),
        cleared=word(Word.CLEARED),
    )
    return _with_tags(slab, state)


def _with_tags(slab: SharedSlab, state: State) -> State:
    # The epoch after the tags: it moves first, so none of the tags is above it.
    count, tags = slab._tags()
    epoch = slab._word(Word.TAG_EPOCH)
    return msgspec.structs.replace(state, tag_count=max(count, 1), tags=tags, tag_epoch=epoch)


def _write_entries(slab: SharedSlab, file: BinaryIO, sync: bytes, progress: Progress | None) -> tuple[int, int]:
    expected, entries, payload_bytes, cursor = len(slab), 0, 0, 0
    while cursor != _SCAN_END:
        now_ns = time.time_ns()
        cursor, rows = slab._scan_entries(cursor, BATCH_BYTES)
        parts: list[bytes] = []
        for key, value, ttl_left, tti in rows:
            if key.startswith(_INTERNAL):
                continue
            expires_ns = 0 if ttl_left is None else min(now_ns + int(ttl_left * _NS), _SCAN_END)
            idle_ms = 0 if tti is None else round(tti * 1000)
            parts += packed(sync, key, value, expires_ns=expires_ns, idle_ms=idle_ms)
            payload_bytes += len(key) + len(value)
        entries += len(parts) // 3
        file.write(b"".join(parts))
        if progress is not None:
            progress(entries, max(expected, entries))
    return entries, payload_bytes


# ---- reading ----


def describe(path: str | os.PathLike[str]) -> SnapshotInfo:
    """Return what a snapshot says about itself.

    Raises:
        SnapshotError: it cannot be read, is no snapshot, is of another version, or both its ends are damaged.
    """
    with opened(path) as source:
        state = source.closing or source.opening
        assert state is not None
        config = _config_of(state, path)
        return SnapshotInfo(state.name, state.taken_at, source.entries, config, source.file_bytes)


def _config_of(state: State, path: str | os.PathLike[str]) -> SlabConfig:
    try:
        return SlabConfig.from_native(state.config)
    except ValueError as error:
        raise SnapshotError(f"{os.fspath(path)} was taken of a slab that cannot be made here: {error}") from None


# ---- restoring ----


def restore(
    slab: SharedSlab, path: str | os.PathLike[str], *, accept_missed: bool = False, progress: Progress | None = None
) -> RestoreReport:
    """Store a snapshot's entries in a slab, each for the rest of its life. A key that is there already is left alone.

    Best done before the application starts. What was deleted by key on this host after the snapshot comes back; what an
    invalidated tag or another host made void does not.

    Args:
        slab: where; of any size: where it is too small for all, its policy decides.
        path: the file.
        accept_missed: also where the slab has followed the invalidations of other hosts beyond the snapshot, so that
            entries which those made void may come back for the rest of their lives.
        progress: is called with the bytes so far and all of them.

    Raises:
        SnapshotError: it cannot be read, is no snapshot, is of another version, both its ends are damaged; or
            invalidations would be missed.
        SlabBusyError, SlabClosedError: as they say; what came before is stored then.
    """
    with opened(path) as source:
        _adopt(slab, source, accept_missed)
        records = Records(source)
        counts = {"restored": 0, "present": 0, "expired": 0, "refused": 0}
        sound, damaged, told = 0, 0, 0
        for record in records:
            if record is None:
                damaged += 1
                continue
            sound += 1
            counts[_store(slab, record)] += 1
            if progress is not None and records.done - told >= BATCH_BYTES:
                told = records.done
                progress(told, source.file_bytes)
        if progress is not None:
            progress(source.file_bytes, source.file_bytes)
        lost = damaged if source.entries is None else max(source.entries - sound, 0)
        return RestoreReport(**counts, lost=lost, is_complete=source.entries is not None)


def _store(slab: SharedSlab, record: Record) -> str:
    """Store one entry; returns what became of it."""
    ttl: float | None = None
    if record.expires_ns:
        ttl = (record.expires_ns - time.time_ns()) / _NS
        if ttl <= 0:
            return "expired"
    if slab.add(record.key, record.value, ttl=ttl, tti=record.idle_ms / 1000 if record.idle_ms else None):
        return "restored"
    return "present" if record.key in slab else "refused"


def _adopt(slab: SharedSlab, source: Source, accept_missed: bool) -> None:
    """Take over what the entries' validity rests on, before the first of them can be found."""
    state = source.state
    if not _adopt_place(slab, state) and not accept_missed:
        raise SnapshotError(
            f"slab {slab.name!r} has followed the invalidations of other hosts beyond {source.path}: what "
            "those made void could come back. Restore before the application starts, or accept that (--accept-missed)"
        )
    slab._word_raise(Word.TAG_EPOCH, state.tag_epoch)
    for tag, generation in _spread(state, slab._tags()[0]):
        slab._tag_raise(tag, generation)


def _adopt_place(slab: SharedSlab, state: State) -> bool:
    """Go on in the stream of invalidations from where the snapshot was. Returns whether none will be missed."""
    if state.cursor and not slab._word(Word.CURSOR):
        # Whose place it is first: 1 we set the place  2 a manager finds that it is not its Redis's, and sets it to 0
        # 3 we say that it is.
        slab._word_exchange(Word.FOLLOWED, 0, state.followed)
        if slab._word(Word.FOLLOWED) == state.followed and slab._word_exchange(Word.CURSOR, 0, state.cursor):
            slab._word_raise(Word.BEGIN, state.begin)
            slab._word_raise(Word.CLEARED, state.cleared)
            return True
    followed, cursor = slab._word(Word.FOLLOWED), slab._word(Word.CURSOR)
    return not cursor or (followed == state.followed and cursor <= state.cursor)


def _spread(state: State, count: int) -> Iterator[tuple[int, int]]:
    """The tags' generations for a table of another size. Both are powers of two, and a tag lies at its hash modulo.

    In a larger table it may be at any place that has the same rest: all of them are raised, too much, never too little.
    """
    for index, generation in state.tags.items():
        for place in range(index % max(count, 1), count, state.tag_count):
            yield place, generation
