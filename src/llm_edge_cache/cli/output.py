"""How commands print: sizes, times and keys for people, JSON for programs, progress on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ProgressBar", "columns", "count_text", "json_line", "key_text", "say", "size_text", "time_text"]

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_BAR_CELLS: Final = 30
_REDRAW_SECONDS: Final = 0.1
_PATIENCE_SECONDS: Final = 0.3  # what is done by then shows no bar


def say(*lines: str) -> None:
    """Print lines to standard output."""
    for line in lines:
        print(line)  # noqa: T201


def json_line(value: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(value, separators=(", ", ": "), ensure_ascii=False)


def size_text(count: float) -> str:
    """Return bytes in the unit that people would choose: 512 B, 1.5 KiB, 64.0 MiB."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def time_text(seconds: float | None) -> str:
    """Return a duration with two digits or so: 850 ns, 1.2 ms, 45 s, 3 h 20 min; "never" for None."""
    if seconds is None:
        return "never"
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    if seconds < 120:
        return f"{seconds:.3g} s"
    for limit, large, small, names in ((7200, 60, 1, ("min", "s")), (172_800, 3600, 60, ("h", "min"))):
        if seconds < limit:
            return f"{seconds // large:.0f} {names[0]} {seconds % large // small:.0f} {names[1]}"
    return f"{seconds // 86_400:.0f} d {seconds % 86_400 // 3600:.0f} h"


def count_text(count: float) -> str:
    """Return a number with its thousands marked."""
    return f"{count:,.0f}"


def key_text(key: bytes) -> str:
    """Return a key as text: what is not printable, and a backslash, as escapes."""
    text = key.decode(errors="backslashreplace") if b"\\" not in key else repr(key)[2:-1]
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align rows of cells; the columns named in `right` to the right."""
    table = [list(row) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


class ProgressBar:
    """How far a long command is, on standard error; only where that is a terminal, and only if it takes a while."""

    def __init__(self, what: str, unit: str) -> None:
        """Show progress of this.

        Args:
            what: e.g. "snapshot".
            unit: "bytes", or what is counted.
        """
        self._what = what
        self._text = size_text if unit == "bytes" else count_text
        self._unit = "" if unit == "bytes" else f" {unit}"
        self._is_on = sys.stderr.isatty()
        self._started = time.monotonic()
        self._drawn = self._started + _PATIENCE_SECONDS - _REDRAW_SECONDS
        self._is_shown = False

    def __call__(self, done: int, total: int) -> None:
        """Tell how much is done, of how much."""
        now = time.monotonic()
        if not self._is_on or now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn, self._is_shown = now, True
        share = min(done / total, 1.0) if total else 1.0
        cells = round(share * _BAR_CELLS)
        left = (now - self._started) * (1 - share) / share if share else 0.0
        amount = f"{self._text(done)} of {self._text(total)}{self._unit}"
        line = (
            f"{self._what} [{'#' * cells}{'.' * (_BAR_CELLS - cells)}] {share:4.0%}  {amount}, {time_text(left)} left"
        )
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)  # noqa: T201

    def __enter__(self) -> Self:
        """Return this bar."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # noqa: T201
