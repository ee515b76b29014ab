"""gunicorn's configuration: the slab's hooks, and whatever else an application wants."""

from llm_edge_cache.workers import gunicorn as slab_hooks
from llm_edge_cache.workers.gunicorn import *  # noqa: F403 - gunicorn takes the hooks by their names

workers = 4


def child_exit(server, worker):  # type: ignore[no-untyped-def]
    """A hook of one's own goes on to ours, which frees what a killed worker left unfinished."""
    slab_hooks.child_exit(server, worker)
    server.log.info("worker %s has ended", worker.pid)
