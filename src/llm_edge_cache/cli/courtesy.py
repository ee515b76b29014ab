"""Giving way: long work that takes next to nothing where processors are wanted by others, and all where they are idle.

A low priority alone does not do it: it counts among the processes of one session or control group, and a service is in
another one than the operator's shell. So the work looks at how long it itself was ready to run and did not (the second
number of /proc/thread-self/schedstat), and rests while there is such waiting.
"""

from __future__ import annotations

import os
import time
from typing import Final

__all__ = ["Courtesy"]

_LOWEST_PRIORITY: Final = 19
_RESTS: Final = 50  # times as long as it worked: 2 % of one processor
_LONGEST_REST: Final = 0.5
_TOLERATED: Final = 0.1  # waiting, as a share of the work
_REMEMBERED: Final = 64  # steps: who has rested is let run at once, which does not mean that nobody waits


class Courtesy:
    """The rests of one thread's work, which tells of each of its steps."""

    def __init__(self, *, is_on: bool) -> None:
        """Begin, at the lowest priority from now on; or, if not on, never rest."""
        self._is_on = is_on
        self._busy = 0  # steps for which to go on resting
        if is_on:
            os.nice(_LOWEST_PRIORITY)
        self._worked, self._waited = time.thread_time_ns(), _waited_ns()

    def step(self) -> None:
        """Rest, if others waited for the processor during the step that ends here."""
        if not self._is_on:
            return
        worked, waited = time.thread_time_ns(), _waited_ns()
        work = worked - self._worked
        if waited - self._waited > _TOLERATED * work:
            self._busy = _REMEMBERED
        if self._busy:
            self._busy -= 1
            time.sleep(min(_RESTS * work / 1e9, _LONGEST_REST))
        self._worked, self._waited = worked, _waited_ns()


def _waited_ns() -> int:
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1])
    except (OSError, ValueError, IndexError):  # a kernel that does not keep it
        return 0
