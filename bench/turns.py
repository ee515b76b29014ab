"""Contestants that take turns: the frame of benchmarks whose figures are ratios within one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from workload import nanoseconds_per_call

KEYS = 1_000

Rounds = dict[str, list[float]]  # ns a call, one figure a round
Call = Callable[[str], object]


def take_turns(calls: dict[str, Call], counts: dict[str, int], rounds: int) -> Rounds:
    """Each round begins with another contestant; each runs once untimed before it is timed."""
    results: Rounds = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            keys = [f"key:{at % KEYS}" for at in range(counts[name])]
            nanoseconds_per_call(calls[name], keys[: len(keys) // 4])
            results[name].append(nanoseconds_per_call(calls[name], keys))
    return results


def ratio(results: Rounds, above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(results[above], results[below], strict=True))


def difference(results: Rounds, more: str, less: str) -> float:
    return statistics.median(a - b for a, b in zip(results[more], results[less], strict=True))


def medians(results: Rounds) -> dict[str, float]:
    return {name: round(statistics.median(figures), 1) for name, figures in results.items()}
