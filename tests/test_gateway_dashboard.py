"""The dashboard in a real browser: what it shows, on which screens, and what it does when the gateway is gone.

    LLM_EDGE_CACHE_PICTURES=docs/images python -m pytest -n0 tests/test_gateway_dashboard.py -k pictures

draws the pictures of the documentation after some minutes of load; without the variable, any pictures, at once.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page
from gateway_servers import CHAT, Connection, Gateway, ask, question, run_gateway
from processes import stop
from redis_servers import RedisServer
from stand_in_upstream import StandInUpstream

from llm_edge_cache import SharedSlab
from llm_edge_cache.gateway.stand_in import StandInSettings
from llm_edge_cache.gateway.stand_in_faults import Plan

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("chromium")]  # with the time to install it

TOKEN = "c0rrect-horse/battery+staple"
BRISK = StandInSettings(answers="different", words=30, first_delay=0.1, word_delay=0.004)
BUSY = Plan(503, ((b"content-type", b"application/json"),), (b'{"error": {"message": "busy", "type": "busy"}}',))
PICTURES = os.environ.get("LLM_EDGE_CACHE_PICTURES")
WIDTHS = [390, 800, 1280]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Gateway]:
    """A gateway with four workers and a Redis, in which another host has left answers."""
    directory = tmp_path_factory.mktemp("watched")
    l2 = {"redis_url": redis_server.url, "key_prefix": f"dashboard-{secrets.token_hex(4)}:"}
    with StandInUpstream(BRISK, {}) as upstream:
        with run_gateway(directory, upstream, l2=l2) as other:
            asyncio.run(_leave_answers(other))
        name = "gateway-demo" if PICTURES else None
        with run_gateway(directory, upstream, workers=4, l2=l2, name=name) as gateway:
            yield gateway


async def _leave_answers(gateway: Gateway) -> None:
    await asyncio.gather(*(ask(gateway.port, CHAT, question(f"question {number}")) for number in range(0, 400, 2)))


@asynccontextmanager
async def load(gateway: Gateway, pause: float = 0.1) -> AsyncIterator[None]:
    """Clients who ask often for little, seldom for much, now and then for what fails; streams and whole answers."""
    is_over = asyncio.Event()
    clients = [asyncio.create_task(_client(gateway, number, pause, is_over)) for number in range(10)]
    try:
        yield
    finally:
        is_over.set()
        await asyncio.gather(*clients)


async def _client(gateway: Gateway, number: int, pause: float, is_over: asyncio.Event) -> None:
    draw = random.Random(f"{number} {time.monotonic()}")  # else every load would ask the same again
    while not is_over.is_set():
        async with await Connection.open(gateway.port) as connection:
            for _ in range(30):
                if is_over.is_set():
                    return
                await connection.ask(CHAT, _question(gateway, draw))
                await asyncio.sleep(draw.random() * pause)


def _question(gateway: Gateway, draw: random.Random) -> dict[str, Any]:
    kind = draw.random()
    if kind < 0.02:
        body = question(f"fails {draw.random()}")
        gateway.plan(CHAT, body, BUSY)
        return body
    if kind < 0.1:
        return question(f"once {draw.random()}", stream=True)
    if kind < 0.2:
        return question(f"everybody asks this at {time.monotonic():.0f}", stream=True)
    return question(f"question {min(int(draw.paretovariate(0.6)) - 1, 999)}", stream=draw.random() < 0.3)


def run(steps: Callable[[Browser], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with Browser() as browser:
            await steps(browser)

    asyncio.run(main())


async def is_live(page: Page) -> None:
    await page.wait_for("document.body.dataset.is === 'live'")


def is_clean(page: Page, gateway: Gateway) -> None:
    """It asked nobody but its gateway, and neither its script nor its policy found fault with anything."""
    assert page.complaints == []
    assert page.asked
    assert {url for url, _ in page.asked if not url.startswith((f"{gateway.url}/", "data:"))} <= {"about:blank"}


# ---- what it shows ----

ALL_DRAWN = """
['ratio', 'requests', 'latency', 'memory', 'tokens', 'seconds', 'errors'].every((id) =>
    document.querySelectorAll(`#${id} path.curve`).length > 0 && document.querySelector(`#${id} text.none`) === null)
