"""What the stand-in provider says: answers in each protocol's shape, made up by a program and saying so.

Pure functions: what is asked and a text in, bytes out.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

__all__ = ["Said", "answer_body", "answer_frames", "make_text"]

_OPENING: Final = "I am a stand-in: no model reads your question, a program made this up."
_FILLER: Final = "These words stand where a model's answer would be, so that caches have something to keep."
_SECONDS: Final = 1_700_000_000  # every answer's creation time; a clock would make equal answers differ
_DIMENSIONS: Final = 8

_encode: Final = msgspec.json.Encoder().encode


class Said(NamedTuple):
    """One answer, before it has a protocol's shape."""

    request: Mapping[str, Any]
    """The JSON object that was asked."""
    text: str
    identity: str
    """Makes ids unique where texts are."""

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return str(self.request.get("model", "stand-in"))

    @property
    def words(self) -> list[str]:
        """The text in the pieces of a stream."""
        first, *others = self.text.split(" ")
        return [first, *(f" {word}" for word in others)]

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens of prompt and answer: bytes in fours, and words."""
        return len(_encode(self.request)) // 4 + 1, len(self.words)


def make_text(identity: str, words: int) -> str:
    """Return a text of at least so many words that names its identity and says what it is."""
    text = [*_OPENING.split(), *f"Answer {identity}.".split()]
    filler = itertools.cycle(_FILLER.split())
    return " ".join([*text, *itertools.islice(filler, max(0, words - len(text)))])


def answer_body(path: str, said: Said) -> bytes:
    """Return an answer in one piece, JSON in the shape of the endpoint at this path.

    Raises:
        KeyError: the stand-in does not speak what is expected there.
    """
    return _encode(_BODIES[path](said))


def answer_frames(path: str, said: Said) -> list[bytes]:
    """Return the same answer as the frames of a stream.

    Raises:
        KeyError: there is no stream at this path.
    """
    return list(_FRAMES[path](said))


def _openai_usage(said: Said) -> dict[str, int]:
    prompt, completion = said.counts
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _input_usage(said: Said) -> dict[str, int]:
    prompt, completion = said.counts
    return {"input_tokens": prompt, "output_tokens": completion}


def _frame(value: object) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def _event(value: Mapping[str, Any]) -> bytes:
    return f"event: {value['type']}\n".encode() + _frame(value)


# ---- chat and text completions ----


def _choices(said: Said) -> range:
    asked = said.request.get("n")
    return range(asked if isinstance(asked, int) and 0 < asked <= 8 else 1)


def _completion(said: Said, kind: str, prefix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"{prefix}-stand-in-{said.identity}",
        "object": kind,
        "created": _SECONDS,
        "model": said.model,
        "choices": choices,
    }


def _chat_body(said: Said) -> dict[str, Any]:
    message = {"role": "assistant", "content": said.text, "refusal": None}
    choices = [{"index": i, "message": message, "logprobs": None, "finish_reason": "stop"} for i in _choices(said)]
    return {**_completion(said, "chat.completion", "chatcmpl", choices), "usage": _openai_usage(said)}


def _chat_frames(said: Said) -> Iterator[bytes]:
    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _frame(_completion(said, "chat.completion.chunk", "chatcmpl", [choice]))

    for index in _choices(said):
        yield chunk(index, {"role": "assistant", "content": ""})
    for word in said.words:
        for index in _choices(said):
            yield chunk(index, {"content": word})
    for index in _choices(said):
        yield chunk(index, {}, "stop")
    yield from _usage_and_end(said, "chat.completion.chunk", "chatcmpl")


def _text_body(said: Said) -> dict[str, Any]:
    choices = [{"index": i, "text": said.text, "logprobs": None, "finish_reason": "stop"} for i in _choices(said)]
    return {**_completion(said, "text_completion", "cmpl", choices), "usage": _openai_usage(said)}


def _text_frames(said: Said) -> Iterator[bytes]:
    words = said.words
    for position, word in enumerate(words):
        finish_reason = "stop" if position == len(words) - 1 else None
        for index in _choices(said):
            choice = {"index": index, "text": word, "logprobs": None, "finish_reason": finish_reason}
            yield _frame(_completion(said, "text_completion", "cmpl", [choice]))
    yield from _usage_and_end(said, "text_completion", "cmpl")


def _usage_and_end(said: Said, kind: str, prefix: str) -> Iterator[bytes]:
    options = said.request.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage") is True:
        yield _frame({**_completion(said, kind, prefix, []), "usage": _openai_usage(said)})
    yield b"data: [DONE]\n\n"


# ---- responses ----


def _message_item(said: Said, text: str, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_stand_in_{said.identity}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_part(text)] if text else [],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(said: Said, status: str) -> dict[str, Any]:
    is_done = status == "completed"
    usage = _input_usage(said)
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return {
        "id": f"resp_stand_in_{said.identity}",
        "object": "response",
        "created_at": _SECONDS,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": said.request.get("instructions"),
        "model": said.model,
        "output": [_message_item(said, said.text, "completed")] if is_done else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "metadata": {},
        "usage": {**usage, **details, "total_tokens": sum(usage.values())} if is_done else None,
    }


def _response_body(said: Said) -> dict[str, Any]:
    return _response(said, "completed")


def _response_frames(said: Said) -> Iterator[bytes]:
    for number, event in enumerate(_response_events(said)):
        yield _event({**event, "sequence_number": number})


def _response_events(said: Said) -> Iterator[dict[str, Any]]:
    place = {"item_id": f"msg_stand_in_{said.identity}", "output_index": 0, "content_index": 0}
    yield {"type": "response.created", "response": _response(said, "in_progress")}
    yield {"type": "response.in_progress", "response": _response(said, "in_progress")}
    item = _message_item(said, "", "in_progress")
    yield {"type": "response.output_item.added", "output_index": 0, "item": item}
    yield {"type": "response.content_part.added", **place, "part": _part("")}
    for word in said.words:
        yield {"type": "response.output_text.delta", **place, "delta": word, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": said.text, "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": _part(said.text)}
    item = _message_item(said, said.text, "completed")
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": "response.completed", "response": _response(said, "completed")}


# ---- embeddings ----


def _embeddings_body(said: Said) -> dict[str, Any]:
    asked = said.request.get("input")
    inputs = asked if isinstance(asked, list) and asked and not isinstance(asked[0], int) else [asked]
    dimensions = said.request.get("dimensions")
    size = dimensions if isinstance(dimensions, int) and 0 < dimensions <= 4096 else _DIMENSIONS
    is_base64 = said.request.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(f"{said.identity} {text}", size, is_base64)}
        for index, text in enumerate(inputs)
    ]
    prompt, _ = said.counts
    usage = {"prompt_tokens": prompt, "total_tokens": prompt}
    return {"object": "list", "data": data, "model": said.model, "usage": usage}


def _vector(seed: str, size: int, is_base64: bool) -> list[float] | str:
    octets = hashlib.shake_128(seed.encode("utf-8", "replace")).digest(size)
    numbers = [octet / 128 - 1 for octet in octets]
    return base64.b64encode(struct.pack(f"<{size}f", *numbers)).decode("ascii") if is_base64 else numbers


# ---- messages ----


def _message_body(said: Said) -> dict[str, Any]:
    return {
        "id": f"msg_stand_in_{said.identity}",
        "type": "message",
        "role": "assistant",
        "model": said.model,
        "content": [{"type": "text", "text": said.text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": _input_usage(said),
    }


def _message_frames(said: Said) -> Iterator[bytes]:
    whole = _message_body(said)
    prompt, completion = said.counts
    start = {**whole, "content": [], "stop_reason": None, "usage": {"input_tokens": prompt, "output_tokens": 1}}
    yield _event({"type": "message_start", "message": start})
    yield _event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    yield _event({"type": "ping"})
    for word in said.words:
        yield _event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}})
    yield _event({"type": "content_block_stop", "index": 0})
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    yield _event({"type": "message_delta", "delta": delta, "usage": {"output_tokens": completion}})
    yield _event({"type": "message_stop"})


_BODIES: Final[Mapping[str, Callable[[Said], dict[str, Any]]]] = {
    "/v1/chat/completions": _chat_body,
    "/v1/completions": _text_body,
    "/v1/responses": _response_body,
    "/v1/embeddings": _embeddings_body,
    "/v1/messages": _message_body,
}
_FRAMES: Final[Mapping[str, Callable[[Said], Iterator[bytes]]]] = {
    "/v1/chat/completions": _chat_frames,
    "/v1/completions": _text_frames,
    "/v1/responses": _response_frames,
    "/v1/messages": _message_frames,
}
