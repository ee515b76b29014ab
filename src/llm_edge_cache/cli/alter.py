"""`llm-edge-cache delete`, `clear`, `unlink`: taking something out of a live slab, or the slab away."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llm_edge_cache.cli.attach import add_command, add_key, key_of, live_slab
from llm_edge_cache.cli.output import count_text, json_line, key_text, say, size_text

__all__ = ["add_parsers"]

_TIER = "Redis, where it is used, keeps what it has: the application's invalidate() and clear_all() reach both tiers."


def add_parsers(commands: Any) -> None:
    """Add this module's subcommands."""
    parser = add_command(
        commands,
        "delete",
        "delete keys",
        f"Deletes keys from the slab, for every process of the host. {_TIER} Exits with 1 if one was not there.",
    )
    add_key(parser, how_many="+")
    parser.set_defaults(run=_delete)
    parser = add_command(
        commands,
        "clear",
        "delete everything in the slab",
        f"Deletes every entry: when it returns, all keys miss in every process. {_TIER}",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask, on a terminal either")
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


def _delete(options: argparse.Namespace) -> int:
    keys = [key_of(text, options) for text in options.key]
    with live_slab(options) as slab:
        absent = [key for key in keys if not slab.delete(key)]
    if options.json:
        say(json_line({"deleted": len(keys) - len(absent), "absent": [key_text(key) for key in absent]}))
    else:
        say(f"deleted {count_text(len(keys) - len(absent))} of {count_text(len(keys))}")
        say(*(f"was not there: {key_text(key)}" for key in absent))
    return 1 if absent else 0


def _clear(options: argparse.Namespace) -> int:
    with live_slab(options) as slab:
        entries = len(slab)
        if not _is_wanted(options, f"Delete the {count_text(entries)} entries of slab {slab.name!r}?"):
            return 1
        slab.clear()
    say(json_line({"deleted": entries}) if options.json else f"cleared: {count_text(entries)} entries deleted")
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
