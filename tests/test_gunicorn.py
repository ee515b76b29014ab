"""Real gunicorn masters with real workers on one slab."""

from __future__ import annotations

import os
import pwd
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from worker_servers import GUNICORN, Bench, Server, bench, is_running, wait_until

from llm_edge_cache import SharedSlab, naming

PRELOAD = [
    pytest.param([], {}, id="no-preload"),
    pytest.param(["--preload"], {}, id="preload-lazy"),
    pytest.param(["--preload"], {"SLAB_APP_OPEN": "import"}, id="preload-on-import"),
]
LARGE_BYTES = 200_000


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path) as tools:
        yield tools


def _worker_pids(server: Server) -> set[int]:
    return {child.pid for child in psutil.Process(server.pid).children()}


@pytest.mark.parametrize(("options", "environ"), PRELOAD)
def test_every_worker_reads_what_one_has_set(tools: Bench, options: list[str], environ: dict[str, str]) -> None:
    server = tools.gunicorn(*options, environ=environ)
    workers = server.pids(2)
    server.ask("/set?key=k&value=shared")
    assert server.value_seen_by("k", 2) == dict.fromkeys(workers, "shared")
    assert server.ask("/stats")["check"] == []
    tools.wait_attached(3)  # two workers and their master


@pytest.mark.parametrize(("options", "environ"), PRELOAD)
def test_the_environment_configures_the_slab(tools: Bench, options: list[str], environ: dict[str, str]) -> None:
    size = {"LLM_EDGE_CACHE_L1_MEMORY": "24MiB", "LLM_EDGE_CACHE_L1_MAX_CAPACITY": "500"}
    server = tools.gunicorn(*options, environ={**size, **environ})
    stats = server.ask("/stats")["stats"]
    assert (stats["memory_bytes"], stats["max_entries"]) == (24 << 20, 500)


def test_the_master_creates_the_slab_before_any_worker_asks_for_it(tools: Bench) -> None:
    server = tools.gunicorn()
    assert server.port
    wait_until(lambda: SharedSlab.exists(tools.name), "the slab")


def test_a_stopped_server_leaves_a_warm_slab_and_no_process_attached(tools: Bench) -> None:
    server = tools.gunicorn()
    server.pids(2)
    server.ask("/set?key=k&value=warm")
    assert server.stop() == 0
    assert tools.attached() == 0
    with SharedSlab.attach(tools.name) as slab:
        assert slab.get(b"k") == b"warm"


def test_a_worker_that_never_uses_the_slab_is_not_attached_and_does_not_map_it(tools: Bench) -> None:
    server = tools.gunicorn()
    workers = server.pids(2)
    tools.wait_attached(1)  # the master
    assert _maps(server.pid, tools.name)
    assert not any(_maps(pid, tools.name) for pid in workers)


def _maps(pid: int, name: str) -> bool:
    return name in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(("options", "environ"), PRELOAD)
def test_hup_replaces_the_workers_and_keeps_the_cache(
    tools: Bench, options: list[str], environ: dict[str, str]
) -> None:
    server = tools.gunicorn(*options, environ=environ)
    old = server.pids(2)
    server.ask("/set?key=k&value=warm")
    server.send(signal.SIGHUP)
    wait_until(lambda: len(_worker_pids(server)) == 2 and not _worker_pids(server) & old, "new workers")
    assert server.value_seen_by("k", 2) == dict.fromkeys(_worker_pids(server), "warm")
    tools.wait_attached(3)


