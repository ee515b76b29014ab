"""Every benchmark runs, judges itself by its bars and writes its result with where it came from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import provenance
import pytest
import traces

BENCH = Path(__file__).parent.parent / "bench"
SHARED_TRACES = BENCH.parent.parent / "shared" / "traces"


def run(program: str, result: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCH / program), "--json", str(result), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(result.read_text())
    return document


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "program",
    [
        "slab.py",
        "gateway_streams.py",
        "memory.py",
        "liveness.py",
        "flights.py",
        "manager.py",
        "faults.py",
        "gateway.py",
        "targets.py",
        "adapters.py",
        "invalidation.py",
        "snapshot.py",
    ],
)
def test_a_quick_run_writes_bars_and_provenance(program: str, tmp_path: Path) -> None:
    document = run(program, tmp_path / "result.json", "--quick")
    assert document["provenance"]["program"] == program
    assert document["bars"]


@pytest.mark.timeout(300)
def test_the_hit_ratio_is_measured_without_the_recorded_traces_too(tmp_path: Path) -> None:
    document = run("hitratio.py", tmp_path / "result.json", "--traces", str(tmp_path / "absent"))
    assert [pair["trace"] for pair in document["pairs"]] == ["synthetic", "synthetic"]
    assert all(pair["hit_percent"] > 20 for pair in document["pairs"])
    assert all(pair["most_entries"] <= size for pair, size in zip(document["pairs"], (100, 1000), strict=True))


@pytest.mark.timeout(300)
def test_what_if_is_measured_without_the_recorded_traces_too(tmp_path: Path) -> None:
    document = run("whatif.py", tmp_path / "result.json", "--traces", str(tmp_path / "absent"))
    answers = [one for one in document["answers"] if one["sample"] == "rule" and one["entries"] == 1000]
    assert [one["factor"] for one in answers] == [0.5, 1.0, 2.0, 4.0]
    assert all(one["real_percent"] == pytest.approx(one["answer_percent"], abs=4) for one in answers)


def test_tables_are_read_with_their_stars() -> None:
    row = traces._row(
        "t", ["size", "LRU", "S3-FIFO", "WTLFU best W", "OPT"], ["1,000", "32.8", "40.9*", "41.0 @20%", "53.6"]
    )
    assert row.size == 1000
    assert row.percent == {"LRU": 32.8, "S3-FIFO": 40.9, "WTLFU best W": 41.0, "OPT": 53.6}
    assert row.best_online_percent == 40.9


@pytest.mark.skipif(not SHARED_TRACES.exists(), reason="the recorded traces are not beside this repository")
def test_recorded_traces_have_the_keys_that_their_tables_say() -> None:
    keys = traces.read_keys(SHARED_TRACES / "web12.trace.gz")
    assert (len(keys), len(set(keys))) == (95_607, 13_756)
    assert len(traces.read_tables(SHARED_TRACES / "README.md")) == 34


def test_a_bar_is_met_or_missed_at_its_limit() -> None:
    assert provenance.at_most("x", 1.0, 1.0).met
    assert not provenance.at_most("x", 1.1, 1.0).met
    assert provenance.at_least("x", 1.0, 1.0).met
    assert not provenance.at_least("x", 0.9, 1.0).met
