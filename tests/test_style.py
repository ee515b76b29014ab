"""The linters and type checkers that every change must pass, as part of the one test command."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
C_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O2", "-fsyntax-only"]


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_would_format_nothing() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_mypy_strict_finds_nothing() -> None:
    run(sys.executable, "-m", "mypy")


@pytest.mark.parametrize("folder", ["kernel", "binding"])
def test_the_c_sources_compile_without_a_warning(folder: str) -> None:
    sources = sorted(str(path) for path in (ROOT / "src" / folder).glob("*.c"))
    includes = ["-I", str(ROOT / "src" / "kernel"), "-I", sysconfig.get_path("include")]
    run("gcc", *C_FLAGS, *includes, *sources)


def test_the_kernel_knows_nothing_of_python_and_does_no_io() -> None:
    forbidden = ("Python.h", "stdio.h", "getenv", "exit(", "malloc(")
    for path in (ROOT / "src" / "kernel").glob("*.[ch]"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path
