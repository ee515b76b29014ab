"""gunicorn's configuration for the shared slab: ``gunicorn -c python:llm_edge_cache.workers.gunicorn app:app``.

The master creates the slab before the first fork (before the application is imported, with ``preload_app``), as the
workers' user if that is another, and frees what a killed worker left unfinished. Workers reach it with
``SharedSlab(name)`` or ``SharedSlab.attach(name)``. Its name and size come from the environment: see
`llm_edge_cache.settings.load_settings`.

In a configuration file of one's own::

    from llm_edge_cache.workers import gunicorn as slab_hooks
    from llm_edge_cache.workers.gunicorn import *

    def child_exit(server, worker):          # a hook of one's own goes on to ours
        slab_hooks.child_exit(server, worker)
        ...

=====================  ============================================================================================
hook                   what it does
=====================  ============================================================================================
``nworkers_changed``   the first hook of a master, the only one before ``preload_app`` imports: creates or attaches
``on_starting``        the same, where a configuration of one's own has left ``nworkers_changed`` out
``on_reload`` (HUP)    attaches to what the settings name now; keeps what it has where that fails
``post_fork``          drops the master's handle in the worker: one that never uses the slab is not to keep it mapped
``child_exit``         reaps after a worker
``on_exit``            closes; never unlinks: the next start finds the cache warm
=====================  ============================================================================================
"""

# ruff: noqa: ARG001 - gunicorn fixes the arguments of its hooks
from __future__ import annotations

import os
from typing import Any

from llm_edge_cache.errors import CacheError
from llm_edge_cache.settings import load_settings
from llm_edge_cache.workers.keeper import SlabKeeper

# gunicorn takes every global of a configuration module that bears a setting's name; these are all of ours.
__all__ = ["child_exit", "nworkers_changed", "on_exit", "on_reload", "on_starting", "post_fork"]

# One per master. gunicorn reads a configuration again at HUP, but a module imported once stays.
_keeper = SlabKeeper()


def nworkers_changed(server: Any, new_value: int, old_value: int | None) -> None:
    """Create the slab when the master sets its number of workers for the first time."""
    if old_value is None:
        _open(server)


def on_starting(server: Any) -> None:
    """Create the slab if that has not been done."""
    if not _keeper.is_open:
        _open(server)


def on_reload(server: Any) -> None:
    """Attach to the slab that the settings name now; on failure, keep the one held."""
    try:
        _keeper.open(*_settings(server))
    except CacheError as error:
        server.log.error("llm-edge-cache: the slab stays as it was: %s", error)


def post_fork(server: Any, worker: Any) -> None:
    """Drop the master's handle in a new worker."""
    _keeper.close()


def child_exit(server: Any, worker: Any) -> None:
    """Free what the worker had reserved; a failure is logged, the next reaping will do it."""
    try:
        _keeper.reap()
    except CacheError as error:
        server.log.warning("llm-edge-cache: not reaped after worker %s: %s", worker.pid, error)


def on_exit(server: Any) -> None:
    """Close the slab, which stays."""
    _keeper.close()


def _open(server: Any) -> None:
    try:
        _keeper.open(*_settings(server))
    except CacheError as error:
        # The one exception that gunicorn reports as "Error: ..." instead of a traceback; it exits with 1.
        raise RuntimeError(str(error)) from error


def _settings(server: Any) -> tuple[Any, int, int]:
    # raw_env is not yet in os.environ when the first hook runs.
    environ = {**os.environ, **server.cfg.env}
    return load_settings(environ).slab, server.cfg.uid, server.cfg.gid
