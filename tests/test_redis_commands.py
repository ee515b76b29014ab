"""What each error of Redis or of the wire means, and that nothing of its text is handed on but the code."""

from __future__ import annotations

import hashlib

import pytest
from redis import exceptions
from redis._parsers.base import BaseParser

from llm_edge_cache.errors import CacheError
from llm_edge_cache.redis_commands import LuaScript, RedisTrouble, link_trouble, reply_trouble


@pytest.mark.parametrize(
    ("text", "reason", "is_outage"),
    [
        ("NOAUTH Authentication required.", "auth", True),
        ("WRONGPASS invalid username-password pair or user is disabled.", "auth", True),
        ("NOPERM this user has no permissions to run the 'set' command", "auth", False),
        ("ERR Client sent AUTH, but no password is set", "auth", True),
        ("ERR invalid password", "auth", True),
        ("LOADING Redis is loading the dataset in memory", "loading", True),
        ("BUSY Redis is busy running a script.", "loading", True),
        ("MASTERDOWN Link with MASTER is down", "loading", True),
        ("CLUSTERDOWN The cluster is down", "cluster", True),
        ("MOVED 7 host:7", "cluster", True),
        ("ASK 7 host:7", "cluster", True),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "cluster", True),
        ("ERR max number of clients reached", "connection", True),
        ("OOM command not allowed when used memory > 'maxmemory'.", "oom", False),
        ("ERR Error running script (call to f_0): @user_script:1: -OOM command not allowed", "oom", False),
        ("READONLY You can't write against a read only replica.", "readonly", False),
        ("ERR Error running script (call to f_0): @user_script:1: -READONLY You can't write", "readonly", False),
        ("MISCONF Redis is configured to save RDB snapshots", "response", False),
        ("NOREPLICAS Not enough good replicas to write.", "response", False),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "response", False),
        ("NOSCRIPT No matching script.", "response", False),
        ("ERR unknown command 'secret'", "response", False),
        ("", "response", False),
        ("secret", "response", False),
    ],
)
def test_an_error_reply_has_its_reason(text: str, reason: str, is_outage: bool) -> None:
    error = BaseParser.parse_error(text)
    trouble = (
        link_trouble(error, "here") if isinstance(error, exceptions.ConnectionError) else reply_trouble(error, "here")
    )
    assert (trouble.reason, trouble.is_outage) == (reason, is_outage)
    assert "secret" not in str(trouble)
    assert "here" in str(trouble)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (exceptions.TimeoutError("x"), "timeout"),
        (TimeoutError("x"), "timeout"),
        (exceptions.ConnectionError("Connection refused."), "connection"),
        (exceptions.InvalidResponse("Protocol Error: b'secret'"), "connection"),
        (UnicodeDecodeError("utf-8", b"secret", 0, 1, "secret"), "connection"),
        (OSError(5, "secret"), "connection"),
        (RedisTrouble("oom", "as it was"), "oom"),
    ],
)
def test_a_failed_exchange_has_its_reason(error: Exception, reason: str) -> None:
    trouble = link_trouble(error, "here")
    assert trouble.reason == reason
    assert "secret" not in str(trouble)


def test_a_trouble_is_one_of_the_package_s_errors() -> None:
    assert issubclass(RedisTrouble, CacheError)


def test_a_script_knows_its_name_on_the_server() -> None:
    assert LuaScript("return 1").sha == hashlib.sha1(b"return 1").hexdigest()
