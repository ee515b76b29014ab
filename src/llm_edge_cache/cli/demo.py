"""`llm-edge-cache demo`: the whole thing at work, with no key, no network and no Redis.

Three parts, each a process of its own as in real life: a stand-in for a provider, which streams made-up answers with
the delays of a real one and counts the calls it gets; the gateway with its workers; and the official openai client,
here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from llm_edge_cache.errors import CacheError, SettingsError
from llm_edge_cache.slab import SharedSlab

__all__ = ["add_parsers"]

_EXTRA: Final = "the demonstration needs its extra: pip install 'llm-edge-cache[demo]'"
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 15.0
_QUESTIONS: Final = (
    "Why is the sky blue?",
    "Name three uses of a paper clip.",
    "What is a count-min sketch?",
    "Write a haiku about caches.",
    "How do I reverse a list in Python?",
)
_USERS: Final = 6  # each with a connection of its own, which one of the workers accepted
_REPEATS: Final = 4  # of each question, before the next one
_ROW: Final = "{:>7}  {:<34} {:>7} {:>9}  {:<9} {:<4} {:>10} {:>9}"


class Row(NamedTuple):
    """One request, as the table shows it."""

    request: int
    question: str
    worker: str
    filled_by: str
    cache: str
    tier: str
    first_byte: str
    whole: str


class DemoError(CacheError):
    """A part of the demonstration did not start."""


def add_parsers(commands: Any) -> None:
    """Add this module's subcommand."""
    parser = commands.add_parser(
        "demo",
        help="see it work: no key, no network, no Redis",
        description="Starts a stand-in provider (its answers are made up), the gateway in front of it, and asks it "
        "questions with the openai client; then leaves the gateway up until Ctrl-C.",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="workers of the gateway (%(default)s)")
    parser.add_argument("--requests", type=int, default=40, metavar="N", help="requests to make (%(default)s)")
    parser.add_argument("--exit", action="store_true", help="end after the table, without waiting for Ctrl-C")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        import openai  # noqa: F401, PLC0415 - found missing before anything is started
    except ImportError as error:
        raise SettingsError(f"{_EXTRA} ({error})") from None
    signal.signal(signal.SIGTERM, _interrupt)
    name = f"demo-{os.getpid()}-{secrets.token_hex(2)}"
    provider_port, gateway_port = _free_port(), _free_port()
    try:
        with _provider(provider_port), _gateway(name, gateway_port, provider_port, options.workers):
            _show(options, gateway_port, provider_port)
    finally:
        if SharedSlab.exists(name):
            SharedSlab(name).unlink()
    return 0


def _interrupt(_signum: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _show(options: argparse.Namespace, gateway_port: int, provider_port: int) -> None:
    url = f"http://127.0.0.1:{gateway_port}/v1"
    _print(f"A stand-in provider (no model: its answers are made up), {options.workers} gateway workers, one slab.\n")
    rows = asyncio.run(_drive(url, options.requests))
    calls = json.loads(_read(f"http://127.0.0.1:{provider_port}/stand-in"))["calls"]
    shared = sum(row.filled_by not in ("", row.worker) for row in rows)
    _print(f"\n{len(rows)} requests, {calls} calls of the provider: {len(rows) - calls} calls saved.")
    _print(f"{shared} answers came from the cache and had been put there by another worker.")
    _print(f"\nThe gateway is up at {url}, its dashboard at {url.removesuffix('/v1')}/dashboard.")
    _print(f"Try, twice:\n\n{_curl(url)}\n")
    if options.exit:
        return
    _print("Ctrl-C ends it.")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def _curl(url: str) -> str:
    body = '{"model": "stand-in", "messages": [{"role": "user", "content": "Hello?"}]}'
    return (
        f"  curl -si {url}/chat/completions -H 'content-type: application/json' -H 'authorization: Bearer any' "
        f"-d '{body}'"
    )


# ---- the client's side ----


async def _drive(url: str, count: int) -> list[Row]:
    """Let a few users ask the questions, and print a row for each answer as it is complete."""
    numbers = iter(range(1, count + 1))
    async with contextlib.AsyncExitStack() as stack:
        # Made before any clock starts: a client reads the certificates of the world first.
        users = [await stack.enter_async_context(_client(url)) for _ in range(_USERS)]
        _print(_ROW.format(*Row._fields).replace("_", " "))
        rows = await asyncio.gather(*(_ask_all(user, numbers) for user in users))
    return [row for part in rows for row in part]


def _client(url: str) -> Any:
    import openai  # noqa: PLC0415 - an extra's

    # A connection for each request: a kept one stays with the worker that accepted it, and often one accepts them all.
    headers = {"Connection": "close"}
    return openai.AsyncOpenAI(base_url=url, api_key="demo", max_retries=0, default_headers=headers)


async def _ask_all(user: Any, numbers: Iterator[int]) -> list[Row]:
    rows = []
    for number in numbers:
        rows.append(await _ask(user, number))
        _print(_ROW.format(*rows[-1]))
    return rows


async def _ask(user: Any, number: int) -> Row:
    question = _QUESTIONS[(number - 1) // _REPEATS % len(_QUESTIONS)]
    started = time.monotonic()
    stream = await user.chat.completions.create(
        model="stand-in", messages=[{"role": "user", "content": question}], stream=True
    )
    first = None
    async for _ in stream:
        first = first or time.monotonic() - started
    whole = time.monotonic() - started
    headers = stream.response.headers
    filled_by = headers.get("x-cache-filled-by", "0")
    return Row(
        number,
        question,
        headers.get("x-cache-worker", ""),
        "" if filled_by == "0" else filled_by,
        headers.get("x-cache", ""),
        headers.get("x-cache-tier", ""),
        f"{1000 * (first or whole):.1f} ms",
        f"{1000 * whole:.0f} ms",
    )


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201


# ---- the processes ----


@contextlib.contextmanager
def _provider(port: int) -> Iterator[None]:
    arguments = ["-m", "uvicorn", "--factory", "llm_edge_cache.gateway.stand_in:StandInProvider"]
    with _process([*arguments, "--port", str(port), "--log-level", "warning"], f"http://127.0.0.1:{port}/stand-in"):
        yield


@contextlib.contextmanager
def _gateway(name: str, port: int, provider_port: int, workers: int) -> Iterator[None]:
    arguments = ["-m", "llm_edge_cache", "serve", "--upstream", f"http://127.0.0.1:{provider_port}", "--name", name]
    arguments += ["--port", str(port), "--workers", str(workers), "--show-workers", "--memory", str(64 << 20)]
    with _process(arguments, f"http://127.0.0.1:{port}/healthz"):
        yield


@contextlib.contextmanager
def _process(arguments: list[str], url: str) -> Iterator[None]:
    """Run a Python program, from when it answers at a URL until the end of the block.

    A session of its own: Ctrl-C in the terminal is for us, who then stop it in order.
    """
    process = subprocess.Popen([sys.executable, *arguments], start_new_session=True)
    try:
        _await_answer(process, url)
        yield
    finally:
        _stop(process)


def _await_answer(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _read(url)
        except (urllib.error.URLError, OSError):  # noqa: PERF203 - until it is up
            time.sleep(0.05)
        else:
            return
    raise DemoError(f"the part of the demonstration that should answer at {url} did not start")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all of its children, in order if it lets us."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own processes
        data: bytes = answer.read()
        return data


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
