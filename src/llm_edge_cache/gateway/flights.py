"""Who asks the upstream, and how everybody else gets the same answer.

In one worker, all requests of one key read one `Broadcast`. It is filled by one task, which leads the key's flight of
the host, or follows the worker that does (`log`):

    request ──> Broadcast of this worker ──filled by──> lead:   L1, L2 and its lease, the upstream ──> log, L1, L2
                                            or by  ──> follow: the log of the worker that leads

The task does not depend on any client: one that hangs up cuts off nobody, and what was paid for is stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from llm_edge_cache.core import Begun
from llm_edge_cache.fetch import FetchOptions
from llm_edge_cache.flight import Lead, Running
from llm_edge_cache.gateway.answers import End, Head, entry_of, head_of, keepable, own_headers
from llm_edge_cache.gateway.broadcast import Broadcast
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.exchange import Exchange
from llm_edge_cache.gateway.log import EndedLogs, Heading, LogLostError, LogReader, LogWriter
from llm_edge_cache.gateway.protocols import CUT_REASONS, FrameSplitter, FrameTooLargeError, StreamJudge, Verdict
from llm_edge_cache.gateway.upstream import Call, Upstream, UpstreamFailureError
from llm_edge_cache.redis_tier import Found
from llm_edge_cache.regions import Counter, Histogram

if TYPE_CHECKING:
    from llm_edge_cache.codec import Entry
    from llm_edge_cache.manager import CacheManager

__all__ = ["AnswerFlights"]

_log = logging.getLogger("llm_edge_cache")

_WAIT_SECONDS: Final = 1.0
_FAILING: Final = frozenset({429, 500, 502, 503, 504, 529})
"""Statuses that a stale answer may stand in for; 529 is Anthropic's "overloaded"."""
_ABORTED: Final = End("aborted", "the worker that asked for this answer is gone")


class _OvertakenError(Exception):
    """What is followed was made void since it began."""


class _Local:
    """A key that this worker is getting the answer of."""

    __slots__ = ("begun", "broadcast", "tags", "task")

    def __init__(self, broadcast: Broadcast, begun: Begun, tags: tuple[str, ...], task: asyncio.Task[None]) -> None:
        self.broadcast = broadcast
        self.begun = begun
        self.tags = tags
        self.task = task


