"""`llm-edge-cache delete`, `clear`, `unlink`: taking something out of a live cache, or the slab away."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any, Final

from llm_edge_cache.cli.attach import UsageError, add_command, add_key, key_of, live_slab
from llm_edge_cache.cli.output import count_text, json_line, key_text, say, size_text
from llm_edge_cache.effects import perform
from llm_edge_cache.engine import DEFAULT_L1, Engine, fingerprint_of
from llm_edge_cache.invalidation import Invalidation, namespace_tag
from llm_edge_cache.keys import is_tier_key
from llm_edge_cache.redis_client import parse_redis_url
from llm_edge_cache.regions import Word
from llm_edge_cache.settings import L2Config, load_settings
from llm_edge_cache.slab import SharedSlab

__all__ = ["add_parsers"]

_TIERS: Final = (
    "Where Redis is used (LLM_EDGE_CACHE_REDIS_URL, or --redis-url), it is void there too, and on every other host. "
    "While Redis is away that is noted in the slab, and the application carries it there later."
)


def add_parsers(commands: Any) -> None:
    """Add this module's subcommands."""
    parser = add_command(
        commands,
        "delete",
        "delete keys, or what is stored under a tag",
        f"Deletes keys, or everything that was stored under a tag or by the gateway for a namespace. {_TIERS} "
        "Exits with 1 if a key was not there, and there is no Redis that may have had it.",
    )
    add_key(parser, how_many="*")
    parser.add_argument("--tag", action="append", default=[], metavar="T", help="what was stored under this tag")
    parser.add_argument(
        "--namespace", action="append", default=[], metavar="N", help="what the gateway stored for this namespace"
    )
    _add_tiers(parser)
    parser.set_defaults(run=_delete)
    parser = add_command(
        commands,
        "clear",
        "delete everything",
        f"Deletes every entry: when it returns, all keys miss in every process. {_TIERS}",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask, on a terminal either")
    _add_tiers(parser)
    parser.set_defaults(run=_clear)
    parser = add_command(
        commands,
        "unlink",
        "take the slab away and free its memory",
        "Retires the slab. Processes that use it go on and miss, until one of them, or a new one, creates it again. "
        "Needed to change its size, and to free the memory when it is used no longer; a reboot does the same.",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask, on a terminal either")
    parser.set_defaults(run=_unlink)


def _add_tiers(parser: Any) -> None:
    parser.add_argument(
        "--redis-url", metavar="URL", help="the application's Redis (default: LLM_EDGE_CACHE_REDIS_URL)"
    )
    parser.add_argument("--l1-only", action="store_true", help="this host's slab alone; Redis keeps what it has")


class _Tiers:
    """What a deletion reaches: the slab, and the Redis that the application has behind it."""

    def __init__(self, slab: SharedSlab, options: argparse.Namespace) -> None:
        l2 = None if options.l1_only else _redis_of(options)
        followed = slab._word(Word.FOLLOWED)
        if l2 is None:
            if followed and not options.l1_only:
                raise UsageError(
                    f"slab {slab.name!r} has a Redis behind it, which would give back what is deleted here: "
                    "name it with LLM_EDGE_CACHE_REDIS_URL or --redis-url, or say --l1-only"
                )
        elif followed not in (0, fingerprint_of(parse_redis_url(l2.redis_url), l2)):
            # An Engine over this slab would make it start anew with that Redis, under the application's feet.
            raise UsageError(
                f"slab {slab.name!r} has another Redis behind it than the one named here, or LLM_EDGE_CACHE_KEY_PREFIX "
                "differs: name it as the application does"
            )
        self._slab = slab
        self._engine = Engine(DEFAULT_L1, l2, slab)
        self.has_redis = l2 is not None

    def invalidate(self, what: Invalidation) -> None:
        # The engine is not opened: a process that is gone in a moment takes over no host's duties.
        perform(self._engine.invalidator.invalidate(what), self._engine.world())

    def __enter__(self) -> _Tiers:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def outcome(self) -> str | None:
        """Say what became of it in Redis: None where there is none."""
        if not self.has_redis:
            return None
        return "void" if self._slab._word(Word.UNDELIVERED) == 0 else "later"

    def said(self) -> list[str]:
        """Say the same to people."""
        told = {"void": "void in Redis and on every host", "later": "Redis is away: it will be told when it is back"}
        outcome = self.outcome()
        return [] if outcome is None else [told[outcome]]


def _redis_of(options: argparse.Namespace) -> L2Config | None:
    l2 = load_settings().l2
    if options.redis_url is None:
        return l2
    return L2Config(options.redis_url) if l2 is None else dataclasses.replace(l2, redis_url=options.redis_url)


def _delete(options: argparse.Namespace) -> int:
    keys = [key_of(text, options) for text in options.key]
    tags = [*options.tag, *map(namespace_tag, options.namespace)]
    if not keys and not tags:
        raise UsageError("nothing to delete: name a KEY, a --tag or a --namespace")
    with live_slab(options) as slab, _Tiers(slab, options) as tiers:
        absent = [key for key in keys if not slab.delete(key)]
        # Only requests are kept in Redis.
        void = [Invalidation("key", key.decode()) for key in keys if is_tier_key(key)]
        for what in [*void, *(Invalidation("tag", tag) for tag in tags)]:
            tiers.invalidate(what)
        deleted = len(keys) - len(absent)
        if options.json:
            known = {"deleted": deleted, "absent": [key_text(key) for key in absent], "tags": tags}
            say(json_line({**known, "redis": tiers.outcome()}))
        else:
            if keys:
                say(f"deleted {count_text(deleted)} of {count_text(len(keys))}")
            say(*(f"was not there: {key_text(key)}" for key in absent))
            say(*(f"void: everything tagged {tag}" for tag in tags))
            say(*tiers.said())
        return int(bool(absent) and not tiers.has_redis)


def _clear(options: argparse.Namespace) -> int:
    with live_slab(options) as slab, _Tiers(slab, options) as tiers:
        entries = len(slab)
        where = " and all that Redis has, for every host" if tiers.has_redis else ""
        if not _is_wanted(options, f"Delete the {count_text(entries)} entries of slab {slab.name!r}{where}?"):
            return 1
        tiers.invalidate(Invalidation("all"))
        if options.json:
            say(json_line({"deleted": entries, "redis": tiers.outcome()}))
        else:
            say(f"cleared: {count_text(entries)} entries deleted", *tiers.said())
    return 0


def _unlink(options: argparse.Namespace) -> int:
    with live_slab(options) as slab:
        stats, users = slab.stats(), slab._mapping.attached() - 1
        size = size_text(stats.memory_bytes)
        used = f"{count_text(stats.entries)} entries, {size}, {count_text(users)} processes attached"
        if not _is_wanted(options, f"Take slab {slab.name!r} away ({used})?"):
            return 1
        slab.unlink()
    if options.json:
        say(json_line({"entries": stats.entries, "memory_bytes": stats.memory_bytes, "attached_processes": users}))
    else:
        say(f"unlinked: {used}")
    return 0


def _is_wanted(options: argparse.Namespace, question: str) -> bool:
    """Ask, where there is somebody to ask."""
    if options.yes or options.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # noqa: T201
    return sys.stdin.readline().strip().lower() in ("y", "yes")
