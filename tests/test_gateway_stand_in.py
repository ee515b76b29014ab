"""The stand-in provider: sound answers in every protocol, counted calls, and each fault as a client sees it."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stand_in_upstream import AT_ONCE, StandInUpstream, load_recordings, read_recordings, request_bytes

from llm_edge_cache.gateway.protocols import PROTOCOLS, FrameSplitter, Verdict
from llm_edge_cache.gateway.stand_in import StandInProvider, StandInSettings
from llm_edge_cache.gateway.stand_in_faults import FAULTS

STREAMING = [path for path in PROTOCOLS if path != "/v1/embeddings"]
QUESTIONS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"model": "m", "prompt": "Hello"},
    "/v1/responses": {"model": "m", "input": "Hello"},
    "/v1/embeddings": {"model": "m", "input": ["Hello", "you"]},
    "/v1/messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]},
}
EXAMPLES = Path(__file__).parent / "data" / "exchanges.jsonl"


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@pytest.fixture(scope="module")
def server() -> Iterator[StandInUpstream]:
    with StandInUpstream(recordings=load_recordings(EXAMPLES)) as running:
        yield running


@pytest.fixture
def upstream(server: StandInUpstream) -> StandInUpstream:
    call(server, "/stand-in/reset", method="POST")
    call(server, "/stand-in/settings", {"answers": "same"})
    return server


def call(
    upstream: StandInUpstream,
    path: str,
    question: object = None,
    *,
    method: str | None = None,
    fault: str | None = None,
    timeout: float = 20,
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", upstream.port, timeout=timeout)
    headers = {} if fault is None else {"X-Stand-In-Fault": fault}
    try:
        body = None if question is None else json.dumps(question)
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        response = connection.getresponse()
        received = [(name.lower().encode(), value.encode()) for name, value in response.getheaders()]
        return Answer(response.status, received, response.read())
    finally:
        connection.close()


def ask(upstream: StandInUpstream, path: str, *, fault: str | None = None, timeout: float = 20, **more: Any) -> Answer:
    return call(upstream, path, {**QUESTIONS[path], **more}, fault=fault, timeout=timeout)


def verdict(path: str, answer: Answer, *, is_stream: bool) -> Verdict:
    if not is_stream:
        return PROTOCOLS[path].judge(answer.status, answer.headers, answer.body)
    splitter, judge = FrameSplitter(), PROTOCOLS[path].stream_judge(answer.status, answer.headers)
    for frame in splitter.feed(answer.body):
        judge.feed(frame)
    return judge.finish(splitter.rest())


# ---- answers ----


@pytest.mark.parametrize("path", PROTOCOLS)
def test_answers_in_one_piece_are_complete(upstream: StandInUpstream, path: str) -> None:
    answer = ask(upstream, path)
    found = verdict(path, answer, is_stream=False)
    assert found.storable
    assert found.model == "m"
    assert found.usage is not None
    assert b"stand-in" in answer.body or path == "/v1/embeddings"


@pytest.mark.parametrize("path", STREAMING)
def test_streams_are_complete(upstream: StandInUpstream, path: str) -> None:
    answer = ask(upstream, path, stream=True, n=2, stream_options={"include_usage": True})
    found = verdict(path, answer, is_stream=True)
    assert found.storable
    assert found.model == "m"
    assert found.usage is not None
    assert b"stand" in answer.body


def test_a_stream_says_what_the_answer_in_one_piece_says(upstream: StandInUpstream) -> None:
    upstream.provider.settings = StandInSettings(first_delay=0, word_delay=0, words=3)
    texts = []
    for stream in (False, True):
        body = ask(upstream, "/v1/messages", stream=stream).body
        parts = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]
        texts.append(
            "".join(part["delta"].get("text", "") for part in parts if part["type"] == "content_block_delta")
            if stream
            else json.loads(body)["content"][0]["text"]
        )
    upstream.provider.settings = AT_ONCE
    assert all(text.startswith("I am a stand-in: no model reads your question") for text in texts)


@pytest.mark.parametrize("path", PROTOCOLS)
def test_the_same_question_has_the_same_answer_and_another_one_another(upstream: StandInUpstream, path: str) -> None:
    assert ask(upstream, path).body == ask(upstream, path).body
    assert ask(upstream, path, seed=1).body != ask(upstream, path, seed=2).body


@pytest.mark.parametrize("path", PROTOCOLS)
def test_all_answers_differ_when_they_should(upstream: StandInUpstream, path: str) -> None:
    call(upstream, "/stand-in/settings", {"answers": "different"})
    assert len({ask(upstream, path).body for _ in range(5)}) == 5


def test_embeddings_come_as_numbers_or_as_base64_and_as_long_as_asked(upstream: StandInUpstream) -> None:
    numbers = ask(upstream, "/v1/embeddings", dimensions=3).json["data"]
    assert [len(item["embedding"]) for item in numbers] == [3, 3]
    assert numbers[0]["embedding"] != numbers[1]["embedding"]
    packed = ask(upstream, "/v1/embeddings", encoding_format="base64", input="x").json["data"]
    assert isinstance(packed[0]["embedding"], str)


def test_recorded_answers_are_given_byte_for_byte(upstream: StandInUpstream) -> None:
    for row in read_recordings(EXAMPLES):
        answer = call(upstream, row["path"], json.loads(request_bytes(row)))
        assert (answer.status, answer.body) == (row["status"], row["response_body"].encode()), row["id"]


def test_what_is_no_request_is_refused_in_the_protocol_s_shape(upstream: StandInUpstream) -> None:
    answer = call(upstream, "/v1/messages", [1])
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_paths_of_no_protocol(upstream: StandInUpstream) -> None:
    assert call(upstream, "/v1/models").json["data"][0]["id"] == "stand-in"
    assert call(upstream, "/v1/nothing").status == 404
    assert call(upstream, "/v1/chat/completions").status == 404  # a GET
    echo = call(upstream, "/v1/echo/there?a=%20", {"x": "é"}, method="PUT").json
    assert (echo["method"], echo["path"], echo["query"]) == ("PUT", "/v1/echo/there", "a=%20")
    assert json.loads(echo["body"]) == {"x": "é"}
    assert ["content-length", str(len(echo["body"]))] in echo["headers"]


# ---- counting and control ----


def test_calls_are_counted_by_path_and_question_and_the_rest_is_not(upstream: StandInUpstream) -> None:
    for path in ("/v1/messages", "/v1/messages", "/v1/completions"):
        ask(upstream, path)
    ask(upstream, "/v1/messages", fault="500")
    call(upstream, "/v1/models")
    tally = call(upstream, "/stand-in").json
    assert (tally["calls"], tally["completed"]) == (4, 4)
    assert tally["by_path"] == {"/v1/messages": 3, "/v1/completions": 1}
    assert sorted(tally["by_question"].values()) == [1, 3]
    assert tally["faults"] == {"500": 1}
    assert call(upstream, "/stand-in/reset", method="POST").json["calls"] == 0


def test_faults_can_be_ordered_for_the_next_calls(upstream: StandInUpstream) -> None:
    call(upstream, "/stand-in/faults", {"fault": "429", "times": 2})
    assert [ask(upstream, "/v1/messages").status for _ in range(3)] == [429, 429, 200]


def test_faults_can_be_asked_for_by_path(upstream: StandInUpstream) -> None:
    assert call(upstream, "/fault/529/v1/messages", QUESTIONS["/v1/messages"]).status == 529
    assert call(upstream, "/fault/529").status == 404


@pytest.mark.parametrize(
    ("path", "given", "complaint"),
    [
        ("/stand-in/settings", {"words": "many"}, "words"),
        ("/stand-in/settings", {"wordz": 1}, "wordz"),
        ("/stand-in/faults", {}, "fault"),
        ("/stand-in/else", {}, "/stand-in/else"),
    ],
)
def test_a_wrong_order_is_refused_by_name(upstream: StandInUpstream, path: str, given: object, complaint: str) -> None:
    answer = call(upstream, path, given)
    assert answer.status == 400
    assert complaint in answer.json["error"]["message"]


def test_an_unknown_fault_is_refused_and_the_known_ones_are_named(upstream: StandInUpstream) -> None:
    answer = ask(upstream, "/v1/messages", fault="flood")
    assert answer.status == 400
    assert all(word in answer.json["error"]["message"] for word in ("flood", *FAULTS))


# ---- faults, as a client sees them ----


@pytest.mark.parametrize("status", [401, 429, 500, 529])
@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_status_comes_with_the_protocol_s_error(upstream: StandInUpstream, path: str, status: int) -> None:
    answer = ask(upstream, path, fault=str(status))
    assert answer.status == status
    assert str(status) in answer.json["error"]["message"]
    assert ((b"retry-after", b"1") in answer.headers) == (status in (429, 529))


@pytest.mark.parametrize("stream", [False, True])
def test_cut_connections_break_where_they_should(upstream: StandInUpstream, stream: bool) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        ask(upstream, "/v1/messages", stream=stream, fault="drop-before")
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(upstream, "/v1/messages", stream=stream, fault="drop-after")
    assert caught.value.partial == b""
    whole = ask(upstream, "/v1/messages", stream=stream).body
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(upstream, "/v1/messages", stream=stream, fault="truncate")
    assert whole.startswith(caught.value.partial)
    assert 0 < len(caught.value.partial) < len(whole)


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_a_hanging_answer_hangs_until_the_client_has_enough(upstream: StandInUpstream, fault: str) -> None:
    with pytest.raises(socket.timeout):
        ask(upstream, "/v1/messages", stream=True, fault=fault, timeout=0.2)
    assert ask(upstream, "/v1/messages").status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["end-early", "garbage", "empty", "error-event", "error-200"])
@pytest.mark.parametrize("path", STREAMING)
def test_broken_answers_end_well_and_are_never_kept(
    upstream: StandInUpstream, path: str, fault: str, stream: bool
) -> None:
    answer = ask(upstream, path, stream=stream, fault=fault)
    assert answer.status == 200
    assert not verdict(path, answer, is_stream=stream).storable


@pytest.mark.parametrize("stream", [False, True])
def test_gzip_and_small_chunks_change_no_byte(upstream: StandInUpstream, stream: bool) -> None:
    whole = ask(upstream, "/v1/messages", stream=stream)
    assert ask(upstream, "/v1/messages", stream=stream, fault="chunks-7").body == whole.body
    packed = ask(upstream, "/v1/messages", stream=stream, fault="gzip")
    assert (b"content-encoding", b"gzip") in packed.headers
    assert gzip.decompress(packed.body) == whole.body


def test_every_fault_is_tried_above() -> None:
    seen = {"hang", "stall", "drop-before", "drop-after", "truncate", "gzip", "chunks-7"}
    assert set(FAULTS) == seen | {"end-early", "garbage", "empty", "error-event", "error-200"}


# ---- delays, and the application alone ----


def slept(settings: StandInSettings, question: dict[str, Any]) -> list[float]:
    """The seconds that one chat call waits, without waiting."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(question).encode()}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    asyncio.run(StandInProvider(settings, sleep=sleep)(scope, receive, send))
    return waits


