"""The operator's commands on a live slab: what they print and leave alone, and what they say of bad input."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import fork, stop
from redis_servers import RedisServer, wait_for

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    L1Config,
    L2Config,
    SharedSlab,
    SlabConfig,
    SyncCacheManager,
    naming,
)
from llm_edge_cache.cli.main import main
from llm_edge_cache.invalidation import namespace_tag
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Word

MiB = 1 << 20
ALL = ("stats", "top", "scan", "check", "get", "delete", "clear", "unlink", "snapshot", "restore", "explain")


class Ran:
    """How a command ended, and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(name: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process, on the test's slab."""

    def command(*arguments: str) -> Ran:
        capsys.readouterr()
        given = [*arguments, "--full-speed"] if arguments[0] == "snapshot" else list(arguments)  # this process goes on
        if "--name" not in given:
            given[1:1] = ["--name", name]
        code = main(given)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Ran(code, printed.out, printed.err)

    return command


def arguments_of(command: str, file: Path) -> list[str]:
    """What makes a command do its work on a slab with the key `0`."""
    more = {
        "top": ["--once", "--interval", "0.05"],
        "get": ["0", "--json"],
        "delete": ["0"],
        "snapshot": [str(file)],
        "restore": [str(file)],
    }
    return [command, *more.get(command, [])]


# ---- what they print ----


def test_stats_tell_what_the_slab_counted(slab: SharedSlab, run: Any) -> None:
    slab.set_many({b"a": bytes(1000), b"b": b"1"})
    slab.get(b"a")
    slab.get(b"absent")
    found = run("stats", "--json").json
    assert (found["name"], found["slab"]["entries"], found["hit_ratio"]) == (slab.name, 2, 0.5)
    assert found["slab"]["attached_processes"] == 0  # the command itself is not counted
    assert found["config"]["memory_bytes"] == slab.config.memory_bytes
    printed = run("stats").out
    assert f"slab                     {slab.name}\n" in printed
    assert "hit ratio                50.0%\n" in printed


def test_stats_tell_what_a_manager_counted(name: str, run: Any) -> None:
    request = CacheableRequest("m", "Hello?")
    with SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB)) as manager:
        for _ in range(4):
            manager.get_or_compute(request, lambda: CachedResponse("Hi.", "m"))
        found = run("stats", "--json").json
    assert found["hit_ratio"] == 0.75
    assert found["counters"]["computations"] == 1
    assert found["latency_seconds"]["l1"]["count"] == 4
    assert "computations             1\n" in run("stats").out


def test_scan_lists_entries(slab: SharedSlab, run: Any) -> None:
    slab.set_many({b"a/1": bytes(2048), b"a/\xff": b"", b"b/1": b"1"}, ttl=100)
    printed = run("scan", "--prefix", "a/").out.splitlines()
    assert len(printed) == 3
    assert any(line.split()[:2] == ["2.0", "KiB"] and line.endswith("  a/1") for line in printed)
    assert any(line.endswith(r"  a/\xff") for line in printed)
    rows = [json.loads(line) for line in run("scan", "--json").out.splitlines()]
    assert {row["key_hex"]: row["size"] for row in rows} == {"612f31": 2048, "612fff": 0, "622f31": 1}
    assert len(run("scan", "--limit", "2", "--json").out.splitlines()) == 2


def test_check_says_sound_or_what_is_broken(slab: SharedSlab, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("check")
    assert (ran.code, ran.out) == (0, "sound: every invariant holds, 0 entries\n")
    assert run("check", "--json").json == {"sound": True, "broken": []}
    monkeypatch.setattr(SharedSlab, "check", lambda self: ["shard 0: a planted fault (1)"])
    ran = run("check")
    assert (ran.code, ran.out) == (1, "shard 0: a planted fault (1)\n")


def test_get_prints_what_is_there_as_it_is(slab: SharedSlab, capsysbinary: Any) -> None:
    slab.set(b"key", b"\x00value\xff", ttl=None)
    assert main(["get", "--name", slab.name, "key"]) == 0
    assert capsysbinary.readouterr().out == b"\x00value\xff"
    assert main(["get", "--name", slab.name, "--hex", "6b6579", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out) == {
        "key": "key", "size": 7, "ttl_left": None, "value_base64": "AHZhbHVl/w==",
    }  # fmt: skip


def test_get_reads_a_response(name: str, run: Any) -> None:
    request = CacheableRequest("m", "Hello?")
    with SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB)) as manager:
        manager.store(request, CachedResponse("Good day.", "model-1"), tags=["greeting"])
        key = tier_key(request).decode()
        printed = run("get", key).out
        entry = run("get", key, "--json").json["entry"]
    assert "model          model-1\n" in printed
    assert "tags           greeting\n" in printed
    assert printed.endswith("\n\nGood day.\n")
    assert (entry["content"], entry["tags"]) == ("Good day.", ["greeting"])


