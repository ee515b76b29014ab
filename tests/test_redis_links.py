"""Connections: TLS, deadlines, and what they do not do."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from fault_proxy import FaultProxy
from redis._parsers import _RESP2Parser
from redis_faces import Face, make_face
from redis_servers import RedisServer, wait_for

from llm_edge_cache.errors import RedisConfigError
from llm_edge_cache.redis_client import Batch, Call, RedisClient, RedisTrouble
from llm_edge_cache.redis_links import LinkMaker, _TimedSocket
from llm_edge_cache.redis_route import Node
from llm_edge_cache.redis_target import parse_redis_url

AMPLE = 10.0  # seconds; the operation timeout where none is to pass, however slow the machine
TIMEOUT = 0.5  # the one of tests in which it passes
PING = Call(("PING",))


class Authority:
    """A certificate authority with files for both sides."""

    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        self.ca_file = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca_file)
        client = self._authority.issue_cert("client@example")
        self.client_file = directory / "client.pem"
        client.private_key_and_cert_chain_pem.write_to_path(self.client_file)

    def server_context(self, host: str = "127.0.0.1", *, asks_for_certificate: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(host).configure_cert(context)
        if asks_for_certificate:
            self._authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def make() -> Iterator[Callable[..., Face]]:
    made: list[Face] = []

    def make_one(kind: str, url: str, **options: Any) -> Face:
        made.append(make_face(kind, url, **{"operation_timeout": AMPLE, **options}))
        return made[-1]

    yield make_one
    for face in made:
        face.close()


both = pytest.mark.parametrize("kind", ["threads", "asyncio"])


def with_options(proxy: FaultProxy, **options: object) -> str:
    return f"{proxy.url}?" + "&".join(f"{name}={quote(str(value))}" for name, value in options.items())


def is_served(face: Face) -> bool:
    with contextlib.suppress(RedisTrouble):
        return bool(face.run(PING) == b"PONG")
    return False


@both
def test_tls_with_a_trusted_certificate(
    kind: str, make: Callable[..., Face], redis_server: RedisServer, authority: Authority
) -> None:
    with FaultProxy(redis_server.address, tls=authority.server_context()) as proxy:
        face = make(kind, with_options(proxy, ssl_ca_certs=authority.ca_file), operation_timeout=AMPLE)
        face.connect()
        value = os.urandom(3 << 20)
        key = f"links-test:{kind}"
        assert face.run(Batch((Call(("SET", key, value)), Call(("GET", key)), Call(("DEL", key))))) == [b"OK", value, 1]
        proxy.cut()
        assert face.run(PING) == b"PONG"
        assert proxy.accepted == 2


@both
@pytest.mark.parametrize(
    ("host", "knows_authority"), [("127.0.0.1", False), ("elsewhere.example", True)], ids=["unknown", "other host"]
)
def test_tls_with_a_certificate_that_does_not_count(
    kind: str, make: Callable[..., Face], authority: Authority, host: str, knows_authority: bool
) -> None:
    judged = {"ssl_ca_certs": authority.ca_file} if knows_authority else {}
    with RedisServer() as server, FaultProxy(server.address, tls=authority.server_context(host)) as proxy:
        with pytest.raises(RedisTrouble, match=r"(?i)certificate.verify.failed") as caught:
            make(kind, with_options(proxy, **judged)).run(PING)
        assert caught.value.reason == "connection"
        unchecked = {"ssl_cert_reqs": "none", **judged}
        any_host = {"ssl_ca_certs": authority.ca_file, "ssl_check_hostname": "false"}
        for options in (unchecked, any_host):
            assert make(kind, with_options(proxy, **options)).run(PING) == b"PONG"


@both
def test_tls_with_a_certificate_of_the_client_s(
    kind: str, make: Callable[..., Face], redis_server: RedisServer, authority: Authority
) -> None:
    context = authority.server_context(asks_for_certificate=True)
    with FaultProxy(redis_server.address, tls=context) as proxy:
        shown = {"ssl_ca_certs": authority.ca_file, "ssl_certfile": authority.client_file}
        assert make(kind, with_options(proxy, **shown)).run(PING) == b"PONG"
        with pytest.raises(RedisTrouble) as caught:
            make(kind, with_options(proxy, ssl_ca_certs=authority.ca_file)).run(PING)
        assert caught.value.is_outage


@both
def test_a_tls_handshake_that_stalls_ends_at_the_deadline(
    kind: str, make: Callable[..., Face], redis_server: RedisServer
) -> None:
    with FaultProxy(redis_server.address) as proxy:
        proxy.blackhole()
        start = time.monotonic()
        with pytest.raises(RedisTrouble) as caught:
            make(kind, proxy.url.replace("redis", "rediss"), operation_timeout=TIMEOUT).run(PING)
        assert caught.value.reason == "timeout"
        assert time.monotonic() - start < 10 * TIMEOUT


@both
def test_tls_to_a_server_that_speaks_none(kind: str, make: Callable[..., Face], redis_server: RedisServer) -> None:
    with pytest.raises(RedisTrouble) as caught:
        make(kind, redis_server.url.replace("redis", "rediss"), operation_timeout=TIMEOUT).run(PING)
    assert caught.value.is_outage


@both
def test_an_answer_over_tls_that_trickles_ends_at_the_deadline(
    kind: str, make: Callable[..., Face], redis_server: RedisServer, authority: Authority
) -> None:
    with FaultProxy(redis_server.address, tls=authority.server_context()) as proxy:
        # A handshake needs more than a command; all of the answer would take 50 s.
        face = make(kind, with_options(proxy, ssl_ca_certs=authority.ca_file), operation_timeout=2.0)
        wait_for(lambda: is_served(face), "it is connected")
        proxy.trickle(20)
        start = time.monotonic()
        with pytest.raises(RedisTrouble) as caught:
            face.run(Call(("ECHO", b"x" * 1000)))
        assert caught.value.reason == "timeout"
        assert time.monotonic() - start < 20
        proxy.pass_on()
        wait_for(lambda: is_served(face), "it is served again")


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile"])
def test_a_file_that_cannot_be_used_is_a_clear_error(option: str, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for path in (nonsense, tmp_path / "absent.pem"):
        with pytest.raises(RedisConfigError, match=path.name):
            RedisClient(parse_redis_url(f"rediss://localhost?{option}={path}"))


@both
def test_a_receiver_that_takes_nothing_ends_sending_at_the_deadline(kind: str, make: Callable[..., Face]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(10)
        face = make(kind, f"redis://127.0.0.1:{silent.getsockname()[1]}", operation_timeout=2.0)
        size = 32 << 20
        start = time.monotonic()
        with pytest.raises(RedisTrouble) as caught:
            face.run(Call(("SET", "k", b"x" * size)))
        assert caught.value.reason == "timeout"
        assert time.monotonic() - start < 20
        received = 0
        with silent.accept()[0] as peer, contextlib.suppress(ConnectionResetError):
            while data := peer.recv(1 << 20):
                received += len(data)
        assert received < size  # what was not sent by then was thrown away with the connection


class SlowClock(socket.socket):
    """A socket that never has anything and notes how long it was told to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts: list[float] = []

    def settimeout(self, timeout: float | None) -> None:
        self.timeouts.append(timeout or 0.0)

    def recv(self, *_: Any) -> bytes:
        return b"x"


