"""Other processes of a test: forked children, which never go on with the tests; how to stop a process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
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


def stop(pid: int, patience: float = 60.0) -> None:
    """SIGSTOP a process, and return once none of its threads runs.

    1. The signal is sent; the process still runs on another processor.
    2. It accepts the connection, or ends the write, that the test makes next, as if it were not stopped.
    So its state is waited for. For as long as it takes it may also die of something else.

    patience: seconds.

    Raises:
        ProcessLookupError: there is no such process.
        TimeoutError: it still runs.
    """
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + patience
    while not _stands(pid):
        if time.monotonic() > end:
            raise TimeoutError(f"process {pid} still runs {patience:g} s after SIGSTOP")
        time.sleep(0.0005)


def _stands(pid: int) -> bool:
    """Tell whether each thread is stopped or dead (proc_pid_stat(5))."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                state = file.read().rpartition(b") ")[2][:1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if state not in b"TtZX":
            return False
    return True


def go_on(pid: int) -> None:
    """SIGCONT a process, if there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
