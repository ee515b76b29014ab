"""Forked children of a test, which never go on with the tests, whatever happens in them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from llm_edge_cache import SharedSlab, SlabBusyError


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a forked child, and return the child's process id.

    The child exits with 0 when `work` returns, and with 1 when it raises; what it raised is printed.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return pid


def ends_well(pid: int) -> bool:
    """Wait for a child; tell whether it exited with 0."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def write_for_ever(slab: SharedSlab, size: int = 4000) -> None:
    """Do nothing but write, also when the lock could not be had: whoever has it may have been stopped, or starved."""
    number = 0
    while True:
        number += 1
        try:
            slab.set(b"theirs %d" % (number % 50), bytes(size))
        except SlabBusyError:
            continue
