"""Count what the requests came to, worker by worker, and say whether the run shows what it should."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from client import NO_ANSWER, Outcome

COLUMNS = ("worker", "requests", "hits", "hits put there by another", "misses")


class WorkerTally(NamedTuple):
    """One worker's answers."""

    worker: int
    requests: int
    hits: int
    cross_hits: int
    """Hits on what another worker had put into the slab."""

    @property
    def misses(self) -> int:
        """Return how often this worker asked the provider."""
        return self.requests - self.hits


def tally(outcomes: Iterable[Outcome]) -> list[WorkerTally]:
    """Count by worker, in the order of their process ids."""
    by_worker: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome is not NO_ANSWER:
            by_worker.setdefault(outcome.worker, []).append(outcome)
    return [_tally_worker(worker, by_worker[worker]) for worker in sorted(by_worker)]


def _tally_worker(worker: int, outcomes: Sequence[Outcome]) -> WorkerTally:
    hits = [outcome for outcome in outcomes if outcome.is_hit]
    cross_hits = sum(outcome.stored_by != worker for outcome in hits)
    return WorkerTally(worker, len(outcomes), len(hits), cross_hits)


def complaints(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what went wrong; nothing if answers were shared and every one was the recording's."""
    found = []
    unanswered = sum(outcome is NO_ANSWER for outcome in outcomes)
    if unanswered:
        found.append(f"{unanswered} of {len(outcomes)} requests had no answer")
    different = sum(not outcome.is_identical for outcome in outcomes) - unanswered
    if different:
        found.append(f"{different} of {len(outcomes)} answers differ from their recording")
    if not any(worker.cross_hits for worker in tally(outcomes)):
        found.append("no worker had a hit on what another worker had put there")
    return found


def table(tallies: Sequence[WorkerTally]) -> str:
    """Return the tallies and their totals as aligned columns."""
    rows = [(str(t.worker), t.requests, t.hits, t.cross_hits, t.misses) for t in tallies]
    totals = ("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    cells = [[str(cell) for cell in row] for row in (COLUMNS, *rows, totals)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def latencies(outcomes: Sequence[Outcome]) -> str:
    """Return the median latencies of hits and misses, as the client saw them, and of the look-up alone."""
    hits = [outcome for outcome in outcomes if outcome.is_hit]
    misses = [outcome.seconds for outcome in outcomes if not outcome.is_hit]
    return (
        f"median latency: hit {_milliseconds([outcome.seconds for outcome in hits])}, "
        f"miss {_milliseconds(misses)}; "
        f"look-up in the slab {_microseconds([outcome.lookup_seconds for outcome in hits])}"
    )


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e3:.1f} ms" if seconds else "-"


def _microseconds(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e6:.1f} us" if seconds else "-"
