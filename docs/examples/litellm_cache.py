"""Two processes share LiteLLM's response cache: what the first was answered, the second finds.

pip install 'llm-edge-cache[litellm]'
python docs/examples/litellm_cache.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # do not fetch the list of prices

import litellm

from llm_edge_cache import L1Config, SharedSlab
from llm_edge_cache.adapters.litellm import LLMEdgeCache

NAME = os.environ.setdefault("EXAMPLE_SLAB", f"example-litellm-{os.getpid()}")


def work(answer: str) -> None:
    cache = LLMEdgeCache(L1Config(name=NAME, memory_bytes=16 << 20))
    litellm.cache = litellm.Cache(type="local")
    litellm.cache.cache = cache
    made = litellm.completion(
        "gpt-4o", messages=[{"role": "user", "content": "Why?"}], mock_response=answer, caching=True
    )
    print("  answer:", made.choices[0].message.content)
    time.sleep(1)  # LiteLLM stores from a thread of its own
    cache.close()


def main() -> None:
    try:
        for number, answer in enumerate(("Because.", "Nobody asks me."), 1):
            print(f"process {number}", flush=True)
            subprocess.run([sys.executable, __file__, answer], check=True)
    finally:
        SharedSlab(NAME).unlink()  # only because this is an example: a slab outlives its processes


if __name__ == "__main__":
    work(sys.argv[1]) if sys.argv[1:] else main()
