"""Both Redis clients behind one blocking face, so that one suite judges both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Protocol

from llm_edge_cache.redis_client import AsyncRedisClient, Command, RedisClient
from llm_edge_cache.redis_target import parse_redis_url


class Face(Protocol):
    def run(self, command: Command, *, blocking: float = 0.0) -> Any: ...
    def connect(self) -> None: ...
    def close(self) -> None: ...


class AsyncFace:
    """An AsyncRedisClient in an event loop of its own, in a thread of its own."""

    def __init__(self, url: str, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="async face", daemon=True)
        self._thread.start()
        self.client = AsyncRedisClient(parse_redis_url(url), **options)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def run(self, command: Command, *, blocking: float = 0.0) -> Any:
        return self.do(self.client.run(command, blocking=blocking))

    def connect(self) -> None:
        self.do(self.client.connect())

    def close(self) -> None:
        if self._thread.is_alive():
            self.do(self.client.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(60)
            self.loop.close()


def make_face(kind: str, url: str, **options: Any) -> Face:
    """kind: "threads" or "asyncio"."""
    if kind == "threads":
        return RedisClient(parse_redis_url(url), **options)
    return AsyncFace(url, **options)
