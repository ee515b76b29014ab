"""`llm-edge-cache top`: what the slab is doing, live."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llm_edge_cache.cli.attach import UsageError, add_command, live_slab
from llm_edge_cache.cli.output import columns, count_text, json_line, key_text, say, size_text, time_text
from llm_edge_cache.reading import (
    HISTOGRAM_NAMES,
    SCAN_END,
    Look,
    Process,
    breaker_text,
    largest,
    latency,
    look,
    ratio,
    scan_frequencies,
)
from llm_edge_cache.regions import Counter

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["add_parsers"]

_KEPT: Final = 64  # hot keys that one pass over the slab remembers
_HISTORY: Final = 40
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_HOME, _CLEAR, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[2J", "\x1b[K", "\x1b[J"


def add_parsers(commands: Any) -> None:
    """Add this module's subcommand."""
    parser = add_command(
        commands,
        "top",
        "watch the slab at work",
        "Shows, again and again until Ctrl-C, what the processes of the host ask of the slab: hit ratio, rates, "
        "latency, memory, flights, who asks, and for what. Rates and latencies are those of the last "
        "interval. Reads only.\n\n"
        "With --json one object an interval and line.",
    )
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between looks (%(default)s)")
    parser.add_argument("--once", action="store_true", help="one interval, printed once; no terminal needed")
    parser.add_argument("--keys", type=int, default=10, metavar="N", help="hottest keys to show (%(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if not 0.05 <= options.interval <= 3600:
        raise UsageError(f"--interval must be 0.05 to 3600 seconds, not {options.interval:g}")
    is_live = not options.once and not options.json and sys.stdout.isatty()
    with live_slab(options) as slab:
        try:
            _watch(slab, options, is_live=is_live)
        except KeyboardInterrupt:  # the way to end it
            if options.once:
                raise
    return 0


def _watch(slab: SharedSlab, options: argparse.Namespace, *, is_live: bool) -> None:
    hot = HotKeys(slab)
    ratios: deque[float | None] = deque(maxlen=_HISTORY)
    rates: deque[float | None] = deque(maxlen=_HISTORY)
    before = look(slab, guests=1)
    if is_live:
        say(_CLEAR)
    while True:
        hot.advance()
        time.sleep(options.interval)
        now = look(slab, guests=1)
        step = Step(before, now)
        ratios.append(step.hit_ratio)
        rates.append(step.rate(sum(now.lookups), sum(before.lookups)))
        if options.json:
            say(json_line(_as_json(slab.name, step, hot.hottest(options.keys))))
        else:
            lines = _frame(slab.name, step, hot.hottest(options.keys), ratios, rates)
            _draw(lines) if is_live else say(*lines)
        sys.stdout.flush()
        if options.once:
            return
        before = now


def _draw(lines: list[str]) -> None:
    """Show a frame in place of the last one, cut to the terminal."""
    width, height = shutil.get_terminal_size()
    shown = [line[:width] + _CLEAR_LINE for line in lines[: height - 1]]
    print(_HOME + "\n".join(shown) + "\n" + _CLEAR_BELOW, end="")  # noqa: T201


# ---- what is shown ----


class Step(NamedTuple):
    """Two looks, and what happened between them."""

    before: Look
    now: Look

    def rate(self, after: int, earlier: int) -> float:
        """Return a change of a sum, per second."""
        # A slab that was replaced begins at 0 again.
        return max(after - earlier, 0) / max(self.now.at - self.before.at, 1e-9)

    def total_rate(self, field: str) -> float:
        """Return how fast one of the slab's own sums grows."""
        return self.rate(self.now.totals[field], self.before.totals[field])

    def counter_rate(self, counter: Counter) -> float:
        """Return how fast a counter grows."""
        return self.rate(self.now.counters[counter], self.before.counters[counter])

    @property
    def hit_ratio(self) -> float | None:
        """L1's hit ratio between the looks."""
        if self.now.is_bare != self.before.is_bare:
            return None
        (hits, misses), (hits_before, misses_before) = self.now.lookups, self.before.lookups
        return ratio(max(hits - hits_before, 0), max(misses - misses_before, 0))

    def histogram(self, index: int) -> tuple[int, ...]:
        """Return what a histogram counted between the looks."""
        pairs = zip(self.now.histograms[index], self.before.histograms[index], strict=True)
        return tuple(max(after - before, 0) for after, before in pairs)

    def processes(self) -> list[tuple[Process, float]]:
        """Return the live processes with their look-ups per second, the busiest first; no process is 0.

        A record goes from a dead process to the next one, so a change is only known where the pid stayed.
        """
        earlier = {process.pid: process.hits + process.misses for process in self.before.processes}
        rates = [
            (process, self.rate(process.hits + process.misses, earlier.get(process.pid, 0)))
            for process in self.now.processes
            if process.is_alive
        ]
        return sorted(rates, key=lambda pair: pair[1], reverse=True)


class HotKeys:
    """The keys that were asked for most lately, found by looking at a piece of the slab at a time."""

    def __init__(self, slab: SharedSlab) -> None:
        """Look into this slab."""
        self._slab = slab
        self._cursor = 0
        self._found: dict[bytes, int] = {}  # in this pass over the slab
        self._last: dict[bytes, int] = {}  # in the one before

    def advance(self) -> None:
        """Look at the next piece, for 1 % of an interval at most; small slabs are seen whole each time."""
        self._cursor, found = scan_frequencies(self._slab, self._cursor)
        self._found = dict(largest(self._found | found, _KEPT))
        if self._cursor == SCAN_END:
            self._cursor, self._last, self._found = 0, self._found, {}

    def hottest(self, count: int) -> list[tuple[bytes, int]]:
        """Return keys with how often they were asked for, an estimate; the hottest first."""
        return largest(self._last | self._found, count)


def _as_json(name: str, step: Step, hottest: list[tuple[bytes, int]]) -> dict[str, Any]:
    now = step.now
    return {
        "name": name,
        "at": time.time(),
        "hit_ratio": step.hit_ratio,
        "per_second": {label: round(value, 3) for label, value in _rates(step).items()},
        "latency_seconds": {
            histogram.name.lower(): latency(step.histogram(histogram)) for histogram in HISTOGRAM_NAMES
        },
        "entries": now.totals["entries"],
        "max_entries": now.config.max_entries,
        "used_bytes": now.totals["used_bytes"],
        "memory_bytes": now.config.memory_bytes,
        "window_share": now.totals["window_ppm"] / 1e6,
        "breaker": breaker_text(now.words),
        "attached_processes": now.totals["attached_processes"],
        "processes": [
            {**process._asdict(), "lookups_per_second": round(rate, 3)} for process, rate in step.processes()
        ],
        "hottest": [{"key": key_text(key), "key_hex": key.hex(), "frequency": frequency} for key, frequency in hottest],
    }


def _rates(step: Step) -> dict[str, float]:
    before, now = step.before, step.now
    return {
        "lookups": step.rate(sum(now.lookups), sum(before.lookups)),
        "writes": step.rate(now.writes, before.writes),
        "deletes": step.total_rate("deletes"),
        "evictions": step.total_rate("evictions"),
        "expirations": step.total_rate("expirations"),
        "not_admitted": step.total_rate("admission_rejections"),
        "l2_hits": step.counter_rate(Counter.L2_HITS),
        "l2_misses": step.counter_rate(Counter.L2_MISSES),
        "computations": step.counter_rate(Counter.COMPUTATIONS),
        "coalesced": step.counter_rate(Counter.COALESCED),
        "takeovers": step.counter_rate(Counter.TAKEOVERS),
    }


def _frame(
    name: str,
    step: Step,
    hottest: list[tuple[bytes, int]],
    ratios: deque[float | None],
    rates: deque[float | None],
) -> list[str]:
    now, per_second = step.now, _rates(step)
    totals, config = now.totals, now.config
    overall = ratio(*now.lookups)
    return [
        f"{name}   {time.strftime('%H:%M:%S')}   {count_text(totals['attached_processes'])} processes   "
        f"made {time_text(max(time.time() - totals['created_wall_ns'] / 1e9, 0.0))} ago",
        "",
        f"hit ratio   {_percent(step.hit_ratio)}  {_sparks(ratios, 1.0)}   {_percent(overall)} in all",
        f"look-ups    {_rate(per_second['lookups'])}  {_sparks(rates, None)}",
        f"entries     {_gauge(totals['entries'], config.max_entries or 0)}  {count_text(totals['entries'])} of "
        f"{count_text(config.max_entries or 0)}",
        f"memory      {_gauge(totals['used_bytes'], config.memory_bytes)}  {size_text(totals['used_bytes'])} of "
        f"{size_text(config.memory_bytes)}",
        f"window      {_gauge(totals['window_ppm'], 1_000_000)}  {totals['window_ppm'] / 1e4:.1f} % of the capacity",
        f"breaker     {breaker_text(now.words)}",
        "",
        *_rate_lines(per_second),
        *_latency_lines(step),
        *_process_lines(step),
        *_key_lines(hottest),
    ]


def _rate_lines(per_second: dict[str, float]) -> list[str]:
    cells = [f"{label.replace('_', ' '):<13}{_rate(value):>12}" for label, value in per_second.items()]
    cells = cells[1:]  # look-ups stand above
    return ["   ".join(cells[at : at + 3]) for at in range(0, len(cells), 3)]


def _latency_lines(step: Step) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "count", "mean", "p50", "p99", "p999")]
    for histogram, label in HISTOGRAM_NAMES.items():
        found = latency(step.histogram(histogram))
        if found is not None:
            times = (time_text(found[field]) for field in ("mean", "p50", "p99", "p999"))
            rows.append((label, count_text(found["count"]), *times))
    return ["", *columns(rows, right=(1, 2, 3, 4, 5))] if len(rows) > 1 else []


