"""`llm-edge-cache stats`, `scan`, `check`, `get`: looking into a live slab."""

from __future__ import annotations

import argparse
import base64
import itertools
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from llm_edge_cache.cli.attach import add_command, add_key, key_of, live_slab
from llm_edge_cache.cli.output import ProgressBar, columns, count_text, json_line, key_text, say, size_text, time_text
from llm_edge_cache.cli.what_if import tell
from llm_edge_cache.codec import CodecError, Entry, EntryCodec
from llm_edge_cache.reading import HISTOGRAM_NAMES, Look, breaker_text, latency, look, ratio
from llm_edge_cache.regions import Counter

if TYPE_CHECKING:
    from llm_edge_cache.slabconfig import EntryInfo

__all__ = ["add_parsers"]


def add_parsers(commands: Any) -> None:
    """Add this module's subcommands."""
    parser = add_command(
        commands, "stats", "figures of the slab", "Prints what the slab holds and what was asked of it, host-wide."
    )
    parser.add_argument(
        "--what-if",
        action="store_true",
        help="instead: what the hit ratio would be at half, twice and four times the size, from sampled keys",
    )
    parser.set_defaults(run=_stats)
    parser = add_command(
        commands,
        "scan",
        "list the entries",
        "Lists the entries: bytes of the value, time left, time idle (where an idle limit is on), how often it was "
        "asked for lately (an estimate, up to 15 and what is not counted yet), key. With --json one object a line.",
    )
    parser.add_argument("--prefix", default="", metavar="TEXT", help="only keys that begin so")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after so many")
    parser.set_defaults(run=_scan)
    parser = add_command(
        commands,
        "check",
        "check every invariant of the slab",
        "Checks the whole segment, shard by shard; a shard's writers wait meanwhile. Prints what is broken, and exits "
        "with 1 if anything is.",
    )
    parser.set_defaults(run=_check)
    parser = add_command(
        commands,
        "get",
        "print one value",
        "Prints the value of a key: of a cached response what it says and until when it holds, of anything else its "
        "bytes. It is a hit like any other. Exits with 1 if there is no such key.",
    )
    add_key(parser)
    parser.add_argument("--raw", action="store_true", help="the value's bytes as they are, whatever it is")
    parser.set_defaults(run=_get)


# ---- stats ----


def _stats(options: argparse.Namespace) -> int:
    with live_slab(options) as slab:
        if options.what_if:
            return tell(slab, as_json=options.json)
        seen = look(slab, guests=1)
        name = slab.name
    if options.json:
        say(json_line(_stats_json(name, seen)))
    else:
        say(*columns([(label, value) for label, value in _stats_rows(name, seen)]))
    return 0


def _stats_json(name: str, seen: Look) -> dict[str, Any]:
    hits, misses = seen.lookups
    config = seen.config
    return {
        "name": name,
        "config": {
            "memory_bytes": config.memory_bytes,
            "max_entries": config.max_entries,
            "ttl": config.ttl,
            "tti": config.tti,
            "max_value_bytes": config.max_value_bytes,
        },
        "slab": seen.totals,
        "hit_ratio": ratio(hits, misses),
        "counters": {counter.name.lower(): seen.counters[counter] for counter in Counter},
        "latency_seconds": {
            histogram.name.lower(): latency(seen.histograms[histogram]) for histogram in HISTOGRAM_NAMES
        },
        "breaker": breaker_text(seen.words),
        "processes": [process._asdict() for process in seen.processes],
    }


def _stats_rows(name: str, seen: Look) -> list[tuple[str, str]]:
    totals, config = seen.totals, seen.config
    hits, misses = seen.lookups
    share = ratio(hits, misses)
    age = time.time() - totals["created_wall_ns"] / 1e9
    rows = [
        ("slab", name),
        ("created", f"{time_text(max(age, 0.0))} ago"),
        ("processes", count_text(totals["attached_processes"])),
        ("entries", f"{count_text(totals['entries'])} of {count_text(config.max_entries or 0)}"),
        ("memory", f"{size_text(totals['used_bytes'])} used of {size_text(config.memory_bytes)}"),
        ("payload", size_text(totals["payload_bytes"])),
        ("default ttl, idle limit", f"{time_text(config.ttl)}, {time_text(config.tti)}"),
        ("largest value", size_text(config.max_value_bytes or 0)),
        ("hit ratio", "no look-ups yet" if share is None else f"{share:.1%}"),
        ("hits, misses", f"{count_text(hits)}, {count_text(misses)}"),
        ("writes", count_text(seen.writes)),
        ("evictions, expirations", f"{count_text(totals['evictions'])}, {count_text(totals['expirations'])}"),
        ("not admitted", count_text(totals["admission_rejections"])),
        ("refused, busy", f"{count_text(totals['refusals'])}, {count_text(totals['busy'])}"),
        ("recoveries", count_text(totals["recoveries"])),
        ("admission window", f"{totals['window_ppm'] / 1e4:.1f} %"),
    ]
    return rows + _latency_rows(seen) + ([] if seen.is_bare else _manager_rows(seen))


