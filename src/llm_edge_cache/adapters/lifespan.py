"""A cache that is opened and closed with an application: Starlette and FastAPI, and Flask or anything else on WSGI.

    app = FastAPI(lifespan=lifespan(CacheManager()))          # request.state.cache
    app.wsgi_app = OpenedWSGI(app.wsgi_app, SyncCacheManager())   # request.environ["llm_edge_cache"]

A manager may be made before workers are forked: each opens it, and closes it, for itself.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from llm_edge_cache.errors import CacheError
from llm_edge_cache.manager import CacheManager
from llm_edge_cache.sync_manager import SyncCacheManager

__all__ = ["ENVIRON_KEY", "STATE_KEY", "OpenedWSGI", "lifespan"]

ENVIRON_KEY: Final = "llm_edge_cache"
"""Where a WSGI application finds the manager, in the request's environ."""
STATE_KEY: Final = "cache"
"""Where a Starlette or FastAPI application finds it, in the request's state."""

Manager = CacheManager | SyncCacheManager
Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


def lifespan(manager: Manager | Callable[[], Manager], inner: Lifespan | None = None) -> Lifespan:
    """Return a lifespan that opens the cache before the application serves, and closes it afterwards.

    Args:
        manager: The manager; or what returns one, for an application that starts more than once in one process, as
            under a test client: a manager that was closed stays closed.
        inner: A lifespan of the application's own, which runs while the cache is open.

    Returns:
        What Starlette and FastAPI take as `lifespan`. Requests have the manager as `request.state.cache`, besides what
        `inner` gives them.
    """

    @asynccontextmanager
    async def opened(app: Any) -> AsyncIterator[Mapping[str, Any]]:
        made = manager if isinstance(manager, (CacheManager, SyncCacheManager)) else manager()
        async with contextlib.AsyncExitStack() as stack:
            await _open(made)
            stack.push_async_callback(_close, made)
            state = None if inner is None else await stack.enter_async_context(inner(app))
            yield {**(state or {}), STATE_KEY: made}

    return opened


async def _open(manager: Manager) -> None:
    if isinstance(manager, CacheManager):
        await manager.open()
    else:
        await asyncio.get_running_loop().run_in_executor(None, manager.open)


async def _close(manager: Manager) -> None:
    if isinstance(manager, CacheManager):
        await manager.aclose()
    else:
        await asyncio.get_running_loop().run_in_executor(None, manager.close)


class OpenedWSGI:
    """A WSGI application with a cache: opened by a process's first request, closed when the process ends.

    WSGI tells an application neither of its start nor of its end.

    Args:
        application: The application.
        manager: The manager; requests find it in their environ, as `llm_edge_cache`.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]], manager: SyncCacheManager) -> None:
        if not isinstance(manager, SyncCacheManager):
            raise TypeError(f"manager must be a SyncCacheManager, not {type(manager).__name__}")
        self._application = application
        self._manager = manager
        self._pid = 0  # of the process that has opened it

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Serve a request."""
        if self._pid != os.getpid():
            self._open()
        environ[ENVIRON_KEY] = self._manager
        return self._application(environ, start_response)

    def _open(self) -> None:
        self._manager.open()
        self._pid = os.getpid()
        atexit.register(self._close, self._pid)

    def _close(self, pid: int) -> None:
        if pid == os.getpid():  # a child that was forked later has a copy of this, and its parent's work
            with contextlib.suppress(CacheError):
                self._manager.close()
