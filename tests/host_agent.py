"""A process of a host that does what a test tells it: `HostAgent` here starts one; run as a program, this file is it.

One JSON line each way: a list of a command's name and its arguments, then its result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

from processes import stop

from llm_edge_cache import CacheableRequest, CachedResponse, L1Config, L2Config, SyncCacheManager
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Counter, Word


class HostAgent:
    """A process with a manager over the slab `name`; a context manager, which kills it at the end."""

    def __init__(self, name: str, url: str, prefix: str, **l2: Any) -> None:
        command = [sys.executable, __file__, json.dumps({"name": name, "url": url, "prefix": prefix, "l2": l2})]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "open"

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the agent has died"
        return json.loads(line)

    def do(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Have a command of `_Agent` carried out."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, arguments, options]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def get(self, text: str) -> str | None:
        """Look a request up; the content that was found."""
        found: str | None = self.do("get", text)
        return found

    def word(self, word: Word) -> int:
        return int(self.do("word", int(word)))

    def count(self, counter: Counter) -> int:
        return int(self.do("count", int(counter)))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        stop(self.process.pid)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> HostAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


class _Agent:
    def __init__(self, name: str, url: str, prefix: str, l2: dict[str, Any]) -> None:
        l1 = L1Config(memory_bytes=4 << 20, max_capacity=500, name=name)
        self.manager = SyncCacheManager(l1, L2Config(url, key_prefix=prefix, **l2)).open()
        self._slab = self.manager.slab

    def get(self, text: str) -> str | None:
        found = self.manager.lookup(_request(text)).response
        return None if found is None else found.content

    def store(self, text: str, content: str, **options: Any) -> bool:
        return self.manager.store(_request(text), CachedResponse(content, "model"), **options)

    def fetch(self, text: str, content: str) -> str:
        found = self.manager.get_or_compute(_request(text), lambda: CachedResponse(content, "model"))
        assert found is not None
        return found.content

    def flush(self) -> bool:
        queue = self.manager._engine.queue
        return queue is not None and queue.flush(10)

    def invalidate(self, text: str) -> None:
        self.manager.invalidate(_request(text))

    def invalidate_tag(self, tag: str) -> None:
        self.manager.invalidate_tag(tag)

    def clear_all(self) -> None:
        self.manager.clear_all()

    def is_in_l1(self, text: str) -> bool:
        return tier_key(_request(text)) in self._slab

    def word(self, word: int) -> int:
        return self._slab._word(word)

    def count(self, counter: int) -> int:
        return self._slab._counter_sums()[counter]

    def process(self) -> int:
        return os.getpid()


def _request(text: str) -> CacheableRequest:
    return CacheableRequest("model", text)


def _main() -> None:
    agent = _Agent(**json.loads(sys.argv[1]))
    print(json.dumps("open"), flush=True)
    for line in sys.stdin:
        command, arguments, options = json.loads(line)
        print(json.dumps(getattr(agent, command)(*arguments, **options)), flush=True)


if __name__ == "__main__":
    _main()
