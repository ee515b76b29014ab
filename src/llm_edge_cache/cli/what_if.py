"""`llm-edge-cache stats --what-if`: the answers as a table, with the memory that each size would take."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from llm_edge_cache.cli.output import columns, count_text, json_line, say, size_text, time_text
from llm_edge_cache.native import native
from llm_edge_cache.whatif import Answer, Estimate, History, estimate, read_history

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab
    from llm_edge_cache.slabconfig import SlabConfig

__all__ = ["tell"]

_KEPT_FREE: Final = 64 / 63  # of the arena, so that entries lie in one piece
_NOT_SCALED: Final = 0.975  # of the memory: the rest is for samples, processes and flights, which grow with it
_NOTHING: Final = "nothing is remembered: nothing was stored since the slab was empty, or it is too small to remember"


def tell(slab: SharedSlab, *, as_json: bool) -> int:
    """Print what the hit ratio would be at other sizes; returns the exit code: 1 when nothing is known yet."""
    now_ns = time.monotonic_ns()
    history = read_history(slab, now_ns)
    if history is None:
        say(json_line({"name": slab.name, "what_if": None}) if as_json else _NOTHING)
        return 1
    answer = estimate(history)
    sizes = [_size_at(history, slab.config, one.factor) for one in answer.estimates]
    if as_json:
        say(json_line(_json(slab.name, answer, sizes, now_ns)))
    else:
        say(*_table(answer, sizes), "", *_notes(answer, now_ns))
    return 0 if any(one.hit_ratio is not None for one in answer.estimates) else 1


# ---- memory ----


def _size_at(history: History, config: SlabConfig, factor: float) -> tuple[int, int | None]:
    """Return entries, and the bytes that they take at the present mean size; None while there are no entries."""
    wanted = max(round(history.size * factor), 1)
    if history.mean_bytes is None:
        return wanted, None
    tables = native.minimum_bytes((1, 0, 0, wanted, 1))
    least = native.minimum_bytes((1, 0, 0, wanted, config.max_value_bytes or 0))
    return wanted, max(round((tables + wanted * history.mean_bytes * _KEPT_FREE) / _NOT_SCALED), least)


# ---- as text ----


def _table(answer: Answer, sizes: list[tuple[int, int | None]]) -> list[str]:
    rows = [("entries", "hit ratio", "", "memory")]
    for one, (entries, memory) in zip(answer.estimates, sizes, strict=True):
        ratio, remark = _ratio_text(one, answer)
        rows.append((count_text(entries), ratio, remark, "?" if memory is None else size_text(memory)))
    return columns(rows, right=(0, 1, 3))


def _ratio_text(one: Estimate, answer: Answer) -> tuple[str, str]:
    if one.hit_ratio is None or one.margin is None:
        wanted = count_text(answer.lookups_remembered + one.lookups_missing)
        if answer.is_whole:
            return "?", f"known after {count_text(one.lookups_missing)} more look-ups"
        return "?", f"takes {wanted} look-ups, and the slab remembers {count_text(answer.lookups_remembered)}"
    return f"{one.hit_ratio:.1%}", "now: counted" if one.factor == 1.0 else f"+- {100 * one.margin:.1f} points"


def _notes(answer: Answer, now_ns: int) -> list[str]:
    since = time_text(max(now_ns - answer.since_ns, 0) / 1e9)
    notes = [
        f"about the {count_text(answer.lookups)} look-ups of the last {since}; the other sizes are told from "
        f"{count_text(answer.sampled_keys)} sampled keys ({answer.sampled_share:.2%})"
    ]
    if answer.is_whole:
        notes.append("the slab was empty then: the misses while a cache of each size fills are part of it")
    else:
        notes.append("what was before is forgotten: larger sizes are rather told too low than too high")
    return notes


# ---- as JSON ----


def _json(name: str, answer: Answer, sizes: list[tuple[int, int | None]], now_ns: int) -> dict[str, Any]:
    return {
        "name": name,
        "what_if": [
            {
                "factor": one.factor,
                "entries": entries,
                "memory_bytes": memory,
                "hit_ratio": one.hit_ratio,
                "margin": one.margin,
                "lookups_missing": one.lookups_missing,
            }
            for one, (entries, memory) in zip(answer.estimates, sizes, strict=True)
        ],
        "lookups": answer.lookups,
        "lookups_remembered": answer.lookups_remembered,
        "seconds": max(now_ns - answer.since_ns, 0) / 1e9,
        "sampled_keys": answer.sampled_keys,
        "sampled_share": answer.sampled_share,
        "is_whole": answer.is_whole,
    }