"""


def test_every_figure_is_drawn_from_a_live_gateway(watched: Gateway) -> None:
    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{watched.url}/dashboard")
        async with load(watched):
            await page.wait_for(ALL_DRAWN)
            await page.wait_for("document.querySelectorAll('#keys .key').length === 10")
            await page.wait_for("document.querySelectorAll('#workers .track').length === 4")
            pids = await page.evaluate("[...document.querySelectorAll('#workers .name')].map((name) => name.innerText)")
            keys = await page.evaluate("[...document.querySelectorAll('#keys .key')].map((key) => key.title)")
            legend = await page.evaluate("document.querySelector('#ratio .legend').innerText")
            text = await page.text()
        assert sorted(pids) == sorted(f"process {pid}" for pid in watched.worker_pids())
        assert all(len(key) == 64 and int(key, 16) for key in keys)
        for word in ("both tiers", "L1", "L2", "%"):
            assert word in legend
        for word in (watched.name, "Hit ratio", "Look-ups", "L1 latency", "Memory", "Tokens saved", "Time saved",
                     "Upstream errors", "Redis: in use"):  # fmt: skip
            assert word in text
        is_clean(page, watched)

    run(steps)


def test_the_pointer_reads_a_curve(watched: Gateway) -> None:
    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{watched.url}/dashboard")
        async with load(watched):
            await page.wait_for(ALL_DRAWN)
            point = "document.querySelector('#latency svg').getBoundingClientRect()"
            x, y = await page.evaluate(f"(({{left, top, width}}) => [left + width - 20, top + 60])({point})")
            await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            await page.wait_for("/^at \\d\\d:\\d\\d:\\d\\d$/.test(document.querySelector('#latency .when').innerText)")
            assert await page.evaluate("document.querySelectorAll('#latency line.rule').length") == 1
        is_clean(page, watched)

    run(steps)


def test_without_requests_it_says_so(tmp_path: Path) -> None:
    with StandInUpstream(BRISK, {}) as upstream, run_gateway(tmp_path, upstream, has_probe=False) as gateway:

        async def steps(browser: Browser) -> None:
            page = await browser.open(f"{gateway.url}/dashboard")
            await page.wait_for("document.querySelector('#ratio text.none') !== null")
            text = await page.text()
            for said in ("no requests in this time", "nothing is stored yet", "no Redis"):
                assert said in text + str(await page.evaluate("document.body.textContent"))
            assert "NaN" not in text
            assert "undefined" not in text
            is_clean(page, gateway)

        run(steps)


# ---- on which screens ----

# Words of a chart that lie upon each other or outside of it; and whatever is wider than the page.
MISPLACED = """
(() => {
    const found = [];
    if (document.documentElement.scrollWidth > innerWidth) found.push(`wider than ${innerWidth}`);
    for (const svg of document.querySelectorAll('svg')) {
        const frame = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll('text')].filter((text) => text.textContent);
        const boxes = texts.map((text) => text.getBoundingClientRect());
        boxes.forEach((box, at) => {
            const name = `${svg.parentNode.id}: ${texts[at].textContent}`;
            if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
                || box.bottom > frame.bottom + 1) found.push(`${name} is outside`);
            boxes.slice(at + 1).forEach((other, index) => {
                const isApart = box.right <= other.left || other.right <= box.left
                    || box.bottom <= other.top + 1 || other.bottom <= box.top + 1;
                if (!isApart) found.push(`${name} lies upon ${texts[at + 1 + index].textContent}`);
            });
        });
    }
    for (const box of document.querySelectorAll('dd, dt, figcaption, .legend, .bars, #about'))
        if (box.scrollWidth > box.clientWidth + 1) found.push(`${box.className || box.id}: ${box.innerText} is cut`);
    return found;
})()
"""


# The same at many moments: the ticks of the axis wander through the chart.
MISPLACED_EVER = f"""
(() => {{
    const found = new Set(), span = Number($('window').value), now = past[past.length - 1].time;
    for (let shift = 0; shift < 120; shift += 3.7) {{
        const points = past.map((point) => ({{...point, time: point.time + shift}}));
        for (const chart of charts) chart.show(points, now + shift - span, now + shift);
        for (const each of {MISPLACED.strip()}) found.add(each);
    }}
    redraw();
    return [...found];
}})()
"""

# The longest of everything, as if the gateway had answered so.
LARGE = """
(() => {
    const last = lately[lately.length - 1];
    const grown = Object.fromEntries(Object.entries(last.counters).map(([name, count]) => [name, count + 1e9]));
    take({
        ...last, at: last.at + 1, name: 'n'.repeat(100), attached: 12345, age: 1e8, counters: grown,
        l1: {...last.l1, entries: 123456789, used_bytes: 987654321, memory_bytes: 1234567890},
        l2: {breaker: 'open: Redis is left alone', entries: 123456789, undelivered: true},
        workers: last.workers.map((worker, at) => ({pid: 4194300 + at, lookups: worker.lookups})),
    });
    return true;
})()
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_or_is_cut_off(width: int, watched: Gateway) -> None:
    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{watched.url}/dashboard", width=width)
        await is_live(page)
        assert await page.evaluate(MISPLACED) == []
        async with load(watched):
            await page.wait_for(ALL_DRAWN)
            for seconds in (60, 300, 600):
                await page.evaluate(
                    f"$('window').value = '{seconds}', $('window').dispatchEvent(new Event('change')), true"
                )
                assert await page.evaluate(MISPLACED_EVER) == []
            assert await page.evaluate("document.querySelectorAll('figure').length") == 9
            await page.evaluate(LARGE)
            assert await page.evaluate(MISPLACED) == []
        is_clean(page, watched)

    run(steps)


