"""Answers of a provider's API, cached inside its client: what the transports of HTTP clients decide, without their I/O.

The rules, the keys and the stored form are the gateway's, so a client with such a transport and a gateway before the
same provider find each other's answers. What differs is who reads: here nobody but the caller does, so an answer is
written down as the caller takes it, and kept once the caller has had it whole:

    read(...)       None: nothing that is cached
    begin(exchange) an Answer, a Call to be made, or None: find() may have to wait, so it is made of steps
    Call            Recording.take(chunk) ... finish(), or failed()

One caller per key makes the call, on this host and, with a lease in Redis, among all; the others wait until its answer
is whole.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from llm_edge_cache.core import Begun
from llm_edge_cache.effects import Steps, WaitForFlight
from llm_edge_cache.errors import CacheError, SettingsError
from llm_edge_cache.fetch import FetchOptions, OutOfTimeError
from llm_edge_cache.flight import Lead, Running
from llm_edge_cache.gateway.answers import Head, HeaderList, entry_of, forwardable, keepable, kept_of
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.exchange import Exchange, ExchangeReader
from llm_edge_cache.gateway.protocols import (
    CUT_REASONS,
    PROTOCOLS,
    BadRequestError,
    FrameSplitter,
    FrameTooLargeError,
    Verdict,
    WireProtocol,
)
from llm_edge_cache.gateway.respond import cache_headers
from llm_edge_cache.lookup import L1Hit
from llm_edge_cache.redis_tier import Found
from llm_edge_cache.regions import Counter

if TYPE_CHECKING:
    from llm_edge_cache.engine import Engine
    from llm_edge_cache.model import CachedResponse

__all__ = ["Answer", "Answering", "Call", "Recording", "protocol_at"]

_WAIT_SECONDS: Final = 1.0  # between two looks at a flight whose wake-up was lost
_IDLE_SECONDS: Final = 2.0
"""How long a caller may leave an answer lying before others no longer wait for it."""
_ANYWHERE: Final = ("/chat/completions", "/embeddings")
"""Ends of paths that mean one thing only, whatever stands before them: many providers have no /v1."""
_JSON: Final = (b"content-type", b"application/json")


class Answer(NamedTuple):
    """What is answered without a call."""

    status: int
    headers: HeaderList
    body: bytes


class _Pace:
    """Whether a caller gets on with its answer. Nothing but a number, so that a flight may hold it for ever."""

    __slots__ = ("idle_since",)

    def __init__(self) -> None:
        self.idle_since: float | None = None
        """Since when the answer waits for its caller, on the monotonic clock; None: the caller waits for the answer."""

    def is_driven(self) -> bool:
        """Tell whether the flight is to be renewed."""
        idle_since = self.idle_since
        return idle_since is None or time.monotonic() - idle_since < _IDLE_SECONDS


class Call(msgspec.Struct, frozen=True, eq=False):
    """A call that this caller is to make."""

    exchange: Exchange
    lead: Lead
    """Its flight; with record -1 nobody waits for it."""
    pace: _Pace
    begun: Begun
    may_store: bool
    headers: HeaderList
    """What the caller is told of the cache, besides the headers of the provider."""


def protocol_at(path: str) -> tuple[WireProtocol, str] | None:
    """Return the protocol that is spoken at a URL's path, and which end of the path is the endpoint; None: none known.

    Providers put the same endpoints under paths of their own, so only the end counts. `/messages` and the like mean
    other things elsewhere (a message that is added to a thread, for one): those need their /v1.
    """
    for endpoint, protocol in PROTOCOLS.items():
        if path.endswith(endpoint):
            return protocol, endpoint
        bare = endpoint.removeprefix("/v1")
        if bare in _ANYWHERE and path.endswith(bare):
            return protocol, bare
    return None


class Answering:
    """The decisions of one transport.

    Args:
        engine: the cache.
        config: the gateway's rules; its upstream is replaced by that of each request.
    """

    def __init__(self, engine: Engine, config: GatewayConfig) -> None:
        self._engine = engine
        self._config = config
        self._reader_of = functools.lru_cache(maxsize=64)(self._reader_for)
        self.cut_reasons: Final = frozenset[str]() if config.keep_cut_answers else CUT_REASONS
        self._dropped: deque[Lead] = deque()  # of answers that nobody read to the end, nor closed

    def _reader_for(self, base: str, endpoint: str) -> ExchangeReader:
        return ExchangeReader(self._for_upstream(base, endpoint))

    def _for_upstream(self, base: str, endpoint: str) -> GatewayConfig:
        config = msgspec.structs.replace(self._config, upstream=base)
        if endpoint in _ANYWHERE or config.base != base:
            # A gateway's upstream has its endpoints under /v1, and may be written with or without it: what stands
            # elsewhere must not have that one's key. No URL has a space.
            return msgspec.structs.replace(self._config, upstream=f"{base} {endpoint}")
        return config

    # ---- requests ----

    @staticmethod
    def is_endpoint(method: str, target: bytes) -> bool:
        """Tell whether it is a request that read() may know, by its method, and its path and query."""
        return method == "POST" and protocol_at(target.partition(b"?")[0].decode("latin-1")) is not None

    def read(self, origin: str, target: bytes, headers: HeaderList, body: bytes) -> Exchange | None:
        """Return a request as the gateway would read it; None: leave it alone, the provider says what is wrong with it.

        Args:
            origin: scheme, host and port of the URL.
            target: path and query, as they go over the wire.
            headers: names in lower case.
            body: as it goes over the wire.
        """
        raw_path, _, query = target.partition(b"?")
        path = raw_path.decode("latin-1")
        found = protocol_at(path)
        if found is None:
            return None
        protocol, endpoint = found
        scope = {"path": path, "query_string": query, "headers": headers}
        try:
            reader = self._reader_of(origin + path.removesuffix(endpoint), endpoint)
            return reader.read(protocol, scope, body)
        except (BadRequestError, SettingsError):
            return None

    def begin(self, exchange: Exchange) -> Answer | Call | None:
        """Say how a request goes on, as far as L1 can tell at once."""
        controls = exchange.controls
        may_store = not controls.no_store
        if exchange.bypass is not None:
            told = cache_headers(b"BYPASS", b"fwd=bypass; detail=" + exchange.bypass.encode(), b"")
            return self._call_alone(exchange, told, may_store=False)
        if controls.no_cache or controls.max_age == 0:
            return self._call_alone(exchange, _miss(exchange, b"fwd=request"), may_store=may_store)
        found = self._engine.core.look(exchange.key)
        if isinstance(found, L1Hit):
            if controls.max_age is None or _age_of(found.response) <= controls.max_age:
                return _kept(exchange, found.response, b"HIT", b"hit", b"l1")
            return self._call_alone(exchange, _miss(exchange, b"fwd=stale"), may_store=may_store)
        if controls.only_if_cached:
            told = _miss(exchange, b"fwd=request; detail=only-if-cached")
            body = exchange.protocol.error_body(504, "this answer is not in the cache")
            return Answer(504, [_JSON, *told], body)
        # Nobody is to wait for an answer that will not be kept.
        return None if may_store else self._call_alone(exchange, _miss(exchange, b"fwd=uri-miss"), may_store=False)

    # ---- one caller of all makes the call ----

    def find(self, exchange: Exchange, until_ns: int) -> Steps[Answer | Call]:
        """Go on with a request that L1 had no answer to: look again in both tiers, wait for whoever asks, or lead.

        Args:
            exchange: the request.
            until_ns: when to stop waiting for others, and ask alone; CLOCK_MONOTONIC.
        """
        self._end_dropped()
        try:
            while True:
                pace = _Pace()
                flight = self._engine.flights.join(exchange.key, pace.is_driven)
                if isinstance(flight, Lead):
                    return (yield from self._lead(exchange, flight, pace, until_ns))
                outcome = yield from self._follow(exchange, flight, until_ns)
                if outcome is not None:
                    return outcome
        except OutOfTimeError:
            return self._call_alone(exchange, _miss(exchange, b"fwd=uri-miss"), may_store=True)

    def _lead(self, exchange: Exchange, lead: Lead, pace: _Pace, until_ns: int) -> Steps[Answer | Call]:
        engine, is_calling = self._engine, False
        engine.upkeep.start()
        try:
            # 1 A misses  2 the leader before stores and ends its flight  3 A leads: it is there.
            entry, look = engine.core.peek(lead.key)
            if entry is not None:
                engine.slab._count(Counter.COALESCED)
                engine.core.count_saved(entry)
                return _kept(exchange, entry.response, b"HIT", b"hit", b"l1")
            found = yield from engine.fetching.claim(lead, self.options_of(exchange), until_ns)
            if isinstance(found, Found) and not found.is_stale:
                engine.core.promote(look, found)
                engine.core.count_saved(found.entry)
                return _kept(exchange, found.entry.response, b"HIT", b"hit", b"l2")
            is_calling = True
            return self._call(exchange, lead, pace, _miss(exchange, b"fwd=uri-miss"))
        finally:
            if not is_calling:
                engine.flights.end(lead)

    def _follow(self, exchange: Exchange, flight: Running, until_ns: int) -> Steps[Answer | Call | None]:
        """Wait for another's call. Returns None when it was given up, and the next is to be joined or led."""
        engine = self._engine
        while engine.flights.is_running(flight):
            left = (until_ns - time.monotonic_ns()) / 1e9
            if left <= 0:
                raise OutOfTimeError
            yield WaitForFlight(flight.record, flight.token, min(left, _WAIT_SECONDS))
        entry, _ = engine.core.peek(exchange.key)
        if entry is not None:
            engine.slab._count(Counter.COALESCED)
            engine.core.count_saved(entry)
            return _kept(exchange, entry.response, b"COALESCED", b"fwd=uri-miss; collapsed", b"l1")
        if engine.flights.left_nothing(flight):
            # Its answer cannot be kept (an error, for one, is the answer to one client): all ask now, and at once.
            return self._call_alone(exchange, _miss(exchange, b"fwd=uri-miss"), may_store=True)
        return None

    def options_of(self, exchange: Exchange) -> FetchOptions:
        """Return for how long an answer is kept."""
        ttl = min(exchange.controls.ttl or self._config.ttl, self._config.ttl_most)
        return FetchOptions(l1_ttl=ttl, l2_ttl=ttl)

    def _call(
        self, exchange: Exchange, lead: Lead, pace: _Pace, headers: HeaderList, *, may_store: bool = True
    ) -> Call:
        self._engine.slab._count(Counter.COMPUTATIONS)
        return Call(exchange, lead, pace, self._engine.core.begin(lead.key), may_store, headers)

    def _call_alone(self, exchange: Exchange, headers: HeaderList, *, may_store: bool) -> Call:
        return self._call(exchange, Lead(exchange.key, -1, 0), _Pace(), headers, may_store=may_store)

    # ---- the call ----

    def failed(self, call: Call, error: BaseException) -> None:
        """Note that a call brought no answer: the provider was not reached, or the caller was interrupted."""
        is_failure = isinstance(error, Exception)
        with contextlib.suppress(CacheError):
            self._engine.slab._count(Counter.COMPUTE_ERRORS, int(is_failure))
        self.end(call.lead, is_kept=False, is_told=is_failure)

    def record(self, call: Call, status: int, headers: HeaderList) -> Recording:
        """Begin to write an answer down; its caller was handed it at this moment.

        Args:
            call: the call that brought it.
            status: its HTTP status.
            headers: its headers, names in lower case.
        """
        recording = Recording(self, call, Head(status, keepable(headers)), forwardable(headers))
        # A caller may drop an answer, neither read nor closed. Then its flight is not renewed, and ended by whoever
        # comes next: here it cannot be, since collecting garbage may begin anywhere, under the flights' lock as well.
        recording.if_dropped = weakref.finalize(recording, self._dropped.append, call.lead)
        recording.if_dropped.atexit = False
        return recording

    def keep(self, call: Call, head: Head, body: bytes, verdict: Verdict, microseconds: int) -> Steps[bool]:
        """Store an answer, unless it was overtaken. Returns whether it is kept."""
        options = self.options_of(call.exchange)
        entry = entry_of(head, body, verdict, microseconds, options.l1_ttl or 0.0)
        if not (yield from self._engine.fetching.has_kept_lease(call.lead)):
            return False
        return self._engine.fetching.keep(call.lead, call.begun, entry, options)

    def end(self, lead: Lead, *, is_kept: bool, is_told: bool) -> None:
        """End a call's flight.

        Args:
            lead: the flight.
            is_kept: whether there is an answer for those who wait.
            is_told: whether there cannot be one: they ask all at once. Else one of them asks for the others.
        """
        with contextlib.suppress(CacheError):
            if not is_kept and is_told:
                self._engine.flights.tell_uncacheable(lead)
            if not is_kept:
                self._engine.fetching.release(lead)
        self._engine.flights.end(lead)

    def _end_dropped(self) -> None:
        while self._dropped:
            with contextlib.suppress(IndexError):  # another thread was faster
                self.end(self._dropped.popleft(), is_kept=False, is_told=False)

    @property
    def answer_limit(self) -> int:
        """The largest answer that is written down, in bytes."""
        return self._config.answer_limit


