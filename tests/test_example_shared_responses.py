"""The example under docs/examples/shared_responses, as a reader runs it, and its parts."""

from __future__ import annotations

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from worker_servers import PATIENCE_SECONDS, wait_until

from llm_edge_cache import list_slabs

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "shared_responses"
SAMPLE = EXAMPLE / "sample.jsonl"
MODULES = ("exchanges", "client", "report", "provider")


def _start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE / "run.py"), "--cassettes", str(SAMPLE), *arguments],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait; see that neither a slab nor a process is left. Returns exit status, output, complaints."""
    output, complaints = process.communicate(timeout=PATIENCE_SECONDS)
    ours = f"shared-responses-{process.pid}-"
    assert [name for name in list_slabs() if name.startswith(ours)] == []
    assert [p.pid for p in psutil.process_iter() if _slab_of(p).startswith(ours)] == []
    return process.returncode, output, complaints


def _slab_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("LLM_EDGE_CACHE_NAME", ""))
    except psutil.Error:
        return ""


@pytest.mark.parametrize("server", ["gunicorn", "gunicorn-preload", "uvicorn"])
def test_workers_answer_from_what_others_have_put_there(server: str) -> None:
    status, output, complaints = _finish(_start("--server", server, "--requests", "400", "--delay-scale", "0.05"))
    assert (status, complaints) == (0, "")
    header, rule, *workers, _, totals = output.splitlines()[1:7]
    assert header.split() == ["worker", "requests", "hits", "hits", "put", "there", "by", "another", "misses"]
    assert set(rule) == {"-", " "}
    rows = [[int(cell) for cell in line.split()] for line in workers]
    assert len(rows) == 2
    assert totals.split() == ["all", *(str(sum(column)) for column in list(zip(*rows, strict=True))[1:])]
    _, requests, hits, cross_hits, misses = (sum(column) for column in zip(*rows, strict=True))
    assert requests == hits + misses == 400
    assert 0 < cross_hits <= hits
    assert "slab: 23 entries, " in output
    assert f"; {hits} hits, {misses} misses" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals) -> None:
    process = _start("--requests", "100000")
    wait_until(lambda: [name for name in list_slabs() if f"-{process.pid}-" in name], "the example's slab")
    process.send_signal(number)
    status, _, complaints = _finish(process)
    assert status == 128 + number
    assert "Traceback" not in complaints


def test_a_server_that_does_not_start_is_reported_with_its_log() -> None:
    status, _, complaints = _finish(_start(GUNICORN_CMD_ARGS="--no-such-option"))
    assert status == 2
    assert "the server did not start" in complaints
    assert "no-such-option" in complaints


def test_recordings_that_are_not_there_are_named() -> None:
    status, _, complaints = _finish(_start("--cassettes", "/no/such/folder"))
    assert status == 2
    assert "/no/such/folder" in complaints


# ---- its parts ----


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the example's modules, which call each other by their bare names; forget them afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    together = ModuleType("parts")
    for name in MODULES:
        setattr(together, name, __import__(name))
    yield together
    for name in MODULES:
        sys.modules.pop(name, None)


def test_equal_requests_have_equal_keys_whatever_their_spelling(parts: Any) -> None:
    key = parts.exchanges.request_key
    assert key("/p", "", b'{"a": 1, "b": "\xc3\xa9"}') == key("/p", "", b'{"b":"\\u00e9","a":1}')


@pytest.mark.parametrize(
    ("path", "query", "body"),
    [("/q", "", b'{"a":1}'), ("/p", "x", b'{"a":1}'), ("/p", "", b'{"a":2}'), ("/p", "", b"a=1")],
)
def test_different_requests_have_different_keys(parts: Any, path: str, query: str, body: bytes) -> None:
    assert parts.exchanges.request_key(path, query, body) != parts.exchanges.request_key("/p", "", b'{"a":1}')


def test_the_sample_holds_exchanges_of_every_kind(parts: Any) -> None:
    exchanges = parts.exchanges.load_exchanges(SAMPLE)
    assert len(exchanges) == 23
    assert len({exchange.content_type for exchange in exchanges}) >= 5
    assert any(exchange.response.startswith(bytes(range(256))) for exchange in exchanges)


def test_each_request_is_loaded_once_and_only_if_it_was_answered(parts: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in SAMPLE.read_bytes().split(b"\n")[:3]]
    rows.append({**rows[0], "response_body": "another answer to the first request"})
    rows[1]["status"] = 404
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    loaded = parts.exchanges.load_exchanges(tmp_path)
    assert [exchange.response.decode() for exchange in loaded] == [rows[0]["response_body"], rows[2]["response_body"]]


def test_a_binary_answer_is_decoded(parts: Any, tmp_path: Path) -> None:
    row = json.loads(SAMPLE.read_bytes().split(b"\n")[0])
    row.update(response_body=base64.b64encode(b"\0\xff\n").decode(), body_encoding="base64")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert parts.exchanges.load_exchanges(tmp_path)[0].response == b"\0\xff\n"


def _outcome(parts: Any, **changes: Any) -> Any:
    good = parts.client.Outcome(1, stored_by=2, is_hit=True, is_identical=True, seconds=0.001, lookup_seconds=1e-6)
    return good._replace(**changes)


def test_a_hit_on_another_worker_s_answer_is_what_the_run_is_to_show(parts: Any) -> None:
    assert parts.report.complaints([_outcome(parts)]) == []


def test_hits_on_a_worker_s_own_answers_alone_are_a_failure(parts: Any) -> None:
    assert parts.report.complaints([_outcome(parts, stored_by=1)]) == [
        "no worker had a hit on what another worker had put there"
    ]


def test_one_different_answer_is_a_failure(parts: Any) -> None:
    outcomes = [_outcome(parts), _outcome(parts, is_identical=False)]
    assert parts.report.complaints(outcomes) == ["1 of 2 answers differ from their recording"]


def test_one_missing_answer_is_a_failure(parts: Any) -> None:
    outcomes = [_outcome(parts), parts.client.NO_ANSWER]
    assert parts.report.complaints(outcomes) == ["1 of 2 requests had no answer"]


def test_the_delay_is_the_recorded_one_within_reason(parts: Any) -> None:
    slow = parts.exchanges.load_exchanges(SAMPLE)[0]._replace(seconds=70.0)
    assert parts.provider.RecordedProvider([slow], 0.5).delay(slow) == 0.75
