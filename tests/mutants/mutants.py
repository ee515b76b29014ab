"""Plants bugs in the kernel and shows that a named test finds each of them.

python3 tests/mutants/mutants.py --record docs/results/mutants.json

Each mutant is a textual change of one file. It is applied to a copy of the tree, the named program is built there
and must fail; on the unchanged copy it must succeed. A mutant whose text is not found exactly once is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks

from catalogue import MUTANTS, Mutant
from provenance import commit

ROOT = Path(__file__).resolve().parents[2]
#: A program that runs longer than this on a mutant hangs, which counts as found.
LIMIT_SECONDS = 240.0
#: The fuzzer stops at the first finding; so long it may search.
FUZZ_MINUTES = 3.0


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    number: int
    name: str
    file: str
    finder: str
    why: str
    found: bool
    seconds: float
    message: str


def copy_tree(source: Path, target: Path) -> Path:
    """Copies what building and running the C programs needs."""
    for part in ("src/kernel", "tests/c", "tests/fuzz", "bench"):
        shutil.copytree(source / part, target / part)
    return target


def planted(source: Path, mutant: Mutant) -> str:
    """The mutant's text of its file; what is to be replaced must be there exactly once."""
    text = (source / "src" / "kernel" / mutant.file).read_text()
    for old, new in ((mutant.old, mutant.new), *mutant.also):
        if text.count(old) != 1:
            raise SystemExit(f"{mutant.name}: its text is {text.count(old)} times in {mutant.file}, expected once")
        text = text.replace(old, new)
    return text


def command_for(tree: Path, finder: str, seed: int) -> tuple[list[list[str]], list[str]]:
    """The commands that build the finder, and the one that runs it."""
    if finder == "fuzz":
        fuzz = ["python3", str(tree / "tests/fuzz/run.py"), "--seed", str(seed), "--work", str(tree / "fuzz")]
        return [], [*fuzz, "--minutes", str(FUZZ_MINUTES)]
    program = tree / "build" / finder
    # A mutant may leave a variable or a function unused: that is not what is to be found.
    make = [
        "make",
        "-s",
        "-C",
        str(tree / "tests/c"),
        "-j2",
        f"BUILD={tree / 'build'}",
        "WARNINGS=-std=c11 -w",
        str(program),
    ]
    return [make], [str(program)]


def message_of(output: str) -> str:
    """The line of a program's output that says what was wrong."""
    for mark in ("FAILED", "ERROR: ", "SUMMARY: ", "not repaired"):
        lines = [line.strip() for line in output.splitlines() if mark in line]
        if lines:
            following = output.split(lines[0], 1)[1].strip().splitlines()
            return " | ".join([lines[0].replace(str(ROOT), ""), *(line.strip() for line in following[:2])])[:300]
    return (output.strip().splitlines() or ["no output"])[-1][:300]


def run_finder(tree: Path, finder: str, seed: int) -> tuple[bool, float, str]:
    """Returns whether the finder failed, after how many seconds, and what it said."""
    builds, command = command_for(tree, finder, seed)
    for build in builds:
        built = subprocess.run(build, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            raise SystemExit(f"cannot build {finder}: {built.stderr[-2000:]}")
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return True, time.monotonic() - begun, "ran for too long"
    return done.returncode != 0, time.monotonic() - begun, message_of(done.stdout.decode(errors="replace"))


def try_mutant(source: Path, number: int, mutant: Mutant, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="lec-mutant-") as directory:
        tree = copy_tree(source, Path(directory))
        (tree / "src" / "kernel" / mutant.file).write_text(planted(source, mutant))
        found, seconds, message = run_finder(tree, mutant.finder, seed)
    return Outcome(number, mutant.name, mutant.file, mutant.finder, mutant.why, found, round(seconds, 1), message)


def prove_finders(source: Path, finders: list[str], seed: int) -> None:
    """Every finder succeeds on the tree as it is."""
    with tempfile.TemporaryDirectory(prefix="lec-mutant-none-") as directory:
        tree = copy_tree(source, Path(directory))
        for finder in finders:
            failed, seconds, message = run_finder(tree, finder, seed)
            print(
                f"unchanged  {finder:24} {'FAILS: ' + message if failed else 'succeeds'} ({seconds:.1f} s)", flush=True
            )
            if failed:
                raise SystemExit(1)


def try_all(chosen: list[tuple[int, Mutant]], seed: int, prove: bool) -> list[Outcome]:
    """Tries the mutants on one copy of the tree, so that work in progress beside does not matter."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lec-mutant-source-") as directory:
        source = copy_tree(ROOT, Path(directory))
        for _, mutant in chosen:
            planted(source, mutant)
        if prove:
            prove_finders(source, sorted({mutant.finder for _, mutant in chosen}), seed)
        for number, mutant in chosen:
            outcome = try_mutant(source, number, mutant, seed)
            outcomes.append(outcome)
            verdict = "found" if outcome.found else "NOT FOUND"
            print(
                f"{number:3} {verdict:9} {mutant.finder:20} {outcome.seconds:6.1f} s  {mutant.name}: {outcome.message}",
                flush=True,
            )
    return outcomes


def write_record(path: Path, outcomes: list[Outcome], seed: int, started: str) -> None:
    record = {
        "program": "tests/mutants/mutants.py",
        "commit": commit(),
        "started": started,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "seed": seed,
        "mutants": len(outcomes),
        "found": sum(outcome.found for outcome in outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only mutants whose name, file or finder has this text")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer")
    parser.add_argument("--record", type=Path, help="write the outcomes here")
    parser.add_argument(
        "--skip-unchanged", action="store_true", help="do not run the finders on the unchanged tree first"
    )
    arguments = parser.parse_args()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    chosen = [(n, m) for n, m in enumerate(MUTANTS, 1) if arguments.only in f"{m.name} {m.file} {m.finder}"]
    outcomes = try_all(chosen, arguments.seed, not arguments.skip_unchanged)
    if arguments.record:
        write_record(arguments.record, outcomes, arguments.seed, started)
    missed = [outcome.name for outcome in outcomes if not outcome.found]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} mutants found")
    for name in missed:
        print(f"missed: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
