"""The segment's files in /dev/shm: named, reserved, trusted only when the user's alone, never half made."""

from __future__ import annotations

import fcntl
import os
import random
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import ends_well, fork

from llm_edge_cache import (
    SharedSlab,
    SlabBusyError,
    SlabConfig,
    SlabNotFoundError,
    SlabPermissionError,
    SlabVersionError,
    list_slabs,
    namelock,
    naming,
    segment,
)
from llm_edge_cache.naming import Owner, Place, place_of
from llm_edge_cache.native import native

MiB = 1 << 20
SMALL = SlabConfig(memory_bytes=4 * MiB)
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def _place(name: str) -> Place:
    return place_of(name, naming.current_owner())


def _shm_files(name: str) -> list[str]:
    return sorted(entry for entry in os.listdir("/dev/shm") if name in entry)


# ---- the name ----


def test_the_file_s_name_shows_the_slab_s() -> None:
    assert Path(_place("my app/1").segment).name.startswith("llm-edge-cache.my_app_1.")


@pytest.mark.parametrize("part", ["name", "uid", "layout", "mutex", "libc", "pid", "time"])
def test_parties_that_could_not_understand_each_other_never_meet(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = place_of("name", Owner(1000, 1000))

    class Other:
        LAYOUT_VERSION = native.LAYOUT_VERSION + (part == "layout")
        MUTEX_BYTES = native.MUTEX_BYTES + (part == "mutex")

    namespace = naming._namespace
    monkeypatch.setattr(naming, "native", Other)
    monkeypatch.setattr(naming, "_namespace", lambda kind: namespace(kind) + (kind == part))
    if part == "libc":
        monkeypatch.setattr(naming, "_libc", lambda: "glibc 9.9")
    theirs = place_of("name2" if part == "name" else "name", Owner(1000 + (part == "uid"), 1000))
    assert ours.segment != theirs.segment


def test_a_long_name_makes_a_short_file_name() -> None:
    path = _place("x" * 1024).lock
    assert len(Path(path).name) < 128
    assert _place("x" * 1024) != _place("x" * 1023 + "y")


# ---- created, and whole ----


def test_files_are_the_user_s_alone_whatever_the_umask(name: str) -> None:
    before = os.umask(0)
    try:
        slab = SharedSlab(name, SMALL)
    finally:
        os.umask(before)
    with slab:
        for path in (slab._place.segment, slab._place.lock):
            status = os.stat(path)
            assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 0o600)


def test_a_umask_that_takes_everything_does_not_lock_us_out(name: str) -> None:
    before = os.umask(0o777)
    try:
        SharedSlab(name, SMALL).close()
    finally:
        os.umask(before)
    SharedSlab.attach(name).close()


def test_every_page_is_reserved(slab: SharedSlab) -> None:
    status = os.stat(slab._place.segment)
    assert status.st_size == 4 * MiB
    assert status.st_blocks * 512 >= status.st_size


def test_the_lock_file_remembers_the_name(slab: SharedSlab) -> None:
    assert Path(slab._place.lock).read_bytes().decode() == slab.name


