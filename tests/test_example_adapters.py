"""The adapters' examples under docs/examples, as a reader runs them: the second process finds what the first made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_edge_cache import list_slabs

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def run(program: str) -> tuple[str, str]:
    """Run an example; return what its two processes said."""
    environment = {name: value for name, value in os.environ.items() if name != "EXAMPLE_SLAB"}
    command = [sys.executable, str(EXAMPLES / program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [name for name in list_slabs() if name.startswith("example-")] == []
    first, second = done.stdout.split("process 2\n")
    return first, second


@pytest.mark.parametrize("program", ["django_cache.py", "flask_cache.py", "dogpile_region.py"])
def test_the_second_process_computes_nothing(program: str) -> None:
    first, second = run(program)
    assert first.count("computing") == 1
    assert "visit 1" in first
    assert "computing" not in second
    assert "visit 2" in second
    assert "1234" in second


@pytest.mark.parametrize("program", ["httpx_client.py", "langchain_cache.py", "cached_function.py"])
def test_the_second_process_asks_nobody(program: str) -> None:
    first, second = run(program)
    assert first.count("asking the provider") == 1
    assert "Because." in first
    assert "asking" not in second
    assert "Because." in second


def test_the_second_process_of_litellm_asks_nobody() -> None:
    pytest.importorskip("litellm", reason="of the extra bench")
    assert all("answer: Because." in said for said in run("litellm_cache.py"))
