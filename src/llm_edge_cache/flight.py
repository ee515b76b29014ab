"""Single flight: one computation of a key at a time, over all threads and processes of the host.

The record of a running computation is data in the slab: owner, deadline and a fencing token (`_flight_join` and its
companions). It is never an entry that could be evicted, and never a lock. An owner that dies is noticed by whoever
waits; one that is stopped loses the flight at its deadline, and its value is refused, because the take-over voids its
token.

A process renews the flights that it leads from a thread of its own (`upkeep`).
"""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from llm_edge_cache.errors import ComputeError
from llm_edge_cache.native import native
from llm_edge_cache.regions import Counter

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["FLIGHT_LEASE_NS", "Flights", "Lead", "Running"]

FLIGHT_LEASE_NS: Final = 2_000_000_000
"""How long a flight is its owner's without being renewed."""
_OUTCOME_SECONDS: Final = 5.0
_LONGEST_MESSAGE: Final = 500  # characters of an exception that other processes see


class Running(NamedTuple):
    """Another's flight of the same key."""

    record: int
    """Its place in the slab."""
    token: int


class Lead:
    """This process computes a key. Ended by `Flights.end`."""

    __slots__ = ("key", "lease", "lost", "record", "token")

    def __init__(self, key: bytes, record: int, token: int) -> None:
        """Hold a record of the slab; -1: there was none to be had, so others may compute it too."""
        self.key: Final = key
        self.record: Final = record
        self.token: Final = token
        self.lease: bytes | None = None
        """Token of the lease in Redis, while it is held."""
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
        self._leads: dict[int, Lead] = {}

    def join(self, key: bytes) -> Lead | Running:
        """Lead the computation of a key, or learn who does."""
        role, record, token = self._slab._flight_join(key, FLIGHT_LEASE_NS)
        if role == native.FLIGHT_JOINED:
            return Running(record, token)
        if role == native.FLIGHT_NONE:
            self._slab._count(Counter.UNCOORDINATED)
            return Lead(key, -1, secrets.randbits(62))
        if role == native.FLIGHT_TAKEN_OVER:
            self._slab._count(Counter.TAKEOVERS)
        lead = Lead(key, record, token)
        with self._lock:
            self._leads[token] = lead
        return lead

    def end(self, lead: Lead) -> None:
        """Give the flight up and wake whoever waits for it."""
        with self._lock:
            self._leads.pop(lead.token, None)
        if lead.is_coordinated and not self._slab._flight_end(lead.record, lead.token):
            lead.lost = True
        if lead.lost:
            self._slab._count(Counter.FLIGHTS_LOST)

    def renew(self) -> list[Lead]:
        """Keep this process's flights for another term. Returns those that hold a lease in Redis as well."""
        with self._lock:
            leads = list(self._leads.values())
        for lead in leads:
            if not self._slab._flight_renew(lead.record, lead.token, FLIGHT_LEASE_NS):
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
        if lead.is_coordinated:
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
            raise ComputeError(f"another process's computation of this value failed: {outcome.message}")
        return True

    def wait(self, flight: Running, seconds: float) -> None:
        """Wait in this thread until a flight is no more, at most so long."""
        self._slab._flight_wait(flight.record, flight.token, 0, max(0, round(seconds * 1e9)))


def _outcome_key(token: int) -> bytes:
    return b"\0llm-edge-cache:flight:%x" % token
