"""The operator's calls: who may make them, what they want, and what they make void, in both tiers and on all hosts."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn.config
from gateway_servers import (
    APPLICATION,
    CHAT,
    UVICORN,
    Connection,
    Gateway,
    Reply,
    ask,
    connections_by_worker,
    question,
    request,
    run_hosts,
)
from redis_servers import RedisServer
from worker_servers import Server, wait_until

from llm_edge_cache import SharedSlab
from llm_edge_cache.cli import serve
from llm_edge_cache.errors import SettingsError
from llm_edge_cache.gateway.access import admin_denial, page_denial
from llm_edge_cache.gateway.config import CONFIG_VARIABLE, GatewayConfig
from llm_edge_cache.gateway.stand_in import StandInSettings
from llm_edge_cache.gateway.stand_in_faults import Plan

TOKEN = "c0rrect-horse/battery+staple"
DIFFERENT = StandInSettings(answers="different", words=4, first_delay=0.0, word_delay=0.0)
PACED = StandInSettings(answers="different", words=20, first_delay=0.2, word_delay=0.1, jitter=0.0)
TEAM = {"x_portkey_cache_namespace": "team-a"}
PATHS = ["/dashboard", "/admin/stats", "/admin/delete", "/admin/clear"]


def call(gateway: Gateway, method: str, path: str, body: object = b"", **headers: str) -> Reply:
    return asyncio.run(request(gateway.port, method, path, body, **{"host": f"127.0.0.1:{gateway.port}", **headers}))


def void(gateway: Gateway, path: str, body: object, **headers: str) -> Any:
    reply = call(gateway, "POST", path, body, **headers)
    assert reply.status == 200, reply
    return reply.json


def answer(gateway: Gateway, text: str, *, stream: bool = False, **headers: str) -> Reply:
    reply = asyncio.run(ask(gateway.port, CHAT, question(text, stream=stream), **headers))
    assert reply.status == 200, reply
    return reply


def message_of(reply: Reply) -> str:
    return str(reply.json["error"]["message"])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with an admin token."""
    with run_hosts(tmp_path_factory.mktemp("guarded"), DIFFERENT, admin_token=TOKEN) as (gateway,):
        yield gateway


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[list[Gateway]]:
    """Two hosts with one Redis."""
    with run_hosts(
        tmp_path_factory.mktemp("pair"), DIFFERENT, hosts=2, redis_url=redis_server.url, workers=2
    ) as gateways:
        yield gateways


# ---- figures ----


def test_the_figures_are_the_whole_host_s_from_any_worker(gateway: Gateway) -> None:
    async def main() -> list[Any]:
        async with connections_by_worker(gateway) as found:
            for number, (connection,) in enumerate(found.values()):
                await connection.ask(CHAT, question(f"counted {number}"))
            stats = []
            for (connection,) in found.values():
                head = f"GET /admin/stats HTTP/1.1\r\nhost: localhost:{gateway.port}\r\n\r\n".encode()
                await connection.send(head)
                stats.append((await connection.body(await connection.head())).json)
            return stats

    stats = asyncio.run(main())
    assert len({one["worker"] for one in stats}) == gateway.workers
    assert stats[0]["name"] == gateway.name
    for one in stats:
        assert one["counters"]["computations"] >= gateway.workers
        assert sum(one["histograms"]["compute"][:-1]) >= gateway.workers
        assert len(one["bounds"]) + 2 == len(one["histograms"]["l1"])
        assert set(gateway.worker_pids()) <= {worker["pid"] for worker in one["workers"]}
        assert 0 < one["l1"]["used_bytes"] <= one["l1"]["memory_bytes"]
        assert one["l2"] is None
    assert stats[0]["counters"]["l1_misses"] <= stats[-1]["counters"]["l1_misses"]


def test_hot_keys_are_hashes_and_come_in_pieces(gateway: Gateway) -> None:
    key = answer(gateway, "a hot one").get("x-cache-key")
    for _ in range(5):
        assert answer(gateway, "a hot one").cache == "HIT"
    with SharedSlab.attach(gateway.name) as slab:
        slab.set(b"a name that somebody gave", b"x")
    found: dict[str, int] = {}
    cursor, pieces = "0", 0
    while cursor != str((1 << 64) - 1):
        keys = call(gateway, "GET", f"/admin/stats?cursor={cursor}").json["keys"]
        assert int(keys["next"]) > int(cursor)
        found.update(keys["found"])
        cursor, pieces = keys["next"], pieces + 1
    assert found[str(key)] >= 2
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in found)


