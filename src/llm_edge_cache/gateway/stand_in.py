"""A stand-in provider: a small ASGI application that speaks the gateway's endpoints without any model.

It serves the demonstration and the tests. Every answer says that it is a stand-in.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings, /v1/messages
    GET  /v1/models                       one model
    ANY  /v1/echo...                      what was received, as JSON: for what a gateway passes through
    GET  /stand-in                        Tally: the calls it has counted
    POST /stand-in/reset                  count from zero, forget ordered faults
    POST /stand-in/settings               any of `StandInSettings` as JSON
    POST /stand-in/faults                 {"fault": "429", "times": 2}: the next two calls fail

A fault (`stand_in_faults.FAULTS`) can also be asked for by the header `x-stand-in-fault`, or by a path that begins with
`/fault/NAME`. A fault that cuts the connection raises `ConnectionCutError` out of the application: a server then closes
the connection, though one that has not sent the headers yet may first answer 500, as uvicorn does.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any, Final, Literal

import msgspec

from llm_edge_cache.canonical import encode_json
from llm_edge_cache.gateway.protocols.base import WireProtocol
from llm_edge_cache.gateway.protocols.body import BadRequestError, parse_body
from llm_edge_cache.gateway.protocols.openai_chat import OpenAIChat
from llm_edge_cache.gateway.protocols.registry import PROTOCOLS
from llm_edge_cache.gateway.stand_in_answers import Said, answer_body, answer_frames, make_text
from llm_edge_cache.gateway.stand_in_faults import Plan, apply_fault

__all__ = ["ConnectionCutError", "StandInProvider", "StandInSettings", "Tally", "recording_key"]

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_CONTROL: Final = "/stand-in"
_JSON: Final = ((b"content-type", b"application/json"),)
_STREAM: Final = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_ELSEWHERE: Final = OpenAIChat()  # whose errors are told at paths of no protocol
_encode: Final = msgspec.json.Encoder().encode


class ConnectionCutError(Exception):
    """Raised out of the application to cut a connection, on purpose."""


class StandInSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the stand-in answers."""

    answers: Literal["same", "different"] = "same"
    """To equal questions: always the same answer, or never."""
    words: int = 40
    """Words of an answer; a stream has one event for each."""
    first_delay: float = 0.3
    """Seconds to the first byte of an answer, on average."""
    word_delay: float = 0.02
    """Seconds between two events of a stream, on average; an answer in one piece takes the same time for its words."""
    jitter: float = 0.5
    """Share by which each delay is longer or shorter, at most, drawn from the question: 0 to 1."""


class Tally(msgspec.Struct):
    """What a stand-in has counted since it started or was reset."""

    calls: int = 0
    """Calls of the protocols' endpoints, faults included."""
    completed: int = 0
    """Answers that were sent to a clean end."""
    by_path: Counter[str] = msgspec.field(default_factory=Counter)
    by_question: Counter[str] = msgspec.field(default_factory=Counter)
    """By :func:`recording_key`."""
    faults: Counter[str] = msgspec.field(default_factory=Counter)


def recording_key(path: str, body: bytes) -> str:
    """Return what identifies a question to the stand-in: a hash of the path and of the body as JSON, every field.

    Raises:
        ValueError: the body is no JSON.
    """
    value = msgspec.json.decode(body)
    return hashlib.sha256(encode_json([path, value], "body")).hexdigest()