# WCAG 2, 1.4.3: 4.5 for text; 1.4.11: 3 for what a curve is drawn with.
CONTRASTS = """
(() => {
    const probe = document.body.appendChild(document.createElement('i'));
    const lightness = (colour) => {
        probe.style.color = colour;
        const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((part) => part / 255)
            .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (one, other) => {
        const [a, b] = [lightness(`var(--${one})`), lightness(`var(--${other})`)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    const found = {page: lightness('var(--page)')};
    const inks = ['text', 'quiet', 'blue', 'teal', 'amber', 'violet', 'red', 'grey'];
    for (const ink of inks) found[ink] = contrast(ink, 'card');
    probe.remove();
    return found;
})()
"""


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_it_is_legible_by_day_and_by_night(is_dark: bool, watched: Gateway) -> None:
    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{watched.url}/dashboard", is_dark=is_dark)
        await is_live(page)
        contrasts = await page.evaluate(CONTRASTS)
        assert (contrasts.pop("page") < 0.1) is is_dark
        assert {
            ink: ratio for ink, ratio in contrasts.items() if ratio < (4.5 if ink in ("text", "quiet") else 3)
        } == {}
        is_clean(page, watched)

    run(steps)


# ---- when things change ----


def test_a_gateway_that_does_not_answer_is_told_and_found_again(tmp_path: Path) -> None:
    with StandInUpstream(BRISK, {}) as upstream, run_gateway(tmp_path, upstream) as gateway:

        async def steps(browser: Browser) -> None:
            page = await browser.open(f"{gateway.url}/dashboard")
            await is_live(page)
            stop(gateway.server.pid)
            try:
                await page.wait_for("document.body.dataset.is === 'lost'")
                assert "The gateway cannot be reached since" in await page.text()
            finally:
                gateway.server.send(signal.SIGCONT)
            await is_live(page)
            assert "cannot be reached" not in await page.text()
            gateway.server.end_all()
            await page.wait_for("document.body.dataset.is === 'lost'")
            is_clean(page, gateway)

        run(steps)


def test_another_slab_under_the_name_begins_anew(tmp_path: Path) -> None:
    with StandInUpstream(BRISK, {}) as upstream, run_gateway(tmp_path, upstream) as gateway:

        async def steps(browser: Browser) -> None:
            page = await browser.open(f"{gateway.url}/dashboard")
            async with load(gateway):
                await page.wait_for(ALL_DRAWN.replace("'errors'", "'tokens'"))
                with SharedSlab.attach(gateway.name) as slab:
                    SharedSlab(gateway.name, slab.config, replace=True).close()
                await page.wait_for("past.some((point) => point.ratioL1 === undefined)")
                await page.wait_for("past[past.length - 1].ratioL1 > 0")
            assert await page.evaluate("past.every((point) => !Object.values(point).some((value) => value < 0))")
            is_clean(page, gateway)

        run(steps)


def test_answers_that_are_slow_to_come_make_no_nonsense(watched: Gateway) -> None:
    """1 the gateway is stopped for longer than a rate is taken over  2 the next answer is all there is of that time."""

    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{watched.url}/dashboard")
        await page.wait_for("past.length > 0")
        await page.evaluate("(() => { const last = lately[lately.length - 1];"
                            "take({...last, at: last.at + 9}); return true; })()")  # fmt: skip
        assert await page.evaluate("past.every((point) => !Object.values(point).some(Number.isNaN))")
        assert "NaN" not in await page.text()
        is_clean(page, watched)

    run(steps)


