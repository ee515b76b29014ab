"""Two processes share one dogpile.cache region: what the first computes, the second finds; only one computes at a time.

pip install 'llm-edge-cache[dogpile]'
python docs/examples/dogpile_region.py
"""

from __future__ import annotations

import os
import subprocess
import sys

from dogpile.cache import make_region

from llm_edge_cache import SharedSlab

NAME = os.environ.setdefault("EXAMPLE_SLAB", f"example-dogpile-{os.getpid()}")

region = make_region()


@region.cache_on_arguments(expiration_time=60)
def report(year: int) -> dict[str, int]:
    print("  computing the report")
    return {"year": year, "orders": 1234}


def work() -> None:
    region.configure("llm_edge_cache.slab", arguments={"name": NAME, "config": {"memory_bytes": 16 << 20}})
    visits = region.get_or_create("visits", lambda: 0) + 1
    region.set("visits", visits)
    print("  visit", visits)
    print("  ", report(2026))


def main() -> None:
    try:
        for number in (1, 2):
            print(f"process {number}", flush=True)
            subprocess.run([sys.executable, __file__, "worker"], check=True)
    finally:
        SharedSlab(NAME).unlink()  # only because this is an example: a slab outlives its processes


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else main()
