"""A FastAPI application whose workers share one cache.

pip install llm-edge-cache fastapi uvicorn
uvicorn --app-dir docs/examples/web_apps --workers 4 fastapi_app:app
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from fastapi import FastAPI, Request

from llm_edge_cache import CacheableRequest, CachedResponse, CacheManager, load_settings
from llm_edge_cache.adapters.lifespan import lifespan

settings = load_settings()
app = FastAPI(lifespan=lifespan(CacheManager(settings.l1, settings.l2)))


async def ask_the_provider(question: str) -> CachedResponse:
    """Stands for the call of an LLM."""
    await asyncio.sleep(0.2)
    return CachedResponse(f"the answer to {question!r}, by worker {os.getpid()}", "gpt-4o")


@app.get("/ask")
async def ask(request: Request, question: str) -> dict[str, Any]:
    cache: CacheManager = request.state.cache
    asked = CacheableRequest("gpt-4o", question)
    response = await cache.get_or_compute(asked, lambda: ask_the_provider(question))
    return {"pid": os.getpid(), "content": response.content if response else None}


@app.get("/pid")
async def pid() -> dict[str, int]:
    return {"pid": os.getpid()}