# ---- with a token ----


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("guarded")
    with StandInUpstream(BRISK, {}) as upstream, run_gateway(directory, upstream, admin_token=TOKEN) as gateway:
        yield gateway


def test_the_page_asks_for_the_token(guarded: Gateway) -> None:
    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{guarded.url}/dashboard")
        await page.wait_for("!$('login').hidden")
        for wrong in ("wrong", "caf\u00e9"):
            await _give(page, wrong)
            await page.wait_for("$('refused').innerText === 'This is not the gateway\\'s token.'")
            assert await page.evaluate("$('tiles').innerText") == ""
            await page.evaluate("$('refused').textContent = '', true")
        await _give(page, TOKEN)
        await is_live(page)
        assert await page.evaluate("$('login').hidden")
        _has_kept_the_token_to_itself(page)
        assert TOKEN not in await page.evaluate("location.href + document.documentElement.outerHTML + document.cookie")
        is_clean(page, guarded)

    run(steps)


def test_the_token_may_come_in_the_fragment(guarded: Gateway) -> None:
    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{guarded.url}/dashboard#token={TOKEN.replace('+', '%2B')}")
        await is_live(page)
        assert await page.evaluate("location.href") == f"{guarded.url}/dashboard"
        _has_kept_the_token_to_itself(page)
        is_clean(page, guarded)

    run(steps)


async def _give(page: Page, token: str) -> None:
    await page.wait_for("!$('login').hidden")
    await page.evaluate("$('token').focus(), true")
    await page.call("Input.insertText", text=token)
    await page.evaluate("document.querySelector('#login button').click(), true")


def _has_kept_the_token_to_itself(page: Page) -> None:
    polls = [(url, headers) for url, headers in page.asked if "/admin/" in url]
    assert any(headers.get("Authorization") == f"Bearer {TOKEN}" for _, headers in polls)
    assert not any("token" in url.partition("#")[0] for url, _ in page.asked)


# ---- the pictures of the documentation ----


@pytest.mark.parametrize(
    ("name", "width", "is_dark"),
    [("dashboard", 1280, False), ("dashboard-dark", 1280, True), ("dashboard-phone", 390, False)],
)
def test_pictures(name: str, width: int, is_dark: bool, watched: Gateway, tmp_path: Path) -> None:
    async def steps(browser: Browser) -> None:
        page = await browser.open(f"{watched.url}/dashboard", width=width, is_dark=is_dark)
        for pause in [0.3, 0.1, 0.2, 0.05] if PICTURES else []:
            async with load(watched, pause):
                await asyncio.sleep(20)
        async with load(watched):
            await page.wait_for(ALL_DRAWN)
            await asyncio.sleep(12 if PICTURES else 0)
            picture = await page.picture(1600 if width < 600 else None)
        assert picture.startswith(b"\x89PNG")
        if PICTURES:
            (Path(PICTURES) / f"{name}.png").write_bytes(_repacked(picture))

    run(steps)


def _repacked(picture: bytes) -> bytes:
    """The same PNG with no filter before the compression (RFC 2083): flat colours are a quarter smaller so."""
    chunks = list(_chunks(picture))
    width, _, depth, colours = struct.unpack(">IIBB", chunks[0][1][:10])
    assert (depth, colours) == (8, 2)  # three bytes a pixel
    packed = b"".join(data for kind, data in chunks if kind == b"IDAT")
    lines, above = [], bytearray(3 * width)
    rows = memoryview(zlib.decompress(packed))
    for start in range(0, len(rows), 3 * width + 1):
        above = _unfiltered(rows[start], bytearray(rows[start + 1 : start + 1 + 3 * width]), above)
        lines += [b"\0", above]
    kept = [chunks[0], (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in kept
    )
    return picture[:8] + b"".join(written)


def _chunks(picture: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(picture):
        (size,) = struct.unpack(">I", picture[at : at + 4])
        yield picture[at + 4 : at + 8], picture[at + 8 : at + 8 + size]
        at += 12 + size


def _unfiltered(filtered: int, line: bytearray, above: bytearray) -> bytearray:
    for at in range(len(line)):
        left, corner = (line[at - 3], above[at - 3]) if at >= 3 else (0, 0)
        upper = above[at]
        nearest = min((left, upper, corner), key=lambda each: abs(left + upper - corner - each))
        line[at] = (line[at] + (0, left, upper, (left + upper) // 2, nearest)[filtered]) & 255
    return line
