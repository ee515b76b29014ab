"""The caching transports: real clients, real HTTP to the stand-in provider, which counts its calls."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from gateway_servers import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, Gateway
from redis_servers import wait_for
from stand_in_upstream import AT_ONCE, StandInUpstream

from llm_edge_cache import CacheManager, L1Config, SharedSlab, SyncCacheManager
from llm_edge_cache.adapters import answering
from llm_edge_cache.adapters import httpx2 as adapters_httpx2
from llm_edge_cache.adapters.answering import protocol_at
from llm_edge_cache.adapters.httpx import AsyncCachingTransport, CachingTransport
from llm_edge_cache.flight import Flights, Running
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.exchange import ExchangeReader
from llm_edge_cache.gateway.protocols import PROTOCOLS
from llm_edge_cache.gateway.stand_in import StandInSettings

MiB = 1 << 20
PATIENCE = 60.0
FACES = ("threads", "asyncio")
LIBRARIES = {"httpx": httpx, "httpx2": httpx2}
SAY = [{"role": "user", "content": "say something"}]
SLOWLY = StandInSettings(first_delay=60.0, word_delay=0.0, jitter=0.0)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:openai")


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[StandInUpstream]:
    with StandInUpstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(shared_upstream: StandInUpstream) -> Iterator[StandInUpstream]:
    """A provider that has counted nothing yet."""
    shared_upstream.provider.settings = AT_ONCE
    shared_upstream.provider._control("/stand-in/reset", b"")
    yield shared_upstream
    shared_upstream.provider.settings = AT_ONCE
    shared_upstream.is_hurried = False


@pytest.fixture
def l1(name: str) -> L1Config:
    return L1Config(name=name, memory_bytes=4 * MiB)


def calls(upstream: StandInUpstream) -> int:
    return upstream.provider.tally.calls


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Running]:
    """Flights of others that callers have found, and wait for."""
    found: list[Running] = []
    join = Flights.join

    def noted(self: Flights, *arguments: Any) -> Any:
        flight = join(self, *arguments)
        if isinstance(flight, Running):
            found.append(flight)
        return flight

    monkeypatch.setattr(Flights, "join", noted)
    return found


def hurry_once(upstream: StandInUpstream, is_so: Callable[[], object]) -> None:
    """Let the provider answer when it is so."""
    wait_for(is_so, "they wait for one answer", timeout=PATIENCE)
    upstream.is_hurried = True


# ---- one way of asking for both faces ----


class Asked:
    """What came of a request."""

    def __init__(self, response: Any, chunks: list[bytes]) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.body = b"".join(chunks)
        self.cache = response.headers.get("x-cache")


class Client:
    """A client with a caching transport, of either face; the asynchronous one on a loop of its own."""

    def __init__(self, face: str, library: Any = httpx2, **options: Any) -> None:
        self.face = face
        self._library = library
        if face == "threads":
            self.transport: Any = CachingTransport(**options)
            self.http = library.Client(transport=self.transport, timeout=PATIENCE)
        else:
            self._loop = asyncio.new_event_loop()
            self.transport = AsyncCachingTransport(**options)
            self.http = library.AsyncClient(transport=self.transport, timeout=PATIENCE)

    def run(self, outcome: Any) -> Any:
        return self._loop.run_until_complete(outcome) if inspect.isawaitable(outcome) else outcome

    def ask(self, url: str, body: Any, *, most: int = 1 << 30, **options: Any) -> Asked:
        """Ask, and take so many chunks of the answer."""
        request = self.http.build_request("POST", url, json=body, **options)
        if self.face == "threads":
            response = self.http.send(request, stream=True)
            with contextlib.closing(response):
                return Asked(response, [chunk for _, chunk in zip(range(most), response.iter_raw(), strict=False)])
        return self.run(self._ask(request, most))  # type: ignore[no-any-return]

    async def _ask(self, request: Any, most: int) -> Asked:
        response = await self.http.send(request, stream=True)
        chunks: list[bytes] = []
        async with contextlib.aclosing(response):
            iterator = response.aiter_raw()
            while len(chunks) < most:
                with contextlib.suppress(StopAsyncIteration):
                    chunks.append(await anext(iterator))
                    continue
                break
        return Asked(response, chunks)

    def close(self) -> None:
        if self.face == "threads":
            self.http.close()
        else:
            self.run(self.http.aclose())
            self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chat(text: str = "why", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(params=FACES)
def client(request: pytest.FixtureRequest, l1: L1Config) -> Iterator[Client]:
    with Client(request.param, l1=l1) as client:
        yield client


# ---- the official clients ----


ENDPOINTS: dict[str, Callable[[Any, bool], Any]] = {
    CHAT: lambda client, stream: client.chat.completions.create(model="m", messages=SAY, stream=stream),
    COMPLETIONS: lambda client, stream: client.completions.create(model="m", prompt="say", stream=stream),
    RESPONSES: lambda client, stream: client.responses.create(model="m", input="say", stream=stream),
    EMBEDDINGS: lambda client, stream: client.embeddings.create(model="m", input="say"),
    MESSAGES: lambda client, stream: client.messages.create(model="m", max_tokens=99, messages=SAY, stream=stream),
}


def told(value: Any) -> Any:
    return value.model_dump(warnings=False)


def get_with(path: str, http: Any, url: str, stream: bool) -> Any:
    if path == MESSAGES:
        client: Any = anthropic.Anthropic(api_key="k", base_url=url, http_client=http, max_retries=0)
    else:
        client = openai.OpenAI(api_key="k", base_url=f"{url}/v1", http_client=http, max_retries=0)
    value = ENDPOINTS[path](client, stream)
    return [told(event) for event in value] if stream else told(value)


async def get_with_async(path: str, http: Any, url: str, stream: bool) -> Any:
    if path == MESSAGES:
        client: Any = anthropic.AsyncAnthropic(api_key="k", base_url=url, http_client=http, max_retries=0)
    else:
        client = openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1", http_client=http, max_retries=0)
    value = await ENDPOINTS[path](client, stream)
    return [told(event) async for event in value] if stream else told(value)


KINDS = [(path, stream) for path in ENDPOINTS for stream in (False, True) if not (stream and path == EMBEDDINGS)]


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(("path", "stream"), KINDS)
def test_an_official_client_s_second_call_makes_none(
    upstream: StandInUpstream, l1: L1Config, face: str, path: str, stream: bool
) -> None:
    with httpx2.Client() as plain:
        expected = get_with(path, plain, upstream.url, stream)
    with Client(face, l1=l1) as client:
        get: Any = get_with if face == "threads" else get_with_async
        answers = [client.run(get(path, client.http, upstream.url, stream)) for _ in range(2)]
    assert [expected, expected] == answers
    assert calls(upstream) == 2


def test_the_openai_client_of_today_takes_an_httpx_client_too(upstream: StandInUpstream, l1: L1Config) -> None:
    with Client("threads", httpx, l1=l1) as one, Client("threads", httpx2, l1=l1) as other:
        assert get_with(CHAT, one.http, upstream.url, True) == get_with(CHAT, other.http, upstream.url, True)
    assert calls(upstream) == 1


ANOTHER = """
import sys, httpx2
from llm_edge_cache import L1Config
from llm_edge_cache.adapters.httpx import CachingTransport
name, url, stream = sys.argv[1:]
with httpx2.Client(transport=CachingTransport(l1=L1Config(name=name, memory_bytes=4 << 20)), timeout=20) as http:
    body = {"model": "m", "messages": [{"role": "user", "content": "why"}], "stream": bool(stream)}
    print(http.post(url + "/v1/chat/completions", json=body).content)
