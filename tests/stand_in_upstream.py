"""The stand-in provider behind a server of its own, which does to connections what no ASGI server lets one do.

    with StandInUpstream() as upstream: ... upstream.url, upstream.provider.tally

    python tests/stand_in_upstream.py --port 8010 --different --recordings ../shared/cassettes

A plain HTTP/1.1 server, so a cut connection is really cut: before the headers, too. One thread, one event loop; the
provider's counters may be read from other threads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from llm_edge_cache.gateway.protocols import PROTOCOLS, FrameSplitter, WireProtocol
from llm_edge_cache.gateway.stand_in import ConnectionCutError, StandInProvider, StandInSettings, recording_key
from llm_edge_cache.gateway.stand_in_faults import Plan

AT_ONCE = StandInSettings(first_delay=0.0, word_delay=0.0)
LARGEST_HEAD = 1 << 16  # bytes


# ---- recordings ----


def read_recordings(source: Path) -> Iterator[dict[str, Any]]:
    """The recorded exchanges that one of the protocols can express, of a file of JSON lines or of a folder of them."""
    for file in sorted(source.glob("*.jsonl*")) if source.is_dir() else [source]:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for line in data.split(b"\n"):
            row = json.loads(line) if line else {}
            if line and protocol_of(row) is not None:
                yield row


def protocol_of(row: dict[str, Any]) -> WireProtocol | None:
    """By the end of the path: providers put the same endpoint at many places."""
    if row["method"] != "POST" or row["request_json"] is None or "/threads/" in row["path"]:
        return None
    fitting = [protocol for path, protocol in PROTOCOLS.items() if row["path"].endswith(path.removeprefix("/v1"))]
    return max(fitting, key=lambda protocol: len(protocol.path), default=None)


def request_bytes(row: dict[str, Any]) -> bytes:
    return json.dumps(row["request_json"], ensure_ascii=False, separators=(",", ":")).encode()


def headers_of(recorded: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in recorded.items()]


def plan_of(row: dict[str, Any]) -> Plan:
    """A recorded answer, to be given again; a stream frame by frame."""
    body = row["response_body"].encode()
    chunks = [body]
    if row["streaming"]:
        splitter = FrameSplitter()
        chunks = [*splitter.feed(body), splitter.rest()]
    plain = tuple(header for header in headers_of(row["response_headers"]) if header[0] != b"content-length")
    return Plan(row["status"], plain, tuple(filter(None, chunks)), is_paced=row["streaming"])


def load_recordings(source: Path) -> dict[str, Plan]:
    """Answers by question. Of several answers to one question the first; a failure only where there is nothing else."""
    plans: dict[str, Plan] = {}
    for row in sorted(read_recordings(source), key=lambda row: row["status"] != 200):
        protocol = protocol_of(row)
        assert protocol is not None
        plans.setdefault(recording_key(protocol.path, request_bytes(row)), plan_of(row))
    return plans


# ---- the server ----


class StandInUpstream:
    """Serves on a free port of the loopback, from a thread, between `start` and `stop`."""

    def __init__(
        self, settings: StandInSettings = AT_ONCE, recordings: dict[str, Plan] | None = None, port: int = 0
    ) -> None:
        self.provider = StandInProvider(settings, recordings, sleep=self._delay)
        self.port = port
        self.is_hurried = False
        """Its delays end at once, those under way too: what is to happen before has all the time."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._is_ready = threading.Event()
        self._stop = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()
        assert self._is_ready.wait(20), "the stand-in does not start"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the stand-in does not stop"

    def __enter__(self) -> StandInUpstream:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _delay(self, seconds: float) -> None:
        end = self._loop.time() + seconds
        while (left := end - self._loop.time()) > 0 and not self.is_hurried:
            await asyncio.sleep(min(left, 0.01))

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(_Connection(self.provider, reader, writer).serve())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", self.port, limit=LARGEST_HEAD)
        self.port = server.sockets[0].getsockname()[1]
        self._is_ready.set()
        await self._stop.wait()
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One client's connection: requests one after another."""

    def __init__(self, provider: StandInProvider, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._provider = provider
        self._reader = reader
        self._writer = writer
        self._is_chunked = False
        self._is_head = False
        self._body: bytes | None = None  # what the application has not received yet

    async def serve(self) -> None:
        try:
            while await self._serve_one():
                pass
        except (ConnectionCutError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writer.transport.abort()

    async def _serve_one(self) -> bool:
        head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        method, target, _ = first.split(b" ")
        path, _, query = target.partition(b"?")
        self._is_head = method == b"HEAD"
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        self._body = await self._read_body(dict(headers))
        scope = {
            "type": "http",
            "method": method.decode(),
            "path": path.decode(),
            "query_string": query,
            "headers": headers,
        }
        await self._provider(scope, self._receive, self._send)
        return True

    async def _read_body(self, headers: dict[bytes, bytes]) -> bytes:
        if headers.get(b"transfer-encoding") != b"chunked":
            return await self._reader.readexactly(int(headers.get(b"content-length", b"0")))
        parts = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            parts.append((await self._reader.readexactly(size + 2))[:-2])
        await self._reader.readuntil(b"\r\n")
        return b"".join(parts)

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        while await self._reader.read(4096):
            pass
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._is_chunked = all(name != b"content-length" for name, _ in message["headers"])
            headers = [*message["headers"], *([(b"transfer-encoding", b"chunked")] if self._is_chunked else [])]
            lines = [b"HTTP/1.1 %d Stand-in" % message["status"], *(b"%s: %s" % header for header in headers)]
            self._writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
        elif self._is_head:
            pass
        elif not self._is_chunked:
            self._writer.write(message["body"])
        elif message["body"]:
            self._writer.write(b"%x\r\n%s\r\n" % (len(message["body"]), message["body"]))
        elif not message["more_body"]:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        await asyncio.sleep(0)  # others take their turn, as between packets of a network


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in provider: no model, made-up or recorded answers.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--recordings", type=Path, help="a file of recorded exchanges, or a folder of them")
    parser.add_argument("--different", action="store_true", help="no two answers are alike")
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--first-delay", type=float, default=0.3, help="seconds")
    parser.add_argument("--word-delay", type=float, default=0.02, help="seconds")
    given = parser.parse_args()
    settings = StandInSettings(
        answers="different" if given.different else "same",
        words=given.words,
        first_delay=given.first_delay,
        word_delay=given.word_delay,
    )
    recordings = load_recordings(given.recordings) if given.recordings else None
    # Also while it prints: whoever reads the line may interrupt at once.
    with contextlib.suppress(KeyboardInterrupt), StandInUpstream(settings, recordings, given.port) as upstream:
        print(f"a stand-in provider at {upstream.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