def test_an_absent_key_exits_with_1(slab: SharedSlab, run: Any) -> None:
    ran = run("get", "absent")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"llm-edge-cache: slab {slab.name!r} has no entry 'absent'\n"


def test_delete_deletes_and_says_what_was_not_there(slab: SharedSlab, run: Any) -> None:
    slab.set_many({b"a": b"1", b"b": b"2"})
    ran = run("delete", "a", "absent")
    assert (ran.code, ran.out) == (1, "deleted 1 of 2\nwas not there: absent\n")
    assert run("delete", "b", "--json").json == {"deleted": 1, "absent": [], "tags": [], "redis": None}
    assert len(slab) == 0


def test_clear_and_unlink(slab: SharedSlab, run: Any) -> None:
    slab.set_many({b"a": b"1", b"b": b"2"})
    assert run("clear").out == "cleared: 2 entries deleted\n"
    assert len(slab) == 0
    assert run("unlink", "--json").json["memory_bytes"] == slab.config.memory_bytes
    assert not SharedSlab.exists(slab.name)


def test_delete_by_tag_and_by_namespace_leaves_the_rest(slab: SharedSlab, run: Any) -> None:
    with SyncCacheManager(slab=slab) as manager:
        for prompt, tags in (("a", ["greeting"]), ("b", [namespace_tag("tenant")]), ("c", ["else"])):
            manager.store(CacheableRequest("model-1", prompt), CachedResponse(prompt, "model-1"), tags=tags)
        ran = run("delete", "--tag", "greeting", "--namespace", "tenant")
        assert (ran.code, ran.out) == (
            0,
            "void: everything tagged greeting\nvoid: everything tagged namespace:tenant\n",
        )
        assert [manager.lookup(CacheableRequest("model-1", prompt)).is_hit for prompt in "abc"] == [False, False, True]


