"""What can go wrong with a provider, as changes to the answer that it planned.

A plan says everything that will go over the wire and how it ends; a fault is a function from a sound plan to a broken
one. Only the server that carries a plan out does I/O.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from llm_edge_cache.gateway.protocols.base import WireProtocol

__all__ = ["FAULTS", "Plan", "apply_fault"]

_PIECE: Final = 7  # bytes; shares no divisor with anything in the protocols


class Plan(msgspec.Struct, frozen=True):
    """One answer, as it will be sent."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    """Without any length."""
    chunks: tuple[bytes, ...]
    is_paced: bool = False
    """Pause before every chunk, as a model does that is still thinking of the next word."""
    end: Literal["clean", "cut", "hang"] = "clean"
    """After the last chunk: end the answer, cut the connection, or wait until the client hangs up."""
    has_head: bool = True
    """False: status, headers and chunks are never sent; only the end happens."""

    def with_header(self, name: bytes, value: bytes) -> Plan:
        """Return this plan with one more header."""
        return msgspec.structs.replace(self, headers=(*self.headers, (name, value)))


def apply_fault(name: str, plan: Plan, protocol: WireProtocol) -> Plan:
    """Return the plan with a fault in it.

    Args:
        name: one of `FAULTS`, or a status of three digits, e.g. `429`.
        plan: a sound answer.
        protocol: in whose shape to complain.

    Raises:
        ValueError: there is no such fault.
    """
    if name.isdecimal() and 400 <= int(name) <= 599:
        return _refusal(int(name), protocol)
    if name == "error-event":
        return _broken_off(plan, protocol.error_event("the stand-in was told to fail", status=529))
    if name == "error-200":
        return _in_one_piece(plan, protocol.error_body(500, "the stand-in was told to fail"))
    if name not in _CHANGES:
        raise ValueError(f"no fault is called {name!r}; there are {', '.join(FAULTS)}, and 400 to 599")
    return _CHANGES[name](plan)


def _refusal(status: int, protocol: WireProtocol) -> Plan:
    body = protocol.error_body(status, f"the stand-in was told to answer {status}")
    plan = Plan(status, ((b"content-type", b"application/json"),), (body,))
    return plan.with_header(b"retry-after", b"1") if status in (429, 503, 529) else plan


def _in_one_piece(plan: Plan, body: bytes) -> Plan:
    return Plan(plan.status, ((b"content-type", b"application/json"),), (body,))


def _half(plan: Plan) -> tuple[bytes, ...]:
    """The first half: of the chunks, and of the bytes of the chunk in the middle."""
    middle = len(plan.chunks) // 2
    return (*plan.chunks[:middle], *(chunk[: len(chunk) // 2] for chunk in plan.chunks[middle : middle + 1]))


def _broken_off(plan: Plan, last: bytes) -> Plan:
    return msgspec.structs.replace(plan, chunks=(*plan.chunks[: len(plan.chunks) // 2], last))


def _hang(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, has_head=False, end="hang")


def _drop_before(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, has_head=False, end="cut")


def _drop_after(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, chunks=(), end="cut")


def _truncate(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, chunks=_half(plan), end="cut")


def _end_early(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, chunks=_half(plan))


def _stall(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, chunks=_half(plan), end="hang")


def _garbage(plan: Plan) -> Plan:
    return _broken_off(plan, b"\xff\xfe{data: \x00 no protocol looks like this\n\ndata: {nor this\n\n")


def _empty(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, chunks=())


def _gzip(plan: Plan) -> Plan:
    packed = gzip.compress(b"".join(plan.chunks), mtime=0)
    return msgspec.structs.replace(plan, chunks=(packed,)).with_header(b"content-encoding", b"gzip")


def _small_chunks(plan: Plan) -> Plan:
    whole = b"".join(plan.chunks)
    pieces = tuple(whole[start : start + _PIECE] for start in range(0, len(whole), _PIECE))
    return msgspec.structs.replace(plan, chunks=pieces, is_paced=False)


_CHANGES: Final[Mapping[str, Callable[[Plan], Plan]]] = {
    "hang": _hang,
    "drop-before": _drop_before,
    "drop-after": _drop_after,
    "truncate": _truncate,
    "end-early": _end_early,
    "stall": _stall,
    "garbage": _garbage,
    "empty": _empty,
    "gzip": _gzip,
    "chunks-7": _small_chunks,
}

FAULTS: Final = (*_CHANGES, "error-event", "error-200")
"""By what the client sees: no answer, for as long as it waits; the connection cut before or after the headers; half an
answer and the connection cut; half an answer that ends well; half an answer and then nothing; bytes that are no
protocol; headers only; the whole answer compressed, or in chunks of 7 bytes (faults of neither, but of careless
readers); an error in the middle of a stream; an error object with status 200."""
