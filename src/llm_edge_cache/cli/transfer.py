"""`llm-edge-cache snapshot`, `restore`: a warm cache over a reboot, or for another host."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from llm_edge_cache import snapshot
from llm_edge_cache.cli.attach import UsageError, add_command, chosen_name, live_slab
from llm_edge_cache.cli.courtesy import Courtesy
from llm_edge_cache.cli.output import ProgressBar, count_text, json_line, say, size_text, time_text
from llm_edge_cache.slab import SharedSlab

__all__ = ["add_parsers"]


def add_parsers(commands: Any) -> None:
    """Add this module's subcommands."""
    parser = add_command(
        commands,
        "snapshot",
        "save the entries to a file",
        "Saves the entries to a file, each with its value, its expiry and its idle limit. The application goes on, and "
        "comes first where processors are busy; each entry is consistent in itself. FILE appears when it is whole and "
        "on disk; until then, and after any failure, what was there before is untouched. It holds answers in plain "
        "text: only its owner may read it.",
    )
    parser.add_argument("file", metavar="FILE", help="where to; replaced if it is there")
    parser.add_argument(
        "--full-speed", action="store_true", help="do not give way to other processes that want the processor"
    )
    parser.set_defaults(run=_snapshot)
    parser = add_command(
        commands,
        "restore",
        "store the entries of a file",
        "Stores a snapshot's entries in the slab, each for the rest of its life. What the slab has already is left "
        "alone. Best done before the application starts, with --create. Damaged entries are left out and counted.",
    )
    parser.add_argument("file", metavar="FILE", help="a file that snapshot wrote")
    parser.add_argument(
        "--create", action="store_true", help="make the slab where none is live, as the one was that was saved"
    )
    parser.add_argument("--memory", type=int, metavar="BYTES", help="with --create: another size")
    parser.add_argument(
        "--accept-missed",
        action="store_true",
        help="restore although the slab has followed other hosts' invalidations beyond the snapshot",
    )
    parser.set_defaults(run=_restore)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: in order, so that no half file is left."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _snapshot(options: argparse.Namespace) -> int:
    started = time.monotonic()
    courtesy = Courtesy(is_on=not options.full_speed)
    with _terminable(), live_slab(options) as slab, ProgressBar("snapshot", "entries") as bar:

        def tell(done: int, total: int) -> None:
            bar(done, total)
            courtesy.step()

        report = snapshot.save(slab, options.file, progress=tell)
        name = slab.name
    seconds = time.monotonic() - started
    if options.json:
        say(json_line({"name": name, "file": options.file, **report._asdict(), "seconds": seconds}))
    else:
        say(
            f"saved {count_text(report.entries)} entries of slab {name!r}, {size_text(report.payload_bytes)}, in "
            f"{time_text(seconds)}: {options.file}, {size_text(report.file_bytes)}"
        )
    return 0


def _restore(options: argparse.Namespace) -> int:
    started = time.monotonic()
    if options.memory is not None and not options.create:
        raise UsageError("--memory says how large the slab is to be made, so it needs --create")
    with _terminable(), _slab_for(options) as slab, ProgressBar("restore", "bytes") as bar:
        report = snapshot.restore(slab, options.file, accept_missed=options.accept_missed, progress=bar)
        kept, name = len(slab), slab.name
    seconds = time.monotonic() - started
    if options.json:
        say(json_line({"name": name, "file": options.file, **report._asdict(), "entries": kept, "seconds": seconds}))
    else:
        say(_restored_text(report, name, seconds))
    if report.lost or not report.is_complete:
        print(f"llm-edge-cache: {_loss_text(report)}", file=sys.stderr)  # noqa: T201
    return 0


def _slab_for(options: argparse.Namespace) -> SharedSlab:
    if not options.create or SharedSlab.exists(chosen_name(options)):
        return live_slab(options)
    config = snapshot.describe(options.file).config
    if options.memory is not None:
        try:
            config = config.with_memory(options.memory)
        except ValueError as error:
            raise UsageError(f"--memory: {error}") from None
    return SharedSlab(chosen_name(options), config)


def _restored_text(report: snapshot.RestoreReport, name: str, seconds: float) -> str:
    others = (
        (report.expired, "had expired"),
        (report.present, "were there already"),
        (report.refused, "found no room"),
    )
    rest = "".join(f", {count_text(count)} {what}" for count, what in others if count)
    return f"restored {count_text(report.restored)} entries to slab {name!r} in {time_text(seconds)}{rest}"


def _loss_text(report: snapshot.RestoreReport) -> str:
    if report.is_complete:
        return f"the file is damaged: {count_text(report.lost)} entries are lost, the others are restored"
    return (
        f"the end of the file is damaged or missing: {count_text(report.lost)} damaged entries were found, and how "
        "many are missing is not known; the others are restored"
    )
