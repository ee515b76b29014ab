"""The command line: finds the subcommand, runs it, and turns our errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from llm_edge_cache.cli import demo, serve
from llm_edge_cache.errors import CacheError

__all__ = ["main"]

_GROUPS = (serve, demo)
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows the program's name; None: what the process was given.

    Returns:
        The exit code: 0 done, 1 it could not be done (why is on standard error), 2 wrong usage, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="llm-edge-cache",
        description="One LLM response cache for every worker on the host.",
    )
    parser.add_argument("--version", action="version", version=version("llm-edge-cache"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in _GROUPS:
        group.add_parsers(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except CacheError as error:
        print(f"llm-edge-cache: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code
