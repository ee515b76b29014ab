"""Two processes share LangChain's cache of model answers: what the first was answered, the second finds.

pip install 'llm-edge-cache[langchain]'
python docs/examples/langchain_cache.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from langchain_core.globals import set_llm_cache
from langchain_core.language_models.fake_chat_models import FakeListChatModel

from llm_edge_cache import L1Config, SharedSlab
from llm_edge_cache.adapters.langchain import LLMEdgeCache

NAME = os.environ.setdefault("EXAMPLE_SLAB", f"example-langchain-{os.getpid()}")


class StandInModel(FakeListChatModel):
    """Stands for the model of a provider, which this example does without."""

    def _call(self, *arguments: Any, **options: Any) -> str:
        print("  asking the provider")
        return super()._call(*arguments, **options)


def work() -> None:
    cache = LLMEdgeCache(L1Config(name=NAME, memory_bytes=16 << 20))
    set_llm_cache(cache)
    print("  answer:", StandInModel(responses=["Because."]).invoke("Why?").content)
    cache.close()


def main() -> None:
    try:
        for number in (1, 2):
            print(f"process {number}", flush=True)
            subprocess.run([sys.executable, __file__, "worker"], check=True)
    finally:
        SharedSlab(NAME).unlink()  # only because this is an example: a slab outlives its processes


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else main()
