"""What all commands on a live slab share: which one, and why there is none. None of them ever creates one."""

from __future__ import annotations

import argparse
import contextlib
import os
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from llm_edge_cache import naming
from llm_edge_cache.cli.output import key_text
from llm_edge_cache.errors import SlabNotFoundError, SlabPermissionError, SlabVersionError
from llm_edge_cache.settings import load_settings
from llm_edge_cache.slab import SharedSlab

__all__ = ["UsageError", "add_command", "add_key", "chosen_name", "key_of", "live_slab"]

_WIDTH: Final = 100  # of help texts
_ATTACHES: Final = "Attaches to a live slab and never creates one by accident."
_EPILOG: Final = (
    "Exit codes: 0 done, 1 it could not be done (why is on standard error), 2 wrong usage, 130 interrupted."
)
_LONGEST_NAME: Final = 4096


class UsageError(Exception):
    """The arguments make no sense; exit code 2."""


def add_command(commands: Any, name: str, help_text: str, description: str, *, has_json: bool = True) -> Any:
    """Add a command on a slab, with the options that all of them have; returns its parser."""
    parser = commands.add_parser(
        name,
        help=help_text,
        description="\n\n".join(textwrap.fill(part, _WIDTH) for part in (*description.split("\n\n"), _ATTACHES)),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--name", metavar="S", help="the slab (default: LLM_EDGE_CACHE_NAME, or llm-edge-cache where that is not set)"
    )
    if has_json:
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def chosen_name(options: argparse.Namespace) -> str:
    """Return the slab's name: as given, or from the environment. Raises UsageError."""
    name: str = options.name if options.name is not None else load_settings().l1.name
    try:
        naming.place_of(name, naming.current_owner())
    except ValueError as error:
        raise UsageError(str(error)) from None
    return name


def live_slab(options: argparse.Namespace) -> SharedSlab:
    """Attach to the slab that a command is about.

    Raises:
        SlabNotFoundError: none is live; says which are, and whose or which version's one of that name is.
        SlabPermissionError: it is another user's.
        SlabVersionError: another version made it.
    """
    name = chosen_name(options)
    try:
        return SharedSlab.attach(name)
    except SlabNotFoundError:
        for error in _reasons(name):
            raise error from None
        raise


def _reasons(name: str) -> Iterator[Exception]:
    """Why a slab of this name may be live and yet not be found: the file's name depends on user and version."""
    mine = naming.place_of(name, naming.current_owner())
    others = [(path, status) for path, status in _lock_files() if path != mine.lock]
    for path, status in others:
        owner = naming.Owner(status.st_uid, status.st_gid)
        if owner.uid != mine.owner.uid and naming.place_of(name, owner).lock == path:
            yield SlabPermissionError(
                f"slab {name!r} belongs to uid {owner.uid}, and this is uid {mine.owner.uid}: "
                "run the command as that user"
            )
    if any(status.st_uid == mine.owner.uid and _content(path) == name.encode() for path, status in others):
        yield SlabVersionError(
            f"a slab {name!r} is there, but another version or build of llm-edge-cache made it, another C library, "
            "or another container: run the command with that one"
        )


def _lock_files() -> Iterator[tuple[str, os.stat_result]]:
    """The lock files of all slabs of the host; they come and go."""
    for entry in os.scandir(naming.DIRECTORY):
        if entry.name.startswith(naming.PREFIX) and entry.name.endswith(naming.LOCK_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                yield entry.path, entry.stat(follow_symlinks=False)


def _content(path: str) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(_LONGEST_NAME)
    except OSError:
        return b""


# ---- keys ----


def add_key(parser: Any, *, how_many: str | None = None) -> None:
    """Add the arguments that name a key."""
    parser.add_argument(
        "key", metavar="KEY", nargs=how_many, help="the key, as text; of requests 64 hexadecimal digits"
    )
    parser.add_argument("--hex", action="store_true", help="KEY is given as the hexadecimal digits of its bytes")


def key_of(text: str, options: argparse.Namespace) -> bytes:
    """Return the key that an argument names.

    Raises:
        UsageError: it is none.
    """
    try:
        key = bytes.fromhex(text) if options.hex else os.fsencode(text)
    except ValueError:
        raise UsageError(f"{text!r} is not hexadecimal, as --hex has it") from None
    if not 1 <= len(key) <= 1024:
        raise UsageError(f"a key has 1 to 1,024 bytes, not {len(key):,}: {key_text(key[:40])!r}")
    return key
