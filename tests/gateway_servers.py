"""A real gateway for the tests: uvicorn with workers, before a stand-in provider, and a client that shows every byte.

The client is a plain HTTP/1.1 client over a socket: it tells in which worker a request ended up, when each part of an
answer came, and whether an answer ended or was cut; and it sends what no library would send.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil
from processes import go_on, stop
from stand_in_upstream import StandInUpstream, load_recordings
from worker_servers import PATIENT_MASTER, Server, is_running, wait_until

from llm_edge_cache import SharedSlab
from llm_edge_cache.gateway.config import CONFIG_VARIABLE
from llm_edge_cache.gateway.stand_in import StandInSettings, recording_key
from llm_edge_cache.gateway.stand_in_faults import Plan

MiB = 1 << 20
APPLICATION = "llm_edge_cache.gateway.app:from_environment"
UVICORN = [
    *("-m", "uvicorn", "--factory"),
    *("--host", "127.0.0.1", "--port", "0", "--no-access-log", "--no-server-header", "--no-date-header"),
    # Longer than clients keep a connection (the official ones 5 s, as long as uvicorn): 1 the server closes an idle one
    # 2 its client, which has not heard of it, sends the next request.
    *("--timeout-keep-alive", "75"),
    *PATIENT_MASTER,
]

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS, MESSAGES = "/v1/embeddings", "/v1/messages"

_PROBE = "which worker is this?"
INVENTED = Path(__file__).resolve().parent / "data" / "exchanges.jsonl"
RECORDED = Path(
    os.environ.get("LLM_EDGE_CACHE_CASSETTES", Path(__file__).resolve().parents[2] / "shared" / "cassettes")
)
"""Exchanges with real providers; may be absent."""


def recordings() -> dict[str, Plan]:
    """What the provider answers to recorded questions."""
    recorded = load_recordings(RECORDED) if RECORDED.is_dir() else {}
    return {**load_recordings(INVENTED), **recorded}


# ---- servers ----


class Gateway:
    """One gateway with its workers, its slab, and the provider behind it."""

    def __init__(self, server: Server, name: str, upstream: StandInUpstream, workers: int) -> None:
        self.server = server
        self.name = name
        self.upstream = upstream
        self.workers = workers

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def calls(self) -> int:
        """How often the provider was called; only the provider can tell."""
        return self.upstream.provider.tally.calls

    def calls_of(self, path: str, body: dict[str, Any]) -> int:
        """How often the provider was asked this question."""
        return self.upstream.provider.tally.by_question[recording_key(path, json.dumps(body).encode())]

    def plan(self, path: str, body: dict[str, Any], plan: Plan) -> None:
        """Have the provider answer this question so."""
        recorded = self.upstream.provider._recordings
        assert isinstance(recorded, dict)
        recorded[recording_key(path, json.dumps(body).encode())] = plan

    def worker_pids(self) -> list[int]:
        """The processes that serve: those that have the slab's segment mapped."""
        if not is_running(self.server.pid):
            return []
        master = psutil.Process(self.server.pid)  # which serves itself where there is one worker
        family = [master, *master.children(recursive=True)]
        return [one.pid for one in family if is_running(one.pid) and _maps_slab(one, self.name)]

    def wait_ready(self, *, has_probe: bool = True) -> None:
        wait_until(lambda: len(self.worker_pids()) >= self.workers, f"{self.workers} workers\n{self.server.log}")
        self.server.ask("/healthz")
        if has_probe:
            reply = asyncio.run(ask(self.port, CHAT, question(_PROBE), authorization=_PROBE))
            assert reply.status == 200, reply