class Recording:
    """One answer, written down while its caller takes it. Belongs to that caller."""

    def __init__(self, answering: Answering, call: Call, head: Head, headers: HeaderList) -> None:
        self._answering = answering
        self._call = call
        self._head = head
        self._headers = headers
        self.if_dropped: weakref.finalize[[Lead], Recording] | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._judge = call.exchange.protocol.stream_judge(head.status, headers, cut_reasons=answering.cut_reasons)
        self._splitter = FrameSplitter()
        self._is_lost = not call.may_store or head.status != 200
        self._is_finished = False
        self.rest()

    def rest(self) -> None:
        """The caller has what has come, and may take its time."""
        self._call.pace.idle_since = time.monotonic()

    def wait(self) -> None:
        """The caller waits for more."""
        self._call.pace.idle_since = None

    def take(self, chunk: bytes) -> None:
        """Write down what the caller is given now."""
        self.rest()
        if self._is_lost:
            return
        self._size += len(chunk)
        self._parts.append(chunk)
        try:
            frames = self._splitter.feed(chunk) if self._call.exchange.is_stream else ()
        except FrameTooLargeError:
            self._lose()
            return
        for frame in frames:
            self._judge.feed(frame)
        if self._size > self._answering.answer_limit:
            self._lose()

    def _lose(self) -> None:
        self._is_lost = True
        self._parts.clear()

    def finish(self, *, is_whole: bool) -> Steps[None]:
        """Keep the answer if it is whole and good, and end its flight. Only the first time counts; raises nothing.

        Args:
            is_whole: whether the body came to its end. A stream that was closed after its protocol's end mark, which is
                how clients close it, has all there is.
        """
        if self._is_finished:
            return
        self._is_finished = True
        if self.if_dropped is not None:
            self.if_dropped.detach()
        is_kept = is_settled = False
        try:
            verdict = None if self._is_lost else self._verdict(is_whole)
            # A caller that hangs up says nothing of the answer: whoever waits asks for it again, one for all.
            is_settled = is_whole or self._is_lost or (verdict is not None and verdict.storable)
            if verdict is not None and verdict.storable:
                microseconds = (time.monotonic_ns() - self._call.begun.began_ns) // 1000
                body = b"".join(self._parts)
                is_kept = yield from self._answering.keep(self._call, self._head, body, verdict, microseconds)
        except CacheError:
            pass  # the caller has its answer; closed or stopped caches are their own affair
        finally:
            self._answering.end(self._call.lead, is_kept=is_kept, is_told=is_settled)

    def _verdict(self, is_whole: bool) -> Verdict | None:
        exchange = self._call.exchange
        if exchange.is_stream:
            rest = self._splitter.rest()
            if not is_whole and (rest.strip() or not self._judge.has_ended):
                return None
            return self._judge.finish(rest, is_clean_end=is_whole)
        if not is_whole:
            return None
        body = b"".join(self._parts)
        return exchange.protocol.judge(self._head.status, self._headers, body, cut_reasons=self._answering.cut_reasons)


def _miss(exchange: Exchange, status: bytes) -> HeaderList:
    return cache_headers(b"MISS", status, exchange.key)


def _kept(exchange: Exchange, response: CachedResponse, verdict: bytes, status: bytes, tier: bytes) -> Answer:
    age, kept = _age_of(response), kept_of(response)
    if verdict == b"HIT":
        status += b"; ttl=%d" % (int(kept.ttl) - age)
    told = cache_headers(verdict, status, exchange.key, tier=tier, age=age)
    length = (b"content-length", b"%d" % len(response.raw))
    return Answer(200, [*kept.headers, length, *told], response.raw)


def _age_of(response: CachedResponse) -> int:
    return 0 if response.cached_at is None else max(0, int(time.time() - response.cached_at))
