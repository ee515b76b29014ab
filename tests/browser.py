"""A headless Chromium for the tests, driven over the DevTools protocol. It asks nobody but who it is told to.

    async with Browser() as browser:
        page = await browser.open("http://127.0.0.1:8080/dashboard", width=390)
        await page.wait_for("document.title")

Debian's package `chromium`. Where it is missing, and this is root's machine with apt, it is installed: no package of
PyPI has one in it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import functools
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from worker_servers import PATIENCE_SECONDS

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-default-apps", "--no-proxy-server", "--remote-debugging-port=0"),
]
LARGEST_MESSAGE = 64 << 20  # bytes; a screenshot is one message


@functools.cache
def find_chromium() -> str | None:
    """Where it is; None: there is none, and none can be had."""
    found = _on_path()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        with (Path(tempfile.gettempdir()) / "llm-edge-cache-apt.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the test run has several processes
            found = _on_path() or _install()
    return found


def _on_path() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def _install() -> str | None:
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], install):
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(command, env=environ, capture_output=True, timeout=600, check=False)
    return _on_path()


class Browser:
    """One browser with a profile of its own, gone at the end."""

    async def __aenter__(self) -> Browser:
        program = find_chromium()
        assert program is not None
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        profile = Path(self._directory.name)
        self._process = await asyncio.create_subprocess_exec(
            program,
            *ARGUMENTS,
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._session = aiohttp.ClientSession()
        address = await _address(profile / "DevToolsActivePort", self._process)
        self._socket = await self._session.ws_connect(address, max_msg_size=LARGEST_MESSAGE, heartbeat=None)
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._pages: dict[str, Page] = {}
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._socket.close()
        await self._session.close()
        self._process.kill()
        await self._process.wait()
        self._directory.cleanup()

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._replies.pop(told["id"]).set_result(told)
            elif told.get("sessionId") in self._pages:
                self._pages[told["sessionId"]].hear(told["method"], told["params"])

    async def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Have a command of the protocol carried out."""
        number = next(self._numbers)
        self._replies[number] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        await self._socket.send_json(message)
        told = await asyncio.wait_for(self._replies[number], PATIENCE_SECONDS)
        assert "error" not in told, (method, told["error"])
        result: dict[str, Any] = told["result"]
        return result

    async def open(self, url: str, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> Page:
        """Open a page in a tab of this size, on a machine with this taste."""
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.call(f"{domain}.enable")
        await page.resize(width, height)
        await page.prefer(is_dark=is_dark)
        await page.call("Page.navigate", url=url)
        await page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.complaints: list[str] = []
        """What the console has: errors of the script, and what the content's policy refused."""
        self.asked: list[tuple[str, dict[str, str]]] = []
        """The addresses that it asked, each with the headers."""

    def hear(self, method: str, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.asked.append((told["request"]["url"], told["request"]["headers"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["source"] != "network":
            self.complaints.append(told["entry"]["text"])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **parameters)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def prefer(self, *, is_dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def evaluate(self, expression: str) -> Any:
        """What an expression comes to, as JSON has it."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def wait_for(self, expression: str) -> Any:
        """The first true value of an expression; fails after PATIENCE_SECONDS."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            value = await self.evaluate(expression)
            if value:
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"not within {PATIENCE_SECONDS} s: {expression}\n{await self.text()}\n{self.complaints}")

    async def text(self) -> str:
        return str(await self.evaluate("document.body.innerText"))

    async def picture(self, height: int | None = None) -> bytes:
        """The page, as PNG; of so many lines, or whole."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        told = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(told["data"])


async def _address(file: Path, process: asyncio.subprocess.Process) -> str:
    """Where the browser listens; it says so in a file once it does."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        assert process.returncode is None, "the browser ended"
        with contextlib.suppress(OSError, ValueError):
            port, path = file.read_text().split()
            return f"ws://127.0.0.1:{port}{path}"
        await asyncio.sleep(0.05)
    raise AssertionError("the browser does not start")
