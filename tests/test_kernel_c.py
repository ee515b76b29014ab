"""Builds and runs the kernel's C tests (tests/c) and a short, fixed run of the fuzzer (tests/fuzz)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PROGRAMS = [
    "plain/test_model",
    "plain/test_threads",
    "plain/test_policy",
    "plain/test_flights",
    "plain/test_samples",
    "asan/test_model",
    "asan/test_threads",
    "asan/test_policy",
    "asan/test_flights",
    "asan/test_samples",
    "tsan/test_threads",
    "tsan/test_flights",
    "points/test_announced",
    "points/test_readside",
    "points/test_crash",
    "points/test_recovery",
    "points/test_stopped",
    "points/test_flight_deaths",
    "weak/test_weakmem",
    "weak/test_weakflights",
]
#: Inputs of the fixed fuzzing run: the committed corpus, and so many mutations of it from a fixed seed.
FUZZ_RUNS = 20_000

pytestmark = pytest.mark.timeout(600)  # building and killing take a while on a busy machine
needs_gcc = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("gcc", "make", "objcopy")), reason="needs gcc, make and objcopy"
)
needs_clang = pytest.mark.skipif(not shutil.which("clang"), reason="needs clang with libFuzzer")


def run(command: list[str], seconds: float) -> str:
    """Returns what the command printed; fails with it when the command fails."""
    outcome = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if outcome.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with {outcome.returncode}:\n{outcome.stdout[-6000:]}", pytrace=False)
    return outcome.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the built programs."""
    directory = tmp_path_factory.mktemp("kernel-c")
    run(["make", "-s", "-C", str(TESTS / "c"), f"-j{os.cpu_count() or 1}", f"BUILD={directory}", "all"], 300)
    return directory


@needs_gcc
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_c_program_succeeds(build: Path, program: str) -> None:
    print(run([str(build / program)], 300))


@needs_clang
def test_a_short_fuzzing_run_finds_nothing(tmp_path: Path) -> None:
    print(
        run(
            [
                "python3",
                str(TESTS / "fuzz" / "run.py"),
                "--runs",
                str(FUZZ_RUNS),
                "--seed",
                "1",
                "--work",
                str(tmp_path),
            ],
            300,
        )
    )
