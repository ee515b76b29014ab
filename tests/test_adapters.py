"""Each adapter says what to install where its framework is missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("framework", ["django", "cachelib", "dogpile"])
def test_a_framework_that_is_missing_is_a_clear_error(framework: str, run_python: Callable[..., str]) -> None:
    program = """
import importlib, sys
sys.modules[sys.argv[1]] = None
try:
    importlib.import_module(f"llm_edge_cache.adapters.{sys.argv[1]}")
except ImportError as error:
    print(error)
"""
    assert f"pip install 'llm-edge-cache[{framework}]'" in run_python(program, framework)
