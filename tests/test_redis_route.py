"""Which server a command goes to: decisions driven by hand, then real Sentinels and a real Cluster.

The groups take seconds to start and to fail over, so each is started once and its story told in one test for a face.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fault_proxy import FaultProxy
from processes import ends_well, fork
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, ReadOnlyError, ResponseError, TryAgainError
from redis_faces import Face, make_face
from redis_servers import RedisCluster, RedisServer, SentinelGroup, wait_for

from llm_edge_cache.redis_client import Batch, Call, LuaScript, RedisTrouble, Script
from llm_edge_cache.redis_route import ClusterRoute, Node, SentinelRoute, Steps, route_to
from llm_edge_cache.redis_target import parse_redis_url

ONE, TWO, THREE = (Node("node", port) for port in (1, 2, 3))
WATCH_ONE, WATCH_TWO = (Node("sentinel", port, is_sentinel=True) for port in (1, 2))
GET = Call(("GET", b"k"))
SET = LuaScript("return redis.call('SET', KEYS[1], ARGV[1])")


def drive(steps: Steps, script: list[tuple[Node, str, Any]]) -> Any:
    """Play Redis: `script` lists the node and first word that must come, and the reply (or trouble) to give."""
    reply: Any = None
    expected = iter(script)
    try:
        node, wires = next(steps)
        while True:
            wanted, word, reply = next(expected)
            assert (wanted, word) == (node, wires[-1][0])
            is_trouble = isinstance(reply, RedisTrouble)
            node, wires = steps.throw(reply) if is_trouble else steps.send([None] * (len(wires) - 1) + [reply])
    except StopIteration as done:
        assert next(expected, None) is None
        return done.value
    except RedisTrouble as trouble:
        assert next(expected, None) is None
        return trouble


def trouble(reason: Any = "connection") -> RedisTrouble:
    return RedisTrouble(reason, "played")


# ---- Sentinels ----


def named(node: Node) -> list[bytes]:
    return [node.host.encode(), str(node.port).encode()]


FIND_ONE = [(WATCH_ONE, "SENTINEL", named(ONE)), (ONE, "ROLE", [b"master", 0, []])]


def sentinels() -> SentinelRoute:
    return SentinelRoute([WATCH_ONE, WATCH_TWO], "main")


def test_the_master_is_asked_for_once() -> None:
    route = sentinels()
    assert drive(route.perform(GET), [*FIND_ONE, (ONE, "GET", b"v")]) == b"v"
    assert drive(route.perform(GET), [(ONE, "GET", b"v")]) == b"v"


@pytest.mark.parametrize("reply", [None, trouble(), ResponseError("x"), trouble("auth")])
def test_the_next_sentinel_is_asked_when_one_knows_nothing(reply: Any) -> None:
    script = [(WATCH_ONE, "SENTINEL", reply), (WATCH_TWO, "SENTINEL", named(ONE)), FIND_ONE[1], (ONE, "GET", b"v")]
    assert drive(sentinels().perform(GET), script) == b"v"


def test_a_sentinel_that_used_up_the_time_is_asked_last_from_then_on() -> None:
    route = sentinels()
    assert drive(route.perform(GET), [(WATCH_ONE, "SENTINEL", trouble("timeout"))]).reason == "timeout"
    script = [(WATCH_TWO, "SENTINEL", named(ONE)), FIND_ONE[1], (ONE, "GET", b"v")]
    assert drive(route.perform(GET), script) == b"v"


def test_a_master_that_says_it_is_a_replica_is_not_taken() -> None:
    script = [
        (WATCH_ONE, "SENTINEL", named(ONE)),
        (ONE, "ROLE", [b"slave"]),
        (WATCH_TWO, "SENTINEL", named(TWO)),
        (TWO, "ROLE", [b"master"]),
        (TWO, "GET", b"v"),
    ]
    assert drive(sentinels().perform(GET), script) == b"v"


def test_no_master_at_all_is_an_outage() -> None:
    nobody = [(WATCH_ONE, "SENTINEL", None), (WATCH_TWO, "SENTINEL", None)]
    found = drive(sentinels().perform(GET), nobody)
    assert (found.reason, found.is_outage) == ("connection", True)


@pytest.mark.parametrize("reply", [trouble(), trouble("timeout"), ReadOnlyError("x")])
def test_a_master_that_fails_or_was_demoted_is_asked_for_anew(reply: Any) -> None:
    route = sentinels()
    assert isinstance(drive(route.perform(GET), [*FIND_ONE, (ONE, "GET", reply)]), RedisTrouble)
    assert drive(route.perform(GET), [*FIND_ONE, (ONE, "GET", b"v")]) == b"v"


@pytest.mark.parametrize("reply", [[b"node", b"x"], [1, 2], [b"\xff", b"1"]])
def test_a_sentinel_s_answer_without_sense_is_a_trouble(reply: Any) -> None:
    route = SentinelRoute([WATCH_ONE], "main")
    assert drive(route.perform(GET), [(WATCH_ONE, "SENTINEL", reply)]).reason == "response"


# ---- a Cluster ----

MAP = [[0, 8000, [b"node", 1, b"id"], [b"replica", 9, b"id"]], [8001, 16383, [b"node", 2, b"id"]]]
HOLDER = ONE if key_slot(b"k") <= 8000 else TWO
OTHER = TWO if HOLDER is ONE else ONE


def cluster() -> ClusterRoute:
    return ClusterRoute([THREE])


def learned() -> ClusterRoute:
    route = cluster()
    assert drive(route.perform(GET), [(THREE, "CLUSTER", MAP), (HOLDER, "GET", b"v")]) == b"v"
    return route


def test_the_map_of_slots_is_asked_for_once() -> None:
    route = learned()
    assert route.shards == 2
    assert drive(route.perform(GET), [(HOLDER, "GET", b"v")]) == b"v"


def test_moved_is_followed_and_remembered() -> None:
    route = learned()
    moved = MovedError(f"{key_slot(b'k')} node:3")
    assert drive(route.perform(GET), [(HOLDER, "GET", moved), (THREE, "GET", b"v")]) == b"v"
    assert drive(route.perform(GET), [(THREE, "GET", b"v")]) == b"v"


def test_moved_and_ask_are_understood_as_older_redis_py_hands_them_on() -> None:
    route = learned()
    slot = key_slot(b"k")
    moved, ask = ResponseError(f"MOVED {slot} node:3"), ResponseError(f"ASK {slot} node:1")
    assert drive(route.perform(GET), [(HOLDER, "GET", moved), (THREE, "GET", ask), (ONE, "GET", b"v")]) == b"v"
    assert drive(route.perform(GET), [(THREE, "GET", ResponseError("MOVED nonsense"))]).reason == "cluster"


def test_moved_without_a_host_means_the_same_host() -> None:
    moved = MovedError(f"{key_slot(b'k')} :3")
    assert drive(learned().perform(GET), [(HOLDER, "GET", moved), (THREE, "GET", b"v")]) == b"v"


def test_ask_is_followed_once_and_not_remembered() -> None:
    route = learned()
    ask = AskError(f"{key_slot(b'k')} node:3")
    steps = route.perform(GET)
    assert next(steps) == (HOLDER, [GET.args])
    assert steps.send([ask]) == (THREE, [("ASKING",), GET.args])
    with pytest.raises(StopIteration) as done:
        steps.send([b"OK", b"v"])
    assert done.value.value == b"v"
    assert drive(route.perform(GET), [(HOLDER, "GET", b"v")]) == b"v"


def test_redirections_end() -> None:
    moved = {node: MovedError(f"{key_slot(b'k')} node:{node.port}") for node in (ONE, TWO)}
    there_and_back = [(HOLDER, "GET", moved[OTHER]), (OTHER, "GET", moved[HOLDER])] * 2 + [
        (HOLDER, "GET", moved[OTHER])
    ]
    found = drive(learned().perform(GET), there_and_back)
    assert (found.reason, found.is_outage) == ("cluster", True)


@pytest.mark.parametrize(("reply", "reason"), [(ClusterDownError("x"), "cluster"), (TryAgainError("x"), "cluster")])
def test_a_cluster_that_does_not_serve_the_slot_is_an_outage(reply: Any, reason: str) -> None:
    found = drive(learned().perform(GET), [(HOLDER, "GET", reply)])
    assert (found.reason, found.is_outage) == (reason, True)


def test_after_a_node_failed_another_is_asked_for_the_map() -> None:
    route = learned()
    assert drive(route.perform(GET), [(HOLDER, "GET", trouble())]).reason == "connection"
    assert drive(route.perform(GET), [(THREE, "CLUSTER", trouble("timeout"))]).reason == "timeout"
    assert drive(route.perform(GET), [(ONE, "CLUSTER", MAP), (HOLDER, "GET", b"v")]) == b"v"


def test_a_slot_that_nobody_holds_is_an_outage() -> None:
    found = drive(cluster().perform(GET), [(THREE, "CLUSTER", [[0, 0, [b"node", 1]]])])
    assert (found.reason, found.is_outage) == ("cluster", True)


@pytest.mark.parametrize("reply", [[[0, 1]], [["x", 1, [b"node", 1]]], [[0, 1, [b"\xff", 1]]], [7]])
def test_a_map_without_sense_is_a_trouble(reply: Any) -> None:
    assert drive(cluster().perform(GET), [(THREE, "CLUSTER", reply)]).reason == "response"


def test_a_server_that_is_no_cluster_is_told_apart() -> None:
    found = drive(cluster().perform(GET), [(THREE, "CLUSTER", ResponseError("ERR This instance has cluster support"))])
    assert found.reason == "response"


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (GET, b"k"),
        (Call(("GET", "k")), b"k"),
        (Call(("MEMORY", "USAGE", b"k")), b"k"),
        (Call(("XREAD", "BLOCK", 200, "STREAMS", b"k", "$")), b"k"),
        (Call((b"XREAD", b"BLOCK", 200, b"STREAMS", b"k", b"$")), b"k"),
        (Script(SET, b"k", (b"v",)), b"k"),
        (Call(("GET", b"{k}1")), b"k"),
    ],
)
def test_a_command_goes_to_the_holder_of_its_key(command: Any, key: bytes) -> None:
    node, _ = next(learned().perform(command))
    assert node == (ONE if key_slot(key) <= 8000 else TWO)


@pytest.mark.parametrize("command", [Call(("PING",)), Call((b"SCAN", 0, b"COUNT", 10)), Call((b"DBSIZE",))])
def test_a_command_without_a_key_goes_to_one_and_the_same_node(command: Call) -> None:
    node, _ = next(learned().perform(command))
    assert node == ONE


def test_a_command_without_a_key_goes_to_the_shard_that_it_names() -> None:
    route = learned()
    size = [Call((b"DBSIZE",), shard) for shard in range(3)]
    assert drive(route.perform(size[0]), [(ONE, b"DBSIZE", 5)]) == 5
    assert drive(route.perform(size[1]), [(TWO, b"DBSIZE", 7)]) == 7
    assert drive(route.perform(size[2]), []) is None
    assert drive(route.perform(size[1]), [(TWO, b"DBSIZE", ResponseError("ERR"))]).reason == "response"
    assert drive(route.perform(size[1]), [(TWO, b"DBSIZE", trouble())]).reason == "connection"
    assert drive(route_to(parse_redis_url("redis://h")).perform(size[1]), []) is None


def exchanges(steps: Steps, replies: list[Any]) -> tuple[list[tuple[Node, int]], Any]:
    """Give the replies to one exchange after the other. Returns the nodes, with the commands sent, and the answer."""
    sent: list[tuple[Node, int]] = []
    try:
        node, wires = next(steps)
        while True:
            sent.append((node, len(wires)))
            reply = replies.pop(0)
            node, wires = steps.throw(reply) if isinstance(reply, RedisTrouble) else steps.send(reply)
    except StopIteration as done:
        return sent, done.value


FOUR = Batch(tuple(Call(("GET", b"%d" % n)) for n in range(4)))
AT_ONE = [at for at in range(4) if key_slot(b"%d" % at) <= 8000]
AT_TWO = [at for at in range(4) if at not in AT_ONE]


def test_a_batch_is_one_round_trip_to_each_node() -> None:
    assert len(AT_ONE) == len(AT_TWO) == 2
    order = [ONE, TWO] if 0 in AT_ONE else [TWO, ONE]
    sent, answers = exchanges(learned().perform(FOUR), [[b"a", b"b"], [b"c", b"d"]])
    assert sent == [(node, 2) for node in order]
    assert sorted(answers) == [b"a", b"b", b"c", b"d"]
    assert [answers[at] for at in (AT_ONE if order[0] is ONE else AT_TWO)] == [b"a", b"b"]


def test_what_a_node_refuses_of_a_batch_is_repeated_alone() -> None:
    moved = MovedError("1 node:3")
    sent, answers = exchanges(
        learned().perform(FOUR),
        [[b"a", moved], [moved], [b"moved"], [b"c", ResponseError("ERR")], [ResponseError("ERR")]],
    )
    assert [count for _, count in sent] == [2, 1, 1, 2, 1]
    assert sent[2][0] == THREE
    assert {b"a", b"moved", b"c"} < set(answers)
    assert [answer.reason for answer in answers if isinstance(answer, RedisTrouble)] == ["response"]


def test_a_node_that_fails_takes_its_part_of_a_batch_alone() -> None:
    failed = trouble()
    _, answers = exchanges(learned().perform(FOUR), [failed, [b"c", b"d"]])
    assert answers.count(failed) == 2
    assert {b"c", b"d"} < set(answers)


def test_a_node_s_name_is_its_address() -> None:
    assert [str(Node("::1", 7)), str(Node("h", 7)), str(Node("", 0, "/s"))] == ["[::1]:7", "h:7", "/s"]
    assert next(route_to(parse_redis_url("unix:///s")).perform(GET))[0] == Node("", 0, "/s")


# ---- the real groups ----


@pytest.fixture(params=["threads", "asyncio"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Face]]:
    made: list[Face] = []

    def make_one(url: str, **options: Any) -> Face:
        made.append(make_face(request.param, url, **{"operation_timeout": 10.0, **options}))
        return made[-1]

    yield make_one
    for face in made:
        face.close()


def test_a_failed_master_is_replaced_by_the_one_that_the_sentinels_elect() -> None:
    with SentinelGroup(password="pw") as group:
        faces = [make_face(kind, group.url, operation_timeout=10.0) for kind in ("threads", "asyncio")]
        for face in faces:
            face.connect()
            assert face.run(Script(SET, b"k", (b"before",))) == b"OK"
        wait_for(lambda: group.replica.ask("GET", "k") == b"before", "replication")
        group.sentinels[0].kill()  # the first one that is asked is gone too
        group.fail_over()
        for face in faces:
            wait_for(lambda face=face: is_served(face, b"before"), "the new master is found")  # type: ignore[misc]
            assert face.run(Call(("SET", b"k", b"after"))) == b"OK"
            assert group.replica.ask("GET", "k") == b"after"
            group.replica.ask("SET", "k", "before")
        for sentinel in group.sentinels:
            sentinel.kill()
        for face in faces:
            assert face.run(Call(("GET", b"k"))) == b"before"  # they are asked only when the master fails
            face.close()


def is_served(face: Face, value: bytes) -> bool:
    start = time.monotonic()
    try:
        answer = face.run(Call(("GET", b"k")))
    except RedisTrouble as found:
        answer = found.is_outage
    assert time.monotonic() - start < 15.0
    assert answer in {value, True}
    return bool(answer == value)


@pytest.fixture(scope="module")
def redis_cluster() -> Iterator[RedisCluster]:
    with RedisCluster(password="pw") as started:
        yield started


def other_than(redis_cluster: RedisCluster, node: RedisServer) -> RedisServer:
    return next(other for other in redis_cluster.nodes if other is not node)


def test_keys_on_every_node_are_served(make: Callable[..., Face], redis_cluster: RedisCluster) -> None:
    face = make(redis_cluster.url)
    face.connect()
    for n in range(50):
        assert face.run(Script(SET, b"all:%d" % n, (n,))) == b"OK"
    answers = face.run(Batch(tuple(Call(("GET", b"all:%d" % n)) for n in range(50))))
    assert answers == [b"%d" % n for n in range(50)]
    holders = {redis_cluster.holder(b"all:%d" % n).port for n in range(50)}
    assert len(holders) == 3


def test_a_slot_is_served_while_it_moves_and_after(make: Callable[..., Face], redis_cluster: RedisCluster) -> None:
    face = make(redis_cluster.url)
    tag = b"{%s}" % type(face).__name__.encode()
    here, there, late = tag + b"here", tag + b"there", tag + b"late"
    source = redis_cluster.holder(tag)
    assert face.run(Call(("SET", here, b"1"))) == b"OK"
    with redis_cluster.migrating(here, other_than(redis_cluster, source)):
        assert face.run(Call(("GET", here))) == b"1"
        assert face.run(Script(SET, there, (b"2",))) == b"OK"  # ASK: it is created at the new node
        assert face.run(Call(("GET", there))) == b"2"
    answers = face.run(Batch((Call(("GET", here)), Call(("GET", there)), Call(("SET", late, b"3")))))
    assert answers == [b"1", b"2", b"OK"]  # MOVED
    assert make(redis_cluster.url).run(Call(("GET", here))) == b"1"


def test_a_cluster_node_behind_a_plain_url_is_told_apart(
    make: Callable[..., Face], redis_cluster: RedisCluster
) -> None:
    node = other_than(redis_cluster, redis_cluster.holder(b"k"))
    with pytest.raises(RedisTrouble, match="redis\\+cluster://") as caught:
        make(node.url).run(GET)
    assert caught.value.reason == "cluster"


def test_a_stopped_node_costs_its_keys_alone(make: Callable[..., Face], redis_cluster: RedisCluster) -> None:
    face = make(redis_cluster.url, operation_timeout=0.3)
    face.connect()
    stopped = redis_cluster.holder(b"k")
    spared = next(b"%d" % n for n in range(100) if redis_cluster.holder(b"%d" % n) is not stopped)
    stopped.pause()
    try:
        start = time.monotonic()
        with pytest.raises(RedisTrouble) as caught:
            face.run(GET)
        assert caught.value.reason == "timeout"
        assert time.monotonic() - start < 3.0
        wait_for(lambda: is_answered(face, Call(("GET", spared))), "the others' keys are served")
    finally:
        stopped.resume()
    wait_for(lambda: is_answered(face, GET), "all keys are served again")


def is_answered(face: Face, command: Call) -> bool:
    try:
        face.run(command)
    except RedisTrouble:
        return False
    return True


def test_a_seed_that_is_gone_is_passed_over(make: Callable[..., Face], redis_cluster: RedisCluster) -> None:
    with FaultProxy(redis_cluster.nodes[0].address) as proxy:
        proxy.refuse()
        url = redis_cluster.url.replace("@", f"@127.0.0.1:{proxy.port},")
        make(url).connect()


def test_a_fork_leaves_the_cluster_s_connections_to_the_parent(redis_cluster: RedisCluster) -> None:
    client = make_face("threads", redis_cluster.url, operation_timeout=5.0)
    client.connect()
    echo = LuaScript("return {KEYS[1], ARGV[1]}")

    def converse(who: bytes) -> None:
        for n in range(200):
            assert client.run(Script(echo, b"%d" % n, (who,))) == [b"%d" % n, who]

    child = fork(lambda: converse(b"child"))
    converse(b"parent")
    assert ends_well(child)
    client.close()
