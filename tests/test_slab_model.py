"""A slab and a dictionary are driven by the same operations and never differ.

The slab here is large enough never to evict, so a miss is as wrong as a wrong value.
"""

from __future__ import annotations

import os
import secrets

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_edge_cache import SharedSlab, SlabConfig

KEYS = st.sampled_from([b"a", b"b", b"c", b"key", b"key2", b"x" * 64, b"x" * 65, b"y" * 1024])
VALUES = st.one_of(
    st.binary(max_size=200),
    st.integers(min_value=-(2**63), max_value=2**63 - 1).map(lambda number: b"%d" % number),
    st.integers(min_value=0, max_value=40_000).map(bytes),
)
LIVES = st.sampled_from([None, 1.0, 5.0, 100.0])


class SlabModel(RuleBasedStateMachine):
    """The dictionary maps a key to (value, when it expires or None)."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = SharedSlab(
            f"model-{os.getpid()}-{secrets.token_hex(4)}", SlabConfig(memory_bytes=4 << 20, ttl=None)
        )
        self.model: dict[bytes, tuple[bytes, float | None]] = {}
        self.tokens: dict[bytes, int] = {}
        self.now = 0.0

    def teardown(self) -> None:
        assert self.slab.check() == []
        self.slab.unlink()
        self.slab.close()

    def live(self, key: bytes) -> bytes | None:
        value, until = self.model.get(key, (None, None))
        return None if until is not None and until <= self.now else value

    def put(self, key: bytes, value: bytes, life: float | None) -> None:
        self.model[key] = (value, None if life is None else self.now + life)
        self.tokens.pop(key, None)

    @rule(key=KEYS, value=VALUES, life=LIVES)
    def set(self, key: bytes, value: bytes, life: float | None) -> None:
        assert self.slab.set(key, value, ttl=life)
        self.put(key, value, life)

    @rule(pairs=st.dictionaries(KEYS, VALUES), life=LIVES)
    def set_many(self, pairs: dict[bytes, bytes], life: float | None) -> None:
        assert self.slab.set_many(pairs, ttl=life) == []
        for key, value in pairs.items():
            self.put(key, value, life)

    @rule(key=KEYS, value=VALUES)
    def add(self, key: bytes, value: bytes) -> None:
        absent = self.live(key) is None
        assert self.slab.add(key, value) is absent
        if absent:
            self.put(key, value, None)

    @rule(key=KEYS, value=VALUES, stale=st.booleans())
    def cas(self, key: bytes, value: bytes, stale: bool) -> None:
        found = self.slab.gets(key)
        assert (found and found[0]) == self.live(key)
        if found is not None:
            assert self.slab.cas(key, value, found[1] + stale) is not stale
            if not stale:
                self.put(key, value, None)

    @rule(key=KEYS)
    def take_token(self, key: bytes) -> None:
        value, token = self.slab.get_or_token(key)
        assert value == self.live(key)
        self.tokens[key] = token

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), value=VALUES)
    def fill_with_a_current_token(self, data: st.DataObject, value: bytes) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        # A token may be void without cause (keys share generations), but a fill that says so stored nothing.
        if self.slab.fill(key, value, self.tokens.pop(key)):
            self.put(key, value, None)

    @rule(key=KEYS, delta=st.integers(min_value=-(2**62), max_value=2**62))
    def incr(self, key: bytes, delta: int) -> None:
        value = self.live(key)
        outcome: object
        try:
            outcome = self.slab.incr(key, delta)
        except (KeyError, ValueError, OverflowError) as error:
            outcome = type(error)
        if value is None:
            assert outcome is KeyError
        elif not value.lstrip(b"-").isdigit() or len(value) > 20:
            assert outcome is ValueError
        elif not -(2**63) <= int(value) + delta < 2**63:
            assert outcome is OverflowError
        else:
            assert outcome == int(value) + delta
            self.model[key] = (b"%d" % outcome, self.model[key][1])
            self.tokens.pop(key, None)

    @rule(key=KEYS, life=LIVES)
    def touch(self, key: bytes, life: float | None) -> None:
        value = self.live(key)
        assert self.slab.touch(key, life) is (value is not None)
        if value is not None:
            self.model[key] = (value, None if life is None else self.now + life)

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        assert self.slab.delete(key) is (self.live(key) is not None)
        self.model.pop(key, None)
        self.tokens.pop(key, None)

    @rule(keys=st.frozensets(KEYS))
    def delete_many(self, keys: frozenset[bytes]) -> None:
        assert self.slab.delete_many(keys) == sum(self.live(key) is not None for key in keys)
        for key in keys:
            self.model.pop(key, None)
            self.tokens.pop(key, None)

    @rule(key=KEYS)
    def pop(self, key: bytes) -> None:
        assert self.slab.pop(key) == self.live(key)
        self.model.pop(key, None)
        self.tokens.pop(key, None)

    @rule()
    def clear(self) -> None:
        self.slab.clear()
        self.model.clear()
        self.tokens.clear()

    @rule(seconds=st.sampled_from([0.5, 3.0, 50.0]))
    def wait(self, seconds: float) -> None:
        # A hair more on the slab's side: its clock also runs by itself, and comes in steps.
        self.slab._advance_clock(seconds)
        self.now += seconds

    @rule()
    def attach_again(self) -> None:
        offset = self.now
        again = SharedSlab.attach(self.slab.name)
        again._advance_clock(offset)
        self.slab.close()
        self.slab = again

    @invariant()
    def every_key_reads_the_same(self) -> None:
        expected = {key: self.live(key) for key in self.model}
        assert {key: self.slab.get(key) for key in expected} == expected
        assert self.slab.get_many(expected) == {key: value for key, value in expected.items() if value is not None}

    @invariant()
    def a_scan_sees_what_is_live(self) -> None:
        assert {info.key for info in self.slab.scan()} == {key for key in self.model if self.live(key) is not None}


TestSlabModel = SlabModel.TestCase
TestSlabModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
