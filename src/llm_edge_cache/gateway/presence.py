"""A client is served for as long as it is there: ASGI servers do not tell an application that its client has gone.

Not for answers that are there at once: two tasks cost more than they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from llm_edge_cache.gateway.respond import Receive

__all__ = ["while_present"]


async def while_present(
    receive: Receive, serving: Coroutine[Any, Any, None], *, body: asyncio.Event | None = None
) -> None:
    """Run `serving`; cancel it when the client has gone.

    Args:
        receive: of the request.
        serving: sends the answer.
        body: set once the request's body was received, by whoever else receives it; None: it was.
    """
    task = asyncio.ensure_future(serving)
    gone = asyncio.ensure_future(_until_gone(receive, body))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        # 1 the client goes  2 `gone` is done  3 the answer ends before we run: then it is not cancelled, but whole.
        has_left = not task.done()
        gone.cancel()
        task.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)
    if not has_left:
        task.result()  # raises what it raised


async def _until_gone(receive: Receive, body: asyncio.Event | None) -> None:
    if body is not None:
        await body.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
