"""What is asked of Redis, as data, and the one exception that says it was not answered.

A decision of the cache yields these records; a client (`redis_client`) carries them out.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

import msgspec
from redis import exceptions

from llm_edge_cache.errors import CacheError

__all__ = [
    "Batch",
    "Call",
    "Command",
    "LuaScript",
    "Reason",
    "RedisTrouble",
    "Script",
    "link_trouble",
    "reply_trouble",
    "sound_answer",
]

Argument: TypeAlias = bytes | str | int
Reason = Literal["timeout", "connection", "auth", "oom", "readonly", "loading", "cluster", "response"]

_OUTAGES: Final = frozenset({"timeout", "connection", "auth", "loading", "cluster"})


class Call(msgspec.Struct, frozen=True):
    """One command; its answer is Redis's, as bytes, int, None or a list of these."""

    args: tuple[Argument, ...]
    shard: int = 0
    """For a command without a key: which of the servers that hold a part each; None answers where there is none."""

    def __repr__(self) -> str:
        return f"<Call {self.args[0]!r}, {len(self.args)} arguments>"  # they may be somebody's answer


class LuaScript:
    """The text of a script and its name on the server (SHA-1, hexadecimal)."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text: Final = text
        self.sha: Final = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Script(msgspec.Struct, frozen=True):
    """One run of a script that touches exactly one key; sent by its SHA-1, in full where the server has not seen it."""

    source: LuaScript
    key: bytes
    args: tuple[Argument, ...] = ()

    def __repr__(self) -> str:
        return f"<Script {self.source.sha[:8]}, {len(self.args)} arguments>"


class Batch(msgspec.Struct, frozen=True):
    """Commands that do not depend on each other: one round trip to each server that holds one of their keys.

    No transaction. A script that the server has not seen is run after the others, in a second round trip.
    """

    commands: tuple[Call | Script, ...]


Command: TypeAlias = Call | Script | Batch


class RedisTrouble(CacheError):  # noqa: N818 - a state of the world more than an error: callers go on without Redis
    """A command was not answered, or not with what was asked for. It holds no key, no value and no password.

    The reasons: "timeout" (no complete answer in time), "connection" (refused, broken, or not Redis's protocol),
    "auth" (password or rights), "loading" (the server is still loading, or busy), "cluster" (the Cluster is down, or
    a slot could not be traced), "oom" (its memory is full), "readonly" (a replica), "response" (any other error).
    """

    def __init__(self, reason: Reason, message: str, code: str = "") -> None:
        super().__init__(message)
        self.reason: Final = reason
        self.code: Final = code
        """The first word of the error that Redis answered with; empty when it answered none."""

    @property
    def is_outage(self) -> bool:
        """The server cannot serve; otherwise it answers, and only this command failed."""
        return self.reason in _OUTAGES and not self.is_denied

    @property
    def is_denied(self) -> bool:
        """The user may not use this command or this key; others may well work."""
        return self.code == "NOPERM"

    @property
    def is_wrong_type(self) -> bool:
        """Under the key lies what cannot be ours: a list, a hash ..."""
        return self.code == "WRONGTYPE"


_MEANING: Final[dict[Reason, str]] = {
    "timeout": "no complete answer in time",
    "connection": "the connection failed",
    "auth": "user name, password or rights were refused",
    "oom": "its memory is full and nothing may be evicted",
    "readonly": "it is a read-only replica",
    "loading": "it is loading its data, or busy",
    "cluster": "the Cluster does not serve this slot now; a redis+cluster:// URL is needed for a Cluster",
    "response": "it answered with an error",
}
_BY_CODE: Final[dict[str, Reason]] = {
    "NOAUTH": "auth",
    "WRONGPASS": "auth",
    "NOPERM": "auth",
    "OOM": "oom",
    "READONLY": "readonly",
    "UNBLOCKED": "readonly",  # it became a replica while XREAD waited
    "LOADING": "loading",
    "BUSY": "loading",
    "MASTERDOWN": "loading",
    "CLUSTERDOWN": "cluster",
    "MOVED": "cluster",
    "ASK": "cluster",
    "TRYAGAIN": "cluster",
}
_BY_CLASS: Final[dict[type[BaseException], str]] = {
    exceptions.NoPermissionError: "NOPERM",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.NoScriptError: "NOSCRIPT",
    exceptions.AuthenticationError: "NOAUTH",
    exceptions.AuthorizationError: "NOAUTH",
    exceptions.AuthenticationWrongNumberOfArgsError: "NOAUTH",
}
# What a server before version 7 makes of an error inside a script: "Error running script (...): ...: -OOM command ...".
_INSIDE_SCRIPT: Final = re.compile(r"^(?:ERR )?Error running script.*?-([A-Z]+) ", re.DOTALL)
_CODE: Final = re.compile(r"[A-Z]{2,20}(?= |$)")


def reply_trouble(error: BaseException, where: str) -> RedisTrouble:
    """The trouble that an error reply means.

    Args:
        error: What redis-py made of the reply. Of its text only the code is kept: the rest may quote arguments.
        where: The server's address.
    """
    code = _BY_CLASS.get(type(error)) or _code_in(str(error))
    reason = _BY_CODE.get(code, "response")
    return RedisTrouble(reason, f"Redis at {where}: {_MEANING[reason]} ({code})", code)


def _code_in(text: str) -> str:
    found = _INSIDE_SCRIPT.match(text)
    if found:
        return found[1]
    code = _CODE.match(text)
    return code[0] if code else "ERR"


def link_trouble(error: BaseException, where: str) -> RedisTrouble:
    """The trouble that a failed exchange means, `error` being anything but a reply's own error."""
    if isinstance(error, RedisTrouble):
        return error
    if type(error) in _BY_CLASS:
        return reply_trouble(error, where)
    if isinstance(error, (exceptions.TimeoutError, TimeoutError)):
        return RedisTrouble("timeout", f"Redis at {where}: {_MEANING['timeout']}")
    # The text of a broken protocol's error quotes what was received: it may be somebody's value.
    detail = str(error) if type(error) is exceptions.ConnectionError else type(error).__name__
    return RedisTrouble("connection", f"Redis at {where}: {_MEANING['connection']} ({detail})")


@contextlib.contextmanager
def sound_answer(who: str) -> Iterator[None]:
    """What cannot be read within is an answer that no Redis gives: a RedisTrouble, which quotes nothing of it."""
    try:
        yield
    except (AttributeError, IndexError, TypeError, ValueError):
        raise RedisTrouble("response", f"{who}: an answer makes no sense") from None
