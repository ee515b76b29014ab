"""The stress programs, briefly: what a full run would find in an hour, these find in seconds when it is broken
outright.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def run(program: str, result: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / program), "--json", str(result), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(result.read_text())
    return document


@pytest.mark.timeout(300)
def test_a_short_history_of_four_processes_has_no_violation(tmp_path: Path) -> None:
    document = run("history.py", tmp_path / "history.json", "--operations", "200000", "--per-round", "50000")
    assert document["violations"] == []
    assert document["kinds"]["evicting"]["evictions"] > 0
    assert document["kinds"]["squeezed"]["evictions"] > 0


@pytest.mark.timeout(300)
def test_a_few_hundred_kills_are_noticed_by_nobody(tmp_path: Path) -> None:
    document = run("sigkill_soak.py", tmp_path / "soak.json", "--kills", "300", "--per-batch", "50")
    assert document["problems"] == []
    assert document["totals"]["recoveries"] > 0


@pytest.mark.timeout(300)
def test_a_gateway_answers_whatever_it_is_sent(tmp_path: Path) -> None:
    document = run("gateway_fuzz.py", tmp_path / "fuzz.json", "--requests", "1500")
    assert document["problems"] == []
    assert document["caches"]["HIT"] > 0


@pytest.mark.timeout(300)
def test_ten_seconds_of_recycled_and_killed_workers_flush_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(FOLDER / "recycling.py"),
        "--seconds",
        "10",
        "--json",
        str(tmp_path / "recycling.json"),
    ]
    subprocess.run(command, capture_output=True, timeout=300, check=False)  # its bar of a second is not judged here
    document: dict[str, Any] = json.loads((tmp_path / "recycling.json").read_text())
    assert document["void_everywhere"] is True
    for host in document["hosts"]:
        assert host["flushes"] == 0
        assert host["untouched_kept"] == 50
        assert host["check"] == []
        assert host["recycled"] + host["killed"] > 0
        assert host["longest_silence_ms"] < 10_000
