"""The lock file beside a segment: whoever creates, attaches, retires or unlinks holds it.

A `flock`, so that it goes with its holder, however that dies. The file remembers the slab's name and lives exactly as
long as the segment: who lets go of the lock while there is no segment removes it, and who gets the lock of a removed
file starts over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from typing import Final

from llm_edge_cache.errors import SlabBusyError, SlabPermissionError
from llm_edge_cache.naming import Owner, Place

__all__ = ["hold", "open_trusted"]

_WAIT_SECONDS: Final = 10.0  # only a stopped holder takes longer: it creates at most one segment
_POLL_SECONDS: Final = 0.002
_OPEN_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
MODE: Final = 0o600

# Lock files that this process holds or waits for. A child forked meanwhile closes its copies, or it would hold them too
# once they are locked, even beyond this process's end.
_held: set[int] = set()


def _close_in_child() -> None:
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def hold(place: Place) -> Iterator[None]:
    """Hold the lock of a slab's name.

    Raises:
        SlabPermissionError: the lock file is not the owner's alone.
        SlabBusyError: another process has held the lock for 10 s.
    """
    file = _acquire(place)
    try:
        yield
    finally:
        if not os.path.lexists(place.segment):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place.lock)
        # Explicitly: a child that inherited the file would keep the lock.
        fcntl.flock(file, fcntl.LOCK_UN)
        _close(file)


def open_trusted(path: str, owner: Owner, *, create: bool = False) -> int:
    """Open a file in /dev/shm that must be the owner's alone.

    Args:
        path: the file.
        owner: whose it must be, and whose it becomes when it is made here.
        create: make it; it must not be there yet.

    Returns:
        The file descriptor, closed at exec.

    Raises:
        SlabPermissionError: it is another user's, a link, or open to others.
        FileNotFoundError, FileExistsError: as `create` has it.
    """
    try:
        file = os.open(path, _OPEN_FLAGS | (os.O_CREAT | os.O_EXCL if create else 0), MODE)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise SlabPermissionError(_refusal(path, owner, os.strerror(error.errno or 0))) from error
        raise
    try:
        if create:
            _hand_to(file, path, owner)
        _require_trusted(file, path, owner)
    except BaseException:
        os.close(file)
        raise
    return file


def _hand_to(file: int, path: str, owner: Owner) -> None:
    """Make a new file the owner's, or take it away again."""
    try:
        os.fchmod(file, MODE)  # whatever the umask left of it
        if os.fstat(file).st_uid != owner.uid:
            os.fchown(file, owner.uid, owner.gid)
    except OSError as error:
        os.unlink(path)
        fault = f"uid {os.geteuid()} cannot make it uid {owner.uid}'s ({error.strerror})"
        raise SlabPermissionError(_refusal(path, owner, fault)) from error


def _require_trusted(file: int, path: str, owner: Owner) -> None:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        fault = "it is no regular file"
    elif status.st_uid != owner.uid:
        fault = f"it belongs to uid {status.st_uid}"
    elif stat.S_IMODE(status.st_mode) != MODE:
        fault = f"its mode is {stat.S_IMODE(status.st_mode):04o}, not {MODE:04o}"
    elif status.st_nlink > 1:
        fault = "it has another link"
    else:
        return
    raise SlabPermissionError(_refusal(path, owner, fault))


def _refusal(path: str, owner: Owner, fault: str) -> str:
    return (
        f"{path} is not trusted: {fault}; it must be a file of uid {owner.uid} alone. Remove it, or choose another name"
    )


def _acquire(place: Place) -> int:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        file = _open_lock(place)
        _held.add(file)
        try:
            _lock(file, place, deadline)
            if _is_at(file, place.lock):
                _remember(file, place.name)
                return file
        except BaseException:
            _close(file)
            raise
        _close(file)


def _close(file: int) -> None:
    _held.discard(file)
    os.close(file)


def _open_lock(place: Place) -> int:
    # Never O_CREAT on a file that may be there: the kernel refuses that in /dev/shm when it is another user's,
    # even to root (fs.protected_regular).
    while True:
        for create in (False, True):
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                return open_trusted(place.lock, place.owner, create=create)


def _lock(file: int, place: Place, deadline: float) -> None:
    while not _try_lock(file):
        if time.monotonic() >= deadline:
            raise SlabBusyError(
                f"another process has held {place.lock} for {_WAIT_SECONDS:.0f} s: it is stopped while opening the slab"
            )
        time.sleep(_POLL_SECONDS)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: str) -> bool:
    """Tell whether the path still leads to this file: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remember(file: int, name: str) -> None:
    content = name.encode()
    if os.pread(file, len(content) + 1, 0) != content:
        os.ftruncate(file, 0)
        os.pwrite(file, content, 0)
