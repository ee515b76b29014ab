"""Which server answers a command: decided here, without I/O.

A route's `perform` is a generator. It yields exchanges, (node, commands), and is sent the replies, an error reply as an
exception in its place; a RedisTrouble is thrown into it when the exchange failed. What it returns is the answer. The
clients for threads and for asyncio drive the same generators.

Sources: Redis documentation, "Guidelines for Redis clients with support for Redis Sentinel" and "Redis Cluster
specification".
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from redis import exceptions
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from llm_edge_cache.redis_commands import (
    Argument,
    Batch,
    Call,
    Command,
    RedisTrouble,
    Script,
    reply_trouble,
    sound_answer,
)
from llm_edge_cache.redis_target import RedisTarget

__all__ = ["Exchange", "Node", "Route", "Steps", "route_to"]

_MOST_REDIRECTS: Final = 5


class Node(NamedTuple):
    """One server's address."""

    host: str
    port: int
    unix_path: str | None = None
    is_sentinel: bool = False

    def __str__(self) -> str:
        if self.unix_path is not None:
            return self.unix_path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Wire: TypeAlias = tuple[Argument, ...]
Exchange: TypeAlias = tuple[Node, Sequence[Wire]]
Steps: TypeAlias = Generator[Exchange, list[Any], Any]


def route_to(target: RedisTarget) -> Route:
    """The route that a target's kind needs."""
    nodes = [Node(host, port, is_sentinel=target.kind == "sentinel") for host, port in target.nodes]
    if target.kind == "cluster":
        return ClusterRoute(nodes)
    if target.kind == "sentinel":
        return SentinelRoute(nodes, target.service or "")
    return Route(Node("", 0, target.unix_path) if target.unix_path is not None else nodes[0])


def _short_form(command: Call | Script) -> Wire:
    if isinstance(command, Script):
        return ("EVALSHA", command.source.sha, 1, command.key, *command.args)
    return command.args


def _long_form(script: Script) -> Wire:
    return ("EVAL", script.source.text, 1, script.key, *script.args)


def _needs_text(command: Call | Script, reply: Any) -> bool:
    return isinstance(reply, exceptions.NoScriptError) and isinstance(command, Script)


