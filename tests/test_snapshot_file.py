"""The file of a snapshot: damage loses what it hits and no more, and is counted; what is no snapshot is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_edge_cache import SharedSlab, snapshot
from llm_edge_cache.errors import SnapshotError
from llm_edge_cache.snapshot_file import opened

ENTRIES = 200


@pytest.fixture
def file(slab: SharedSlab, tmp_path: Path) -> Path:
    """A snapshot of values that hold their keys; the slab is empty again."""
    slab.set_many({b"key %03d" % number: b"key %03d " % number * 30 for number in range(ENTRIES)})
    snapshot.save(slab, tmp_path / "file")
    slab.clear()
    return tmp_path / "file"


def places(file: Path) -> list[int]:
    """Where the records begin."""
    with opened(file) as source:
        data, sync = file.read_bytes(), source.state.sync
        found = [source.begin]
        while (at := data.find(sync, found[-1] + 1, source.end)) >= 0:
            found.append(at)
    assert len(found) == ENTRIES
    return found


def change(file: Path, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(file.read_bytes())
    edit(data)
    file.write_bytes(data)


def flip(*offsets: int) -> Callable[[bytearray], object]:
    def edit(data: bytearray) -> None:
        for at in offsets:
            data[at] ^= 0x40

    return edit


def restored(slab: SharedSlab, file: Path) -> snapshot.RestoreReport:
    report = snapshot.restore(slab, file)
    for info in slab.scan():
        assert slab.get(info.key) == (info.key + b" ") * 30
    assert report.restored == len(slab)
    return report


@pytest.mark.parametrize(
    ("offset", "what"),
    [(0, "sync"), (8, "checksum"), (16, "key's length"), (17, "key's length, far too long"), (20, "value's length"),
     (23, "value's length, gigabytes"), (24, "idle limit"), (28, "expiry"), (36, "key"), (100, "value")],
)  # fmt: skip
def test_a_damaged_entry_loses_only_itself(slab: SharedSlab, file: Path, offset: int, what: str) -> None:
    change(file, flip(places(file)[77] + offset))
    assert restored(slab, file) == (ENTRIES - 1, 0, 0, 0, 1, True)


def test_every_damaged_entry_is_counted(slab: SharedSlab, file: Path) -> None:
    starts = places(file)
    change(file, flip(*(starts[at] + at for at in (0, 3, 4, 5, 90, ENTRIES - 1))))
    assert restored(slab, file) == (ENTRIES - 6, 0, 0, 0, 6, True)


def test_what_was_cut_out_of_the_middle_is_counted(slab: SharedSlab, file: Path) -> None:
    starts = places(file)

    def cut(data: bytearray) -> None:
        del data[starts[50] + 13 : starts[60] + 5]

    change(file, cut)
    report = restored(slab, file)
    assert (report.restored, report.lost, report.is_complete) == (ENTRIES - 11, 11, True)


def test_a_lost_beginning_loses_no_entry(slab: SharedSlab, file: Path) -> None:
    change(file, flip(3, 12, 60))
    assert restored(slab, file) == (ENTRIES, 0, 0, 0, 0, True)


def test_a_lost_end_loses_no_other_entries_and_is_told(slab: SharedSlab, file: Path) -> None:
    starts = places(file)

    def cut(data: bytearray) -> None:
        del data[starts[120] + 99 :]

    change(file, cut)
    report = restored(slab, file)
    assert (report.restored, report.lost, report.is_complete) == (120, 1, False)


def test_both_ends_damaged_is_a_clear_error(slab: SharedSlab, file: Path) -> None:
    size = file.stat().st_size
    change(file, flip(60, size - 60))
    with pytest.raises(SnapshotError, match="damaged at both ends"):
        snapshot.restore(slab, file)
    assert len(slab) == 0


def test_random_damage_never_stores_a_wrong_value_or_raises_anything_else(slab: SharedSlab, file: Path) -> None:
    whole = file.read_bytes()
    for seed in range(150):
        generator, data = random.Random(seed), bytearray(whole)
        for _ in range(generator.randrange(1, 20)):
            at = generator.randrange(len(data))
            kind = generator.randrange(4)
            if kind == 0:
                data[at] ^= 1 << generator.randrange(8)
            elif kind == 1:
                data[at : at + generator.randrange(3000)] = generator.randbytes(generator.randrange(3000))
            elif kind == 2:
                del data[at : at + generator.randrange(3000)]
            else:
                data[at:at] = data[at : at + generator.randrange(3000)]
        file.write_bytes(data)
        slab.clear()
        try:
            report = restored(slab, file)
        except SnapshotError:
            assert len(slab) == 0
        else:
            assert report.restored <= ENTRIES


@pytest.mark.parametrize("content", [b"", b"x", b"no snapshot at all " * 100, bytes(5000), b"\x89PNG\r\n\x1a\n" * 9])
def test_a_foreign_file_is_a_clear_error(slab: SharedSlab, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    for reads in (lambda: snapshot.restore(slab, tmp_path / "file"), lambda: snapshot.describe(tmp_path / "file")):
        with pytest.raises(SnapshotError, match="is no snapshot"):
            reads()


def test_another_version_s_is_a_clear_error(slab: SharedSlab, file: Path) -> None:
    def raise_version(data: bytearray) -> None:
        data[8] = data[len(data) - 16] = 2

    change(file, raise_version)
    with pytest.raises(SnapshotError, match="has snapshot format 2, this version reads 1"):
        snapshot.restore(slab, file)


@pytest.mark.parametrize("path", ["absent", "."])
def test_what_cannot_be_read_is_a_clear_error(slab: SharedSlab, tmp_path: Path, path: str) -> None:
    with pytest.raises(SnapshotError, match="cannot be read"):
        snapshot.restore(slab, tmp_path / path)


def test_a_value_that_is_a_snapshot_itself_is_restored(slab: SharedSlab, file: Path, tmp_path: Path) -> None:
    inner = file.read_bytes()
    slab.set(b"inner", inner)
    snapshot.save(slab, tmp_path / "outer")
    slab.clear()
    assert snapshot.restore(slab, tmp_path / "outer") == (1, 0, 0, 0, 0, True)
    assert slab.get(b"inner") == inner
