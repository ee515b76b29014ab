"""What the gateway must know of a wire protocol, and what all protocols judge alike.

    request   WireProtocol.bypass_reason(body)                  may it be answered from the cache at all?
    answer    WireProtocol.judge(status, headers, body)         -> Verdict, for an answer in one piece
              WireProtocol.stream_judge(status, headers)        -> StreamJudge: .feed(frame) ... .finish() -> Verdict
    failure   WireProtocol.error_body(...) / .error_event(...)  our own failures in the protocol's shape

Nothing here does I/O. An answer is kept only if it is known to be good; whatever is unknown, odd or cut is passed on
and not kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final, Literal

import msgspec

from llm_edge_cache.gateway.protocols.body import RequestBody
from llm_edge_cache.gateway.protocols.cachekey import Headers
from llm_edge_cache.gateway.protocols.sse import BOM, parse_frame
from llm_edge_cache.model import TokenUsage

__all__ = [
    "CUT_REASONS",
    "Reason",
    "StreamJudge",
    "Verdict",
    "WireProtocol",
    "count_of",
    "dict_of",
    "dicts_of",
    "is_event_stream",
    "text_of",
]

CUT_REASONS: Final = frozenset(
    {
        "abort",
        "cancelled",
        "content_filter",
        "error",
        "insufficient_system_resource",
        "length",
        "max_output_tokens",
        "max_tokens",
        "model_context_window_exceeded",
        "model_length",
        "pause_turn",
        "refusal",
    }
)
"""Finish reasons of answers that are not kept, in any protocol's words: a limit, a filter or a fault ended them early.

`refusal` is Anthropic's stop reason for an answer that its filter cut off; a model that declines in words ends in
`end_turn` or `stop`, and its answer is kept.
"""

Reason = Literal["complete", "status", "encoding", "unparsable", "error", "empty", "cut", "incomplete"]
"""Why an answer may be kept ("complete"), or why not:

- status: any other than 200;
- encoding: compressed, so it was not looked into, or no event stream where one should be;
- unparsable: no JSON, or JSON of another shape;
- error: an error object or event inside a 200;
- empty: nothing is answered: no text, no tool call, no refusal;
- cut: its finish reason is one of the excluded ones;
- incomplete: the protocol's own end is missing.
"""


class Verdict(msgspec.Struct, frozen=True):
    """Whether an answer may be kept, and what it says about itself."""

    reason: Reason
    usage: TokenUsage | None = None
    """What it cost, as far as it says."""
    model: str | None = None
    """The model that answered, in the provider's words."""
    finish_reason: str | None = None
    """Why it ended, in the provider's words; of several choices the first, or the first that was cut."""

    @property
    def storable(self) -> bool:
        """May it be kept?"""
        return self.reason == "complete"


class StreamJudge(ABC):
    """Follows one streamed answer, frame by frame, without keeping any of it.

    Args:
        cut_reasons: finish reasons of answers that are not to be kept.
        fault: what is wrong with the answer before its first frame; None: nothing.
    """

    def __init__(self, cut_reasons: frozenset[str], fault: Reason | None = None) -> None:
        self._cut_reasons: Final = cut_reasons
        self._fault = fault
        self._is_first = True
        self._is_whole = False  # set at the finish: the end mark was seen, or the connection ended well
        self.has_ended = False
        """Has the protocol's own end mark been seen? What follows is none of the answer."""
        self.usage: TokenUsage | None = None
        self.model: str | None = None
        self.finish_reason: str | None = None

    def feed(self, frame: bytes) -> None:
        """Take the next frame, as the splitter cut it. Never raises for what is in it."""
        if self._is_first:
            frame = frame.removeprefix(BOM)
            self._is_first = False
        event = parse_frame(frame)
        if not event.is_text:
            self._void("unparsable")
        if event.data is None:
            return
        if event.data.strip() == b"[DONE]":
            self._take_done()
            return
        fields = _parse_object(event.data)
        if fields is None or self.has_ended:
            self._void("unparsable")  # an answer with something after its end is not understood either
        elif fields.get("error") or event.name == b"error" or fields.get("type") == "error":
            self._void("error")
        else:
            self._take(fields)

    def finish(self, rest: bytes = b"", *, is_clean_end: bool = True) -> Verdict:
        """Return the verdict on the whole stream. To be called once, after the last frame.

        Args:
            rest: what the splitter had left: some servers do not end their last event with an empty line.
            is_clean_end: False if the connection broke. The answer is complete all the same if its end mark was seen.
        """
        if rest.strip():
            self.feed(rest)
        self._is_whole = self.has_ended or (is_clean_end and not rest.strip())
        reason = self._fault or self._conclude()
        return Verdict(reason, self.usage, self.model, self.finish_reason)

    def _void(self, fault: Reason) -> None:
        self._fault = self._fault or fault

    def _take_done(self) -> None:  # noqa: B027 (most protocols have nothing to do here)
        """Take OpenAI's end mark, which some servers send in other protocols too, where it means nothing."""

    @abstractmethod
    def _take(self, fields: dict[str, Any]) -> None:
        """Take the JSON object of one event."""

    @abstractmethod
    def _conclude(self) -> Reason:
        """Return the reason, where no fault was seen."""


