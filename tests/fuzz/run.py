"""Builds the fuzzer, runs it for some minutes (or a number of runs) and records the outcome as JSON.

python3 tests/fuzz/run.py --minutes 60 --record docs/results/fuzz.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks

from provenance import commit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNEL = ROOT / "src" / "kernel"
CORPUS = HERE / "corpus"
FLAGS = [
    "-std=c11", "-D_GNU_SOURCE", "-g", "-O2", "-pthread",
    "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip
#: One input is a few dozen calls on a small segment: longer than this is an endless loop.
TIMEOUT_SECONDS = 10
MAX_INPUT_BYTES = 1024


def build(work: Path) -> Path:
    """Compiles kernel and fuzzer together; returns the program."""
    program = work / "fuzz_segment"
    sources = [str(HERE / "fuzz_segment.c"), *(str(source) for source in sorted(KERNEL.glob("*.c")))]
    subprocess.run(["clang", *FLAGS, f"-I{KERNEL}", *sources, "-o", str(program)], check=True)
    return program


def fuzz(program: Path, work: Path, arguments: argparse.Namespace) -> tuple[int, str, float]:
    """Runs the fuzzer on a copy of the corpus that it may extend; returns exit status, output and seconds."""
    grown = work / "corpus"
    grown.mkdir(exist_ok=True)
    command = [
        str(program), str(grown), str(CORPUS), f"-seed={arguments.seed}", f"-timeout={TIMEOUT_SECONDS}",
        f"-max_len={MAX_INPUT_BYTES}", "-print_final_stats=1", f"-artifact_prefix={work}/",
    ]  # fmt: skip
    command.append(f"-runs={arguments.runs}" if arguments.runs else f"-max_total_time={int(arguments.minutes * 60)}")
    begun = time.monotonic()
    outcome = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return outcome.returncode, outcome.stdout.decode(errors="replace"), time.monotonic() - begun


def number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def artifacts(work: Path) -> set[str]:
    """Inputs that a run wrote down because they failed; those of earlier runs in the same folder included."""
    return {path.name for kind in ("crash-*", "timeout-*", "oom-*", "leak-*") for path in work.glob(kind)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=0, help="stop after so many executions instead")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**31)
    parser.add_argument("--work", type=Path, default=Path("/tmp/lec-fuzz-run"))
    parser.add_argument("--record", type=Path, help="write the outcome here")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    started, version = datetime.now(timezone.utc).isoformat(timespec="seconds"), commit()
    known = artifacts(arguments.work)
    status, output, seconds = fuzz(build(arguments.work), arguments.work, arguments)
    findings = sorted(artifacts(arguments.work) - known)
    outcome = {
        "program": "tests/fuzz/fuzz_segment.c",
        "commit": version,
        "started": started,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "seed": arguments.seed,
        "executions": number(r"stat::number_of_executed_units:\s*(\d+)", output),
        "seconds": round(seconds, 1),
        "coverage_edges": number(r"cov: (\d+)", output),
        "corpus_inputs": number(r"corp: (\d+)/", output),
        "exit_status": status,
        "findings": findings,
    }
    print(json.dumps(outcome, indent=2))
    if status != 0:
        print(output[-6000:], file=sys.stderr)
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(outcome, indent=2) + "\n")
    return 1 if status != 0 or findings else 0


if __name__ == "__main__":
    sys.exit(main())
