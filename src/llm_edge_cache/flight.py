"""Single flight: one computation of a key at a time, over all threads and processes of the host.

The record of a running computation is data in the slab: owner, deadline and a fencing token (`_flight_join` and its
companions). It is never an entry that could be evicted, and never a lock. An owner that dies is noticed by whoever
waits; one that is stopped loses the flight at its deadline, and its value is refused, because the take-over voids its
token.

A process renews the flights that it leads from a thread of its own (`upkeep`).

A forked child has copies of its parent's leads, and may finish the generators that hold them (when it collects its
garbage); the flights stay the parent's: only what is among a process's own leads is ended, renewed or released.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from llm_edge_cache.errors import ComputeError, SlabBusyError, SlabClosedError
from llm_edge_cache.native import native
from llm_edge_cache.regions import Counter

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["FLIGHT_LEASE_NS", "Flights", "Lead", "Running"]

FLIGHT_LEASE_NS: Final = 2_000_000_000
"""How long a flight is its owner's without being renewed."""
_OUTCOME_SECONDS: Final = 5.0
_LONGEST_MESSAGE: Final = 500  # characters of an exception that other processes see


def _always() -> bool:
    return True


class Running(NamedTuple):
    """Another's flight of the same key."""

    record: int
    """Its place in the slab."""
    token: int


class Lead:
    """This process computes a key. Ended by `Flights.end`."""

    __slots__ = ("is_driven", "key", "lease", "lease_until_ns", "lost", "record", "token")

    def __init__(self, key: bytes, record: int, token: int, is_driven: Callable[[], bool] = _always) -> None:
        """Hold a record of the slab; -1: there was none to be had, so others may compute it too."""
        self.key: Final = key
        self.record: Final = record
        self.token: Final = token
        self.is_driven: Final = is_driven
        """Whether the computation can get on; a flight that nobody drives is not renewed."""
        self.lease: bytes | None = None
        """Token of the lease in Redis, while it is held."""
        self.lease_until_ns = 0
        """Until when it is held for certain; CLOCK_MONOTONIC."""
        self.lost = False
        """Taken over by another process."""

    @property
    def is_coordinated(self) -> bool:
        """Tell whether others wait for this one."""
        return self.record >= 0


class _Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What other processes are told of a flight that left no value."""

    kind: str
    """"error", or "uncacheable": there is a value, which each caller has to compute."""
    message: str = ""


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Outcome).decode


class Flights:
    """The flights of one process."""

    def __init__(self, slab: SharedSlab) -> None:
        """Lead and join flights of this slab."""
        self._slab = slab
        self._lock = threading.Lock()
        self._leads: set[Lead] = set()

    def join(self, key: bytes, is_driven: Callable[[], bool] = _always) -> Lead | Running:
        """Lead the computation of a key, or learn who does.

        Args:
            key: 64 hexadecimal digits.
            is_driven: asked before each renewal by the thread that renews.
        """
        role, record, token = self._slab._flight_join(key, FLIGHT_LEASE_NS)
        if role == native.FLIGHT_JOINED:
            return Running(record, token)
        if role == native.FLIGHT_NONE:
            self._slab._count(Counter.UNCOORDINATED)
            record, token = -1, secrets.randbits(62)
        if role == native.FLIGHT_TAKEN_OVER:
            self._slab._count(Counter.TAKEOVERS)
        lead = Lead(key, record, token, is_driven)
        with self._lock:
            self._leads.add(lead)
        return lead

    def holds(self, lead: Lead) -> bool:
        """Tell whether a lead is this process's, and neither ended nor given up."""
        return lead in self._leads

    def end(self, lead: Lead) -> None:
        """Let the flight end, if it is still ours, and wake whoever waits for it."""
        with self._lock:
            if lead not in self._leads:
                return
            self._leads.remove(lead)
        with contextlib.suppress(SlabClosedError):
            if lead.is_coordinated and not self._slab._flight_end(lead.record, lead.token):
                lead.lost = True
            if lead.lost:
                self._slab._count(Counter.FLIGHTS_LOST)

    def abandon(self) -> list[Lead]:
        """Give all flights up, so that other processes compute these values now, and return them."""
        with self._lock:
            leads, self._leads = list(self._leads), set()
        for lead in leads:
            if lead.is_coordinated:
                self._slab._flight_end(lead.record, lead.token)
        return leads

    def renew(self) -> list[Lead]:
        """Keep this process's flights for another term. Returns those that hold a lease in Redis as well."""
        with self._lock:
            leads = [lead for lead in self._leads if lead.is_driven()]
        for lead in leads:
            if lead.is_coordinated and not self._slab._flight_renew(lead.record, lead.token, FLIGHT_LEASE_NS):
                lead.lost = True
        return [lead for lead in leads if lead.lease is not None]

    def has_leads(self) -> bool:
        """Tell whether there is anything to renew."""
        return bool(self._leads)

    def is_running(self, flight: Running) -> bool:
        """Tell whether a flight is still under way."""
        return self._slab._flight_state(flight.record, flight.token) >= 0

    # ---- flights that leave no value ----

    def tell_failure(self, lead: Lead, error: BaseException) -> None:
        """Let the waiting processes know why there is no value. Called before end()."""
        self._tell(lead, _Outcome("error", f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]))

    def tell_uncacheable(self, lead: Lead) -> None:
        """Let the waiting processes know that each has to compute for itself: all at once, not one after the other."""
        self._tell(lead, _Outcome("uncacheable"))

    def _tell(self, lead: Lead, outcome: _Outcome) -> None:
        if not lead.is_coordinated:
            return
        with contextlib.suppress(SlabBusyError, SlabClosedError):  # untold, they try one after the other
            self._slab.set(_outcome_key(lead.token), _encode(outcome), ttl=_OUTCOME_SECONDS, tti=None)

    def left_nothing(self, flight: Running) -> bool:
        """Tell whether a flight has ended with a value that cannot be kept.

        Raises:
            ComputeError: its computation failed.
        """
        data = self._slab.get(_outcome_key(flight.token))
        if data is None:
            return False
        try:
            outcome = _decode(data)
        except msgspec.MsgspecError:
            return False
        if outcome.kind == "error":
            raise ComputeError(f"another caller's computation of this value failed: {outcome.message}")
        return True

    def wait(self, flight: Running, seconds: float) -> None:
        """Wait in this thread until a flight is no more, at most so long."""
        self._slab._flight_wait(flight.record, flight.token, 0, max(0, round(seconds * 1e9)))


def _outcome_key(token: int) -> bytes:
    return b"\0llm-edge-cache:flight:%x" % token
