"""Two processes of a Flask application share one cache: what the first computes, the second finds.

pip install 'llm-edge-cache[cachelib]' flask-caching
python docs/examples/flask_cache.py
"""

from __future__ import annotations

import os
import subprocess
import sys

from flask import Flask
from flask_caching import Cache

from llm_edge_cache import SharedSlab, SlabConfig

NAME = os.environ.setdefault("EXAMPLE_SLAB", f"example-flask-{os.getpid()}")

app = Flask(__name__)
cache = Cache(
    config={
        "CACHE_TYPE": "llm_edge_cache.adapters.cachelib.factory",
        "CACHE_ARGS": [NAME],
        "CACHE_OPTIONS": {"config": SlabConfig(memory_bytes=16 << 20)},
    }
)


@app.route("/report")
@cache.cached(timeout=60)
def report() -> dict[str, int]:
    print("  computing the report")
    return {"orders": 1234}


def work() -> None:
    cache.init_app(app)
    with app.app_context(), app.test_client() as client:
        print("  visit", cache.cache.inc("visits"))
        print("  ", client.get("/report").json)


def main() -> None:
    try:
        for number in (1, 2):
            print(f"process {number}", flush=True)
            subprocess.run([sys.executable, __file__, "worker"], check=True)
    finally:
        SharedSlab(NAME).unlink()  # only because this is an example: a slab outlives its processes


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else main()