class Route:
    """To one server; the others are made from this one.

    Args:
        node: The server.
    """

    shards = 1
    """How many servers hold a part of the keys each, as far as is known."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def perform(self, command: Command) -> Steps:
        """Steps that end in the answer to `command`, a list of answers for a Batch, or in a RedisTrouble."""
        if isinstance(command, Batch):
            return self._batch(command.commands)
        return self._single(command)

    def greet(self) -> Steps:
        """Steps that find a server and end when it has answered a PING."""
        return self._single(Call(("PING",)))

    def _single(self, command: Call | Script) -> Steps:
        if isinstance(command, Call) and command.shard > 0:
            return (yield from self._ask_shard(command))
        node, (reply,) = yield from self._deliver([_short_form(command)])
        if _needs_text(command, reply):
            node, (reply,) = yield from self._deliver([_long_form(command)])  # type: ignore[arg-type]
        if isinstance(reply, Exception):
            raise reply_trouble(reply, str(node))
        return reply

    def _ask_shard(self, _: Call) -> Steps:
        """Steps that ask another server than the first; there is none."""
        yield from ()

    def _batch(self, commands: tuple[Call | Script, ...]) -> Steps:
        if not commands:
            return []
        node, replies = yield from self._deliver([_short_form(command) for command in commands])
        unknown = [at for at, command in enumerate(commands) if _needs_text(command, replies[at])]
        if unknown:
            wires = [_long_form(commands[at]) for at in unknown]  # type: ignore[arg-type]
            node, again = yield from self._deliver(wires)
            for at, reply in zip(unknown, again, strict=True):
                replies[at] = reply
        return [reply_trouble(reply, str(node)) if isinstance(reply, Exception) else reply for reply in replies]

    def _deliver(self, wires: Sequence[Wire]) -> Generator[Exchange, list[Any], tuple[Node, list[Any]]]:
        return self._node, (yield self._node, wires)


class SentinelRoute(Route):
    """To the master that a majority of Sentinels agrees on.

    The master is asked for once and kept until it fails or says that it is a replica.

    Args:
        sentinels: Their addresses, in the order in which they are asked first.
        service: The master's name.
    """

    def __init__(self, sentinels: Sequence[Node], service: str) -> None:
        self._sentinels = deque(sentinels)
        self._service = service
        self._master: Node | None = None

    def _deliver(self, wires: Sequence[Wire]) -> Generator[Exchange, list[Any], tuple[Node, list[Any]]]:
        node = self._master or (yield from self._find_master())
        try:
            replies = yield node, wires
        except RedisTrouble:
            self._forget(node)
            raise
        if any(isinstance(reply, exceptions.ReadOnlyError) for reply in replies):
            self._forget(node)  # it was demoted
        return node, replies

    def _forget(self, node: Node) -> None:
        if self._master is node:
            self._master = None

    def _find_master(self) -> Generator[Exchange, list[Any], Node]:
        trouble = None
        for _ in range(len(self._sentinels)):
            sentinel = self._sentinels[0]
            try:
                master = yield from self._ask(sentinel)
            except RedisTrouble as failed:
                trouble = failed
                master = None
            if master is not None:
                self._master = master
                return master
            # Whoever comes next asks another one first: this one may have used up the whole time.
            if self._sentinels[0] is sentinel:
                self._sentinels.rotate(-1)
            if trouble is not None and trouble.reason == "timeout":
                break
        raise trouble or RedisTrouble("connection", f"no Sentinel names a master for {self._service!r} that is one")

    def _ask(self, sentinel: Node) -> Generator[Exchange, list[Any], Node | None]:
        (reply,) = yield sentinel, [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)]
        if not isinstance(reply, list) or len(reply) != 2:
            return None
        with sound_answer(f"Redis at {sentinel}"):
            master = Node(reply[0].decode(), int(reply[1]))
        # A Sentinel that was cut off names the former master.
        (role,) = yield master, [("ROLE",)]
        is_replica = isinstance(role, list) and role[0] != b"master"
        return None if is_replica else master


class ClusterRoute(Route):
    """To the node of a Cluster that holds a command's key.

    The map of slots is asked for once, corrected by every MOVED, and asked for anew after a node failed.

    Args:
        seeds: Some nodes of the Cluster.
    """

    def __init__(self, seeds: Sequence[Node]) -> None:
        self._seeds = tuple(seeds)
        self._known = deque(seeds)
        self._slots: list[Node | None] = []  # by slot; empty: to be asked for

    @property
    def shards(self) -> int:  # type: ignore[override]
        """How many masters hold slots; 1 while none is known."""
        return len(set(filter(None, self._slots))) or 1

    def _ask_shard(self, command: Call) -> Steps:
        slots = self._slots or (yield from self._learn())
        masters = list(dict.fromkeys(filter(None, slots)))  # in the order of their slots: the first one has slot 0
        if command.shard >= len(masters):
            return None
        node = masters[command.shard]
        (reply,) = yield from self._exchange(node, [command.args])
        if isinstance(reply, Exception):
            raise reply_trouble(reply, str(node))
        return reply

    def _batch(self, commands: tuple[Call | Script, ...]) -> Steps:
        """One round trip to each node; what was refused there (moved, or a script not seen yet) is repeated alone."""
        slots = self._slots or (yield from self._learn())
        places: dict[Node | None, list[int]] = {}
        for at, command in enumerate(commands):
            places.setdefault(slots[_slot_of(_short_form(command))], []).append(at)
        answers: list[Any] = [None] * len(commands)
        for node, ats in places.items():
            try:
                replies = yield from self._exchange(self._required(node), [_short_form(commands[at]) for at in ats])
            except RedisTrouble as trouble:  # one node's failure is not the next one's
                replies = [trouble] * len(ats)
            for at, reply in zip(ats, replies, strict=True):
                is_refused = isinstance(reply, Exception) and not isinstance(reply, RedisTrouble)
                answers[at] = (yield from self._alone(commands[at])) if is_refused else reply
        return answers

    def _alone(self, command: Call | Script) -> Steps:
        try:
            return (yield from self._single(command))
        except RedisTrouble as trouble:
            return trouble

    def _required(self, node: Node | None) -> Node:
        if node is None:
            self._slots = []
            raise RedisTrouble("cluster", "no node of the Cluster holds this slot")
        return node

    def _exchange(self, node: Node, wires: Sequence[Wire]) -> Generator[Exchange, list[Any], list[Any]]:
        try:
            return (yield node, wires)
        except RedisTrouble:
            self._distrust(node)
            raise

    def _deliver(self, wires: Sequence[Wire]) -> Generator[Exchange, list[Any], tuple[Node, list[Any]]]:
        (wire,) = wires
        slot = _slot_of(wire)
        slots = self._slots or (yield from self._learn())
        node, is_asking = self._required(slots[slot]), False
        for _ in range(_MOST_REDIRECTS):
            reply = (yield from self._exchange(node, [("ASKING",), wire] if is_asking else [wire]))[-1]
            reply = _with_redirection(reply)
            if not isinstance(reply, exceptions.AskError):
                break
            # A MovedError is an AskError: the slot is there for good, so the map is put right.
            is_asking = not isinstance(reply, exceptions.MovedError)
            node = Node(reply.host or node.host, reply.port)
            if not is_asking:
                slots[slot] = node
        if isinstance(reply, Exception) and reply_trouble(reply, "").reason == "cluster":
            self._slots = []
        return node, [reply]

    def _distrust(self, node: Node) -> None:
        """A node failed: the next command asks for the map, and asks another node first."""
        self._slots = []
        if len(self._known) > 1 and self._known[0] == node:
            self._known.rotate(-1)

    def _learn(self) -> Generator[Exchange, list[Any], list[Node | None]]:
        trouble = None
        for _ in range(len(self._known)):
            node = self._known[0]
            try:
                (reply,) = yield node, [("CLUSTER", "SLOTS")]
            except RedisTrouble as failed:
                trouble = failed
            else:
                if isinstance(reply, list):
                    with sound_answer(f"Redis at {node}"):
                        return self._take_map(reply, node)
                trouble = reply_trouble(reply, str(node))
            if self._known[0] is node:
                self._known.rotate(-1)
            if trouble.reason == "timeout":
                break
        raise trouble or RedisTrouble("cluster", "no node of the Cluster is known")

    def _take_map(self, ranges: list[Any], asked: Node) -> list[Node | None]:
        """Read the answer to CLUSTER SLOTS: [first slot, last slot, [master's host, port, ...], ...]."""
        slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in ranges:
            # A node that does not know its own address leaves it out: it is the one that was asked.
            node = Node(host.decode() if host else asked.host, int(port))
            slots[first : last + 1] = [node] * (last + 1 - first)
        self._known = deque(dict.fromkeys([asked, *filter(None, slots), *self._seeds]))
        self._slots = slots
        return slots


def _with_redirection(reply: Any) -> Any:
    """The same reply; MOVED and ASK as redis-py's exceptions for them, also from versions before 6, which made none."""
    if type(reply) is exceptions.ResponseError:
        code, _, rest = str(reply).partition(" ")
        kind = {"MOVED": exceptions.MovedError, "ASK": exceptions.AskError}.get(code)
        with contextlib.suppress(ValueError):
            return kind(rest) if kind else reply
    return reply


_KEYLESS: Final = frozenset(
    {b"PING", b"SCAN", b"INFO", b"DBSIZE", b"TIME", b"ROLE", b"CLUSTER", b"SCRIPT", b"CLIENT", b"CONFIG"}
)


def _bytes_of(argument: Argument) -> bytes:
    return argument if isinstance(argument, bytes) else str(argument).encode()


def _slot_of(wire: Wire) -> int:
    """The slot of a command's one key; commands without a key go to the node of slot 0."""
    name = _bytes_of(wire[0]).upper()
    at = 1
    if name in _KEYLESS:
        return 0
    if name in {b"EVAL", b"EVALSHA"}:
        at = 3
    elif name == b"MEMORY":
        at = 2
    elif name in {b"XREAD", b"XREADGROUP"}:
        at = [_bytes_of(argument) for argument in wire].index(b"STREAMS") + 1
    return int(key_slot(_bytes_of(wire[at])))