class StandInProvider:
    """The ASGI application.

    Args:
        settings: how to answer.
        recordings: answers to give in place of made-up ones, by :func:`recording_key` of their question.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        settings: StandInSettings | None = None,
        recordings: Mapping[str, Plan] | None = None,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.settings = settings or StandInSettings()
        self.tally = Tally()
        self._recordings: Final = recordings or {}
        self._ordered_faults: deque[str] = deque()
        self._sleep: Final = sleep

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Serve one request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _serve(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        body = await _read_body(receive)
        if body is None:
            return
        path, fault = _path_and_fault(scope)
        protocol = PROTOCOLS.get(path)
        if protocol is not None and scope["method"] == "POST":
            fault = fault or (self._ordered_faults.popleft() if self._ordered_faults else None)
            plan = self._plan_call(protocol, body, fault)
            await self._carry_out(plan, hashlib.sha256(body).hexdigest(), receive, send)
            self.tally.completed += plan.end == "clean"
        else:
            await self._carry_out(self._plan_other(path, scope, body), None, receive, send)

    # ---- deciding ----

    def _plan_call(self, protocol: WireProtocol, body: bytes, fault: str | None) -> Plan:
        self.tally.calls += 1
        self.tally.by_path[protocol.path] += 1
        try:
            request = parse_body(body)
            question = recording_key(protocol.path, body)
        except (BadRequestError, ValueError) as error:
            return Plan(400, _JSON, (protocol.error_body(400, str(error)),))
        self.tally.by_question[question] += 1
        plan = self._recordings.get(question) or self._make_up(protocol, request.fields, question)
        if fault is None:
            return plan
        self.tally.faults[fault] += 1
        try:
            return apply_fault(fault, plan, protocol)
        except ValueError as error:
            return Plan(400, _JSON, (protocol.error_body(400, str(error)),))

    def _make_up(self, protocol: WireProtocol, request: Mapping[str, Any], question: str) -> Plan:
        is_unique = self.settings.answers == "different"
        identity = f"{self.tally.calls}-{secrets.token_hex(4)}" if is_unique else question[:12]
        said = Said(request, make_text(identity, self.settings.words), identity)
        if request.get("stream") is True and protocol.path != "/v1/embeddings":
            return Plan(200, _STREAM, tuple(answer_frames(protocol.path, said)), is_paced=True)
        return Plan(200, _JSON, (answer_body(protocol.path, said),))

    def _plan_other(self, path: str, scope: _Scope, body: bytes) -> Plan:
        if path == _CONTROL or path.startswith(f"{_CONTROL}/"):
            return self._plan_control(path, scope["method"], body)
        if path == "/v1/models":
            model = {"id": "stand-in", "object": "model", "created": 0, "owned_by": "nobody: this is a stand-in"}
            return Plan(200, _JSON, (_encode({"object": "list", "data": [model]}),))
        if path.startswith("/v1/echo"):
            return Plan(200, _JSON, (_encode(_echo(path, scope, body)),))
        return Plan(404, _JSON, (_ELSEWHERE.error_body(404, f"the stand-in has nothing at {path}"),))

    def _plan_control(self, path: str, method: str, body: bytes) -> Plan:
        try:
            if method == "POST":
                self._control(path, body)
        except (ValueError, LookupError) as error:
            return Plan(400, _JSON, (_ELSEWHERE.error_body(400, str(error)),))
        return Plan(200, _JSON, (_encode(self.tally),))

    def _control(self, path: str, body: bytes) -> None:
        if path == f"{_CONTROL}/reset":
            self.tally = Tally()
            self._ordered_faults.clear()
        elif path == f"{_CONTROL}/settings":
            given = {**msgspec.to_builtins(self.settings), **msgspec.json.decode(body, type=dict[str, Any])}
            self.settings = msgspec.convert(given, StandInSettings)
        elif path == f"{_CONTROL}/faults":
            order = msgspec.json.decode(body, type=_FaultOrder)
            self._ordered_faults.extend([order.fault] * order.times)
        else:
            raise LookupError(f"the stand-in has no control at {path}")

    # ---- doing ----

    async def _carry_out(self, plan: Plan, seed: str | None, receive: _Receive, send: _Send) -> None:
        delays = self._delays(plan, seed)
        if plan.has_head:
            await self._sleep(next(delays))
            await send({"type": "http.response.start", "status": plan.status, "headers": _headers(plan)})
            for position, chunk in enumerate(plan.chunks):
                if plan.is_paced and position:
                    await self._sleep(next(delays))
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if plan.end == "cut":
            raise ConnectionCutError
        if plan.end == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _delays(self, plan: Plan, seed: str | None) -> Iterator[float]:
        """Yield the seconds to wait before the first byte, and then before each further chunk of a stream."""
        settings, draw = self.settings, random.Random(seed)  # noqa: S311 (a delay is no secret)

        def jittered(seconds: float) -> float:
            return seconds * (1 + settings.jitter * draw.uniform(-1, 1))

        is_call = seed is not None and plan.status == 200
        first = settings.first_delay + (0 if plan.is_paced else settings.words * settings.word_delay)
        yield jittered(first) if is_call else 0.0
        while True:
            yield jittered(settings.word_delay)


class _FaultOrder(msgspec.Struct, forbid_unknown_fields=True):
    fault: str
    times: int = 1


def _path_and_fault(scope: _Scope) -> tuple[str, str | None]:
    path = scope["path"]
    if path.startswith("/fault/"):
        _, _, name, *rest = path.split("/", 3)
        return "/" + "".join(rest), name
    named = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-stand-in-fault"]
    return path, named[-1] if named else None


def _headers(plan: Plan) -> list[tuple[bytes, bytes]]:
    """An answer in one piece that ends well has a length; any other is sent in chunks."""
    if plan.end == "clean" and len(plan.chunks) <= 1:
        return [*plan.headers, (b"content-length", str(sum(map(len, plan.chunks))).encode())]
    return list(plan.headers)


def _echo(path: str, scope: _Scope, body: bytes) -> dict[str, Any]:
    return {
        "method": scope["method"],
        "path": path,
        "query": scope["query_string"].decode("latin-1"),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "body": body.decode("latin-1"),
    }


async def _read_body(receive: _Receive) -> bytes | None:
    """Return the request's body, or None when the client has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _live(receive: _Receive, send: _Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