def test_no_file_descriptor_passes_to_a_program_that_is_started(slab: SharedSlab) -> None:
    for entry in os.listdir("/proc/self/fd"):
        with_suffix = Path("/proc/self/fd") / entry
        if with_suffix.exists() and "llm-edge-cache" in os.readlink(with_suffix):
            assert fcntl.fcntl(int(entry), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


GARBAGE: dict[str, Callable[[bytearray], Any]] = {
    "zeros": lambda image: image.__setitem__(slice(None), bytes(len(image))),
    "random": lambda image: image.__setitem__(slice(None), random.Random(1).randbytes(len(image))),
    "random after the magic": lambda image: image.__setitem__(
        slice(8, None), random.Random(2).randbytes(len(image) - 8)
    ),
    "no magic": lambda image: image.__setitem__(slice(0, 8), bytes(8)),
    "another boot": lambda image: image.__setitem__(slice(56, 72), bytes(16)),
    "another size": lambda image: image.__setitem__(slice(48, 56), struct.pack("<Q", 1 << 40)),
    "a configuration of no slab": lambda image: image.__setitem__(slice(44, 48), bytes(4)),
    "half of it": lambda image: image.__delitem__(slice(len(image) // 2, None)),
    "one page": lambda image: image.__delitem__(slice(4096, None)),
    "one byte": lambda image: image.__delitem__(slice(1, None)),
    "nothing": lambda image: image.clear(),
}


def _spoil(path: str, change: Callable[[bytearray], Any]) -> None:
    image = bytearray(Path(path).read_bytes())
    version = image[8:12]
    change(image)
    image[8:12] = version if len(image) >= 12 else image[8:12]  # another version is refused, not replaced; see below
    Path(path).write_bytes(image)


@pytest.mark.parametrize("change", GARBAGE.values(), ids=list(GARBAGE))
def test_garbage_under_the_name_is_replaced_and_never_attached_to(
    name: str, change: Callable[[bytearray], Any]
) -> None:
    with SharedSlab(name, SMALL) as slab:
        place = slab._place
    _spoil(place.segment, change)
    assert not SharedSlab.exists(name)
    assert name not in list_slabs()
    with pytest.raises(SlabNotFoundError):
        SharedSlab.attach(name)
    with SharedSlab(name, SMALL) as slab:
        assert slab.set(b"key", b"value")
        assert slab.check() == []


def test_a_file_whose_pages_are_not_reserved_is_replaced(name: str) -> None:
    with SharedSlab(name, SMALL) as slab:
        place = slab._place
        image = Path(place.segment).read_bytes()
    os.truncate(place.segment, 0)
    os.truncate(place.segment, len(image))
    with open(place.segment, "r+b") as file:
        file.write(image[:8192])
    with SharedSlab(name, SMALL) as slab:
        assert os.stat(place.segment).st_blocks * 512 >= len(image)
        assert slab.set(b"key", b"value")


def _segment_of_layout_77(name: str) -> Place:
    with SharedSlab(name, SMALL) as slab:
        place = slab._place
    with open(place.segment, "r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", 77))
    return place


def test_a_segment_of_another_layout_is_refused_until_it_is_unlinked(name: str) -> None:
    place = _segment_of_layout_77(name)
    for make in (SharedSlab, SharedSlab.attach):
        with pytest.raises(SlabVersionError, match=rf"layout version 77, this is {native.LAYOUT_VERSION}.*unlink"):
            make(name)
    assert not SharedSlab.exists(name)
    segment.unlink(place)
    with SharedSlab(name, SMALL) as slab:
        assert slab.set(b"key", b"value")


def test_replace_takes_the_place_of_a_segment_of_another_layout(name: str) -> None:
    _segment_of_layout_77(name)
    with SharedSlab(name, SMALL, replace=True) as slab:
        assert slab.set(b"key", b"value")


def test_who_has_garbage_mapped_moves_over_to_the_successor(name: str, run_python: Callable[..., str]) -> None:
    with SharedSlab(name, SMALL) as slab:
        with open(slab._place.segment, "r+b") as file:
            file.write(bytes(8))  # the magic
        run_python("import sys; from llm_edge_cache import *; SharedSlab(sys.argv[1]).set(b'key', b'new')", name)
        assert slab.get(b"key") == b"new"


def test_a_segment_that_was_removed_by_hand_does_not_live_on_beside_a_new_one(name: str) -> None:
    with SharedSlab(name, SMALL) as old:
        os.unlink(old._place.segment)
        with SharedSlab(name, SMALL) as new:
            new.set(b"key", b"new")
            assert old.get(b"key") == b"new"


def test_a_lock_file_that_was_removed_by_hand_is_made_again(slab: SharedSlab) -> None:
    os.unlink(slab._place.lock)
    slab.set(b"key", b"value")
    with SharedSlab.attach(slab.name) as second:
        assert second.get(b"key") == b"value"
    SharedSlab(slab.name).close()


# ---- the lock ----


def test_opening_waits_for_who_holds_the_lock(name: str) -> None:
    opened: list[float] = []

    def work() -> None:
        SharedSlab(name, SMALL).close()
        opened.append(time.monotonic())

    thread = threading.Thread(target=work)
    with namelock.hold(_place(name)):
        thread.start()
        time.sleep(0.1)
        released = time.monotonic()
    thread.join()
    assert opened[0] >= released


def test_a_stopped_holder_of_the_lock_is_an_error_not_a_hang(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namelock, "_WAIT_SECONDS", 0.1)
    with namelock.hold(_place(name)), pytest.raises(SlabBusyError, match="stopped while opening the slab"):
        SharedSlab(name)
    assert _shm_files(name) == []


def test_a_child_forked_while_the_lock_is_held_does_not_keep_it(name: str) -> None:
    with namelock.hold(_place(name)):
        pid = fork(lambda: time.sleep(100))
    try:
        begin = time.monotonic()
        SharedSlab(name, SMALL).close()
        assert time.monotonic() - begin < 50
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


# ---- whose it is ----


def _plant(path: str, mode: int = 0o600, uid: int = -1, content: bytes = b"") -> None:
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.write(file, content)
    os.fchmod(file, mode)
    os.fchown(file, uid, -1)
    os.close(file)


@contextmanager
def _planted(name: str, plant: Callable[[str], Any], lock: bool) -> Iterator[Place]:
    place = _place(name)
    path = place.lock if lock else place.segment
    plant(path)
    try:
        yield place
    finally:
        for each in (place.segment, place.lock):
            if os.path.isdir(each):
                os.rmdir(each)
            elif os.path.lexists(each):
                os.unlink(each)


PLANTED: dict[str, Callable[[str], Any]] = {
    "a symlink": lambda path: os.symlink("/etc/passwd", path),
    "a dangling symlink": lambda path: os.symlink("/dev/shm/llm-edge-cache-nowhere", path),
    "a file open to the group": lambda path: _plant(path, mode=0o660),
    "a file open to all": lambda path: _plant(path, mode=0o666),
    "a directory": os.mkdir,
    "a pipe": lambda path: os.mkfifo(path, 0o600),
}


@pytest.mark.parametrize("lock", [False, True], ids=["as segment", "as lock"])
@pytest.mark.parametrize("plant", PLANTED.values(), ids=list(PLANTED))
def test_what_is_not_the_user_s_alone_is_refused(name: str, plant: Callable[[str], Any], lock: bool) -> None:
    with _planted(name, plant, lock) as place:
        with pytest.raises(SlabPermissionError, match="is not trusted"):
            SharedSlab(name, SMALL)
        with pytest.raises(SlabNotFoundError if lock else SlabPermissionError):
            SharedSlab.attach(name)
        assert not SharedSlab.exists(name)
        assert name not in list_slabs()
        assert os.path.lexists(place.lock if lock else place.segment)


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@needs_root
@pytest.mark.parametrize("lock", [False, True], ids=["segment", "lock file"])
def test_what_another_user_planted_is_refused(name: str, lock: bool) -> None:
    planted = _planted(name, lambda path: _plant(path, uid=NOBODY, content=b"x" * 8192), lock)
    with planted, pytest.raises(SlabPermissionError, match=f"belongs to uid {NOBODY}"):
        SharedSlab(name, SMALL)


@needs_root
@pytest.mark.parametrize("lock", [False, True], ids=["segment", "lock file"])
def test_what_root_planted_is_refused_by_others(name: str, lock: bool) -> None:
    place = place_of(name, Owner(NOBODY, NOBODY))
    path = place.lock if lock else place.segment
    _plant(path, mode=0o666)

    def as_nobody() -> None:
        _become_nobody()
        with pytest.raises(SlabPermissionError, match=r"belongs to uid 0|Permission denied"):
            SharedSlab(name, SMALL)

    try:
        assert ends_well(fork(as_nobody))
    finally:
        os.unlink(path)
        if os.path.lexists(place.lock):
            os.unlink(place.lock)


@needs_root
def test_users_do_not_meet(name: str) -> None:
    def as_nobody() -> None:
        _become_nobody()
        assert not SharedSlab.exists(name)
        assert name not in list_slabs()
        with SharedSlab(name, SMALL) as theirs:
            assert theirs.stats().attached_processes == 1
            theirs.unlink()

    with SharedSlab(name, SMALL):
        assert ends_well(fork(as_nobody))
        assert SharedSlab.exists(name)


# ---- too little shared memory ----

_IN_SMALL_SHM = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]


def _run_in_small_shm(program: str, size: str = "16m") -> str:
    """Run a program where /dev/shm is this small; skip where this host lets nobody arrange that."""
    script = f"mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77; exec {sys.executable} -c '{program}'"
    try:
        done = subprocess.run([*_IN_SMALL_SHM, script], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare(1) on this host")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"a small /dev/shm cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_too_little_shared_memory_is_an_error_that_says_what_to_do() -> None:
    printed = _run_in_small_shm(
        """
import os
from llm_edge_cache import *
try:
    SharedSlab("large", SlabConfig(memory_bytes=64 << 20))
except SlabMemoryError as error:
    print(error)
print(os.listdir("/dev/shm"))
"""
    )
    for part in ("67108864 bytes", "16773120 are available", "--shm-size=65m", "smaller memory_bytes", "shrink=True"):
        assert part in printed
    assert printed.endswith("[]\n")


def test_what_fits_is_never_a_sigbus_though_the_rest_fills_up() -> None:
    printed = _run_in_small_shm(
        """
import os
from llm_edge_cache import *
slab = SharedSlab("fits", SlabConfig(memory_bytes=12 << 20, ttl=None))
try:
    with open("/dev/shm/other", "wb") as file:
        while True: file.write(bytes(1 << 20))
except OSError as error:
    print(error.strerror)
for number in range(20000):
    assert slab.set(b"%d" % number, bytes(2000))
print(slab.check(), slab.stats().evictions > 0)
"""
    )
    assert printed == "No space left on device\n[] True\n"


def test_memory_that_others_take_in_between_is_the_same_error() -> None:
    printed = _run_in_small_shm(
        """
import os
from llm_edge_cache import *
from llm_edge_cache import memory
memory.require_available = lambda *arguments: None
try:
    SharedSlab("late", SlabConfig(memory_bytes=64 << 20))
except SlabMemoryError as error:
    print("needs 67108864" in str(error), os.listdir("/dev/shm"))
"""
    )
    assert printed == "True []\n"


def test_shrink_takes_what_there_is_and_warns() -> None:
    printed = _run_in_small_shm(
        """
import warnings
from llm_edge_cache import *
wanted = SlabConfig(memory_bytes=64 << 20)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    slab = SharedSlab("fits", wanted, shrink=True)
    again = SharedSlab("fits", wanted, shrink=True)
print(slab.config, again.config == slab.config, slab.set(b"key", b"value"))
print([(each.category.__name__, "Created with 14680064 bytes" in str(each.message)) for each in caught])
try:
    SharedSlab("fits", wanted)
except SlabConfigError as error:
    print("memory_bytes" in str(error))
"""
    )
    first, second, third = printed.splitlines()
    assert "memory_bytes=14680064, max_entries=14336" in first
    assert first.endswith("True True")
    assert second == "[('RuntimeWarning', True)]"
    assert third == "True"


def test_shrink_with_hardly_anything_left_is_the_error() -> None:
    printed = _run_in_small_shm(
        """
from llm_edge_cache import *
try:
    SharedSlab("none", SlabConfig(memory_bytes=64 << 20), shrink=True)
except SlabMemoryError as error:
    print("ok")
""",
        size="1m",
    )
    assert printed == "ok\n"


def test_a_replacement_that_does_not_fit_leaves_the_live_slab_alone() -> None:
    printed = _run_in_small_shm(
        """
from llm_edge_cache import *
slab = SharedSlab("app", SlabConfig(memory_bytes=12 << 20))
slab.set(b"key", b"value")
try:
    SharedSlab("app", SlabConfig(memory_bytes=13 << 20), replace=True)
except SlabMemoryError:
    print(slab.get(b"key"))
slab.close()
with SharedSlab("app", SlabConfig(memory_bytes=13 << 20)) as slab:
    print(slab.config.memory_bytes >> 20)
"""
    )
    assert printed == "b'value'\n13\n"


def test_a_limit_on_file_sizes_is_the_same_error(name: str, run_python: Callable[..., str]) -> None:
    program = """
import resource, sys
from llm_edge_cache import *
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    SharedSlab(sys.argv[1], SlabConfig(memory_bytes=4 << 20))
except SlabMemoryError as error:
    print("a limit of this process or container" in str(error))
"""
    assert run_python(program, name) == "True"
    assert _shm_files(name) == []


def test_address_space_that_is_too_small_leaves_nothing_behind(name: str, run_python: Callable[..., str]) -> None:
    program = """
import resource, sys
from llm_edge_cache import *
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), used + (16 << 20)))
try:
    SharedSlab(sys.argv[1], SlabConfig(memory_bytes=256 << 20))
except SlabMemoryError as error:
    print("a limit of this process or container" in str(error))
"""
    assert run_python(program, name) == "True"
    assert _shm_files(name) == []
