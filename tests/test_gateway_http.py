"""The gateway's HTTP surface: input that is bad, odd or slow, and whatever else is passed through untouched."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from gateway_servers import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    Connection,
    Gateway,
    MiB,
    Reply,
    ask,
    error_of,
    question,
    request,
    request_bytes,
)

from llm_edge_cache.gateway.stand_in_faults import Plan

ALL = [CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, MESSAGES]
PATHS = pytest.mark.parametrize("path", ALL)

BAD_BODIES = {
    b"": "JSON",
    b"{": "JSON",
    b"{}{}": "JSON",
    b"nonsense": "JSON",
    b"model=m&prompt=x": "JSON",
    b'{"model":"m","temperature":NaN}': "NaN",
    b'{"model":"m","temperature":-Infinity}': "NaN",
    b'{"model":"m","temperature":1e999}': "",
    b'{"model":"m","model":"n"}': "'model' twice",
    b'{"model":"m","a":{"b":1,"b":2}}': "'b' twice",
    b"[]": "an array",
    b"null": "null",
    b'"m"': "a string",
    b"1": "a number",
    b'{"model":"\xff"}': "UTF-8",
    b'{"model":"\\ud800"}': "surrogate",
    b'{"a":' * 200 + b"1" + b"}" * 200: "deep",
    b"[" * 100_000: "",
    b"\xef\xbb\xbf{}": "JSON",
    b"\x00" * 100: "JSON",
    b"\x1f\x8b\x08\x00 gzip": "JSON",
}
"""And what the message says of them."""


# ---- bad input ----


@PATHS
def test_a_bad_body_is_refused_in_the_protocol_s_shape_and_reaches_nobody(path: str, gateway: Gateway) -> None:
    before = gateway.calls()

    async def main() -> None:
        async with await Connection.open(gateway.port) as connection:  # which stays usable
            for body, part in BAD_BODIES.items():
                reply = await connection.ask(path, body)
                assert reply.status == 400, body
                assert reply.get("content-type") == "application/json"
                error = error_of(path, reply)
                assert error.type == "invalid_request_error"
                assert part in error.message, (body, error)

    asyncio.run(main())
    assert gateway.calls() == before


def test_a_message_quotes_no_value(gateway: Gateway) -> None:
    reply = asyncio.run(ask(gateway.port, CHAT, b'{"prompt": "my secret", "a": NaN}'))
    assert "my secret" not in reply.body.decode()


@PATHS
def test_a_wrong_content_type_is_told_where_the_body_is_no_json(path: str, gateway: Gateway) -> None:
    form = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
    reply = asyncio.run(ask(gateway.port, path, form, content_type="multipart/form-data; boundary=x"))
    assert reply.status == 400
    assert "multipart/form-data" in error_of(path, reply).message


def test_a_compressed_body_is_told_to_be_one(gateway: Gateway) -> None:
    reply = asyncio.run(ask(gateway.port, CHAT, b"\x1f\x8b\x08\x00", content_encoding="gzip"))
    assert reply.status == 400
    assert "gzip" in error_of(CHAT, reply).message


@pytest.mark.timeout(300)
def test_a_body_of_fifty_megabytes_passes_and_one_byte_more_is_too_large(gateway: Gateway) -> None:
    fixed = len(json.dumps(question("")).encode())
    largest = question("x" * (50 * MiB - fixed))

    async def main() -> tuple[Reply, Reply, Reply]:
        whole = await ask(gateway.port, CHAT, largest)
        over = await ask(gateway.port, CHAT, question("x" * (50 * MiB - fixed + 1)))
        return whole, over, await ask(gateway.port, CHAT, question("still there?"))

    whole, over, after = asyncio.run(main())
    assert whole.status == 200
    assert (over.status, error_of(CHAT, over).message) == (413, f"the body is larger than {50 * MiB} bytes")
    assert after.status == 200


def test_a_body_without_end_is_cut_off(gateway: Gateway) -> None:
    chunk = b"100000\r\n" + b" " * MiB + b"\r\n"

    async def main() -> Reply:
        async with await Connection.open(gateway.port) as connection:
            await connection.send(request_head("POST", CHAT, "transfer-encoding: chunked"))
            answer = asyncio.create_task(connection.head())
            for _ in range(200):
                if answer.done():
                    break
                await connection.send(chunk)
            return await connection.body(await answer)

    assert asyncio.run(main()).status == 413


def request_head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: gateway", *lines, "", ""]).encode("latin-1")


def test_a_chunked_body_is_read_like_any_other(gateway: Gateway) -> None:
    body = json.dumps(question("in chunks?")).encode()
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))

    async def main() -> tuple[Reply, Reply]:
        async with await Connection.open(gateway.port) as connection:
            head = request_head("POST", CHAT, "transfer-encoding: chunked", "content-type: application/json")
            await connection.send(head + pieces + b"0\r\n\r\n")
            chunked = await connection.body(await connection.head())
            return chunked, await connection.ask(CHAT, body)

    chunked, plain = asyncio.run(main())
    assert (chunked.status, chunked.cache) == (200, "MISS")
    assert (plain.status, plain.cache, plain.body) == (200, "HIT", chunked.body)


def test_requests_sent_before_the_answers_are_answered_in_order(gateway: Gateway) -> None:
    bodies = [question(f"pipelined {number}", stream=bool(number % 2)) for number in range(20)]

    async def main() -> list[Reply]:
        async with await Connection.open(gateway.port) as connection:
            await connection.send(b"".join(request_bytes("POST", CHAT, body) for body in [*bodies, *bodies]))
            return [await connection.body(await connection.head()) for _ in range(40)]

    replies = asyncio.run(main())
    assert [reply.cache for reply in replies] == ["MISS"] * 20 + ["HIT"] * 20
    assert [reply.body for reply in replies[20:]] == [reply.body for reply in replies[:20]]
    assert len({reply.body for reply in replies}) == 20


def test_a_slow_client_is_served_and_holds_up_nobody(gateway: Gateway) -> None:
    data = request_bytes("POST", CHAT, question("slowly?"))

    async def main() -> tuple[Reply, list[Reply]]:
        async with await Connection.open(gateway.port) as connection:
            replies = []
            step = len(data) // 20
            for start in range(0, len(data), step):
                await connection.send(data[start : start + step])
                replies.append(await ask(gateway.port, CHAT, question("fast?")))
            return await connection.body(await connection.head()), replies

    slow, fast = asyncio.run(main())
    assert (slow.status, slow.is_whole) == (200, True)
    assert {reply.status for reply in fast} == {200}


def test_a_client_that_reads_slowly_gets_everything(gateway: Gateway) -> None:
    body = question("a long one?", stream=True)
    frames = [b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % (b"x" * 60_000)] * 100
    end = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    gateway.plan(CHAT, body, Plan(200, ((b"content-type", b"text/event-stream"),), (*frames, end)))

    async def main() -> list[Reply]:
        replies = []
        for _ in range(2):  # from the provider, and from the cache
            async with await Connection.open(gateway.port) as connection:
                await connection.send(request_bytes("POST", CHAT, body))
                reply = await connection.head()
                await asyncio.sleep(0.5)
                replies.append(await connection.body(reply))
        return replies

    for reply, cache in zip(asyncio.run(main()), ("MISS", "HIT"), strict=True):
        assert (reply.cache, reply.is_whole, reply.body) == (cache, True, b"".join((*frames, end)))


def test_a_client_that_stalls_in_its_body_is_told_so_in_the_end(hasty: Gateway) -> None:
    async def main(path: str) -> Reply:
        async with await Connection.open(hasty.port) as connection:
            await connection.send(request_bytes("POST", path, question("to be continued"))[:-3])
            return await connection.body(await connection.head())

    for path in (CHAT, MESSAGES):
        reply = asyncio.run(main(path))
        assert reply.status == 408
        assert "body" in error_of(path, reply).message


def test_a_client_that_leaves_in_its_body_is_nobody_s_problem(gateway: Gateway) -> None:
    async def main() -> Reply:
        for cut in (1, 20, 100, 200):
            async with await Connection.open(gateway.port) as connection:
                await connection.send(request_bytes("POST", CHAT, question("never mind" * 20))[:-cut])
        return await ask(gateway.port, CHAT, question("fine?"))

    before = gateway.calls_of(CHAT, question("never mind" * 20))
    assert asyncio.run(main()).status == 200
    assert gateway.calls_of(CHAT, question("never mind" * 20)) == before


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v2/chat/completions", "/chat/completions", "/v1x/", "/%2e%2e/v1/models"]
)
def test_what_is_served_nowhere_is_told_in_an_error(path: str, gateway: Gateway) -> None:
    before = gateway.calls()
    for method in ("GET", "POST"):
        reply = asyncio.run(request(gateway.port, method, path))
        assert reply.status == 404
        assert "/v1/" in error_of(CHAT, reply).message
    assert gateway.calls() == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT", "OPTIONS", "PATCH"])
@PATHS
def test_other_methods_on_cached_paths_are_the_provider_s(path: str, method: str, gateway: Gateway) -> None:
    asyncio.run(ask(gateway.port, path, question("kept", path=path)))
    reply = asyncio.run(request(gateway.port, method, path))
    direct = asyncio.run(request(gateway.upstream.port, method, path)) if method != "HEAD" else reply
    assert (reply.status, reply.body) == (direct.status, direct.body) == (404, reply.body)
    assert reply.cache is None


RAW = [
    b"\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /v1/\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models#part HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/a b HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET //v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET http://elsewhere/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/[:: HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/%zz%00%0a HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models?a=%0d%0ax:y&\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\ncontent-type: \xff\xc3\xa9\r\n\r\n",
    b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models HTTP/1.0\r\n\r\n",
]


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_what_no_client_sends_neither_hangs_nor_fails_us(data: bytes, gateway: Gateway) -> None:
    async def main() -> bytes:
        async with await Connection.open(gateway.port) as connection:
            await connection.send(data)
            connection.writer.write_eof()
            try:
                return await asyncio.wait_for(connection.reader.read(1 << 20), 30)
            except ConnectionError:
                return b""

    answer = asyncio.run(main())
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer
    assert not answer.startswith(b"HTTP/1.1 500"), answer
    assert asyncio.run(ask(gateway.port, CHAT, question("all well?"))).status == 200


# ---- passing through ----


def echoed(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply
    value: dict[str, Any] = reply.json
    return value


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_passes_with_its_body_query_and_headers(method: str, gateway: Gateway) -> None:
    path = "/v1/echo/a%20b/%C3%A9?x=1&y=%2F&x=2&empty"
    headers = {"x_odd": 'a, b;c="d"', "authorization": "Bearer k", "accept_encoding": "br", "user_agent": "me/1"}
    reply = asyncio.run(request(gateway.port, method, path, b"any \x00 bytes", content_type="a/b", **headers))
    seen = echoed(reply)
    assert (seen["method"], seen["path"]) == (method, "/v1/echo/a%20b/%C3%A9")
    assert seen["query"] == "x=1&y=%2F&x=2&empty"
    assert seen["body"] == "any \x00 bytes"
    passed = dict(map(tuple, seen["headers"]))
    assert passed["content-type"] == "a/b"
    assert passed["content-length"] == "11"
    assert {name.replace("_", "-"): value for name, value in headers.items()}.items() <= passed.items()
    assert passed["host"] == f"127.0.0.1:{gateway.upstream.port}"


def test_nothing_is_added_to_what_passes_through(gateway: Gateway) -> None:
    reply = asyncio.run(request(gateway.port, "GET", "/v1/echo"))
    names = {name for name, _ in echoed(reply)["headers"]}
    assert names <= {"host", "content-type", "content-length"}
    assert not [name for name, _ in reply.headers if name.startswith(("x-cache", "cache-status", "age"))]


def test_headers_come_as_often_and_with_the_bytes_that_they_were_sent_with(gateway: Gateway) -> None:
    async def main() -> Reply:
        async with await Connection.open(gateway.port) as connection:
            head = "GET /v1/echo HTTP/1.1\r\nhost: x\r\nx-a: 1\r\nx-a: 2\r\nx-b: caf\u00e9\r\n\r\n"
            await connection.send(head.encode())
            return await connection.body(await connection.head())

    headers = echoed(asyncio.run(main()))["headers"]
    assert [value for name, value in headers if name == "x-a"] == ["1", "2"]
    assert [value for name, value in headers if name == "x-b"] == ["caf\u00e9".encode().decode("latin-1")]


def test_hop_by_hop_headers_stay_on_their_hop(gateway: Gateway) -> None:
    reply = asyncio.run(
        request(gateway.port, "GET", "/v1/echo", connection="keep-alive, x-mine", x_mine="1", te="trailers", x_ours="2")
    )
    names = {name for name, _ in echoed(reply)["headers"]}
    assert "x-ours" in names
    assert names.isdisjoint({"x-mine", "te", "keep-alive", "connection"})


def test_an_upload_of_several_parts_passes_byte_for_byte(gateway: Gateway) -> None:
    data = random.Random(1).randbytes(300_000)
    body = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n' + data + b"\r\n--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    seen = echoed(asyncio.run(request(gateway.port, "POST", "/v1/echo/files", body, content_type=kind)))
    assert seen["body"].encode("latin-1") == body
    assert ["content-type", kind] in seen["headers"]


def test_a_chunked_upload_passes_chunked(gateway: Gateway) -> None:
    async def main() -> Reply:
        async with await Connection.open(gateway.port) as connection:
            await connection.send(request_head("POST", "/v1/echo", "transfer-encoding: chunked"))
            for piece in (b"one", b"two"):
                await asyncio.sleep(0.05)
                await connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            await connection.send(b"0\r\n\r\n")
            return await connection.body(await connection.head())

    seen = echoed(asyncio.run(main()))
    assert seen["body"] == "onetwo"
    assert "content-length" not in dict(map(tuple, seen["headers"]))


def test_an_answer_passes_with_its_status_and_headers(gateway: Gateway) -> None:
    reply = asyncio.run(request(gateway.port, "GET", "/v1/none"))
    direct = asyncio.run(request(gateway.upstream.port, "GET", "/v1/none"))
    assert (reply.status, reply.headers, reply.body) == (direct.status, direct.headers, direct.body)


def test_what_is_passed_through_is_never_kept(gateway: Gateway) -> None:
    first = asyncio.run(request(gateway.port, "POST", "/v1/echo", question("kept?")))
    second = asyncio.run(request(gateway.port, "POST", "/v1/echo", question("kept? no")))
    assert first.cache is second.cache is None
    assert first.json["body"] != second.json["body"]
