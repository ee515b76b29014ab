"""The command line: finds the subcommand, runs it, and turns our errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from llm_edge_cache.cli import alter, demo, explain, inspection, serve, top, transfer
from llm_edge_cache.cli.attach import UsageError
from llm_edge_cache.errors import CacheError

__all__ = ["main"]

_GROUPS = (serve, demo, inspection, top, alter, transfer, explain)
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
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return 1
    except (CacheError, OSError) as error:
        return _complain(error, 1)
    except UsageError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _complain(error: Exception, code: int) -> int:
    print(f"llm-edge-cache: {error}", file=sys.stderr)  # noqa: T201
    return code
