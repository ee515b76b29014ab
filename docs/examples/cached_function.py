"""Two processes share a function's results: what the first computed, the second finds.

pip install llm-edge-cache
python docs/examples/cached_function.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from llm_edge_cache import SharedSlab, cached

NAME = os.environ.setdefault("EXAMPLE_SLAB", f"example-cached-{os.getpid()}")


class Answer(msgspec.Struct):
    text: str
    tokens: int


@cached(ttl=60, name=NAME)
def answer(question: str) -> Answer:
    print("  asking the provider")
    return Answer("Because.", len(question.split()))


def work() -> None:
    print("  answer:", answer("Why?").text)
    print("  again:", answer(question="Why?"), answer.cache_info()[:2])


def main() -> None:
    try:
        for number in (1, 2):
            print(f"process {number}", flush=True)
            subprocess.run([sys.executable, __file__, "worker"], check=True)
    finally:
        SharedSlab(NAME).unlink()  # only because this is an example: a slab outlives its processes


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else main()