@pytest.mark.parametrize("cursor", ["-1", "x", "1e3", "٣", str(1 << 64), "9" * 1000])
def test_a_cursor_that_is_none_is_refused(cursor: str, gateway: Gateway) -> None:
    reply = call(gateway, "GET", f"/admin/stats?cursor={urllib.parse.quote(cursor)}")
    assert (reply.status, "keys.next" in message_of(reply)) == (
        (200, True) if not cursor else (400, True)
    ) or not cursor


@pytest.mark.parametrize("cursor", [1, 1 << 32, (1 << 64) - 2, (1 << 64) - 1])
def test_any_cursor_of_64_bits_is_harmless(cursor: int, gateway: Gateway) -> None:
    assert call(gateway, "GET", f"/admin/stats?cursor={cursor}").status == 200


def test_failing_calls_of_the_upstream_are_counted(gateway: Gateway) -> None:
    body = question("this one fails")
    gateway.plan(CHAT, body, Plan(503, ((b"content-type", b"application/json"),), (b'{"error": {"message": "no"}}',)))
    before = call(gateway, "GET", "/admin/stats").json["counters"]["compute_errors"]
    assert asyncio.run(ask(gateway.port, CHAT, body)).status == 503
    assert call(gateway, "GET", "/admin/stats").json["counters"]["compute_errors"] >= before + 1


def test_the_page_is_one_answer_with_a_strict_policy(gateway: Gateway) -> None:
    reply = call(gateway, "GET", "/dashboard")
    page, policy = reply.body.decode(), reply.get("content-security-policy") or ""
    assert reply.status == 200
    assert reply.get("content-type") == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}';", policy)
    assert not re.search(r"(?:src|href)=\"(?!data:,\")", page)
    assert "http://www.w3.org/2000/svg" in page
    assert len(re.findall("https?://", page)) == 1
    assert (reply.get("cache-control"), reply.get("referrer-policy")) == ("no-store", "no-referrer")


def test_head_is_get_without_a_body(gateway: Gateway) -> None:
    for path in ("/dashboard", "/admin/stats"):
        reply = call(gateway, "HEAD", path)
        assert (reply.status, reply.body) == (200, b"")


# ---- what is asked ----


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/dashboard"), ("POST", "/admin/stats"), ("GET", "/admin/delete"), ("DELETE", "/admin/delete"),
     ("GET", "/admin/clear"), ("PUT", "/admin/clear")],
)  # fmt: skip
def test_a_wrong_method_is_told_the_right_one(method: str, path: str, gateway: Gateway) -> None:
    reply = call(gateway, method, path, {"confirm": "clear"})
    assert reply.status == 405
    assert reply.get("allow") == ("POST" if path in ("/admin/delete", "/admin/clear") else "GET, HEAD")


def test_other_admin_paths_are_not_there(gateway: Gateway) -> None:
    assert [call(gateway, "GET", path).status for path in ("/admin", "/admin/", "/admin/other", "/dashboard/")] == [
        404
    ] * 4


BAD = [
    ({}, "send one of"),
    ({"key": "0" * 64, "tag": "t"}, "send one of"),
    ({"everything": "x"}, "send one of"),
    ({"key": "0" * 63}, "64 hexadecimal digits"),
    ({"key": "A" * 64}, "64 hexadecimal digits"),
    ({"tag": ""}, "1 to 1024 characters"),
    ({"namespace": "n" * 1025}, "1 to 1024 characters"),
    ({"tag": 1}, "one JSON object"),
    (["key"], "one JSON object"),
    (b"{", "one JSON object"),
    (b"", "one JSON object"),
    (b'{"tag": "\\ud800-----"}', "one JSON object"),
    (b'{"tag": "\xff"}', "one JSON object"),
]


@pytest.mark.parametrize(("body", "said"), BAD)
def test_a_deletion_that_names_nothing_is_refused(body: object, said: str, gateway: Gateway) -> None:
    reply = call(gateway, "POST", "/admin/delete", body)
    assert reply.status == 400
    assert said in message_of(reply)