def test_a_socket_never_waits_much_longer_than_what_is_left() -> None:
    link = LinkMaker(parse_redis_url("redis://localhost")).make(Node("localhost", 1))
    with SlowClock() as raw:
        timed = _TimedSocket(raw, link)
        for left in (1000.0, 999.0, 900.0, 100.0, 50.0, 1000.0):
            link.deadline = time.monotonic() + left
            timed.recv(1)
            assert left * 0.9 < raw.timeouts[-1] < left * 1.1
        assert len(raw.timeouts) == 5  # 999 s were near enough to 1000 s


def test_redis_py_s_own_parser_looks_for_what_arrived_without_waiting() -> None:
    with RedisServer() as server:
        maker = LinkMaker(parse_redis_url(server.url))
        link = maker.make(Node(*server.address))
        link.set_parser(_RESP2Parser)
        ping = maker.pack([("PING",)])
        for _ in range(2):
            assert link.exchange(ping, 1, time.monotonic() + 60) == [b"PONG"]
            start = time.monotonic()
            assert link.is_sound()
            assert time.monotonic() - start < 30
        server.kill()
        assert not link.is_sound()
        link.disconnect()


def test_a_link_s_repr_shows_no_password() -> None:
    maker = LinkMaker(parse_redis_url("redis://user:secret@localhost"))
    for link in (maker.make(Node("localhost", 1)), maker.make_async(Node("localhost", 1))):
        assert "secret" not in repr(link)
