"""The least that an ASGI application can do with a question: read its body, answer a constant of 1,024 bytes.

`constant` is what the gateway's hits are measured against; `provider` also streams where it is asked to, and is
what the gateway's misses ask.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

ANSWER_BYTES = 1024
EVENTS = 8


def _answer(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 200, "completion_tokens": 150, "total_tokens": 350}
    return json.dumps({"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}).encode()


ANSWER = _answer("x" * (ANSWER_BYTES - len(_answer(""))))
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
_STREAM_HEADERS = [(b"content-type", b"text/event-stream")]
_EVENT = b'data: {"object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
_LAST = (
    b'data: {"object":"chat.completion.chunk","model":"m",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def constant(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    await _read(scope, receive)
    await _send_answer(send)


async def provider(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if b'"stream":true' in await _read(scope, receive):
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        for _ in range(EVENTS):
            await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": _LAST})
    else:
        await _send_answer(send)


async def _read(scope: dict[str, Any], receive: Receive) -> bytes:
    assert scope["type"] == "http"  # the servers take it as "no lifespan"
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            return body


async def _send_answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})
