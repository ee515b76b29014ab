"""The known faults of `multiprocessing.shared_memory`: each shown on the plain class, and ours without it.

Where this Python has a fault mended, the first half skips and says so; the second half holds on every version.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1 << 20
SMALL = SlabConfig(memory_bytes=4 * MiB)
PATIENCE_SECONDS = 10.0


@pytest.fixture
def plain(name: str) -> Iterator[Path]:
    """A plain segment of 1 MiB that no tracker knows."""
    path = Path("/dev/shm") / f"plain-{name}"
    path.write_bytes(bytes(MiB))
    yield path
    path.unlink(missing_ok=True)


def _is_gone(path: Path) -> bool:
    deadline = time.monotonic() + 1
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not path.exists()


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _mended(what: str) -> None:
    pytest.skip(f"Python {sys.version.split()[0]} has this mended: {what}")


# ---- cpython#82300: the tracker of an attaching process unlinks the segment when that process exits ----


def test_plain_an_attacher_s_exit_unlinks_the_segment(plain: Path) -> None:
    done = _run(
        "import sys; from multiprocessing.shared_memory import *; SharedMemory(sys.argv[1]).close()", plain.name
    )
    if done.returncode == 0 and not _is_gone(plain):
        _mended("attaching does not register with the resource tracker")
    assert not plain.exists()
    assert "leaked shared_memory" in done.stderr


@pytest.mark.parametrize(
    "ending", ["", "; slab.close()", "; import os; os._exit(0)", "; import os; os.kill(os.getpid(), 9)"]
)
def test_ours_an_attacher_s_exit_leaves_the_segment(slab: SharedSlab, ending: str) -> None:
    done = _run(f"import sys; from llm_edge_cache import *; slab = SharedSlab(sys.argv[1]){ending}", slab.name)
    assert done.stderr == ""
    assert not _is_gone(Path(slab._place.segment))
    assert SharedSlab.exists(slab.name)


def test_ours_a_creator_s_exit_leaves_the_segment(name: str) -> None:
    assert _run("import sys; from llm_edge_cache import *; SharedSlab(sys.argv[1])", name).stderr == ""
    assert not _is_gone(Path(SharedSlab.attach(name)._place.segment))


def test_ours_never_tells_the_tracker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def heard(*arguments: object) -> None:
        raise AssertionError(f"the resource tracker was told {arguments}")

    for module in (resource_tracker, shared_memory.resource_tracker):  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "register", heard)
        monkeypatch.setattr(module, "unregister", heard)
    with SharedSlab(name, SMALL) as slab, SharedSlab.attach(name):
        SharedSlab(name, SMALL, replace=True).close()
        slab.get(b"key")
        slab.unlink()


# ---- cpython#153279: a failed attach unlinks the segment ----

_NO_ROOM = """
import resource, sys
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), used + (8 << 20)))
"""


def test_plain_a_failed_attach_unlinks_the_segment(plain: Path) -> None:
    os.truncate(plain, 256 * MiB)
    program = f"from multiprocessing.shared_memory import SharedMemory\n{_NO_ROOM}\nSharedMemory(sys.argv[1])"
    done = _run(program, plain.name)
    assert "Cannot allocate memory" in done.stderr
    if plain.exists():
        _mended("a failed attach leaves the segment")


def test_ours_a_failed_attach_leaves_the_segment(name: str) -> None:
    program = f"""
from llm_edge_cache import *
{_NO_ROOM}
try:
    SharedSlab.attach(sys.argv[1])
except SlabMemoryError as error:
    print("a limit of this process or container" in str(error))
"""
    with SharedSlab(name, SlabConfig(memory_bytes=64 * MiB)) as slab:
        slab.set(b"key", b"value")
        assert _run(program, name).stdout == "True\n"
        assert SharedSlab.attach(name).get(b"key") == b"value"


# ---- cpython#92408: an attacher can see the segment before it is sized ----


def test_plain_an_attacher_sees_a_segment_without_a_size(plain: Path) -> None:
    os.truncate(plain, 0)  # where the plain creator is between shm_open and ftruncate
    with pytest.raises(ValueError, match="empty"):
        shared_memory.SharedMemory(plain.name)


@pytest.mark.parametrize("step", ["os.posix_fallocate", "native.create"])
def test_ours_an_attacher_waits_for_a_whole_segment(name: str, step: str) -> None:
    program = f"""
import os, sys, time
from llm_edge_cache import *
from llm_edge_cache import memory, segment
owner_name, step = "{step}".split(".")
segment.native = type("Native", (), dict(vars(segment.native)))
owner = {{"os": os, "native": segment.native}}[owner_name]
original = getattr(owner, step)
def slowly(*arguments):
    print("inside", flush=True)
    time.sleep(0.5)
    return original(*arguments)
setattr(owner, step, staticmethod(slowly) if isinstance(owner, type) else slowly)
SharedSlab(sys.argv[1], SlabConfig(memory_bytes=4 << 20)).set(b"key", b"value")
"""
    creator = subprocess.Popen([sys.executable, "-c", program, name], stdout=subprocess.PIPE, text=True)
    with creator:
        assert creator.stdout is not None
        assert creator.stdout.readline() == "inside\n"
        with SharedSlab.attach(name) as slab:
            assert slab.config == SMALL
            assert slab.check() == []
        assert creator.wait(timeout=PATIENCE_SECONDS) == 0


# ---- cpython#114389: pages are not reserved, so a full /dev/shm is a SIGBUS later ----


def _run_in_small_shm(program: str) -> subprocess.CompletedProcess[str]:
    script = f"mount -t tmpfs -o size=8m tmpfs /dev/shm || exit 77; exec {sys.executable} -c '{program}'"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare(1) on this host")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"a small /dev/shm cannot be mounted here: {done.stderr.strip()}")
    return done


def test_plain_a_full_shm_is_a_sigbus() -> None:
    program = """
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=64 << 20)
memory.unlink()
print("created", flush=True)
memory.buf[:] = bytes(64 << 20)
"""
    done = _run_in_small_shm(program)
    if "created" not in done.stdout:
        _mended("pages are reserved at creation")
    assert done.returncode == -signal.SIGBUS


def test_ours_a_full_shm_is_an_error_at_creation() -> None:
    program = """
from llm_edge_cache import *
try:
    SharedSlab("name", SlabConfig(memory_bytes=64 << 20))
except SlabMemoryError:
    print("refused")
"""
    done = _run_in_small_shm(program)
    assert (done.returncode, done.stdout) == (0, "refused\n")


def test_ours_is_a_shared_memory_object_all_the_same(slab: SharedSlab) -> None:
    assert slab._segment is not None
    memory = slab._segment.memory
    assert isinstance(memory, shared_memory.SharedMemory)
    assert memory.size == len(memory.view) == 4 * MiB
    assert f"/dev/shm/{memory.name}" == slab._place.segment
    with pytest.raises(TypeError, match="pickle the SharedSlab"):
        memory.__reduce__()


def test_ours_is_unmapped_when_the_last_object_goes(name: str, run_python: Callable[..., str]) -> None:
    program = """
import sys
from llm_edge_cache import *
slab = SharedSlab(sys.argv[1], SlabConfig(memory_bytes=4 << 20))
first = [line for line in open("/proc/self/maps") if sys.argv[1] in line]
slab.close()
print(len(first), len([line for line in open("/proc/self/maps") if sys.argv[1] in line]))
"""
    assert run_python(program, name) == "1 0"