def test_a_stream_waits_before_its_first_byte_and_then_for_each_event() -> None:
    settings = StandInSettings(words=30, first_delay=0.5, word_delay=0.1, jitter=0.5)
    question = {**QUESTIONS["/v1/chat/completions"], "stream": True}
    first, *others = slept(settings, question)
    assert 0.25 <= first <= 0.75
    assert len(others) > 30
    assert all(0.05 <= wait <= 0.15 for wait in others)
    assert len(set(others)) > 20
    assert slept(settings, question) == [first, *others]


def test_an_answer_in_one_piece_takes_the_time_of_its_words() -> None:
    settings = StandInSettings(words=30, first_delay=0.5, word_delay=0.1, jitter=0.0)
    assert slept(settings, QUESTIONS["/v1/chat/completions"]) == [pytest.approx(3.5)]


def test_the_application_starts_and_stops_with_its_server() -> None:
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent = []

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(StandInProvider()({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_the_program_says_where_it_is_and_stops_when_told() -> None:
    program = Path(__file__).with_name("stand_in_upstream.py")
    with subprocess.Popen(
        [sys.executable, str(program), "--first-delay", "0"], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        url = run.stdout.readline().split()[-1]
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.request("GET", "/stand-in")
        assert json.load(connection.getresponse())["calls"] == 0
        connection.close()
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 0
