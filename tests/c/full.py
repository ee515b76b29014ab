"""Runs the kernel's crash programs without any sampling, and the weak-memory one for longer, and records the outcome.

python3 tests/c/full.py --record docs/results/killpoints.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks

from provenance import commit

HERE = Path(__file__).resolve().parent
#: Program, and the settings that make it leave nothing out.
PROGRAMS: list[tuple[str, dict[str, str]]] = [
    ("points/test_announced", {}),
    ("points/test_crash", {"CRASH_MOST": "0"}),
    ("points/test_recovery", {"RECOVERY_STRIDE": "1", "RECOVERY_FIRST": "3"}),
    ("points/test_stopped", {"STOPPED_STRIDE": "1"}),
    ("weak/test_weakmem", {"WEAKMEM_RUNS": "300000", "WEAKMEM_SEED": "20"}),
    ("tsan/test_threads", {"THREADS_SECONDS": "30", "THREADS_SEED": "20"}),
]


def run(program: Path, settings: dict[str, str]) -> dict[str, object]:
    begun = time.monotonic()
    done = subprocess.run(
        [str(program)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    seconds = round(time.monotonic() - begun, 1)
    lines = done.stdout.strip().splitlines()
    # The summaries begin with the program's name; on failure the end of the output is what counts.
    said = [line for line in lines if line.startswith(program.name)] if done.returncode == 0 else lines[-12:]
    return {"settings": settings, "exit_status": done.returncode, "seconds": seconds, "said": said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write the outcome here")
    arguments = parser.parse_args()
    started, version = datetime.now(timezone.utc).isoformat(timespec="seconds"), commit()
    outcomes: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="lec-full-") as build:
        subprocess.run(["make", "-s", "-C", str(HERE), "-j2", f"BUILD={build}", "all"], check=True)
        for program, settings in PROGRAMS:
            outcomes[program] = run(Path(build) / program, settings)
            print(program, outcomes[program], flush=True)
    record = {
        "program": "tests/c/full.py",
        "commit": version,
        "started": started,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "outcomes": outcomes,
    }
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if any(outcome["exit_status"] for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