"""


@pytest.mark.parametrize("stream", ["", "stream"])
def test_another_process_finds_the_answer(
    upstream: StandInUpstream, name: str, run_python: Callable[..., str], stream: str
) -> None:
    first, second = (run_python(ANOTHER, name, upstream.url, stream) for _ in range(2))
    assert first == second != ""
    assert calls(upstream) == 1


# ---- how an answer is handed on ----


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_hit_is_the_miss_byte_for_byte(
    upstream: StandInUpstream, l1: L1Config, library: str, face: str, stream: bool
) -> None:
    with Client(face, LIBRARIES[library], l1=l1) as client:
        miss, hit = (client.ask(upstream.url + CHAT, chat(stream=stream)) for _ in range(2))
    assert (miss.cache, hit.cache, hit.headers["x-cache-tier"], hit.status) == ("MISS", "HIT", "l1", 200)
    assert hit.body == miss.body
    assert hit.headers["content-type"] == miss.headers["content-type"]
    assert hit.headers["cache-status"].startswith("llm-edge-cache; hit; ttl=3")
    assert int(hit.headers["content-length"]) == len(hit.body)
    assert calls(upstream) == 1


class Source:
    """A provider's stream that tells how far it was read."""

    FRAMES = (b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % number for number in range(3))
    WHOLE = (
        *FRAMES,
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
        b"data: [DONE]\n\n",
        b"\n",
    )

    def __init__(self) -> None:
        self.read = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.WHOLE:
            self.read += 1
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.is_closed = True


