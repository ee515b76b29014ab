"""One mapping of a segment: `multiprocessing.shared_memory.SharedMemory` without its faults.

The faults of the plain class, and what is done about each here:

==========================================================  =====================================================
fault                                                       here
==========================================================  =====================================================
the resource tracker of an attaching process unlinks the    the tracker never hears of the segment, on any version
segment when that process exits (cpython#82300)
a failed attach unlinks it (#153279)                        nothing but `unlink` unlinks
an attacher can see it before it is sized (#92408)          sized, reserved and published under the name's lock
pages are not reserved: a full /dev/shm is a SIGBUS later   `posix_fallocate` before it is mapped
(#114389)
==========================================================  =====================================================
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Final, NoReturn

from llm_edge_cache.errors import SlabMemoryError
from llm_edge_cache.namelock import open_trusted
from llm_edge_cache.naming import DIRECTORY, Place

__all__ = ["SlabMemory", "available_bytes", "require_available"]

_NO_ROOM: Final = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


class SlabMemory(SharedMemory):
    """A segment in /dev/shm as this process maps it. Closing unmaps; only `unlink` takes the file away."""

    def __init__(self, place: Place, file: int) -> None:
        """Map an open segment file of its full size; the file is this object's from now on.

        Raises:
            OSError: it cannot be mapped; the file is closed, and stays where it is.
        """
        # SharedMemory.__init__ is not called: all four faults live there. These are the attributes that it sets.
        self._place = place
        self._name = "/" + os.path.basename(place.segment)
        self._track = False  # for 3.13 and later; before, see unlink()
        self._fd = file
        try:
            self._size = os.fstat(file).st_size
            self._mmap = mmap.mmap(file, self._size)
        except BaseException:
            self._fd = -1
            os.close(file)
            raise
        self._buf = memoryview(self._mmap)

    @property
    def view(self) -> memoryview:
        """The segment's bytes."""
        assert self._buf is not None, "closed"
        return self._buf

    @classmethod
    def create(cls, place: Place, size: int) -> SlabMemory:
        """Make the file, reserve its pages and map it. The name's lock is held.

        Raises:
            SlabMemoryError: there is too little shared memory; nothing is left behind.
            SlabPermissionError: the file cannot be made the owner's.
        """
        require_available(place.name, size)
        file = open_trusted(place.segment, place.owner, create=True)
        try:
            os.posix_fallocate(file, 0, size)
            memory = cls(place, os.dup(file))
        except BaseException as error:
            os.unlink(place.segment)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                _refuse(place.name, size, available_bytes(), error)
            raise
        finally:
            os.close(file)
        return memory

    @classmethod
    def open(cls, place: Place) -> SlabMemory | None:
        """Map the segment that lies under the name; None when there is none, or nothing that could be one.

        Raises:
            SlabPermissionError: it is not the owner's alone.
            SlabMemoryError: this process has no room for it.
        """
        try:
            file = open_trusted(place.segment, place.owner)
        except FileNotFoundError:
            return None
        status = os.fstat(file)
        # Pages that were not reserved would be a SIGBUS in waiting.
        if status.st_size < mmap.PAGESIZE or status.st_blocks * 512 < status.st_size:
            os.close(file)
            return None
        try:
            return cls(place, file)
        except OSError as error:
            _refuse(place.name, status.st_size, None, error)

    def is_current(self) -> bool:
        """Tell whether the name still leads to this segment."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._place.segment, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def is_linked(self) -> bool:
        """Tell whether any name leads to this segment."""
        return os.fstat(self._fd).st_nlink > 0

    def move(self, place: Place) -> None:
        """Take note of the file's new name."""
        self._place = place
        self._name = "/" + os.path.basename(place.segment)

    def hand_to(self, uid: int, gid: int) -> None:
        """Make the file another user's. Raises PermissionError."""
        os.fchown(self._fd, uid, gid)

    def unlink(self) -> None:
        """Take the file away, if the name still leads to it. Mappings of it stay."""
        if self.is_current():
            os.unlink(self._place.segment)

    def __del__(self) -> None:
        """Close, unless a mapping still looks into it (in a garbage cycle): then the mapping closes."""
        with contextlib.suppress(BufferError, OSError):
            self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse: a slab is pickled by its name."""
        raise TypeError("pickle the SharedSlab, not its memory")


def available_bytes() -> int | None:
    """Return the shared memory that is left; None where /dev/shm has no limit of its own."""
    status = os.statvfs(DIRECTORY)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def require_available(name: str, needed: int, released: int = 0) -> None:
    """Refuse early what `posix_fallocate` would refuse after it had starved everybody else.

    Args:
        name: the slab's, for the message.
        needed: bytes.
        released: bytes that are free once the caller goes on.

    Raises:
        SlabMemoryError: there is less.
    """
    available = available_bytes()
    if available is not None and needed > available + released:
        _refuse(name, needed, available + released, None)


def _refuse(name: str, needed: int, available: int | None, cause: Any) -> NoReturn:
    if available is None or available >= needed:
        there_is = "a limit of this process or container is in the way"
    else:
        there_is = f"{available} are available"
    raise SlabMemoryError(
        f"slab {name!r} needs {needed} bytes of shared memory in {DIRECTORY}, and {there_is}. "
        f"Give it more (docker run --shm-size={_mebibytes(needed)}m; in Kubernetes an emptyDir of medium Memory at "
        f"{DIRECTORY}), "
        "choose a smaller memory_bytes, or pass shrink=True to take what there is"
    ) from cause


def _mebibytes(size: int) -> int:
    return -(-size // (1 << 20)) + 1