@pytest.mark.parametrize("body", [{}, {"confirm": "yes"}, {"confirm": "clear", "more": "x"}, {"key": "0" * 64}])
def test_clear_wants_to_be_confirmed(body: object, gateway: Gateway) -> None:
    kept = answer(gateway, "kept")
    reply = call(gateway, "POST", "/admin/clear", body)
    assert reply.status == 400
    assert '{"confirm": "clear"}' in message_of(reply)
    assert answer(gateway, "kept").body == kept.body


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_could_send_is_refused(kind: str, gateway: Gateway) -> None:
    reply = call(gateway, "POST", "/admin/clear", {"confirm": "clear"}, content_type=kind)
    assert reply.status == 415
    assert "application/json" in message_of(reply)


def test_a_large_body_is_refused(gateway: Gateway) -> None:
    assert call(gateway, "POST", "/admin/delete", {"tag": "t" * 20_000}).status == 413


# ---- who may ----


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost", "LOCALHOST:{port}", "a.localhost", "[::1]:{port}"])
def test_this_host_may_ask_as_itself(host: str, gateway: Gateway) -> None:
    assert call(gateway, "GET", "/admin/stats", host=host.format(port=gateway.port)).status == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.1", "127.0.0.1.evil.example", "[", ""]
)
def test_a_name_that_was_bent_to_this_host_is_refused(host: str, path: str, gateway: Gateway) -> None:
    method = "POST" if path in ("/admin/delete", "/admin/clear") else "GET"
    reply = call(gateway, method, path, {"confirm": "clear"}, host=host)
    assert reply.status == 403
    assert "localhost" in message_of(reply)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded", "x-real-ip", "via"])
def test_a_proxy_on_this_host_speaks_for_strangers(name: str, path: str, gateway: Gateway) -> None:
    method = "POST" if path in ("/admin/delete", "/admin/clear") else "GET"
    reply = call(gateway, method, path, {"confirm": "clear"}, **{name: "127.0.0.1"})
    assert reply.status == 403
    assert "LLM_EDGE_CACHE_ADMIN_TOKEN" in message_of(reply)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_from_elsewhere_are_refused(site: str, gateway: Gateway) -> None:
    assert call(gateway, "GET", "/admin/stats", sec_fetch_site=site).status == 403
    assert call(gateway, "POST", "/admin/clear", {"confirm": "clear"}, sec_fetch_site=site).status == 403
    assert call(gateway, "GET", "/admin/stats", sec_fetch_site="same-origin").status == 200
    assert call(gateway, "GET", "/dashboard", sec_fetch_site=site).status == 200  # a link leads to it


