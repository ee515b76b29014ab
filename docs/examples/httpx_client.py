"""Two processes with a caching transport in their HTTP client: what the first was answered, the second finds.

pip install 'llm-edge-cache[httpx]'
python docs/examples/httpx_client.py

With the official clients it is one line: OpenAI(http_client=httpx2.Client(transport=CachingTransport())).
"""

from __future__ import annotations

import os
import subprocess
import sys

import httpx

from llm_edge_cache import L1Config, SharedSlab
from llm_edge_cache.adapters.httpx import CachingTransport

NAME = os.environ.setdefault("EXAMPLE_SLAB", f"example-httpx-{os.getpid()}")


def provider(request: httpx.Request) -> httpx.Response:
    """Stands for the API of a provider, which this example does without."""
    print("  asking the provider")
    answer = {"index": 0, "message": {"role": "assistant", "content": "Because."}, "finish_reason": "stop"}
    return httpx.Response(200, json={"object": "chat.completion", "model": "gpt-4o", "choices": [answer]})


def work() -> None:
    l1 = L1Config(name=NAME, memory_bytes=16 << 20)
    # Left out, `transport` is the library's HTTPTransport.
    with httpx.Client(transport=CachingTransport(httpx.MockTransport(provider), l1=l1)) as client:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Why?"}]}
        answer = client.post("https://api.example.com/v1/chat/completions", json=body)
        print(f"  {answer.headers['x-cache']}:", answer.json()["choices"][0]["message"]["content"])


def main() -> None:
    try:
        for number in (1, 2):
            print(f"process {number}", flush=True)
            subprocess.run([sys.executable, __file__, "worker"], check=True)
    finally:
        SharedSlab(NAME).unlink()  # only because this is an example: a slab outlives its processes


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else main()
