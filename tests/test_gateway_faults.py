"""What a provider can do wrong: none of it is served from the cache, and clients are told in their own protocol."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_servers import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    Gateway,
    Reply,
    ask,
    error_of,
    last_error,
    question,
    run_gateway,
)
from stand_in_upstream import StandInUpstream

from llm_edge_cache.gateway.stand_in_faults import FAULTS

REFUSALS = ("400", "401", "403", "404", "408", "413", "429", "500", "502", "503", "529")
HARMLESS = ("chunks-7",)
"""Only careless readers are hurt."""
SILENT = ("hang", "stall")
"""They last for as long as the gateway is patient."""
SPEECHLESS = (*SILENT, "drop-before")
"""Without us, a client gets no answer, or waits for it as long as it likes."""
CUT = {"hang": 504, "drop-before": 502, "drop-after": 502, "truncate": 502, "stall": 504}
"""What becomes of an answer in one piece that never came whole."""
CUT_STREAM = {"hang": 504, "drop-before": 502}
"""... of a stream that never began."""

PATHS = pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES, COMPLETIONS])
STREAM = pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])


def comparable(reply: Reply) -> tuple[object, ...]:
    """What a client sees of an answer that is the provider's own."""
    own = [(name, value) for name, value in reply.headers if not name.startswith(("x-cache", "cache-status"))]
    framing = ("content-length", "transfer-encoding")
    return reply.status, [pair for pair in own if pair[0] not in framing], reply.body, reply.is_whole


async def ask_directly(gateway: Gateway, path: str, body: dict[str, Any], fault: str) -> Reply | None:
    """What a client sees without us; None where that is nothing."""
    if fault in SPEECHLESS:
        return None
    return await ask(gateway.upstream.port, path, body, x_stand_in_fault=fault)


def check_seen(path: str, fault: str, is_stream: bool, seen: Reply, direct: Reply | None) -> None:
    statuses = CUT_STREAM if is_stream else CUT
    if fault in statuses:
        assert seen.status == statuses[fault], (fault, seen)
        assert error_of(path, seen).message
        assert seen.get("content-type") == "application/json"
    elif fault in CUT:
        assert (seen.status, seen.is_whole) == (200, True), (fault, seen)
        assert last_error(path, seen) is not None, (fault, seen)
        if direct is not None:
            whole_events = direct.body[: direct.body.rfind(b"\n\n") + 2]
            assert seen.body.startswith(whole_events)
            assert seen.body.count(b"\n\n") == whole_events.count(b"\n\n") + 1
    else:
        assert direct is not None
        assert comparable(seen) == comparable(direct), fault


@STREAM
@PATHS
def test_a_fault_is_told_as_it_is_never_kept_and_does_not_harm_the_next_request(
    path: str, is_stream: bool, gateway: Gateway, hasty: Gateway
) -> None:
    async def suffer(gateway: Gateway, fault: str) -> None:
        body = question(f"what goes wrong? {fault}", path=path, stream=is_stream)
        direct = await ask_directly(gateway, path, body, fault)
        seen = await ask(gateway.port, path, body, x_stand_in_fault=fault)
        check_seen(path, fault, is_stream, seen, direct)
        assert seen.cache == "MISS"

        good = await ask(gateway.upstream.port, path, body)
        after = await ask(gateway.port, path, body)
        assert after.cache == ("HIT" if fault in HARMLESS else "MISS"), (fault, after)
        again = await ask(gateway.port, path, body)
        assert again.cache == "HIT"
        assert (after.status, after.body) == (again.status, again.body) == (200, good.body)

    async def main() -> None:
        await asyncio.gather(*(suffer(hasty if fault in SILENT else gateway, fault) for fault in (*FAULTS, *REFUSALS)))

    asyncio.run(main())


@STREAM
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_whoever_waits_for_a_call_that_fails_is_told_as_well(
    path: str, is_stream: bool, gateway: Gateway, hasty: Gateway
) -> None:
    """Ten ask at once, and whoever's request is passed on fails."""

    async def suffer(gateway: Gateway, fault: str) -> None:
        body = question(f"what goes wrong for all? {fault}", path=path, stream=is_stream)
        direct = await ask_directly(gateway, path, body, fault)
        everybody = await asyncio.gather(*(ask(gateway.port, path, body, x_stand_in_fault=fault) for _ in range(10)))
        for seen in everybody:
            if seen.cache in ("COALESCED", "HIT"):
                assert seen.is_whole
                if seen.get("content-encoding") == "gzip":
                    seen.parts[:] = [(0.0, gzip.decompress(seen.body))]
                    assert direct is not None
                    assert seen.body == gzip.decompress(direct.body)
                elif fault in CUT:
                    check_seen(path, fault, is_stream, seen, direct)
                else:
                    assert direct is not None
                    assert (seen.status, seen.body) == (direct.status, direct.body), fault
            else:
                check_seen(path, fault, is_stream, seen, direct)
        if fault in SILENT:
            assert gateway.calls_of(path, body) == 1, fault
        after = await ask(gateway.port, path, body)
        assert after.cache == ("HIT" if fault in HARMLESS else "MISS"), (fault, after)

    async def main() -> None:
        await asyncio.gather(
            *(suffer(hasty if fault in SILENT else gateway, fault) for fault in (*FAULTS, "401", "429", "500", "529"))
        )

    asyncio.run(main())


