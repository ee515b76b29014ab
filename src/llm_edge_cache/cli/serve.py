"""`llm-edge-cache serve`: the gateway, as one command."""

from __future__ import annotations

import argparse
import os
from typing import Any

import msgspec

from llm_edge_cache.errors import SettingsError
from llm_edge_cache.gateway.config import CONFIG_VARIABLE, DEFAULT_MEMORY, SERVER_OPTIONS, GatewayConfig
from llm_edge_cache.settings import L2Config, load_settings
from llm_edge_cache.slab import SharedSlab
from llm_edge_cache.slabconfig import SlabConfig

__all__ = ["add_parsers", "open_gateway_slab", "run_server"]

_APPLICATION = "llm_edge_cache.gateway.app:from_environment"
_ADMIN_LOG = "llm_edge_cache.admin"
_EXTRA = "the gateway needs its extra: pip install 'llm-edge-cache[gateway]'"


def add_parsers(commands: Any) -> None:
    """Add this module's subcommands."""
    parser = commands.add_parser(
        "serve",
        help="answer an LLM provider's API from the cache",
        description="A caching gateway: point your client's base_url at it. Variables LLM_EDGE_CACHE_* give what no "
        "option does (docs/settings.md).",
    )
    parser.add_argument("--upstream", metavar="URL", help="the provider, e.g. https://api.openai.com")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="worker processes")
    parser.add_argument("--name", metavar="S", help="name of the slab in shared memory")
    parser.add_argument("--memory", metavar="BYTES", type=int, help="size of the slab (default: that "
                        "of the live one, LLM_EDGE_CACHE_L1_MEMORY, or 256 MiB)")  # fmt: skip
    parser.add_argument("--redis-url", metavar="URL", help="Redis shared with other hosts (a password is better given "
                        "by LLM_EDGE_CACHE_REDIS_URL)")  # fmt: skip
    parser.add_argument("--ttl", type=float, metavar="SECONDS", help="how long answers are kept")
    parser.add_argument("--share-between-callers", action="store_true", help="callers with different credentials get "
                        "one another's answers")  # fmt: skip
    parser.add_argument("--stale-if-error", type=float, metavar="SECONDS", help="how long beyond its life an answer "
                        "may stand in for a failing upstream")  # fmt: skip
    parser.add_argument("--metrics-token", metavar="TOKEN", help="bearer token that /metrics wants")
    parser.add_argument("--admin-token", metavar="TOKEN", help="bearer token that the dashboard and "
                        "the admin calls want (better given by LLM_EDGE_CACHE_ADMIN_TOKEN); without one they answer "
                        "this host alone")  # fmt: skip
    parser.add_argument("--show-workers", action="store_true", help="tell in headers which worker answered")
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    config = _config_of(options)
    with open_gateway_slab(config.name, _memory_named(options)):
        run_server(config, options.host, options.port, options.workers)
    return 0


def _memory_named(options: argparse.Namespace) -> int | None:
    """Return the size that option or variable asks for; None: any that is live is right."""
    return options.memory or load_settings().slab_memory


def _config_of(options: argparse.Namespace) -> GatewayConfig:
    settings = load_settings()
    upstream = options.upstream or settings.upstream
    if upstream is None:
        raise SettingsError("no upstream: give --upstream URL or set LLM_EDGE_CACHE_UPSTREAM")
    l2 = settings.l2
    if options.redis_url is not None:
        l2 = L2Config(options.redis_url)
    given = {
        field: getattr(options, field)
        for field in ("ttl", "stale_if_error", "metrics_token")
        if getattr(options, field) is not None
    }
    return GatewayConfig(
        upstream=upstream,
        name=options.name or settings.l1.name,
        memory=_memory_named(options) or DEFAULT_MEMORY,
        l2=l2,
        admin_token=settings.admin_token if options.admin_token is None else options.admin_token,
        share_between_callers=options.share_between_callers,
        show_workers=options.show_workers,
        **given,
    )


def open_gateway_slab(name: str, memory_bytes: int | None) -> SharedSlab:
    """Open the slab that is live under the name, or make one. The master holds it open while its workers run.

    Raises:
        SlabError: it cannot be had, or another size is live.
    """
    if memory_bytes is None and SharedSlab.exists(name):
        return SharedSlab(name)
    return SharedSlab(name, SlabConfig(memory_bytes=memory_bytes or DEFAULT_MEMORY, ttl=None))


def run_server(config: GatewayConfig, host: str, port: int, workers: int) -> None:
    """Serve until the process is told to stop; requests under way are answered first.

    Raises:
        SettingsError: the extra is not installed.
    """
    try:
        # Found missing here rather than in every worker.
        import aiohttp  # noqa: F401, PLC0415
        import uvicorn  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(f"{_EXTRA} ({error})") from None
    os.environ[CONFIG_VARIABLE] = msgspec.json.encode(config).decode()
    uvicorn.run(
        _APPLICATION,
        factory=True,
        host=host,
        port=port,
        workers=workers,
        access_log=False,
        log_config=_log_config(uvicorn.config.LOGGING_CONFIG),
        log_level="warning",
        **SERVER_OPTIONS,
    )


def _log_config(servers: dict[str, Any]) -> dict[str, Any]:
    """Return the server's logging with the admin calls' beside it: what was made void is told, and when."""
    handler = {"class": "logging.StreamHandler", "formatter": _ADMIN_LOG, "stream": "ext://sys.stderr"}
    logger = {"handlers": [_ADMIN_LOG], "level": "INFO", "propagate": False}
    return {
        **servers,
        "formatters": {**servers["formatters"], _ADMIN_LOG: {"format": "%(asctime)s %(name)s: %(message)s"}},
        "handlers": {**servers["handlers"], _ADMIN_LOG: handler},
        "loggers": {**servers["loggers"], _ADMIN_LOG: logger},
    }