def _latency_rows(seen: Look) -> list[tuple[str, str]]:
    rows = []
    for histogram, label in HISTOGRAM_NAMES.items():
        found = latency(seen.histograms[histogram])
        if found is not None:
            quantiles = ", ".join(f"{name} {time_text(found[name])}" for name in ("p50", "p99", "p999"))
            rows.append((label, f"mean {time_text(found['mean'])}, {quantiles}"))
    return rows


def _manager_rows(seen: Look) -> list[tuple[str, str]]:
    counters = seen.counters
    tokens = counters[Counter.PROMPT_TOKENS_SAVED] + counters[Counter.COMPLETION_TOKENS_SAVED]
    return [
        ("l2 hits, misses", f"{count_text(counters[Counter.L2_HITS])}, {count_text(counters[Counter.L2_MISSES])}"),
        ("computations", count_text(counters[Counter.COMPUTATIONS])),
        ("coalesced", count_text(counters[Counter.COALESCED])),
        ("tokens saved", count_text(tokens)),
        ("time saved", time_text(counters[Counter.MICROSECONDS_SAVED] / 1e6)),
        ("breaker", breaker_text(seen.words)),
    ]


# ---- scan ----


def _scan(options: argparse.Namespace) -> int:
    prefix = options.prefix.encode(errors="surrogateescape")
    with live_slab(options) as slab, ProgressBar("scan", "entries") as bar:
        # Rows on the same terminal would run into the bar.
        is_barred = not sys.stdout.isatty()
        expected = len(slab)
        if not options.json:
            say(_SCAN_ROW.format("size", "left", "idle", "asked", "key"))
        for shown, info in enumerate(itertools.islice(slab.scan(prefix), options.limit), 1):
            say(json_line(_entry_json(info)) if options.json else _entry_row(info))
            if is_barred:
                bar(shown, max(expected, shown))
    return 0


_SCAN_ROW = "{:>10}  {:>12}  {:>12}  {:>5}  {}"


def _entry_row(info: EntryInfo) -> str:
    idle = "" if info.idle is None else time_text(info.idle)
    return _SCAN_ROW.format(size_text(info.size), time_text(info.ttl_left), idle, info.frequency, key_text(info.key))


def _entry_json(info: EntryInfo) -> dict[str, Any]:
    return {
        "key": key_text(info.key),
        "key_hex": info.key.hex(),
        "size": info.size,
        "ttl_left": info.ttl_left,
        "idle": info.idle,
        "frequency": info.frequency,
    }


# ---- check ----


def _check(options: argparse.Namespace) -> int:
    with live_slab(options) as slab:
        broken = slab.check()
        entries = len(slab)
    if options.json:
        say(json_line({"sound": not broken, "broken": broken}))
    elif broken:
        say(*broken)
    else:
        say(f"sound: every invariant holds, {count_text(entries)} entries")
    return 1 if broken else 0


# ---- get ----


def _get(options: argparse.Namespace) -> int:
    key = key_of(options.key, options)
    with live_slab(options) as slab:
        value, left = slab.get(key), slab.ttl(key)
        is_there = value is not None
        name = slab.name
    if not is_there or value is None:
        print(f"llm-edge-cache: slab {name!r} has no entry {key_text(key)!r}", file=sys.stderr)  # noqa: T201
        return 1
    entry = None if options.raw else _entry_of(value)
    if options.json:
        say(json_line({"key": key_text(key), "size": len(value), "ttl_left": left, **_value_json(value, entry)}))
    elif entry is None:
        sys.stdout.buffer.write(value)
        sys.stdout.buffer.flush()
    else:
        say(*columns(_response_rows(entry, len(value), left)), "", entry.response.content or "(no text)")
    return 0


def _entry_of(value: bytes) -> Entry | None:
    try:
        return EntryCodec().unpack(value)
    except CodecError:
        return None


def _value_json(value: bytes, entry: Entry | None) -> dict[str, Any]:
    if entry is not None:
        return {"entry": msgspec.to_builtins(entry.response) | _validity(entry)}
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        return {"value_base64": base64.b64encode(value).decode()}


def _validity(entry: Entry) -> dict[str, Any]:
    return {
        "expires_at": entry.expires_at,
        "tags": list(entry.generations),
        "computed_in": entry.microseconds / 1e6,
        "is_negative": entry.is_negative,
    }


def _response_rows(entry: Entry, size: int, left: float | None) -> list[tuple[str, str]]:
    response, tokens = entry.response, entry.response.tokens
    rows = [
        ("model", response.model or "-"),
        ("kept", "never expires" if left is None else f"{time_text(left)} more"),
        ("size", size_text(size)),
        ("computed in", time_text(entry.microseconds / 1e6)),
        ("tokens", "-" if tokens is None else f"{tokens.prompt_tokens:,} in, {tokens.completion_tokens:,} out"),
        ("tags", ", ".join(entry.generations) or "-"),
        ("finish reason", response.finish_reason or "-"),
    ]
    if response.cached_at is not None:
        rows.insert(1, ("stored", f"{time_text(max(time.time() - response.cached_at, 0.0))} ago"))
    if entry.is_negative:
        rows.append(("negative", "there is no answer, and that is remembered"))
    return rows