def _process_lines(step: Step) -> list[str]:
    processes = step.processes()
    everything = sum(rate for _, rate in processes)
    rows = [("pid", "look-ups", "share", "hit ratio")]
    rows += [
        (str(process.pid), _rate(rate), _percent(rate / everything if everything else None).strip(), hit.strip())
        for process, rate in processes[:8]
        if rate
        for hit in (_percent(ratio(process.hits, process.misses)),)
    ]
    return ["", *columns(rows, right=(0, 1, 2, 3))] if len(rows) > 1 else []


def _key_lines(hottest: list[tuple[bytes, int]]) -> list[str]:
    rows = [("asked", "hottest keys")] + [(str(frequency), key_text(key)) for key, frequency in hottest]
    return ["", *columns(rows, right=(0,))] if hottest else []


def _percent(share: float | None) -> str:
    return "     -" if share is None else f"{share:6.1%}"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}/s" if per_second >= 10 or per_second == 0 else f"{per_second:.1f}/s"


def _gauge(value: float, limit: float) -> str:
    filled = round(20 * min(value / limit, 1.0)) if limit else 0
    return f"[{'#' * filled}{'.' * (20 - filled)}]"


def _sparks(values: deque[float | None], limit: float | None) -> str:
    known = [value for value in values if value is not None]
    top = limit or max(known, default=0.0) or 1.0
    return "".join(
        " " if value is None else _SPARKS[min(int(value / top * len(_SPARKS)), len(_SPARKS) - 1)] for value in values
    )
