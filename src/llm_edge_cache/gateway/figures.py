"""What the dashboard polls: sums over the whole host, from whichever worker is asked.

Nothing is kept here. The page takes the differences between two polls, has the history, and says where the search for
hot keys goes on.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from llm_edge_cache.keys import is_tier_key
from llm_edge_cache.reading import breaker_text, largest, look, scan_frequencies
from llm_edge_cache.regions import Counter, Histogram, Word
from llm_edge_cache.series import BUCKET_BOUNDS_NS, VERSION

if TYPE_CHECKING:
    from llm_edge_cache.reading import Look
    from llm_edge_cache.slab import SharedSlab

__all__ = ["figures"]

_KEYS: Final = 32
_BOUNDS: Final = [bound / 1e9 for bound in BUCKET_BOUNDS_NS]


def figures(slab: SharedSlab, cursor: int) -> dict[str, Any]:
    """Return a slab's figures, in seconds and bytes. Takes 10 ms of one core at most, whatever the slab's size.

    Args:
        slab: which.
        cursor: where to go on looking for hot keys; `keys.next` of the last answer, or 0.
    """
    seen = look(slab)
    totals = seen.totals
    return {
        "at": seen.at,
        "name": slab.name,
        "version": VERSION,
        "slab": str(totals["created_wall_ns"]),
        "age": time.time() - totals["created_wall_ns"] / 1e9,
        "worker": os.getpid(),
        "attached": totals["attached_processes"],
        "counters": {counter.name.lower(): seen.counters[counter] for counter in Counter},
        "bounds": _BOUNDS,
        "histograms": {histogram.name.lower(): seen.histograms[histogram] for histogram in Histogram},
        "l1": {
            "entries": totals["entries"],
            "max_entries": seen.config.max_entries,
            "used_bytes": totals["used_bytes"],
            "memory_bytes": seen.config.memory_bytes,
            "evictions": totals["evictions"],
            "expirations": totals["expirations"],
        },
        "l2": _l2(seen),
        "workers": [
            {"pid": process.pid, "lookups": process.hits + process.misses}
            for process in seen.processes
            if process.is_alive and process.pid
        ],
        "keys": _keys(slab, cursor),
    }


def _l2(seen: Look) -> dict[str, Any] | None:
    """Return what is known of Redis; None where there is none."""
    words = seen.words
    if not words[Word.FOLLOWED]:
        return None
    is_sized = words[Word.L2_SIZED_AT] != 0
    return {
        "breaker": breaker_text(words),
        "entries": words[Word.L2_ENTRIES] if is_sized else None,
        "bytes": words[Word.L2_BYTES] if is_sized else None,
        "undelivered": words[Word.UNDELIVERED] != 0,
    }


def _keys(slab: SharedSlab, cursor: int) -> dict[str, Any]:
    """Return the hottest keys of the slab's next piece: hashes of requests alone, no names that people gave."""
    following, found = scan_frequencies(slab, cursor)
    hashed = {key: frequency for key, frequency in found.items() if is_tier_key(key)}
    # As text: a number of 64 bits is more than a page's numbers can hold.
    return {"next": str(following), "found": [(key.decode(), count) for key, count in largest(hashed, _KEYS)]}
