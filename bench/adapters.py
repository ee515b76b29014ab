"""The adapters beside what their frameworks offer: ratios, measured in one run, on one pinned core.

    python bench/adapters.py [--quick] [--json FILE]

Each framework's caches are called through the framework, as an application calls them. Every figure is the median over
rounds in which the contestants take turns; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapters_llm
from django.conf import settings
from django.core.cache import CacheHandler
from provenance import RESULTS, Bar, Provenance, at_least, write_results
from rivals import RedisSocket
from turns import KEYS, Call, Rounds, medians, ratio, take_turns
from workload import pin

MiB = 1 << 20
DISTRIBUTIONS = ("django", "redis", "hiredis", "msgspec", *adapters_llm.DISTRIBUTIONS)
SMALL = {"id": 42, "name": "a small dict", "tags": ["a", "b", "c"], "active": True, "score": 0.5}
TEXT = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz ", k=4096))
BYTES = random.Random(1).randbytes(4096)

# ---- Django ----

DJANGO_SLAB = "llm_edge_cache.adapters.django.SharedSlabCache"


@contextmanager
def django_caches() -> Iterator[dict[str, Any]]:
    """The contestants by name: ours under both serializers, LocMemCache, and RedisCache over a Unix socket."""
    settings.configure()
    server = RedisSocket(KEYS, 4096)
    socket = server._client.connection_pool.connection_kwargs["path"]
    location = f"bench-django-{os.getpid()}"
    slab = {"BACKEND": DJANGO_SLAB, "LOCATION": location}
    handler = CacheHandler(
        {
            "slab": {**slab, "OPTIONS": {"memory_bytes": 64 * MiB}},
            "slab, pickle": {**slab, "KEY_PREFIX": "pickle", "OPTIONS": {"serializer": "pickle"}},
            "locmem": {
                "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
                "OPTIONS": {"MAX_ENTRIES": 4 * KEYS},
            },
            "redis": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": f"unix://{socket}?db=0"},
        }
    )
    caches = {alias: handler[alias] for alias in handler.settings if alias != "default"}
    try:
        yield caches
    finally:
        caches["slab"]._store.slab.unlink()
        server.close()


def _counts(caches: dict[str, Any], quick: bool) -> dict[str, int]:
    calls = 1_000 if quick else 20_000
    return {name: calls // 10 if name == "redis" else calls for name in caches}


def django_gets(caches: dict[str, Any], value: object, rounds: int, quick: bool) -> Rounds:
    for cache in caches.values():
        cache.set_many({f"key:{at}": value for at in range(KEYS)})
        if cache.get("key:0") != value or cache.get(f"key:{KEYS - 1}") != value:
            raise SystemExit(f"{cache} lost what it was given")
    return take_turns({name: cache.get for name, cache in caches.items()}, _counts(caches, quick), rounds)


def _setter(cache: Any, value: object) -> Call:
    store = cache.set
    return lambda key: store(key, value)


def django_sets(caches: dict[str, Any], value: object, rounds: int, quick: bool) -> Rounds:
    setters = {name: _setter(cache, value) for name, cache in caches.items()}
    return take_turns(setters, _counts(caches, quick), rounds)


def measure_django(rounds: int, quick: bool) -> tuple[dict[str, Rounds], list[Bar]]:
    with django_caches() as caches:
        rows = {
            "django: set of a small dict": django_sets(caches, SMALL, rounds, quick),
            "django: get of a small dict": django_gets(caches, SMALL, rounds, quick),
            "django: get of 4 KiB of text": django_gets(caches, TEXT, rounds, quick),
            "django: get of 4 KiB of bytes": django_gets(caches, BYTES, rounds, quick),
        }
    bars = [at_least(f"{row}: times faster than redis", ratio(rows[row], "redis", "slab"), 20.0) for row in [*rows][:2]]
    bars += [
        at_least(f"{row}: times faster than locmem", ratio(rows[row], "locmem", "slab"), 1.0) for row in [*rows][2:]
    ]
    return rows, bars


# ---- all of them ----


def _print_table(rows: dict[str, Rounds]) -> None:
    for row, results in rows.items():
        print(f"\n{row}, us")
        for name, figure in medians(results).items():
            print(f"  {name:<21}{figure / 1000:>10.2f}")
    print()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs, not how fast")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "adapters.json", help="result file (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--core", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    provenance = Provenance(None, DISTRIBUTIONS)
    pin(arguments.core)
    rounds = 2 if arguments.quick else max(arguments.rounds, 7)
    rows: dict[str, Rounds] = {}
    bars: list[Bar] = []
    for measure in (measure_django, *adapters_llm.MEASURES):
        more_rows, more_bars = measure(rounds, arguments.quick)
        rows |= more_rows
        bars += more_bars
    _print_table(rows)
    results = {
        "quick": arguments.quick,
        "rounds": rounds,
        "medians_ns": {row: medians(one) for row, one in rows.items()},
        "rounds_ns": rows,
    }
    met = write_results(arguments.json, provenance, results, bars)
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