def own_address() -> str | None:
    """An address of this machine beside the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return None
        address = str(probe.getsockname()[0])
        return None if address.startswith("127.") else address


@pytest.mark.skipif(own_address() is None, reason="this machine has no address but the loopback's")
def test_elsewhere_is_told_that_it_needs_a_token(tmp_path: Path) -> None:
    async def main(gateway: Gateway, method: str, path: str, **headers: str) -> Reply:
        async with Connection(*await asyncio.open_connection(own_address(), gateway.port)) as connection:
            lines = {"host": "localhost", "content-type": "application/json", "content-length": "20", **headers}
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
            await connection.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + b'{"confirm": "clear"}')
            return await connection.body(await connection.head())

    with run_hosts(tmp_path, DIFFERENT, options=("--host", "0.0.0.0")) as (gateway,):
        for path in PATHS:
            method = "POST" if path in ("/admin/delete", "/admin/clear") else "GET"
            reply = asyncio.run(main(gateway, method, path))
            assert reply.status == 403
            assert "LLM_EDGE_CACHE_ADMIN_TOKEN" in message_of(reply)
    with run_hosts(tmp_path, DIFFERENT, options=("--host", "0.0.0.0"), admin_token=TOKEN) as (gateway,):
        assert asyncio.run(main(gateway, "GET", "/admin/stats")).status == 401
        reply = asyncio.run(main(gateway, "GET", "/admin/stats", authorization=f"Bearer {TOKEN}", host="cache.example"))
        assert reply.status == 200


def test_a_unix_socket_is_this_host(tmp_path: Path) -> None:

    name, place = f"test-{secrets.token_hex(6)}", tmp_path / "socket"
    upstream = "http://127.0.0.1:9"
    arguments = [*UVICORN[:3], "--uds", str(place), APPLICATION]
    server = Server(arguments, {CONFIG_VARIABLE: json.dumps({"upstream": upstream, "name": name})}, tmp_path / "log")

    async def main() -> tuple[Reply, Reply]:
        replies = []
        for host in ("localhost", "evil.example"):
            async with Connection(*await asyncio.open_unix_connection(str(place))) as connection:
                await connection.send(f"GET /admin/stats HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
                replies.append(await connection.body(await connection.head()))
        return replies[0], replies[1]

    def can_connect() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return place.exists() and probe.connect_ex(str(place)) == 0

    try:
        wait_until(can_connect, "the server")
        local, bent = asyncio.run(main())
        assert (local.status, bent.status) == (200, 403)
    finally:
        server.end_all()
        if SharedSlab.exists(name):
            SharedSlab.attach(name).unlink()


def scope_of(client: object, server: object, **headers: str) -> dict[str, Any]:
    given = [
        (name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()
    ]
    return {"client": client, "server": server, "headers": given}


HERE, SERVER = ("127.0.0.1", 1234), ("127.0.0.1", 8080)


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        (scope_of(HERE, SERVER), None),
        (scope_of(("127.8.9.10", 1), SERVER), None),
        (scope_of(("::1", 1), ("::1", 8080)), None),
        (scope_of(("::ffff:127.0.0.1", 1), ("::", 8080)), None),
        (scope_of(None, None), None),
        (scope_of(None, ("/run/socket", None)), None),
        (scope_of(("10.0.0.1", 1), SERVER), 403),
        (scope_of(("::ffff:10.0.0.1", 1), SERVER), 403),
        (scope_of(("localhost", 1), SERVER), 403),
        (scope_of(("", 0), SERVER), 403),
        # 1 it sends a request and resets the connection  2 the server, which comes to it late, knows no peer any more
        (scope_of(None, SERVER), 403),
        (scope_of(HERE, SERVER, x_forwarded_for="10.0.0.1"), 403),
    ],
)
def test_who_is_of_this_host(scope: dict[str, Any], status: int | None) -> None:
    for judge in (page_denial, admin_denial):
        denial = judge(scope, None)
        assert (None if denial is None else denial.status) == status


def test_with_a_token_it_is_wanted_from_everyone(guarded: Gateway) -> None:
    wrong = (None, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, "Bearer ", "Bearer caf\xe9")
    for headers in ({} if given is None else {"authorization": given} for given in wrong):
        for method, path in (("GET", "/admin/stats"), ("POST", "/admin/delete"), ("POST", "/admin/clear")):
            reply = call(guarded, method, path, {"confirm": "clear"}, **headers)
            assert (reply.status, reply.get("www-authenticate")) == (401, "Bearer")
            assert TOKEN not in reply.body.decode()
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert (
        call(guarded, "GET", "/admin/stats", host="cache.example", x_forwarded_for="10.0.0.1", **bearer).status == 200
    )
    assert void(guarded, "/admin/clear", {"confirm": "clear"}, **bearer)["void"] == {"all": ""}


def test_the_page_itself_is_there_to_ask_for_the_token(guarded: Gateway) -> None:
    reply = call(guarded, "GET", "/dashboard", host="cache.example")
    assert reply.status == 200
    assert TOKEN not in reply.body.decode()


def test_a_token_in_the_address_is_none(guarded: Gateway) -> None:
    assert call(guarded, "GET", f"/admin/stats?token={TOKEN}").status == 401


@pytest.mark.parametrize("token", ["", "two words", "caf\xe9", "line\nfeed"])
@pytest.mark.parametrize("field", ["admin_token", "metrics_token"])
def test_a_token_that_no_header_can_carry_is_refused(field: str, token: str) -> None:
    with pytest.raises(SettingsError, match=field) as raised:
        GatewayConfig(upstream="http://localhost:1", **{field: token})
    assert not token or token not in str(raised.value)


def test_a_configuration_shows_no_token() -> None:
    config = GatewayConfig(upstream="http://localhost:1", admin_token="sesame-1", metrics_token="sesame-2")
    assert "sesame" not in repr(config)
    assert "upstream='http://localhost:1'" in repr(config)


def test_serve_takes_the_token_of_its_option_before_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    serve.add_parsers(parser.add_subparsers())

    def token_of(*arguments: str) -> str | None:
        return serve._config_of(
            parser.parse_args(["serve", "--upstream", "http://localhost:1", *arguments])
        ).admin_token

    monkeypatch.delenv("LLM_EDGE_CACHE_ADMIN_TOKEN", raising=False)
    assert (token_of(), token_of("--admin-token", "one")) == (None, "one")
    monkeypatch.setenv("LLM_EDGE_CACHE_ADMIN_TOKEN", "two")
    assert (token_of(), token_of("--admin-token", "one")) == ("two", "one")
    with pytest.raises(SettingsError):
        token_of("--admin-token", "")


# ---- what becomes void ----


def test_delete_by_key(gateway: Gateway) -> None:
    gateway.upstream.provider.settings = DIFFERENT
    other, first = answer(gateway, "left alone"), answer(gateway, "deleted by its key")
    key = first.get("x-cache-key")
    assert void(gateway, "/admin/delete", {"key": key}) == {"void": {"key": key}, "redis": None}
    again = answer(gateway, "deleted by its key")
    assert (again.cache, again.get("x-cache-key")) == ("MISS", key)
    assert again.body != first.body
    assert answer(gateway, "left alone").body == other.body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_delete_by_namespace(stream: bool, gateway: Gateway) -> None:
    gateway.upstream.provider.settings = DIFFERENT
    text = f"in a namespace {stream}"
    plain, theirs = answer(gateway, text, stream=stream), answer(gateway, text, stream=stream, **TEAM)
    assert answer(gateway, text, stream=stream, **TEAM).body == theirs.body
    assert void(gateway, "/admin/delete", {"namespace": "team-a"})["void"] == {"namespace": "team-a"}
    again = answer(gateway, text, stream=stream, **TEAM)
    assert again.cache == "MISS"
    assert again.body != theirs.body
    assert answer(gateway, text, stream=stream, **TEAM).body == again.body
    assert answer(gateway, text, stream=stream).body == plain.body


def test_a_namespace_is_the_same_in_a_header_a_body_and_an_operator_s_call(gateway: Gateway) -> None:
    gateway.upstream.provider.settings = DIFFERENT
    name = "\u00e9quipe"
    body = question("spelt", cache={"namespace": name})
    by_body = asyncio.run(ask(gateway.port, CHAT, body))
    by_header = answer(gateway, "spelt", x_portkey_cache_namespace=name)
    assert by_header.body == by_body.body
    void(gateway, "/admin/delete", {"namespace": name})
    assert asyncio.run(ask(gateway.port, CHAT, body)).body != by_body.body


def test_delete_by_a_caller_s_tag(gateway: Gateway) -> None:
    gateway.upstream.provider.settings = DIFFERENT
    tagged = answer(gateway, "tagged", x_cache_tags="geography, europe,, geography ,")
    other = answer(gateway, "tagged otherwise", x_cache_tags="history")
    assert answer(gateway, "tagged").body == tagged.body  # tags are no part of the key
    void(gateway, "/admin/delete", {"tag": "europe"})
    assert answer(gateway, "tagged", x_cache_tags="europe").body != tagged.body
    assert answer(gateway, "tagged otherwise").body == other.body


@pytest.mark.parametrize(
    "tags", [",".join(f"t{number}" for number in range(17)), "t" * 129, "caf\u00e9", "a\tb", "ok, namespace:team-a"]
)
def test_tags_that_are_none_are_refused(tags: str, gateway: Gateway) -> None:
    reply = asyncio.run(ask(gateway.port, CHAT, question("badly tagged"), x_cache_tags=tags))
    assert reply.status == 400
    assert "at most 16 tags" in message_of(reply)


def test_as_many_and_as_long_tags_as_are_allowed(gateway: Gateway) -> None:
    gateway.upstream.provider.settings = DIFFERENT
    tags = [f"{number:x}".ljust(128, "t") for number in range(16)]
    first = answer(gateway, "well tagged", x_cache_tags=",".join(tags))
    void(gateway, "/admin/delete", {"tag": tags[-1]})
    assert answer(gateway, "well tagged").body != first.body


def test_clear(gateway: Gateway) -> None:
    gateway.upstream.provider.settings = DIFFERENT
    first = answer(gateway, "before the clearing")
    assert void(gateway, "/admin/clear", {"confirm": "clear"})["void"] == {"all": ""}
    assert answer(gateway, "before the clearing").body != first.body


VOIDS = {
    "key": lambda key: ("/admin/delete", {"key": key}),
    "tag": lambda _: ("/admin/delete", {"tag": "far"}),
    "namespace": lambda _: ("/admin/delete", {"namespace": "team-b"}),
    "all": lambda _: ("/admin/clear", {"confirm": "clear"}),
}


def writes(gateway: Gateway) -> int:
    return int(call(gateway, "GET", "/admin/stats").json["counters"]["l2_writes"])


@pytest.mark.parametrize("kind", VOIDS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_it_reaches_redis_and_the_other_host(stream: bool, kind: str, pair: list[Gateway]) -> None:
    here, there = pair
    headers = {"x_cache_tags": "far", "x_portkey_cache_namespace": "team-b"}
    text = f"on both hosts {kind} {stream}"
    before = writes(here)
    first = answer(here, text, stream=stream, **headers)
    key = str(first.get("x-cache-key"))
    wait_until(lambda: writes(here) > before, "the answer in Redis")
    assert answer(there, text, stream=stream, **headers).body == first.body
    path, body = VOIDS[kind](key)
    assert void(here, path, body)["redis"] == "void"
    assert answer(here, text, stream=stream, **headers).body != first.body
    wait_until(lambda: answer(there, text, stream=stream, **headers).body != first.body, "the other host hears of it")


def test_while_redis_is_away_it_is_told_later(tmp_path: Path) -> None:
    with RedisServer() as redis, run_hosts(tmp_path, DIFFERENT, redis_url=redis.url) as (gateway,):
        answer(gateway, "stored before", **TEAM)
        redis.stop()
        assert void(gateway, "/admin/delete", {"namespace": "team-a"})["redis"] == "later"
        assert answer(gateway, "stored before", **TEAM).cache == "MISS"


@pytest.mark.parametrize("kind", VOIDS)
def test_who_asks_after_it_is_not_given_an_answer_that_began_before(kind: str, gateway: Gateway) -> None:
    gateway.upstream.provider.settings = PACED
    headers = {"x_cache_tags": "far", "x_portkey_cache_namespace": "team-b"}
    body = question(f"begun before {kind}", stream=True)

    async def main() -> tuple[Reply, list[Reply]]:
        async with connections_by_worker(gateway) as found:
            (first,), *others = found.values()
            calls = gateway.calls_of(CHAT, body)
            asking = asyncio.create_task(first.ask(CHAT, body, **headers))
            while gateway.calls_of(CHAT, body) == calls:
                await asyncio.sleep(0.01)
            path, what = VOIDS[kind](key)
            reply = await request(gateway.port, "POST", path, what, host="localhost")
            assert reply.status == 200, reply
            later = await asyncio.gather(*(other.ask(CHAT, body, **headers) for (other,) in others))
            return await asking, later

    # The key does not depend on the time: it is learnt from an answer that is deleted again.
    gateway.upstream.provider.settings = DIFFERENT
    key = asyncio.run(ask(gateway.port, CHAT, body, **headers)).get("x-cache-key")
    void(gateway, "/admin/delete", {"key": key})
    gateway.upstream.provider.settings = PACED
    old, later = asyncio.run(main())
    assert old.is_whole
    assert all(reply.is_whole and reply.status == 200 for reply in later)
    assert old.body not in {reply.body for reply in later}
    assert answer(gateway, f"begun before {kind}", stream=True, **headers).body != old.body


# ---- what is logged ----


def test_serve_logs_what_was_made_void_and_no_secret(tmp_path: Path) -> None:

    logging = tmp_path / "logging.json"
    logging.write_text(json.dumps(serve._log_config(uvicorn.config.LOGGING_CONFIG)))
    with run_hosts(tmp_path, DIFFERENT, admin_token=TOKEN, options=("--log-config", str(logging))) as (gateway,):
        bearer = {"authorization": f"Bearer {TOKEN}"}
        key = str(answer(gateway, "a secret question", authorization="Bearer sk-secret").get("x-cache-key"))
        void(gateway, "/admin/delete", {"key": key}, **bearer)
        void(gateway, "/admin/delete", {"tag": "line\nfeed"}, **bearer)
        void(gateway, "/admin/delete", {"namespace": "team-a"}, **bearer)
        void(gateway, "/admin/clear", {"confirm": "clear"}, **bearer)
        call(gateway, "POST", "/admin/clear", {"confirm": "clear"}, authorization="Bearer wrong-secret")
        lines = [line for line in gateway.server.log.splitlines() if "llm_edge_cache.admin" in line]
        log = gateway.server.log
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"key '{key[:16]}' was made void for 127.0.0.1",
        "tag 'line\\nfeed' was made void for 127.0.0.1",
        "namespace 'team-a' was made void for 127.0.0.1",
        "all '' was made void for 127.0.0.1",
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in lines)
    for secret in (TOKEN, "secret", key):
        assert secret not in log
