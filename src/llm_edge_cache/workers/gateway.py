"""gunicorn's worker for the gateway: `uvicorn_worker.UvicornWorker` with the settings that `llm-edge-cache serve` has.

    gunicorn -k llm_edge_cache.workers.gateway.GatewayWorker 'llm_edge_cache.gateway.app:from_environment()'

Wants gunicorn and uvicorn-worker beside the extra `gateway`.
"""

from __future__ import annotations

from uvicorn_worker import UvicornWorker

from llm_edge_cache.gateway.config import SERVER_OPTIONS

__all__ = ["GatewayWorker"]


class GatewayWorker(UvicornWorker):
    """Keeps connections for as long as clients do, and adds no headers to a provider's own."""

    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, **SERVER_OPTIONS}  # noqa: RUF012 - the base's attribute
