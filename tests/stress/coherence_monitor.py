"""Knows what each host has to know, and judges every answer by it.

A key's *version* counts the changes of what it is computed from: it grows when an invalidation of the key is called for
(the user changes the source, then invalidates). An answer of version v is *old* for whoever may no longer see it:

- on the host of an invalidation, operations that begin after it returned;
- on another host, operations that begin after the stream entry that confirms it was applied there (`Word.CURSOR`), and
  at the latest when it has returned and that host has applied all there is;
- at the end, when nothing is under way and everything was delivered, on every host.

What confirms what is read off the commands that really reached Redis: an announcement (XADD) covers the versions of its
moment, a tombstone or raised id carries an announcement's number, and an announcement after that confirms it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llm_edge_cache import SharedSlab
from llm_edge_cache.redis_client import Call, Script
from llm_edge_cache.redis_records import RAISE, TOMBSTONE, pack_id
from llm_edge_cache.regions import Counter, Word

What = tuple[str, str]
"""Kind and name of an invalidation."""
Versions = dict[str, int]


class Violation(AssertionError):  # noqa: N818 - what it is
    """An answer that must not have been given."""


class Expected(NamedTuple):
    """What was known when an operation began."""

    host: int
    versions: Versions
    is_blind: bool
    """Redis lost its data and this host has not noticed: nothing is promised until then."""


class Monitor:
    """Of one interleaving.

    Args:
        slabs: One for each host.
        keys: The names of all keys.
        affected: The keys that an invalidation concerns.
        meaning: The invalidation that a key of Redis (tombstone, tag's id, cleared) belongs to.
    """

    def __init__(
        self,
        slabs: list[SharedSlab],
        keys: list[str],
        affected: Callable[[What], list[str]],
        meaning: dict[bytes, What],
    ) -> None:
        self.source: Versions = dict.fromkeys(keys, 1)
        self.answers = 0
        self.hits = 0
        self._slabs = slabs
        self._affected = affected
        self._meaning = meaning
        self._returned: list[Versions] = [{} for _ in slabs]
        self._announced: dict[int, tuple[What, Versions]] = {}
        self._voided: dict[What, Versions] = {}
        self._confirmed: list[tuple[int, int, Versions]] = []
        """Host of origin, id, and what is confirmed by it. That host itself is told by the return alone."""
        self._host_of = {b"%d" % slab._mapping.nonce: host for host, slab in enumerate(slabs)}
        self.newest = 0
        """The last id of the stream, as far as this run has made it."""
        self._losses = 0
        self._noticed_before = [self.starts_over(host) for host in range(len(slabs))]

    # ---- what happens ----

    def called(self, what: What) -> Versions:
        """An invalidation is called for: the source has changed. Returns the versions that are right from now on."""
        for key in self._affected(what):
            self.source[key] += 1
        return self._now(what)

    def returned(self, host: int, what: What, versions: Versions) -> None:
        """The invalidation returned."""
        _raise(self._returned[host], versions)
        voided = self._voided.get(what, {})
        if all(voided.get(key, 0) >= version for key, version in versions.items()):  # else it is in the journal
            self._confirmed.append((host, self.newest, versions))

    def ended(self) -> None:
        """Everything that returned has been delivered by now."""
        for versions in self._returned:
            for others in self._returned:
                _raise(versions, others)

    def saw(self, command: Any, reply: Any) -> None:
        """A command was carried out."""
        if isinstance(command, Call) and command.args[0] == b"XADD":
            self._saw_announcement(dict(zip(command.args[6::2], command.args[7::2], strict=True)), pack_id(reply))
        elif isinstance(command, Script) and command.source in (TOMBSTONE, RAISE):
            what, versions = self._announced.get(int(command.args[0], 16), (None, {}))
            if what is not None and what == self._meaning.get(command.key):
                _raise(self._voided.setdefault(what, {}), versions)

    def _saw_announcement(self, fields: dict[Any, Any], identifier: int) -> None:
        self.newest = max(self.newest, identifier)
        what = (fields[b"kind"].decode(), fields.get(b"name", b"").decode())
        if what[0] == "hello":
            return
        self._announced[identifier] = (what, self._now(what))
        if what in self._voided:
            self._confirmed.append((self._host_of[fields[b"origin"]], identifier, dict(self._voided[what])))

    def starts_over(self, host: int) -> int:
        """Return how often a host has lost its place in the stream."""
        return self._slabs[host]._counter_sums()[Counter.STREAM_FLUSHES]

    def lost(self) -> None:
        """Redis lost all its data."""
        self._losses += 1

    # ---- what is asked ----

    def expect(self, host: int) -> Expected:
        """An operation begins on a host."""
        versions = dict(self._returned[host])
        cursor = self._slabs[host]._word(Word.CURSOR)
        for origin, identifier, confirmed in self._confirmed:
            if origin != host and identifier <= cursor:
                _raise(versions, confirmed)
        noticed = self.starts_over(host) - self._noticed_before[host]
        return Expected(host, versions, noticed < self._losses)

    def judge(self, key: str, content: str | None, expected: Expected) -> None:
        """The operation returned, None for nothing.

        Raises:
            Violation: an old value, or another key's.
        """
        self.answers += 1
        if content is None:
            return
        self.hits += 1
        of, _, version = content.partition(":")
        if of != key:
            raise Violation(f"{key} was answered with the value of {of}")
        needed = expected.versions.get(key, 1)
        if int(version) < needed and not expected.is_blind:
            raise Violation(f"host {expected.host}: {key} was answered in version {version}, {needed} is needed")

    def _now(self, what: What) -> Versions:
        return {key: self.source[key] for key in self._affected(what)}


def _raise(versions: Versions, others: Versions) -> None:
    for key, version in others.items():
        versions[key] = max(version, versions.get(key, 0))
