"""Some hundred interleavings find nothing, and each planted bug of the protocol is found by them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from coherence_monitor import Violation
from coherence_world import Plan, World, random_plan
from stepped import SteppedSlab

from llm_edge_cache import deferred, follower, invalidation, redis_tier
from llm_edge_cache.core import Core
from llm_edge_cache.follower import Follower
from llm_edge_cache.invalidation import Invalidation, Invalidator, tag_hash
from llm_edge_cache.redis_client import LuaScript
from llm_edge_cache.redis_records import pack_id
from llm_edge_cache.redis_tier import RedisTier
from llm_edge_cache.regions import Word

FOLDER = Path(__file__).parent
MOST_RUNS = 1500
ONE_KEY = {"keys": ("a",), "kinds": ("key",)}
TAGGED = {"keys": ("c",), "kinds": ("tag",)}
CLEARING = {"keys": ("a",), "kinds": ("all",)}
QUIET = {"failing": 0.0, "loss": "", "kills": False, "is_short": False, "out_of_contact": False, "processes": 1}
# User 0 and 2 are on the first host, 1 on the second.
HERE = {"script": (("key",), (), ("store", "store")), "lateness": 1.0, "stickiness": 0.0}
HERE_BY_TAG = {**HERE, "script": (("tag",), (), ("store", "store"))}
THERE = {**HERE, "script": (("key",), ("store", "store")), "stickiness": 0.8}
THERE_BY_TAG = {**THERE, "script": (("tag",), ("store", "store"))}

Patch = pytest.MonkeyPatch


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.mark.timeout(300)
def test_some_hundred_interleavings_have_no_violation(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(FOLDER / "interleavings.py"), "--runs", "300", "--seed", "7", "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(result.read_text())
    assert document["violations"] == []
    never = [name for name, times in document["met"].items() if times == 0]
    assert never == []


def no_second_deletion(patch: Patch) -> None:
    def invalidate(self: Invalidator, what: Invalidation) -> Any:
        self.apply(what)
        yield from self._publish(what)

    patch.setattr(Invalidator, "invalidate", invalidate)


def no_confirmation(patch: Patch) -> None:
    announce = Invalidator._announce

    def publish(self: Any, what: Invalidation) -> Any:
        packed = yield from announce(self, what)
        yield from self._tier.ask(self._void(what, packed))
        self._slab._word_raise(Word.BEGIN, packed)
        return True

    patch.setattr(Invalidator, "_publish", publish)


def confirmed_before_the_tombstone(patch: Patch) -> None:
    def publish(self: Any, what: Invalidation) -> Any:
        packed = yield from self._announce(what)
        newest = yield from self._announce(what)
        yield from self._tier.ask(self._void(what, packed))
        self._slab._word_raise(Word.BEGIN, newest)
        return True

    patch.setattr(Invalidator, "_publish", publish)


def write_without(patch: Patch, text: str, instead: str) -> None:
    source = redis_tier.WRITE.text
    assert text in source
    patch.setattr(redis_tier, "WRITE", LuaScript(source.replace(text, instead)))


def tombstones_ignored_by_writes(patch: Patch) -> None:
    write_without(patch, "elseif begin < floor then return 0 end", "end")


def leases_not_checked(patch: Patch) -> None:
    write_without(patch, "if not leased() or token ~= ARGV[2] then return 0 end", "")


def floors_forgotten_with_the_value(patch: Patch) -> None:
    write_without(patch, "local guarded = guard()", "local guarded = 0")


def fences_not_checked(patch: Patch) -> None:
    def fill(self: Any, key: bytes, value: bytes, fence: int, **lives: Any) -> Any:
        return self.set(key, value, **lives)

    patch.setattr(SteppedSlab, "_fill_fenced", fill, raising=False)


def promotions_without_a_token(patch: Patch) -> None:
    def fill(self: Any, key: bytes, value: bytes, token: int, **lives: Any) -> Any:
        return self.set(key, value, **lives)

    patch.setattr(SteppedSlab, "fill", fill, raising=False)


def promotions_under_the_epoch_of_their_end(patch: Patch) -> None:
    promote = Core.promote

    def late(self: Core, look: Any, found: Any, *, stale: float = 0.0) -> None:
        promote(self, look._replace(begun=self.begin(look.key)), found, stale=stale)

    patch.setattr(Core, "promote", late)


def tags_raised_to_the_epoch_before(patch: Patch) -> None:
    def apply(self: Any, what: Invalidation) -> None:
        slab = self._slab
        slab._tag_raise(tag_hash(what.name), slab._word(Word.TAG_EPOCH))
        slab._word_add(Word.TAG_EPOCH, 1)

    patch.setattr(Invalidator, "apply", apply)


def tags_not_compared_in_redis(patch: Patch) -> None:
    judge = RedisTier._judge

    def judged(self: Any, key: bytes, record: bytes | None) -> Any:
        steps = judge(self, key, record)
        try:
            batch = next(steps)
            while True:
                batch = steps.send([b"0" * 16] * len(batch.commands))
        except StopIteration as stop:
            return stop.value
        yield

    patch.setattr(RedisTier, "_judge", judged)


def clear_all_not_remembered_by_its_host(patch: Patch) -> None:
    patch.setattr(invalidation, "Word", _Without(Word, "CLEARED"))


def clear_all_not_remembered_by_other_hosts(patch: Patch) -> None:
    def apply(self: Any, packed: int, fields: dict[bytes, bytes]) -> None:
        what, origin = follower.applied(fields)
        if what is not None and origin != b"%d" % self._slab._mapping.nonce:
            self._invalidator.apply(what)

    patch.setattr(Follower, "_apply", apply)


class _Without:
    """Word, but one of them is another that nobody reads."""

    def __init__(self, words: Any, name: str) -> None:
        self._words, self._name = words, name

    def __getattr__(self, name: str) -> Any:
        return 31 if name == self._name else getattr(self._words, name)


def cursor_moved_before_it_is_applied(patch: Patch) -> None:
    apply, entries_of = Follower._apply, follower._entries_of
    newest = [0]

    def read(reply: Any) -> Any:
        entries = entries_of(reply)
        newest[0] = max([0, *(pack_id(identifier) for identifier, _ in entries)])
        return entries

    def late(self: Any, fields: dict[bytes, bytes], identifier: int) -> None:
        self._slab._word_raise(Word.CURSOR, newest[0])
        apply(self, fields, identifier)

    patch.setattr(follower, "_entries_of", read)
    patch.setattr(Follower, "_apply", late)


def place_looked_for_only_once(patch: Patch) -> None:
    find = Follower._is_in_stream

    def found(self: Any, cursor: int) -> Any:
        if self._has_established:
            return True
        return (yield from find(self, cursor))

    patch.setattr(Follower, "_is_in_stream", found)


def undelivered_invalidations_ignored(patch: Patch) -> None:
    patch.setattr(RedisTier, "is_usable", lambda self: self.breaker.is_closed())


def flights_joined_although_overtaken(patch: Patch) -> None:
    patch.setattr(Core, "has_overtaken", lambda *_: False)


def tag_ids_recreated_at_the_writers_begin(patch: Patch) -> None:
    patch.setattr(deferred, "_concerns", lambda *_: False)


PLANTED: dict[Callable[[Patch], None], dict[str, Any]] = {
    no_second_deletion: {**ONE_KEY, **HERE},
    no_confirmation: {**ONE_KEY, **THERE},
    confirmed_before_the_tombstone: {**ONE_KEY, **THERE, "stickiness": 0.5},
    tombstones_ignored_by_writes: {**ONE_KEY, "stores": 0.5},
    leases_not_checked: {**ONE_KEY, "stores": 0.0},
    floors_forgotten_with_the_value: {
        **ONE_KEY,
        "script": (("key", "store"), ("key", "store", "nap", "nap", "nap")),
        "is_short": True,
        "lateness": 100.0,
    },
    fences_not_checked: ONE_KEY,
    promotions_without_a_token: {**ONE_KEY, **HERE},
    promotions_under_the_epoch_of_their_end: {**TAGGED, **HERE_BY_TAG, "stickiness": 0.5},
    tags_raised_to_the_epoch_before: {**TAGGED, **THERE_BY_TAG},
    tags_not_compared_in_redis: TAGGED,
    clear_all_not_remembered_by_its_host: CLEARING,
    clear_all_not_remembered_by_other_hosts: CLEARING,
    cursor_moved_before_it_is_applied: {
        **ONE_KEY,
        "script": (("key",), (), ("store",), ("store",)),
        "kills": True,
        "processes": 2,
    },
    place_looked_for_only_once: {**ONE_KEY, "loss": "stream"},
    undelivered_invalidations_ignored: {**ONE_KEY, "failing": 0.3},
    flights_joined_although_overtaken: {**ONE_KEY, "stores": 0.0},
    tag_ids_recreated_at_the_writers_begin: {**TAGGED, "loss": "tags", "lateness": 10.0},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Callable[[Patch], None], world: World, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    for number in range(MOST_RUNS):
        plan: Plan = random_plan(random.Random(f"planted {number}"))._replace(**{**QUIET, **PLANTED[plant]})
        try:
            world.play(number, 3, plan)
        except Violation:
            print(f"found by interleaving {number}")
            return
    pytest.fail(f"not found in {MOST_RUNS} interleavings")