@STREAM
def test_who_waits_for_another_s_call_that_breaks_gets_the_answer_of_a_second(
    is_stream: bool, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = question("whose bad luck?", stream=is_stream)
    provider = gateway.upstream.provider
    carry_out = provider._carry_out

    async def slowly(*arguments: Any) -> None:
        await asyncio.sleep(0.4)
        await carry_out(*arguments)

    monkeypatch.setattr(provider, "_carry_out", slowly)

    async def main() -> tuple[Reply, list[Reply]]:
        unlucky = asyncio.create_task(ask(gateway.port, CHAT, body, x_stand_in_fault="drop-before"))
        while not gateway.calls_of(CHAT, body):
            await asyncio.sleep(0.01)
        others = await asyncio.gather(*(ask(gateway.port, CHAT, body) for _ in range(40)))
        return await unlucky, others

    unlucky, others = asyncio.run(main())
    assert unlucky.status == 502
    assert {(reply.status, reply.body) for reply in others} == {(200, others[0].body)}
    assert gateway.calls_of(CHAT, body) == 2


def test_what_a_refusal_tells_of_limits_reaches_its_client(gateway: Gateway) -> None:
    reply = asyncio.run(ask(gateway.port, CHAT, question("too many?"), x_stand_in_fault="429"))
    assert reply.get("retry-after") == "1"


# ---- what is hardly HTTP ----

JSON = b"content-type: application/json\r\n"
SOUND = (
    b'{"id":"c","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"yes"},"finish_reason":"stop"}]}'
)
RAW = {
    "nothing": b"",
    "no HTTP": b"220 mail.example.com ESMTP\r\n\r\n",
    "half a status line": b"HTTP/1.1 2",
    "half a header": b"HTTP/1.1 200 OK\r\ncontent-ty",
    "a header without a colon": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    "a header too long": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    "a status of none": b"HTTP/1.1 999 Odd\r\ncontent-length: 2\r\n\r\n{}",
    "a status too small": b"HTTP/1.1 99 Odd\r\ncontent-length: 2\r\n\r\n{}",
    "no valid length": b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a body too short": b"HTTP/1.1 200 OK\r\n" + JSON + b"content-length: 1000\r\n\r\n" + SOUND,
    "no valid chunk": b"HTTP/1.1 200 OK\r\n" + JSON + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    "chunks without an end": b"HTTP/1.1 200 OK\r\n" + JSON + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "no length, cut": b"HTTP/1.1 200 OK\r\n" + JSON + b"\r\n" + SOUND[:-5],
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "no body": b"HTTP/1.1 200 OK\r\n" + JSON + b"content-length: 0\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "elsewhere": b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
    "a control character": b"HTTP/1.1 200 OK\r\n" + JSON + b"x-odd: a\x01b\r\ncontent-length: 2\r\n\r\n{}",
    "a header that is no ASCII": b"HTTP/1.1 200 OK\r\n" + JSON + b"x-odd: \xff\xc3\xa9\r\ncontent-length: 2\r\n\r\n{}",
    "a stream cut in a frame": b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {"id":"c","ch',
}


class RawUpstream(StandInUpstream):
    """Answers whatever is asked with the same bytes, and hangs up."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.socket.getsockname()[1])
        self.answer = b""

    async def __aenter__(self) -> RawUpstream:
        self.server = await asyncio.start_server(self._serve, sock=self.socket.dup())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        await reader.readexactly(int(length[0].split(b":")[1]) if length else 0)
        writer.write(self.answer)
        writer.close()


@pytest.fixture(scope="module")
def raw_upstream() -> Iterator[RawUpstream]:
    upstream = RawUpstream()
    yield upstream
    upstream.socket.close()


@pytest.fixture(scope="module")
def before_raw(raw_upstream: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("raw")
    with raw_gateway(directory, raw_upstream) as running:
        yield running


def raw_gateway(directory: Path, upstream: RawUpstream):  # type: ignore[no-untyped-def]
    return run_gateway(directory, upstream, idle_timeout=2.0, has_probe=False)


@STREAM
@pytest.mark.parametrize("case", RAW)
def test_what_is_hardly_http_is_answered_as_http(
    case: str, is_stream: bool, before_raw: Gateway, raw_upstream: RawUpstream
) -> None:
    body = question(case, stream=is_stream)
    raw_upstream.answer = RAW[case]

    async def main() -> tuple[Reply, Reply, Reply]:
        async with raw_upstream:
            seen = await ask(before_raw.port, CHAT, body)
            passed = await ask(before_raw.port, "/v1/other", body)
            raw_upstream.answer = b"HTTP/1.1 200 OK\r\n" + JSON + b"content-length: %d\r\n\r\n" % len(SOUND) + SOUND
            return seen, passed, await ask(before_raw.port, CHAT, body)

    seen, passed, after = asyncio.run(main())
    for reply in (seen, passed):
        assert reply.status != 500, reply
        if reply.status == 502:
            assert error_of(CHAT, reply)
    assert (after.cache, after.status, after.body) == ("MISS", 200, SOUND)


def test_an_upstream_that_is_not_there_is_told(before_raw: Gateway, raw_upstream: RawUpstream) -> None:
    raw_upstream.socket.close()
    seen = asyncio.run(ask(before_raw.port, CHAT, question("is it there?")))
    assert (seen.status, error_of(CHAT, seen).message) == (502, "the upstream cannot be reached")
    passed = asyncio.run(ask(before_raw.port, "/v1/other", {}))
    assert (passed.status, error_of(CHAT, passed).message) == (502, "the upstream cannot be reached")