def test_usr2_brings_a_second_master_to_the_same_slab(tools: Bench, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    server = tools.gunicorn("--pid", str(pidfile), "--preload", environ={"SLAB_APP_OPEN": "import"})
    old = server.pids(2)
    server.ask("/set?key=k&value=warm")
    server.send(signal.SIGUSR2)
    second = int(wait_until(lambda: _read(tmp_path / "pid.2"), "the second master's pid file"))
    workers = server.value_seen_by("k", 4)
    assert set(workers.values()) == {"warm"}
    assert old < set(workers)
    tools.wait_attached(6)  # two masters, four workers
    server.stop(signal.SIGQUIT)
    wait_until(lambda: _read(pidfile) == str(second), "the second master's promotion")
    tools.wait_attached(3)
    assert set(server.value_seen_by("k", 2)) == set(workers) - old
    os.kill(second, signal.SIGTERM)
    tools.wait_attached(0)


def test_winch_stops_the_old_master_s_workers_and_the_new_ones_go_on(tools: Bench, tmp_path: Path) -> None:
    # gunicorn heeds WINCH only as a daemon, which leaves our session: its group is ended here.
    pidfile, log = tmp_path / "pid", tmp_path / "server0.log"
    server = tools.gunicorn("--daemon", "--pid", str(pidfile), "--error-logfile", str(log))
    try:
        wait_until(lambda: "Listening at" in server.log, "the daemon's port")
        old_master = int(_read(pidfile))
        old = server.pids(2)
        server.ask("/set?key=k&value=warm")
        os.kill(old_master, signal.SIGUSR2)
        wait_until(lambda: _read(tmp_path / "pid.2"), "the second master's pid file")
        both = server.pids(4)
        os.kill(old_master, signal.SIGWINCH)
        wait_until(lambda: not psutil.Process(old_master).children() or _only_master(old_master), "no old workers")
        assert set(server.value_seen_by("k", 2)) == both - old
        os.kill(old_master, signal.SIGQUIT)
        tools.wait_attached(3)
        assert server.ask("/get?key=k")["value"] == "warm"
    finally:
        _end_daemons(tools.name)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _only_master(old_master: int) -> bool:
    """Tell whether the one child left is the second master, which has children of its own."""
    children = psutil.Process(old_master).children()
    return len(children) == 1 and bool(children[0].children())


def _end_daemons(name: str) -> None:
    """Kill the processes whose environment names this test's slab."""

    def ours() -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if p.pid != os.getpid() and _slab_of(p) == name]

    for process in ours():
        process.kill()
    wait_until(lambda: not ours(), "the end of the daemons")


def _slab_of(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get("LLM_EDGE_CACHE_NAME")
    except psutil.Error:
        return None


def test_recycled_workers_find_the_cache_warm_and_statistics_never_fall(tools: Bench) -> None:
    server = tools.gunicorn("--max-requests", "5", environ={"SLAB_APP_OPEN": "import"})
    server.ask("/set?key=k&value=warm")
    pids: set[int] = set()
    hits = 0
    while len(pids) < 8:
        answer = server.ask("/get?key=k")
        pids.add(answer["pid"])
        assert answer["value"] == "warm"
        now = server.ask("/stats")["stats"]["hits"]
        assert now > hits
        hits = now
    tools.wait_attached(3)


def _wait_gone(server: Server, victim: int) -> None:
    wait_until(lambda: victim not in _worker_pids(server), "the victim's end")


def test_a_worker_killed_under_load_is_replaced_and_the_cache_stays_warm(tools: Bench) -> None:
    server = tools.gunicorn("--threads", "4", "--workers", "3")
    server.pids(3)
    server.ask("/set?key=k&value=warm")
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            server.ask(f"/write?size={LARGE_BYTES}&count=40")

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            victim = server.ask("/pid")["pid"]
            os.kill(victim, signal.SIGKILL)
            _wait_gone(server, victim)
            assert server.ask("/get?key=k")["value"] == "warm"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    wait_until(lambda: len(_worker_pids(server)) == 3, "three workers")
    assert set(server.value_seen_by("k", 3).values()) == {"warm"}
    assert server.ask("/stats")["check"] == []
    tools.wait_attached(4)


def test_a_new_master_finds_warm_what_a_killed_one_left(tools: Bench) -> None:
    first = tools.gunicorn()
    workers = first.pids(2)
    first.ask("/set?key=k&value=warm")
    before = first.ask("/stats")["stats"]
    first.send(signal.SIGKILL)
    first.wait()
    wait_until(lambda: not _still_there(first, workers), "the orphaned workers' end")
    second = tools.gunicorn()
    assert second.value_seen_by("k", 2).keys().isdisjoint(workers)
    after = second.ask("/stats")["stats"]
    assert after["hits"] >= before["hits"] + 2
    assert after["sets"] == before["sets"]
    tools.wait_attached(3)


def _still_there(server: Server, workers: set[int]) -> list[int]:
    """Return the orphans that run yet; a worker looks for its parent only now and then, but after every request."""
    with suppress(OSError):
        urlopen(f"http://127.0.0.1:{server.port}/pid", timeout=1).close()
    return [pid for pid in workers if is_running(pid)]


def test_hooks_of_ones_own_go_on_to_ours(tools: Bench, tmp_path: Path) -> None:
    configuration = tmp_path / "gunicorn.conf.py"
    configuration.write_text(
        "from llm_edge_cache.workers import gunicorn as slab_hooks\n"
        "from llm_edge_cache.workers.gunicorn import *\n"
        "workers = 2\n"
        "def child_exit(server, worker):\n"
        "    slab_hooks.child_exit(server, worker)\n"
        "    server.log.info('own child_exit for %s', worker.pid)\n"
    )
    server = tools.start([*GUNICORN, "-c", str(configuration), "slab_app:application"], {})
    victim = min(server.pids(2))
    server.ask("/set?key=k&value=warm")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: f"own child_exit for {victim}" in server.log, "the hook of one's own")
    assert set(server.value_seen_by("k", 2).values()) == {"warm"}


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [("L1_MEMORY", "lots", "KiB"), ("L1_TTL", "-1", "above 0"), ("NAME", "", "1 to 1024 bytes")],
)
def test_a_bad_setting_ends_the_master_with_a_message(tools: Bench, variable: str, value: str, allowed: str) -> None:
    server = tools.gunicorn(environ={f"LLM_EDGE_CACHE_{variable}": value})
    assert server.wait() == 1
    assert f"Error: LLM_EDGE_CACHE_{variable}='{value}'" in server.log
    assert allowed in server.log
    assert "Traceback" not in server.log


