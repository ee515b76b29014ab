"""Every form of a Redis URL, and that no error or repr gives a password away."""

from __future__ import annotations

import traceback

import pytest

from llm_edge_cache.errors import RedisConfigError
from llm_edge_cache.redis_target import RedisTarget, TlsOptions, parse_redis_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", RedisTarget("single", (("localhost", 6379),))),
        ("redis://cache", RedisTarget("single", (("cache", 6379),))),
        ("REDIS://cache:7", RedisTarget("single", (("cache", 7),))),
        ("redis://cache:7/3", RedisTarget("single", (("cache", 7),), db=3)),
        ("redis://cache:7/?db=3", RedisTarget("single", (("cache", 7),), db=3)),
        ("redis://[::1]:7/1", RedisTarget("single", (("::1", 7),), db=1)),
        ("redis://[fe80::2]", RedisTarget("single", (("fe80::2", 6379),))),
        ("redis://user:pass@cache", RedisTarget("single", (("cache", 6379),), username="user", password="pass")),
        ("redis://:pa%40s%2Fs:+@cache", RedisTarget("single", (("cache", 6379),), password="pa@s/s:+")),
        ("redis://:%C3%A9@cache", RedisTarget("single", (("cache", 6379),), password="é")),
        ("rediss://cache", RedisTarget("single", (("cache", 6379),), tls=True)),
        ("unix:///run/redis.sock", RedisTarget("single", unix_path="/run/redis.sock")),
        ("unix://:pw@/a%20b?db=2", RedisTarget("single", unix_path="/a b", password="pw", db=2)),
        (
            "redis+sentinel://:pw@a:1,[::1]:2,c/main/4?sentinel_username=su&sentinel_password=sp",
            RedisTarget(
                "sentinel",
                (("a", 1), ("::1", 2), ("c", 26379)),
                password="pw",
                db=4,
                service="main",
                sentinel_username="su",
                sentinel_password="sp",
            ),
        ),
        ("rediss+sentinel://a/main", RedisTarget("sentinel", (("a", 26379),), service="main", tls=True)),
        ("redis+cluster://u:p@a:1,b", RedisTarget("cluster", (("a", 1), ("b", 6379)), username="u", password="p")),
        ("rediss+cluster://a", RedisTarget("cluster", (("a", 6379),), tls=True)),
    ],
)
def test_a_url_is_read(url: str, expected: RedisTarget) -> None:
    assert parse_redis_url(url) == expected


def test_tls_options_are_read() -> None:
    url = "rediss://cache?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem&ssl_check_hostname=false"
    expected = TlsOptions(ca_certs="/ca.pem", certfile="/c.pem", keyfile="/k.pem", check_hostname=False)
    assert parse_redis_url(url).tls_options == expected


def test_who_checks_no_certificate_checks_no_host_name() -> None:
    options = parse_redis_url("rediss://cache?ssl_cert_reqs=none").tls_options
    assert options == TlsOptions(cert_reqs="none", check_hostname=False)


@pytest.mark.parametrize(
    ("url", "complaint", "remedy"),
    [
        ("http://cache", "scheme is unknown ('http')", "redis+sentinel://"),
        ("cache:6379", "scheme is unknown ('cache:6379')", "redis://"),
        ("", "scheme is unknown", "redis://"),
        ("redis://cache:x", "a port is not a number ('x')", "1 to 65535"),
        ("redis://cache:0", "a port is not a number ('0')", "1 to 65535"),
        ("redis://cache:70000", "a port is not a number ('70000')", "1 to 65535"),
        ("redis://:7", "a host is missing", "host:port"),
        ("redis://[::1", "a host is missing or malformed ('[::1')", "[IPv6]:port"),
        ("redis://a,b", "several hosts ('a,b')", "redis+cluster://"),
        ("redis://cache/x", "database is not one number ('x')", "0 or more"),
        ("redis://cache/-1", "database is not one number ('-1')", "0 or more"),
        ("redis://cache/1/2", "database is not one number ('1/2')", "0 or more"),
        ("redis://cache/1?db=1", "database is not one number ('1/1')", "once"),
        ("redis://cache?timeout=1", "option is unknown", "allowed: db"),
        ("redis://cache?ssl_ca_certs=/x", "option is unknown", "allowed: db"),
        ("redis://cache?db=1&db=2", "given twice", "allowed: db"),
        ("redis://cache#1", "'#'", "%23"),
        ("unix://", "path is missing", "unix:///absolute/path"),
        ("unix://run/redis.sock", "path is missing", "unix:///absolute/path"),
        ("redis+sentinel://a", "master's name is missing", "/service"),
        ("redis+sentinel://a,/main", "a host is missing", "host:port"),
        ("redis+cluster://a/1", "no path ('/1')", "leave the path out"),
        ("redis+cluster://a?db=1", "option is unknown", "allowed: none"),
        ("rediss://cache?ssl_cert_reqs=maybe", "ssl_cert_reqs is not known ('maybe')", "none, optional or required"),
        ("rediss://cache?ssl_check_hostname=maybe", "ssl_check_hostname is not known ('maybe')", "true or false"),
        ("rediss://cache?ssl_keyfile=/k", "no certificate", "ssl_certfile"),
    ],
)
def test_a_bad_url_is_told_apart(url: str, complaint: str, remedy: str) -> None:
    with pytest.raises(RedisConfigError) as caught:
        parse_redis_url(url)
    assert complaint in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:sec/ret@cache",
        "redis://user:sec?ret@cache",
        "redis://user:sec#ret@cache",
        "redis://user:sec@ret@cache:x",
        "redis://user:secret@cache:x",
        "redis://user:secret@cache/x",
        "redis://user:secret@cache?secret=1",
        "redis://user:%ffsecret@cache",
        "secret://user:secret@cache",
        "redis:secret@cache",
        "redis+sentinel://a:x/main?sentinel_password=secret",
        "redis+sentinel://a/main?sentinel_password=secret&sentinel_password=secret",
    ],
)
def test_no_error_shows_a_part_of_the_password(url: str) -> None:
    with pytest.raises(RedisConfigError) as caught:
        parse_redis_url(url)
    error = caught.value
    shown = "".join(traceback.format_exception(type(error), error, None)) + repr(error) + str(error.args)
    assert "sec" not in shown.replace("several", "")
    assert "ret" not in shown
    assert error.__context__ is None


def test_a_target_does_not_show_its_passwords() -> None:
    target = parse_redis_url("redis+sentinel://user:secret@a/main?sentinel_password=hidden")
    for shown in (repr(target), str(target), target.where):
        assert "secret" not in shown
        assert "hidden" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://[::1]:7/1",
        "rediss://cache:6379/0",
        "unix:///run/redis.sock",
        "redis+sentinel://a:1,b:2/main/3",
        "rediss+cluster://a:1,b:2",
    ],
)
def test_where_is_the_url_without_credentials(url: str) -> None:
    assert parse_redis_url(url).where == url


def test_what_is_no_str_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        parse_redis_url(b"redis://cache")  # type: ignore[arg-type]