class SourceTransport:
    """Answers with such a stream."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.sources: list[Any] = []

    def handle_request(self, request: Any) -> Any:
        kinds = (Source, self.library.SyncByteStream, self.library.AsyncByteStream)
        self.sources.append(type("Both", kinds, {})())
        return self.library.Response(200, headers={"content-type": "text/event-stream"}, stream=self.sources[-1])

    async def handle_async_request(self, request: Any) -> Any:
        return self.handle_request(request)

    def close(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("face", FACES)
def test_nothing_is_read_ahead_of_the_caller(l1: L1Config, library: str, face: str) -> None:
    inner = SourceTransport(LIBRARIES[library])
    with Client(face, inner.library, transport=inner, l1=l1) as client:
        for most in (0, 1, 2):
            client.ask("http://provider" + CHAT, chat(stream=True), most=most)
    assert [source.read for source in inner.sources] == [0, 1, 2]
    assert [source.is_closed for source in inner.sources] == [True, True, True]


@pytest.mark.parametrize(("taken", "asked"), [(1, 2), (4, 2), (5, 1), (6, 1)])
@pytest.mark.parametrize("face", FACES)
def test_a_caller_that_closes_early_stores_nothing_unless_it_had_the_end(
    l1: L1Config, face: str, taken: int, asked: int
) -> None:
    inner = SourceTransport(httpx2)
    with Client(face, transport=inner, l1=l1) as client:
        client.ask("http://provider" + CHAT, chat(stream=True), most=taken)
        again = client.ask("http://provider" + CHAT, chat(stream=True))
    assert len(inner.sources) == asked
    assert again.body == b"".join(Source.WHOLE[: taken if asked == 1 else None])


def test_an_answer_in_one_piece_that_is_closed_early_is_not_stored(upstream: StandInUpstream, client: Client) -> None:
    client.ask(upstream.url + CHAT, chat(), most=0)
    assert [client.ask(upstream.url + CHAT, chat()).cache for _ in range(2)] == ["MISS", "HIT"]


# ---- what is not stored ----

# All but those for which a client waits ("hang", "stall"), and "chunks-7", which is no fault to us.
FAULTS = ("429", "500", "401", "drop-before", "drop-after", "truncate", "end-early", "garbage", "empty")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [*FAULTS, "error-event", "error-200", "gzip"])
def test_a_failure_is_passed_on_and_not_stored(
    upstream: StandInUpstream, client: Client, fault: str, stream: bool
) -> None:
    if fault == "error-event" and not stream:
        pytest.skip("an event needs a stream")
    failing = {"headers": {"x-stand-in-fault": fault}}
    with contextlib.suppress(httpx2.TransportError):
        failed = client.ask(upstream.url + CHAT, chat(stream=stream), **failing)
        assert failed.cache == "MISS"
        assert failed.status == (int(fault) if fault.isdecimal() else 200)
    good = [client.ask(upstream.url + CHAT, chat(stream=stream)) for _ in range(2)]
    assert [answer.cache for answer in good] == ["MISS", "HIT"]
    assert calls(upstream) == 2


@pytest.mark.parametrize("body", [chat(store=True), chat(cache={"use-cache": False})])
def test_what_bypasses_the_gateway_s_cache_bypasses_this_one(
    upstream: StandInUpstream, client: Client, body: dict[str, Any]
) -> None:
    assert [client.ask(upstream.url + CHAT, body).cache for _ in range(2)] == ["BYPASS", "BYPASS"]
    assert calls(upstream) == 2


def test_a_body_that_is_none_is_left_to_the_provider(upstream: StandInUpstream, client: Client) -> None:
    twice = client.ask(upstream.url + CHAT, None, content=b'{"model": 1, "model": 2}')
    assert (twice.status, twice.cache) == (400, None)


def test_other_paths_go_through_untouched(upstream: StandInUpstream, client: Client) -> None:
    answer = client.ask(f"{upstream.url}/v1/echo?a=1", {"cache": {"ttl": 1}}, headers={"cache-control": "no-cache"})
    seen = json.loads(answer.body)
    assert answer.cache is None
    assert ["cache-control", "no-cache"] in seen["headers"]
    assert seen["body"] == '{"cache":{"ttl":1}}'


# ---- who asks ----


def test_callers_with_other_credentials_do_not_share(upstream: StandInUpstream, client: Client) -> None:
    keys = ("one", "two", "one")
    answers = [client.ask(upstream.url + CHAT, chat(), headers={"authorization": f"Bearer {key}"}) for key in keys]
    assert [answer.cache for answer in answers] == ["MISS", "MISS", "HIT"]


@pytest.mark.parametrize("face", FACES)
def test_callers_share_if_told_so(upstream: StandInUpstream, l1: L1Config, face: str) -> None:
    with Client(face, l1=l1, share_between_callers=True) as client:
        for key in ("one", "two"):
            client.ask(upstream.url + CHAT, chat(), headers={"authorization": f"Bearer {key}"})
    assert calls(upstream) == 1


def test_the_key_is_the_gateway_s(upstream: StandInUpstream, client: Client) -> None:
    headers = {"authorization": "Bearer k", "anthropic-beta": "b, a"}
    answer = client.ask(f"{upstream.url}{MESSAGES}?beta=true", chat("x", user="u"), headers=headers)
    scope = {
        "path": MESSAGES,
        "query_string": b"beta=true",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    config = GatewayConfig(upstream=f"{upstream.url}/v1")
    exchange = ExchangeReader(config).read(PROTOCOLS[MESSAGES], scope, json.dumps(chat("x", user="v")).encode())
    assert answer.headers["x-cache-key"] == exchange.key.decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_and_a_gateway_find_each_other_s_answers(gateway: Gateway, stream: bool) -> None:
    headers = {"authorization": "Bearer one's own"}
    asked = [chat(f"which of the two asks first? {number}", stream=stream) for number in range(2)]
    with (
        SyncCacheManager(slab=SharedSlab(gateway.name)) as manager,
        Client("threads", manager=manager) as caching,
        httpx2.Client(headers=headers) as plain,
    ):
        first = plain.post(gateway.url + CHAT, json=asked[0])
        found = caching.ask(gateway.upstream.url + CHAT, asked[0], headers=headers)
        second = caching.ask(gateway.upstream.url + CHAT, asked[1], headers=headers)
        found_too = plain.post(gateway.url + CHAT, json=asked[1])
        manager.slab.close()
    assert (found.cache, found.body) == ("HIT", first.content)
    assert (found_too.headers["x-cache"], found_too.content) == ("HIT", second.body)
    assert found.headers["x-cache-key"] == first.headers["x-cache-key"]


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        (CHAT, CHAT),
        ("/api/v1/chat/completions", CHAT),
        ("/chat/completions", "/chat/completions"),
        ("/v1beta/openai/chat/completions", "/chat/completions"),
        ("/inference/embeddings", "/embeddings"),
        (MESSAGES, MESSAGES),
        ("/v1/threads/t/messages", None),
        ("/messages", None),
        ("/v1/models", None),
        ("/v1/chat/completions/", None),
    ],
)
def test_an_endpoint_is_known_by_the_end_of_its_path(path: str, endpoint: str | None) -> None:
    found = protocol_at(path)
    assert (None if found is None else found[1]) == endpoint


def test_no_two_urls_share_an_answer(l1: L1Config) -> None:
    inner = SourceTransport(httpx2)
    paths = (CHAT, "/chat/completions", "/v1/v1/chat/completions", "//v1/chat/completions", "/a/v1/chat/completions")
    with Client("threads", transport=inner, l1=l1) as client:
        answers = [client.ask("http://provider" + path, chat(stream=True)) for path in paths]
        answers.append(client.ask("http://provider:81" + CHAT, chat(stream=True)))
        answers.append(client.ask(f"https://provider{CHAT}?x=1", chat(stream=True)))
    assert [answer.cache for answer in answers] == ["MISS"] * 7


# ---- controls ----


def test_a_request_says_what_it_wants_of_the_cache(upstream: StandInUpstream, client: Client) -> None:
    url = upstream.url + CHAT
    only = client.ask(url, chat(), headers={"cache-control": "only-if-cached"})
    assert (only.status, b"not in the cache" in only.body, calls(upstream)) == (504, True, 0)
    assert client.ask(url, chat(), headers={"cache-control": "no-store"}).cache == "MISS"
    assert client.ask(url, chat()).cache == "MISS"
    assert client.ask(url, chat(), headers={"cache-control": "only-if-cached"}).cache == "HIT"
    assert client.ask(url, chat(), headers={"cache-control": "no-cache"}).cache == "MISS"
    assert client.ask(url, chat(cache={"namespace": "other"})).cache == "MISS"
    assert calls(upstream) == 4
    assert len(upstream.provider.tally.by_question) == 1, "what was for the cache has reached the provider"


def test_a_ttl_ends(upstream: StandInUpstream, client: Client) -> None:
    client.ask(upstream.url + CHAT, chat(cache={"ttl": 0.2}))
    time.sleep(0.3)
    assert client.ask(upstream.url + CHAT, chat()).cache == "MISS"


# ---- one call for all ----


def test_threads_that_ask_the_same_make_one_call(
    upstream: StandInUpstream, l1: L1Config, joined: list[Running]
) -> None:
    upstream.provider.settings = SLOWLY
    with Client("threads", l1=l1) as client, ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(client.ask, upstream.url + CHAT, chat(stream=True)) for _ in range(8)]
        hurry_once(upstream, lambda: len(joined) == 7)
        asked = [one.result(PATIENCE) for one in asking]
    assert sorted({answer.cache for answer in asked}) == ["COALESCED", "MISS"]
    assert len({answer.body for answer in asked}) == 1
    assert calls(upstream) == 1


def test_tasks_that_ask_the_same_make_one_call(upstream: StandInUpstream, l1: L1Config, joined: list[Running]) -> None:
    upstream.provider.settings = SLOWLY

    async def ask_all() -> list[Any]:
        async with httpx2.AsyncClient(transport=AsyncCachingTransport(l1=l1), timeout=PATIENCE) as http:
            hurrying = asyncio.to_thread(hurry_once, upstream, lambda: len(joined) == 7)
            posts = (http.post(upstream.url + CHAT, json=chat()) for _ in range(8))
            return (await asyncio.gather(hurrying, *posts))[1:]

    assert len({answer.content for answer in asyncio.run(ask_all())}) == 1
    assert calls(upstream) == 1


def test_processes_that_ask_the_same_make_one_call(upstream: StandInUpstream, name: str) -> None:
    upstream.provider.settings = StandInSettings(first_delay=1.5, word_delay=0.0, jitter=0.0)
    command = [sys.executable, "-c", ANOTHER, name, upstream.url, ""]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert said[0] == said[1] != ""
    assert calls(upstream) == 1


def test_those_who_wait_for_a_failing_call_ask_all_at_once(
    upstream: StandInUpstream, l1: L1Config, joined: list[Running]
) -> None:
    upstream.provider.settings = SLOWLY
    upstream.provider._control("/stand-in/faults", b'{"fault": "hang", "times": 1}')
    with Client("threads", l1=l1) as client, ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.ask, upstream.url + CHAT, chat(), timeout=httpx2.Timeout(PATIENCE, read=5.0))
        wait_for(lambda: calls(upstream) == 1, "it hangs", timeout=PATIENCE)
        others = [pool.submit(client.ask, upstream.url + CHAT, chat()) for _ in range(3)]
        wait_for(lambda: len(joined) == 3, "they wait for it", timeout=PATIENCE)
        hurry_once(upstream, lambda: calls(upstream) == 4)
        assert isinstance(first.exception(PATIENCE), httpx2.ReadTimeout)
        assert {other.result(PATIENCE).status for other in others} == {200}
    assert calls(upstream) == 4


def test_who_waits_waits_as_long_as_for_the_provider(upstream: StandInUpstream, l1: L1Config) -> None:
    upstream.provider._control("/stand-in/faults", b'{"fault": "hang", "times": 1}')
    with Client("threads", l1=l1) as client, ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(client.ask, upstream.url + CHAT, chat(), timeout=httpx2.Timeout(PATIENCE, read=6.0))
        wait_for(lambda: calls(upstream) == 1, "it hangs", timeout=PATIENCE)
        answer = client.ask(upstream.url + CHAT, chat(), timeout=httpx2.Timeout(PATIENCE, read=0.5))
        assert (answer.status, answer.cache, hanging.done()) == (200, "MISS", False)
        assert isinstance(hanging.exception(PATIENCE), httpx2.ReadTimeout)


def test_a_caller_that_leaves_its_answer_lying_holds_nobody_up(
    upstream: StandInUpstream, l1: L1Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_IDLE_SECONDS", 0.0)
    with Client("threads", l1=l1) as client:
        request = client.http.build_request("POST", upstream.url + CHAT, json=chat(stream=True))
        lying = client.http.send(request, stream=True)
        assert client.ask(upstream.url + CHAT, chat(stream=True)).status == 200  # in the same thread
        lying.close()
        assert client.ask(upstream.url + CHAT, chat(stream=True)).cache == "HIT"
    assert calls(upstream) == 2


def test_an_answer_that_is_dropped_unread_ends_its_flight(upstream: StandInUpstream, l1: L1Config) -> None:
    with Client("threads", l1=l1) as client:
        request = client.http.build_request("POST", upstream.url + CHAT, json=chat(stream=True))
        transport = client.transport
        dropped = transport.handle_request(request)
        source = dropped.stream._stream
        del dropped
        assert client.ask(upstream.url + CHAT, chat(stream=True)).cache == "MISS"
        assert not transport._faces.engine.flights.has_leads()
        source.close()


def test_a_cancelled_call_lets_the_next_one_lead(
    upstream: StandInUpstream, l1: L1Config, joined: list[Running]
) -> None:
    upstream.provider._control("/stand-in/faults", b'{"fault": "hang", "times": 1}')

    async def cancel_and_ask() -> list[str]:
        async with httpx2.AsyncClient(transport=AsyncCachingTransport(l1=l1), timeout=PATIENCE) as http:
            task = asyncio.ensure_future(http.post(upstream.url + CHAT, json=chat()))
            await asyncio.to_thread(wait_for, lambda: calls(upstream) == 1, "it hangs")
            followers = [asyncio.ensure_future(http.post(upstream.url + CHAT, json=chat())) for _ in range(3)]
            await asyncio.to_thread(wait_for, lambda: len(joined) == 3, "they wait for it")
            task.cancel()
            return sorted(answer.headers["x-cache"] for answer in await asyncio.gather(*followers))

    assert asyncio.run(cancel_and_ask()).count("MISS") == 1
    assert calls(upstream) == 2


# ---- its parts ----


def test_a_given_manager_stays_open(upstream: StandInUpstream, l1: L1Config) -> None:
    with SyncCacheManager(l1) as manager:
        for face in FACES:
            with Client(face, manager=manager) as client:
                client.ask(upstream.url + CHAT, chat())
        assert manager.l1_entry_count() == 1
    assert calls(upstream) == 1


def test_a_manager_of_the_other_face_will_do(upstream: StandInUpstream, l1: L1Config) -> None:
    async def ask() -> None:
        async with CacheManager(l1) as manager:
            transport = AsyncCachingTransport(manager=manager)
            async with httpx2.AsyncClient(transport=transport) as http:
                await http.post(upstream.url + CHAT, json=chat())
            with httpx2.Client(transport=CachingTransport(manager=manager)) as http:
                assert http.post(upstream.url + CHAT, json=chat()).headers["x-cache"] == "HIT"

    asyncio.run(ask())


def test_its_own_manager_is_closed_with_it(l1: L1Config) -> None:
    with Client("threads", l1=l1) as client:
        slab = client.transport._faces.engine.slab
    assert slab.closed


def test_the_environment_says_what_to_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_CACHE_NAME", name)
    monkeypatch.setenv("LLM_EDGE_CACHE_L1_MEMORY", "4MiB")
    with contextlib.closing(CachingTransport()):
        assert SharedSlab.attach(name).config.memory_bytes == 4 * MiB


@pytest.mark.parametrize("options", [{"manager": 1}, {"manager": None, "l1": None, "wrong": 1}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        CachingTransport(**options)


def test_a_manager_and_a_tier_do_not_go_together(l1: L1Config) -> None:
    with SyncCacheManager(l1) as manager, pytest.raises(TypeError, match="not both"):
        CachingTransport(manager=manager, l1=l1)


def test_it_has_both_libraries_names_and_bases() -> None:
    assert adapters_httpx2.CachingTransport is CachingTransport
    for library in LIBRARIES.values():
        assert issubclass(CachingTransport, library.BaseTransport)
        assert issubclass(AsyncCachingTransport, library.AsyncBaseTransport)


def test_without_either_library_the_error_names_the_extra(run_python: Callable[..., str]) -> None:
    program = """
import sys
sys.modules["httpx"] = sys.modules["httpx2"] = None
try:
    import llm_edge_cache.adapters.httpx
except ImportError as error:
    print(error)
"""
    assert "llm-edge-cache[httpx]" in run_python(program)


def test_the_cache_may_be_closed_while_an_answer_is_taken(upstream: StandInUpstream, l1: L1Config) -> None:
    with Client("threads", l1=l1) as client:
        request = client.http.build_request("POST", upstream.url + CHAT, json=chat())
        response = client.http.send(request, stream=True)
        client.transport._faces.close()
        assert json.loads(response.read())["choices"]
