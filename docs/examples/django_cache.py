"""Two processes of a Django project share one cache: what the first computes, the second finds.

pip install 'llm-edge-cache[django]'
python docs/examples/django_cache.py
"""

from __future__ import annotations

import os
import subprocess
import sys

from django.conf import settings
from django.core.cache import cache

from llm_edge_cache import SharedSlab

NAME = os.environ.setdefault("EXAMPLE_SLAB", f"example-django-{os.getpid()}")

settings.configure(
    CACHES={
        "default": {
            "BACKEND": "llm_edge_cache.adapters.django.SharedSlabCache",
            "LOCATION": NAME,
            "OPTIONS": {"memory_bytes": 16 << 20},
        }
    }
)


def expensive_report() -> dict[str, int]:
    print("  computing the report")
    return {"orders": 1234}


def work() -> None:
    """What a view would do."""
    cache.add("visits", 0, timeout=None)
    print("  visit", cache.incr("visits"))
    print("  ", cache.get_or_set("report", expensive_report, timeout=60))


def main() -> None:
    try:
        for number in (1, 2):
            print(f"process {number}", flush=True)
            subprocess.run([sys.executable, __file__, "worker"], check=True)
    finally:
        SharedSlab(NAME).unlink()  # only because this is an example: a slab outlives its processes


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else main()