class AnswerFlights:
    """The answers that one worker is getting, by key."""

    def __init__(self, manager: CacheManager, upstream: Upstream, config: GatewayConfig) -> None:
        """Ask this upstream, and store in this cache."""
        self._manager = manager
        self._engine = manager.engine
        self._upstream = upstream
        self._config = config
        self._cut_reasons = frozenset[str]() if config.keep_cut_answers else CUT_REASONS
        self._local: dict[bytes, _Local] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended_logs = EndedLogs(self._engine.slab)

    def join(self, exchange: Exchange) -> tuple[Broadcast, bool]:
        """Return the answer to a request as it comes, and whether this request is the one that has it asked for."""
        local = self._local.get(exchange.key)
        if local is not None and self._is_joinable(exchange.key, local):
            self._engine.slab._count(Counter.COALESCED)
            return local.broadcast, False
        broadcast = Broadcast()
        begun = self._engine.core.begin(exchange.key)
        patience = 0.0 if exchange.controls.no_store else self._config.background_limit
        task = self._start(self._fill(exchange, broadcast), broadcast, patience)
        self._local[exchange.key] = local = _Local(broadcast, begun, exchange.controls.tags, task)
        task.add_done_callback(lambda _: self._forget(exchange.key, local))
        return broadcast, True

    def _is_joinable(self, key: bytes, local: _Local) -> bool:
        # 1 the worker that leads dies, and the broadcast ends  2 its readers run before the task is forgotten, and join
        # again: each would be given the dead one until it has no more tries, and ask the upstream for itself.
        if local.broadcast.end is not None:
            return False
        # 1 A's answer comes  2 it is invalidated  3 B asks: what began before is too old for B.
        return not self._engine.core.has_overtaken(local.begun, key, local.tags)

    def ask(self, exchange: Exchange, *, store: bool) -> Broadcast:
        """Ask the upstream for this request alone, whoever else asks for the same; store the answer if told to."""
        broadcast = Broadcast()
        patience = self._config.background_limit if store else 0.0
        self._start(self._call(exchange, broadcast, Lead(exchange.key, -1, 0), store=store), broadcast, patience)
        return broadcast

    async def drain(self, seconds: float) -> None:
        """Let what is under way end, for at most so many seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, filling: Any, broadcast: Broadcast, patience: float) -> asyncio.Task[None]:
        """Fill a broadcast; once the last client of any worker has left, for at most so many seconds more."""
        loop = asyncio.get_running_loop()
        task: asyncio.Task[None] = loop.create_task(self._guard(filling, broadcast))

        def give_up() -> None:
            if task.done() or broadcast.readers:  # somebody has joined meanwhile
                return
            if broadcast.is_read_elsewhere():
                loop.call_later(max(patience, _WAIT_SECONDS), give_up)
            else:
                task.cancel()

        def wait_for_others() -> None:
            loop.call_later(patience, give_up)

        broadcast.on_left = wait_for_others
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _forget(self, key: bytes, local: _Local) -> None:
        if self._local.get(key) is local:
            del self._local[key]

    async def _guard(self, filling: Any, broadcast: Broadcast) -> None:
        """See to it that nobody waits for ever, whatever happens to the task."""
        try:
            await filling
        except UpstreamFailureError as failure:
            broadcast.finish(End(failure.kind, str(failure)))
        except Exception:
            _log.exception("an answer could not be got")
            broadcast.finish(End("internal", "the gateway failed"))
        finally:
            broadcast.finish(_ABORTED)

    # ---- filling a broadcast ----

    async def _fill(self, exchange: Exchange, broadcast: Broadcast) -> None:
        flight = self._engine.flights.join(exchange.key)
        if isinstance(flight, Running):
            if not await self._follow(flight, exchange.key, broadcast):
                await self._call(exchange, broadcast, Lead(exchange.key, -1, 0), store=not exchange.controls.no_store)
            return
        self._engine.upkeep.start()
        try:
            is_found, stale = await self._find(flight, exchange, broadcast)
            if not is_found:
                await self._call(exchange, broadcast, flight, store=not exchange.controls.no_store, stale=stale)
        finally:
            self._engine.flights.end(flight)

    async def _find(self, lead: Lead, exchange: Exchange, broadcast: Broadcast) -> tuple[bool, Entry | None]:
        """Look again, now in both tiers; take the lease in Redis.

        Returns:
            Whether the answer was found, and else what may stand in for it if the upstream fails.
        """
        entry, look = self._engine.core.peek(lead.key)
        if entry is not None:
            self._replay(entry, broadcast, "l1")
            return True, None
        found = await self._manager.perform(self._engine.fetching.claim(lead, self._options(exchange)))
        stale = look.entry
        if isinstance(found, Found):
            if not found.is_stale:
                self._engine.core.promote(look, found)
                self._replay(found.entry, broadcast, "l2")
                return True, None
            stale = found.entry
        return False, stale if self._may_stand_in(stale, exchange) else None

    def _options(self, exchange: Exchange) -> FetchOptions:
        ttl = min(exchange.controls.ttl or self._config.ttl, self._config.ttl_most)
        tags = exchange.controls.tags
        return FetchOptions(l1_ttl=ttl, l2_ttl=ttl, tags=tags, stale_if_error=self._config.stale_if_error)

    def _may_stand_in(self, stale: Entry | None, exchange: Exchange) -> bool:
        """Tell whether operator and request allow this answer in place of an error (RFC 5861, section 4)."""
        asked = exchange.controls.stale_if_error
        seconds = self._config.stale_if_error if asked is None else min(asked, self._config.stale_if_error)
        return stale is not None and stale.expires_at is not None and time.time() < stale.expires_at + seconds

    def _replay(self, entry: Entry, broadcast: Broadcast, source: Any) -> None:
        self._engine.core.count_saved(entry)
        response = entry.response
        broadcast.age = 0 if response.cached_at is None else max(0, int(time.time() - response.cached_at))
        broadcast.start(head_of(response), source)
        broadcast.append(response.raw)
        broadcast.finish(End())

    async def _follow(self, flight: Running, key: bytes, broadcast: Broadcast) -> bool:
        """Read what another worker's call brings. Returns False if that is too old to be of use."""
        broadcast.source = "worker"  # before any head: a call that fails without one was not its readers' own either
        waiters, reader = self._engine.waiters, LogReader(self._engine.slab, flight.token)
        progress, started = 0, time.monotonic_ns()
        try:
            # 1 the leader's client leaves  2 we begin to follow  3 the leader gives up, and asks before whether we do.
            reader.mark()
            while (state := await waiters.wait(flight.record, flight.token, _WAIT_SECONDS, progress=progress)) >= 0:
                self._take(reader, key, broadcast, state)
                progress = state
                if broadcast.readers:
                    reader.mark()
            end = reader.end()
            if end is not None:
                self._take_last(reader, key, broadcast, end)
        except _OvertakenError:
            return False
        except LogLostError as error:
            _log.debug("following was given up: %s", error)
            end = None
        self._engine.slab._record(Counter.COALESCED, Histogram.WAIT, started)
        broadcast.finish(_ABORTED if end is None else end)
        return True

    def _take(self, reader: LogReader, key: bytes, broadcast: Broadcast, progress: int) -> None:
        if progress >= 1 and broadcast.head is None:
            head, begun, tags = reader.head()
            if self._engine.core.has_overtaken(begun, key, tags):
                raise _OvertakenError
            broadcast.start(head, "worker")
        if body := reader.read(progress):
            broadcast.append(body)

    def _take_last(self, reader: LogReader, key: bytes, broadcast: Broadcast, end: End) -> None:
        try:
            self._take(reader, key, broadcast, 1 + end.size)
        except LogLostError:
            # A call that failed before its head left none: the failure is the answer, and not to be asked for again.
            if not end.failure:
                raise

    # ---- asking the upstream ----

    async def _call(
        self, exchange: Exchange, broadcast: Broadcast, lead: Lead, *, store: bool, stale: Entry | None = None
    ) -> None:
        begun = self._engine.core.begin(exchange.key)
        log = LogWriter(self._engine.slab, lead.record, lead.token)
        broadcast.is_read_elsewhere = log.is_read
        end, is_kept = End("aborted"), False
        self._engine.slab._count(Counter.COMPUTATIONS)
        try:
            request = (exchange.path, exchange.query, exchange.headers, exchange.body)
            async with self._upstream.call("POST", *request) as call:
                if stale is not None and call.status in _FAILING:
                    raise UpstreamFailureError("status", call.status, f"the upstream answered {call.status}")
                heading = Heading(Head(call.status, keepable(call.headers)), begun, exchange.controls.tags)
                judged = await self._receive(exchange, call, heading, broadcast, log)
            self._count_call(call.status, begun)
            end = End()
            if store and judged.storable and broadcast.head is not None:
                microseconds = (time.monotonic_ns() - begun.began_ns) // 1000
                options = self._options(exchange)
                entry = entry_of(broadcast.head, broadcast.body, judged, microseconds, options.l1_ttl or 0.0)
                if await self._manager.perform(self._engine.fetching.has_kept_lease(lead)):
                    is_kept = self._engine.fetching.keep(lead, begun, entry, options)
        except UpstreamFailureError as failure:
            self._engine.slab._count(Counter.COMPUTE_ERRORS)
            end = End(failure.kind, str(failure))
            if stale is not None and broadcast.head is None:
                log.head(Heading(head_of(stale.response), begun, exchange.controls.tags))
                end = self._stand_in(stale, broadcast, log)
        finally:
            if not is_kept:
                self._engine.fetching.release(lead)
            log.end(end)
            self._ended_logs.add(log)
        broadcast.finish(end)

    def _stand_in(self, stale: Entry, broadcast: Broadcast, log: LogWriter) -> End:
        """Answer with what is stale, here and in the workers that follow."""
        self._engine.slab._count(Counter.STALE_ERROR)
        log.append(stale.response.raw)
        self._replay(stale, broadcast, "stale")
        return End()

    def _count_call(self, status: int, begun: Begun) -> None:
        """Count a call that was answered to its end."""
        if status in _FAILING:
            self._engine.slab._count(Counter.COMPUTE_ERRORS)
        else:
            self._engine.slab._observe(Histogram.COMPUTE, time.monotonic_ns() - begun.began_ns)

    async def _receive(
        self, exchange: Exchange, call: Call, heading: Heading, broadcast: Broadcast, log: LogWriter
    ) -> Verdict:
        """Pass the answer on as it comes, and judge it."""
        head = heading.head
        log.head(heading)
        broadcast.start(head, "upstream", own_headers(call.headers))
        judge = exchange.protocol.stream_judge(call.status, call.headers, cut_reasons=self._cut_reasons)
        events = _Events(judge) if head.is_stream and not head.is_encoded else None
        async for chunk in call.chunks():
            self._pass_on(chunk if events is None else events.take(chunk), broadcast, log)
        if events is not None:
            self._pass_on(events.rest(), broadcast, log)
        # By what was asked for: whoever wants a stream and is given one piece gets it, but the next shall not.
        if exchange.is_stream:
            return judge.finish() if events is None else events.verdict
        return exchange.protocol.judge(call.status, call.headers, broadcast.body, cut_reasons=self._cut_reasons)

    def _pass_on(self, part: bytes, broadcast: Broadcast, log: LogWriter) -> None:
        if not part:
            return
        broadcast.append(part)
        log.append(part)
        if broadcast.size > self._config.answer_limit:
            raise UpstreamFailureError("too_large", 502, "the upstream's answer is too large")


class _Events:
    """A stream that is cut into events, to be judged, and passed on whole.

    No client can do anything with the beginning of an event. And where the upstream breaks off in the middle of one, or
    the worker dies, the error that ends the stream would become part of it: nobody would see it.
    """

    def __init__(self, judge: StreamJudge) -> None:
        self._judge = judge
        self._splitter = FrameSplitter()
        self._is_lost = False
        self.verdict = Verdict("incomplete")
        """Valid once `rest` was called."""

    def take(self, chunk: bytes) -> bytes:
        """Return what may be passed on now."""
        if self._is_lost:
            return chunk
        try:
            frames = self._splitter.feed(chunk)
        except FrameTooLargeError:
            self._is_lost = True
            return self._splitter.rest()
        for frame in frames:
            self._judge.feed(frame)
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def rest(self) -> bytes:
        """Return what no empty line had ended when the stream ended well."""
        left = self._splitter.rest()
        self.verdict = Verdict("unparsable") if self._is_lost else self._judge.finish(left)
        return left