def test_what_is_deleted_with_a_redis_behind_is_void_on_every_host(
    name: str, run: Any, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next look-up would bring it back from there."""
    requests = [CacheableRequest("model-1", prompt) for prompt in "abcd"]
    monkeypatch.setenv("LLM_EDGE_CACHE_REDIS_URL", redis_server.url)
    monkeypatch.setenv("LLM_EDGE_CACHE_KEY_PREFIX", f"{name}:")
    l2 = L2Config(redis_server.url, key_prefix=f"{name}:", operation_timeout_ms=5000)
    other = L1Config(name=f"{name}-other")
    try:
        with SyncCacheManager(L1Config(name=name), l2) as here, SyncCacheManager(other, l2) as there:
            for request, tags in zip(requests, (["t"], [], [], []), strict=True):
                here.get_or_compute(request, lambda: CachedResponse("old", "model-1"), tags=tags)
                wait_for(lambda request=request: there.lookup(request).is_hit, "the other host has it")

            assert run("delete", tier_key(requests[1]).decode(), "--json").json["redis"] == "void"
            wait_for(lambda: not there.lookup(requests[1]).is_hit, "the key is void there")
            assert not here.lookup(requests[1]).is_hit
            assert run("delete", "--tag", "t").out == "void: everything tagged t\nvoid in Redis and on every host\n"
            wait_for(lambda: not there.lookup(requests[0]).is_hit, "the tag is void there")
            assert not here.lookup(requests[0]).is_hit
            assert there.lookup(requests[2]).is_hit
            assert run("clear").out.endswith("entries deleted\nvoid in Redis and on every host\n")
            wait_for(lambda: not there.lookup(requests[2]).is_hit, "all is void there")
            assert not any(here.lookup(request).is_hit for request in requests)
    finally:
        SharedSlab.attach(other.name).unlink()


def test_deleting_reaches_the_redis_of_the_application_or_none(
    name: str, run: Any, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM_EDGE_CACHE_REDIS_URL", raising=False)
    request, l2 = CacheableRequest("model-1", "a"), L2Config(redis_server.url, key_prefix=f"{name}:")
    with SyncCacheManager(L1Config(name=name), l2) as manager:
        manager.store(request, CachedResponse("x", "model-1"))
        words = [manager.slab._word(word) for word in (Word.FOLLOWED, Word.CURSOR)]
        for command in (["clear"], ["delete", tier_key(request).decode()], ["delete", "--tag", "t"]):
            ran = run(*command)
            assert ran.code == 2
            assert "has a Redis behind it, which would give back what is deleted here" in ran.err
            ran = run(*command, "--redis-url", "redis://:secret@127.0.0.1:1/0")
            assert ran.code == 2
            assert "has another Redis behind it than the one named here" in ran.err
            assert "secret" not in ran.err
        assert manager.lookup(request).is_hit
        assert [manager.slab._word(word) for word in (Word.FOLLOWED, Word.CURSOR)] == words
        assert run("delete", tier_key(request).decode(), "--l1-only").out == "deleted 1 of 1\n"
        assert run("clear", "--l1-only").code == 0


def test_what_is_deleted_while_redis_is_away_is_carried_there_later(
    name: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CacheableRequest("model-1", "a")
    with RedisServer() as server:
        monkeypatch.setenv("LLM_EDGE_CACHE_REDIS_URL", server.url)
        l2 = L2Config(server.url, operation_timeout_ms=5000)
        with SyncCacheManager(L1Config(name=name), l2) as manager:
            manager.get_or_compute(request, lambda: CachedResponse("old", "model-1"))
            wait_for(lambda: server.ask("EXISTS", f"llm_cache:{tier_key(request).decode()}"), "it is in Redis")
            server.kill()
            ran = run("delete", tier_key(request).decode())
            assert (ran.code, ran.out) == (0, "deleted 1 of 1\nRedis is away: it will be told when it is back\n")
            assert not manager.lookup(request).is_hit


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("yes\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_on_a_terminal_clear_asks_first(
    slab: SharedSlab, run: Any, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    slab.set(b"a", b"1")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: answer, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    ran = run("clear")
    assert ran.code == code
    assert ran.err.endswith(f"Delete the 1 entries of slab {slab.name!r}? [y/N] ")
    assert len(slab) == code


def test_snapshot_and_restore_say_what_they_did(slab: SharedSlab, run: Any, tmp_path: Path) -> None:
    slab.set_many({b"%d" % number: bytes(1024) for number in range(100)}, ttl=None)
    ran = run("snapshot", str(tmp_path / "file"))
    assert ran.code == 0
    assert ran.out.startswith(f"saved 100 entries of slab {slab.name!r}, 100.")
    slab.delete(b"7")
    assert ", 99 were there already\n" in run("restore", str(tmp_path / "file")).out
    slab.clear()
    found = run("restore", str(tmp_path / "file"), "--json").json
    assert (found["restored"], found["lost"], found["entries"]) == (100, 0, 100)


def test_restore_makes_the_slab_only_when_told(slab: SharedSlab, run: Any, tmp_path: Path) -> None:
    slab.set(b"a", b"1")
    run("snapshot", str(tmp_path / "file"))
    config = slab.config
    slab.unlink()
    assert run("restore", str(tmp_path / "file")).code == 1
    assert not SharedSlab.exists(slab.name)
    assert run("restore", str(tmp_path / "file"), "--create").code == 0
    assert (slab.get(b"a"), slab.config) == (b"1", config)
    slab.unlink()
    assert run("restore", str(tmp_path / "file"), "--create", "--memory", str(8 * MiB)).code == 0
    assert (slab.get(b"a"), slab.config.memory_bytes) == (b"1", 8 * MiB)


def test_a_damaged_snapshot_is_restored_and_the_loss_is_told(slab: SharedSlab, run: Any, tmp_path: Path) -> None:
    slab.set_many({b"%d" % number: bytes(1024) for number in range(100)})
    run("snapshot", str(tmp_path / "file"))
    slab.clear()
    data = bytearray((tmp_path / "file").read_bytes())
    data[50_000] ^= 1
    (tmp_path / "file").write_bytes(data)
    ran = run("restore", str(tmp_path / "file"))
    assert (ran.code, len(slab)) == (0, 99)
    assert ran.err == "llm-edge-cache: the file is damaged: 1 entries are lost, the others are restored\n"


def test_help_of_each_command_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ALL:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        assert "Exit codes: 0 " in printed
        assert "130 interrupted" in printed


def test_the_docs_tell_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)) - {"serve", "demo"}
    page = (Path(__file__).parent.parent / "docs" / "commands.md").read_text()
    assert offered == set(ALL)
    assert set(re.findall(r"^\| `(\w+)", page.partition("## stats")[0], re.MULTILINE)) == offered
    assert set(re.findall(r"^\$ llm-edge-cache (\w+)", page, re.MULTILINE)) == offered


# ---- bad input ----


@pytest.mark.parametrize("command", [command for command in ALL if command != "explain"])
def test_an_unknown_slab_is_never_created_and_the_live_ones_are_named(
    slab: SharedSlab, run: Any, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    ran = run(*arguments_of(command, tmp_path / "file"), "--name", slab.name + "-absent")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"llm-edge-cache: there is no live slab '{slab.name}-absent'; live are ")
    assert repr(slab.name) in ran.err
    assert not SharedSlab.exists(slab.name + "-absent")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's slab")
def test_another_user_s_slab_is_told_from_none(name: str, run: Any) -> None:
    place = naming.place_of(name, naming.Owner(65534, 65534))
    with SharedSlab(name) as slab:
        slab.chown(65534, 65534)
    try:
        ran = run("stats")
        assert ran.code == 1
        assert f"slab {name!r} belongs to uid 65534, and this is uid 0: run the command as that user" in ran.err
    finally:
        os.unlink(place.segment)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place.lock)


def test_another_version_s_slab_is_told_from_none(slab: SharedSlab, run: Any) -> None:
    place = naming.place_of(slab.name, naming.current_owner())
    other = place.segment[:-4] + "0000"  # what another layout's digest makes of the name
    os.rename(place.segment, other)
    os.rename(place.lock, other + naming.LOCK_SUFFIX)
    try:
        ran = run("stats")
    finally:
        os.unlink(other)
        os.unlink(other + naming.LOCK_SUFFIX)
    assert ran.code == 1
    assert "another version or build of llm-edge-cache made it" in ran.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("stats", "--name", ""), "a slab's name must be 1 to 1024 bytes"),
        (("get", "--hex", "xyz"), "'xyz' is not hexadecimal"),
        (("get", ""), "a key has 1 to 1,024 bytes, not 0"),
        (("delete", "k" * 1025), "a key has 1 to 1,024 bytes, not 1,025"),
        (("top", "--interval", "0"), "--interval must be 0.05 to 3600 seconds, not 0"),
        (("restore", "file", "--memory", "5"), "--memory says how large"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(
    slab: SharedSlab, run: Any, arguments: tuple[str, ...], says: str
) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


def test_a_foreign_file_and_a_place_without_rights_exit_with_1(slab: SharedSlab, run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no snapshot")
    ran = run("restore", str(tmp_path / "file"))
    assert (ran.code, ran.err) == (1, f"llm-edge-cache: {tmp_path}/file is no snapshot of a slab\n")
    ran = run("snapshot", "/proc/file")
    assert ran.code == 1
    assert "/proc/file cannot be written" in ran.err


def test_a_size_that_is_too_large_for_the_host_is_a_clear_error(slab: SharedSlab, run: Any, tmp_path: Path) -> None:
    run("snapshot", str(tmp_path / "file"))
    slab.unlink()
    ran = run("restore", str(tmp_path / "file"), "--create", "--memory", str(1 << 40))
    assert ran.code == 1
    assert "bytes of shared memory" in ran.err


def test_a_reader_that_has_seen_enough_ends_a_scan_quietly(slab: SharedSlab) -> None:
    slab.set_many({b"%d" % number: b"" for number in range(3000)})
    command = [sys.executable, "-m", "llm_edge_cache", "scan", "--name", slab.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


# ---- beside an application that works, hangs, or is not told ----


def _write(name: str, seed: int) -> None:
    generator = random.Random(seed)
    with SharedSlab.attach(name) as slab:
        while True:
            slab.set(b"%d" % generator.randrange(400), generator.randbytes(generator.randrange(3000)))


@pytest.fixture
def writers(slab: SharedSlab) -> Iterator[list[int]]:
    """Four processes that write all the time."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(slab.name, seed), daemon=True) for seed in range(4)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 30
    while len(slab) < 300 and time.monotonic() < deadline:
        time.sleep(0.01)
    yield [process.pid for process in processes if process.pid is not None]
    for process in processes:
        process.kill()
        process.join()


def test_every_command_works_beside_four_writers(
    slab: SharedSlab, run: Any, writers: list[int], tmp_path: Path
) -> None:
    for _ in range(3):
        for command in ("stats", "top", "scan", "check", "snapshot", "restore", "clear"):
            ran = run(*arguments_of(command, tmp_path / "file"))
            assert (ran.code, ran.err) == (0, ""), command
        for command in ("get", "delete"):  # the key may be away just now
            assert run(*arguments_of(command, tmp_path / "file")).code in (0, 1)
    assert run("unlink").code == 0


def test_what_only_reads_works_while_the_application_hangs(
    slab: SharedSlab, run: Any, writers: list[int], tmp_path: Path
) -> None:
    for pid in writers:
        stop(pid)
    for command in ("stats", "top", "scan", "snapshot"):
        ran = run(*arguments_of(command, tmp_path / "file"))
        assert (ran.code, ran.err) == (0, ""), command


def test_commands_leave_no_trace_in_what_the_application_counts(slab: SharedSlab, run: Any, tmp_path: Path) -> None:
    slab.set_many({b"%d" % number: bytes(100) for number in range(50)})
    before = (slab.stats(), sorted((info.key, info.frequency) for info in slab.scan()))
    for command in ("stats", "top", "scan", "check", "snapshot"):
        run(*arguments_of(command, tmp_path / "file"))
    assert (slab.stats(), sorted((info.key, info.frequency) for info in slab.scan())) == before


# ---- killed and interrupted ----


@pytest.mark.parametrize("command", [command for command in ALL if command not in ("explain", "unlink")])
def test_sigkill_at_any_point_leaves_the_slab_sound(slab: SharedSlab, tmp_path: Path, command: str) -> None:
    entries = {b"%d" % number: bytes(500) for number in range(2000)}
    slab.set_many(entries)
    main(["snapshot", "--full-speed", "--name", slab.name, str(tmp_path / "file")])
    arguments = arguments_of(command, tmp_path / "file")
    arguments[1:1] = ["--name", slab.name]
    generator = random.Random(1)

    def quietly() -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - not into what collects the output of the tests
        main(arguments)

    for _ in range(12):
        if command == "restore":
            slab.clear()
        pid = fork(quietly)
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert slab.check() == []
        assert slab.set(b"0", b"again")
    assert slab.get(b"0") == b"again"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_snapshot_leaves_no_half_file(name: str, tmp_path: Path, number: signal.Signals) -> None:
    config = SlabConfig(memory_bytes=96 * MiB, max_value_bytes=MiB)
    with SharedSlab(name, config) as slab:
        slab.set_many({b"%d" % each: bytes(MiB // 2) for each in range(150)})
        for _ in range(20):
            code = _interrupted_snapshot(slab.name, tmp_path, number)
            assert not [entry for entry in os.listdir(tmp_path) if entry.endswith(".partial")]
            if code == 130:
                assert os.listdir(tmp_path) == []
                break
            (tmp_path / "file").unlink()  # it was too fast for us
        else:
            pytest.fail("never interrupted in time")
        assert slab.check() == []


def _interrupted_snapshot(name: str, folder: Path, number: signal.Signals) -> int:
    command = [sys.executable, "-m", "llm_edge_cache", "snapshot", "--name", name, str(folder / "file")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not os.listdir(folder):
            time.sleep(0.0005)
        process.send_signal(number)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        return process.wait(60)