def _maps_slab(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(name in mapping.path for mapping in process.memory_maps())
    return False


@contextmanager
def run_gateway(
    directory: Path,
    upstream: StandInUpstream,
    *,
    workers: int = 1,
    application: str = APPLICATION,
    options: tuple[str, ...] = (),
    has_probe: bool = True,
    name: str | None = None,
    **config: Any,
) -> Iterator[Gateway]:
    """Serve between enter and exit; nothing is left behind, and nothing unforeseen was logged.

    Args:
        directory: for the log.
        upstream: the provider.
        workers: how many.
        application: makes the ASGI application, as uvicorn wants it named.
        options: uvicorn's.
        has_probe: the provider answers questions; needed for `connections_by_worker`.
        name: of the slab; None: one that nobody else uses.
        config: fields of `GatewayConfig`.
    """
    name = name or f"test-{os.getpid()}-{secrets.token_hex(6)}"
    settings = {"upstream": upstream.url, "name": name, "show_workers": True, **config}
    log = Path(tempfile.mkstemp(suffix=".log", dir=directory)[1])
    arguments = [*UVICORN, "--workers", str(workers), *options, application]
    server = Server(arguments, {CONFIG_VARIABLE: json.dumps(settings)}, log)
    try:
        running = Gateway(server, name, upstream, workers)
        running.wait_ready(has_probe=has_probe)
        yield running
    finally:
        server.end_all()
        if SharedSlab.exists(name):
            with SharedSlab(name) as slab:
                problems = slab.check()
                slab.unlink()
            assert problems == []
    assert "Traceback" not in server.log, server.log


@contextmanager
def run_hosts(
    directory: Path, settings: StandInSettings, *, hosts: int = 1, redis_url: str | None = None, **options: Any
) -> Iterator[list[Gateway]]:
    """Gateways that share nothing but the provider and, if there is one, the Redis: as many hosts.

    Args:
        directory: for the logs.
        settings: the provider's.
        hosts: how many.
        redis_url: of the Redis; in it they have a prefix of their own.
        options: of `run_gateway`, for each.
    """
    if redis_url is not None:
        prefix = f"hosts-{secrets.token_hex(4)}:"
        options["l2"] = {
            "operation_timeout_ms": 5000,
            **options.get("l2", {}),
            "redis_url": redis_url,
            "key_prefix": prefix,
        }
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(StandInUpstream(settings))
        yield [stack.enter_context(run_gateway(directory, upstream, **options)) for _ in range(hosts)]


# ---- the client ----


class Reply:
    """An answer as it came over the wire."""

    def __init__(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.status = status
        self.headers = headers
        self.parts: list[tuple[float, bytes]] = []
        """Of the body: when it came (time.monotonic()), and what."""
        self.is_whole = False
        """It ended as HTTP wants it; else it was cut."""

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def get(self, name: str) -> str | None:
        return next(iter(self.all(name)), None)

    @property
    def cache(self) -> str | None:
        return self.get("x-cache")

    @property
    def worker(self) -> int:
        """The process that answered."""
        return int(self.get("x-cache-worker") or 0)

    def __repr__(self) -> str:
        return f"<{self.status} {self.headers} {self.body[:200]!r} whole={self.is_whole}>"


class Connection:
    """One connection, kept alive: all of its requests go to one worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):  # it may answer before it has read all, and close
            await self.writer.drain()

    async def head(self) -> Reply:
        """Read a status line and headers; for a 100 those after it.

        Raises:
            asyncio.IncompleteReadError, ConnectionError: the connection was cut before.
        """
        while True:
            lines = (await self.reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
            status = int(lines[0].split(" ")[1])
            if status != 100:
                pairs = (line.partition(":") for line in lines[1:])
                return Reply(status, [(name.lower(), value.strip()) for name, _, value in pairs])

    async def body(self, reply: Reply, *, method: str = "POST") -> Reply:
        """Read the body as far as it comes."""
        async for _ in self.parts(reply, method=method):
            pass
        return reply

    async def parts(self, reply: Reply, *, method: str = "POST") -> AsyncIterator[bytes]:
        """Read the body, chunk by chunk; note in the reply what came, and whether it ended well."""
        try:
            async for part in self._pieces(reply, method):
                reply.parts.append((time.monotonic(), part))
                yield part
            reply.is_whole = True
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    async def _pieces(self, reply: Reply, method: str) -> AsyncIterator[bytes]:
        if method == "HEAD" or reply.status in (204, 304):
            return
        length = reply.get("content-length")
        if length is not None:
            yield await self.reader.readexactly(int(length))
            return
        assert reply.get("transfer-encoding") == "chunked", reply
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readuntil(b"\r\n")

    async def ask(self, path: str, body: object, **headers: str) -> Reply:
        """POST a question and read the whole answer."""
        await self.send(request_bytes("POST", path, body, **headers))
        return await self.body(await self.head())


def request_bytes(method: str, path: str, body: object = b"", **headers: str) -> bytes:
    """A request as it goes over the wire; underscores in names of headers are hyphens there."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "gateway", "content-type": "application/json", "content-length": str(len(data))}
    lines.update((name.replace("_", "-"), value) for name, value in headers.items())
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


async def ask(port: int, path: str, body: object, **headers: str) -> Reply:
    """POST a question over a connection of its own."""
    async with await Connection.open(port) as connection:
        return await connection.ask(path, body, **headers)


async def request(port: int, method: str, path: str, body: object = b"", **headers: str) -> Reply:
    async with await Connection.open(port) as connection:
        await connection.send(request_bytes(method, path, body, **headers))
        return await connection.body(await connection.head(), method=method)


@asynccontextmanager
async def connections_by_worker(gateway: Gateway, each: int = 1) -> AsyncIterator[dict[int, list[Connection]]]:
    """So many connections to every worker, by its process id.

    Which worker accepts a connection is the kernel's choice, so all but one are stopped for as long as that takes.
    """
    found: dict[int, list[Connection]] = {}
    pids = gateway.worker_pids()
    try:
        for pid in pids:
            with _stopped(other for other in pids if other != pid):
                found[pid] = [await Connection.open(gateway.port) for _ in range(each)]
                replies = await asyncio.gather(*map(_probe, found[pid]))
            assert {reply.worker for reply in replies} == {pid}
        yield found
    finally:
        await asyncio.gather(*(connection.close() for many in found.values() for connection in many))


async def _probe(connection: Connection) -> Reply:
    return await connection.ask(CHAT, question(_PROBE), authorization=_PROBE)


@contextmanager
def _stopped(pids: Iterable[int]) -> Iterator[None]:
    stopped = list(pids)
    try:
        for pid in stopped:
            stop(pid)
        yield
    finally:
        for pid in stopped:
            go_on(pid)  # its master may have replaced one that did not answer meanwhile


# ---- questions ----


def question(text: str, *, path: str = CHAT, stream: bool = False, **fields: Any) -> dict[str, Any]:
    """A request's body for any of the endpoints."""
    body: dict[str, Any] = {"model": "stand-in"}
    if path in (CHAT, MESSAGES):
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt" if path == COMPLETIONS else "input"] = text
    if path == MESSAGES:
        body["max_tokens"] = 100
    if stream:
        body["stream"] = True
    return {**body, **fields}


class Shape(NamedTuple):
    """An error in a protocol's own shape."""

    type: str
    message: str


def error_of(path: str, reply: Reply) -> Shape:
    """Read an error body; fails if it has not the protocol's shape."""
    return _error(path, reply.json)


def _error(path: str, value: Any) -> Shape:
    if path == MESSAGES:
        assert value["type"] == "error", value
    error = value["error"]
    assert isinstance(error["type"], str), value
    assert error["message"], value
    return Shape(error["type"], error["message"])


def last_error(path: str, reply: Reply) -> Shape | None:
    """The error in which a stream ended; None: it ended in none."""
    frames = reply.body.rstrip(b"\n").split(b"\n\n")
    data = [line[6:] for line in frames[-1].split(b"\n") if line.startswith(b"data: ")]
    try:
        value = json.loads(b"".join(data))
    except ValueError:
        return None
    if path == RESPONSES and value.get("type") == "error":
        return Shape(value["code"], value["message"])
    return _error(path, value) if isinstance(value.get("error"), dict) else None
