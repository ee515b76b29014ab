"""The adapters' examples under docs/examples, as a reader runs them: the second process finds what the first made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_edge_cache import list_slabs

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


@pytest.mark.parametrize("program", ["django_cache.py", "flask_cache.py", "dogpile_region.py"])
def test_the_second_process_computes_nothing(program: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "EXAMPLE_SLAB"}
    command = [sys.executable, str(EXAMPLES / program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.split("process 2\n")
    assert first.count("computing") == 1
    assert "visit 1" in first
    assert "computing" not in second
    assert "visit 2" in second
    assert "1234" in second
    assert [name for name in list_slabs() if name.startswith("example-")] == []
