"""A Flask application whose workers share one cache, preloaded or not.

pip install llm-edge-cache flask gunicorn
gunicorn -c python:llm_edge_cache.workers.gunicorn --chdir docs/examples/web_apps --workers 4 --preload flask_app:app
"""

from __future__ import annotations

import os
import time
from typing import Any

from flask import Flask, request

from llm_edge_cache import CacheableRequest, CachedResponse, SyncCacheManager, load_settings
from llm_edge_cache.adapters.lifespan import OpenedWSGI

settings = load_settings()
cache = SyncCacheManager(settings.l1, settings.l2)
app = Flask(__name__)
app.wsgi_app = OpenedWSGI(app.wsgi_app, cache)  # type: ignore[method-assign]


def ask_the_provider(question: str) -> CachedResponse:
    """Stands for the call of an LLM."""
    time.sleep(0.2)
    return CachedResponse(f"the answer to {question!r}, by worker {os.getpid()}", "gpt-4o")


@app.get("/ask")
def ask() -> dict[str, Any]:
    question = request.args["question"]
    response = cache.get_or_compute(CacheableRequest("gpt-4o", question), lambda: ask_the_provider(question))
    return {"pid": os.getpid(), "content": response.content if response else None}


@app.get("/pid")
def pid() -> dict[str, int]:
    return {"pid": os.getpid()}