def test_a_configuration_unlike_the_live_slab_s_ends_the_master_with_a_message(tools: Bench) -> None:
    first = tools.gunicorn(environ={"LLM_EDGE_CACHE_L1_MAX_CAPACITY": "500"})
    first.pids(2)
    second = tools.gunicorn(environ={"LLM_EDGE_CACHE_L1_MAX_CAPACITY": "600"})
    assert second.wait() == 1
    assert "max_entries" in second.log
    assert first.ask("/pid")


def test_a_reload_with_a_bad_setting_keeps_the_slab(tools: Bench, tmp_path: Path) -> None:
    configuration = tmp_path / "gunicorn.conf.py"
    configuration.write_text("from llm_edge_cache.workers.gunicorn import *\nworkers = 2\n")
    server = tools.start([*GUNICORN, "-c", str(configuration), "slab_app:application"], {})
    server.pids(2)
    server.ask("/set?key=k&value=warm")
    with configuration.open("a") as stream:
        stream.write("raw_env = ['LLM_EDGE_CACHE_L1_TTL=never']\n")
    server.send(signal.SIGHUP)
    wait_until(lambda: "the slab stays as it was" in server.log, "the complaint in the log")
    assert server.ask("/get?key=k")["value"] == "warm"


@pytest.fixture
def owned_by_nobody(monkeypatch: pytest.MonkeyPatch) -> naming.Owner:
    """Look for slabs under the user "nobody", as the master started by root does."""
    nobody = pwd.getpwnam("nobody")
    owner = naming.Owner(nobody.pw_uid, nobody.pw_gid)
    monkeypatch.setattr(naming, "_owner", owner)
    return owner


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a server that drops its privileges")
@pytest.mark.parametrize(("options", "environ"), PRELOAD)
def test_root_hands_the_slab_to_the_workers_user(
    owned_by_nobody: naming.Owner, tools: Bench, options: list[str], environ: dict[str, str]
) -> None:
    uid, gid = map(str, owned_by_nobody)
    server = tools.gunicorn("--user", uid, "--group", gid, *options, environ=environ)
    workers = server.pids(2)
    place = naming.place_of(tools.name, owned_by_nobody)
    for file in (place.segment, place.lock):
        status = os.stat(file)
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (*owned_by_nobody, 0o600)
    assert not os.path.exists(naming.place_of(tools.name, naming.Owner(0, 0)).segment)
    server.ask("/set?key=k&value=shared")
    assert server.value_seen_by("k", 2) == dict.fromkeys(workers, "shared")
    os.kill(min(workers), signal.SIGKILL)
    assert server.value_seen_by("k", 2).keys() != workers
    server.send(signal.SIGHUP)
    wait_until(lambda: not _worker_pids(server) & workers, "new workers")
    assert set(server.value_seen_by("k", 2).values()) == {"shared"}
    tools.wait_attached(3)