class WireProtocol(ABC):
    """One endpoint of a provider's API. Has no state; one object per endpoint serves all requests."""

    name: ClassVar[str]
    """For metrics and logs, e.g. `openai.chat`."""
    path: ClassVar[str]
    """Where clients find it, e.g. `/v1/chat/completions`."""
    server_state_fields: ClassVar[tuple[str, ...]] = ()
    """Request fields that tie the request to state on the server when they are neither absent, null nor false."""

    def bypass_reason(self, body: RequestBody) -> str | None:
        """Return the name of the field because of which the cache must be left alone, or None.

        Such a request changes or reads what the provider keeps (a stored or a background answer, an earlier one, a
        conversation, a container), so an answer from elsewhere would be wrong.
        """
        fields = body.fields
        for name in self.server_state_fields:
            if fields.get(name) not in (None, False):
                return name
        return None

    def judge(
        self, status: int, headers: Headers, body: bytes, *, cut_reasons: frozenset[str] = CUT_REASONS
    ) -> Verdict:
        """Return whether an answer in one piece may be kept.

        Args:
            status: the HTTP status.
            headers: the answer's headers, names in lower case.
            body: the whole body. The HTTP client has made sure that it is whole.
            cut_reasons: finish reasons of answers that are not to be kept.
        """
        fault = _fault_of_head(status, headers)
        if fault is not None:
            return Verdict(fault)
        answer = _parse_object(body)
        if answer is None:
            return Verdict("unparsable")
        if answer.get("error"):
            return Verdict("error")
        return self._judge_answer(answer, cut_reasons)

    def stream_judge(self, status: int, headers: Headers, *, cut_reasons: frozenset[str] = CUT_REASONS) -> StreamJudge:
        """Return a judge for an answer that comes as a stream of events; the arguments are those of :meth:`judge`."""
        headers = list(headers)
        fault = _fault_of_head(status, headers)
        if fault is None and not is_event_stream(headers):
            fault = "encoding"
        return self._stream_judge(cut_reasons, fault)

    @abstractmethod
    def error_body(self, status: int, message: str, *, error_type: str | None = None, code: str | None = None) -> bytes:
        """Return a JSON body that tells a failure in the protocol's shape.

        Args:
            status: the HTTP status it is sent with; decides about the type.
            message: for people. Nothing secret.
            error_type: the protocol's word for the kind of failure; None: what the protocol uses with this status.
            code: a short name for programs, where the protocol has a place for it.
        """

    @abstractmethod
    def error_event(self, message: str, *, status: int = 502) -> bytes:
        """Return a frame that ends a stream with a failure, in the protocol's own form."""

    @abstractmethod
    def _judge_answer(self, answer: dict[str, Any], cut_reasons: frozenset[str]) -> Verdict:
        """Return the verdict on an answer that is a JSON object without an error."""

    @abstractmethod
    def _stream_judge(self, cut_reasons: frozenset[str], fault: Reason | None) -> StreamJudge:
        """Return a judge for a stream."""


def is_event_stream(headers: Headers) -> bool:
    """Do these headers, names in lower case, announce a stream of events?"""
    types = [value for name, value in headers if name == b"content-type"]
    return bool(types) and types[-1].split(b";", 1)[0].strip().lower() == b"text/event-stream"


def _fault_of_head(status: int, headers: Headers) -> Reason | None:
    if status != 200:
        return "status"
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            return "encoding"
    return None


_decode: Final = msgspec.json.Decoder().decode


def _parse_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = _decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return value if type(value) is dict else None


# ---- reading what answers hold; nothing of it is trusted to be of the type that the protocol documents ----


def text_of(value: object) -> str | None:
    """Return a text that is not empty, or None."""
    return value if isinstance(value, str) and value else None


def dict_of(value: object) -> dict[str, Any]:
    """Return a dict, or an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def dicts_of(value: object) -> list[dict[str, Any]]:
    """Return a list's dicts; none where it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def count_of(value: object) -> int:
    """Return a number of tokens; 0 where it is none."""
    return value if type(value) is int and value >= 0 else 0
