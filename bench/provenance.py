"""Where a recorded figure comes from, and how it stands to its bar.

Every program of this folder and of tests/stress writes its results with :func:`write_results`: the commit, the date,
the machine, its load before and after, and the versions of what was measured travel with the numbers.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
SHARED = ROOT.parent / "shared"
DISTRIBUTION = "llm-edge-cache"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One figure beside the bound it has to keep."""

    name: str
    value: float
    limit: float
    at_most: bool  # else: at least

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{'ok  ' if self.met else 'MISS'}  {self.name:<66} {self.value:>10.3f}  {sign} {self.limit:g}"

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "met": self.met}


def at_most(name: str, value: float, limit: float) -> Bar:
    return Bar(name, value, limit, True)


def at_least(name: str, value: float, limit: float) -> Bar:
    return Bar(name, value, limit, False)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checked-out commit, "+changes" when more than recorded results differs, "none" outside a repository."""
    head = _git("rev-parse", "--verify", "--quiet", "HEAD") or "none"
    return head + ("+changes" if _git("status", "--porcelain", "--", ".", ":(exclude)docs/results") else "")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions(distributions: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in (DISTRIBUTION, *distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203 - a handful of rounds
            found[name] = "absent"
    return found


class Provenance:
    """Started before a measurement, so that the load that it met is recorded as well as the load that it made."""

    def __init__(self, seed: int | None = None, distributions: tuple[str, ...] = ()) -> None:
        self._seed = seed
        self._distributions = distributions
        self._load = os.getloadavg()
        self._commit = commit()  # now: what runs was built before, and the tree may move on meanwhile
        self._begin = time.time()

    def as_dict(self) -> dict[str, Any]:
        return {
            "program": Path(sys.argv[0]).name,
            "arguments": sys.argv[1:],
            "seed": self._seed,
            "commit": self._commit,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._begin)),
            "seconds": round(time.time() - self._begin, 1),
            "load_before": [round(x, 2) for x in self._load],
            "load_after": [round(x, 2) for x in os.getloadavg()],
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "versions": _versions(self._distributions),
        }


def write_results(path: Path | None, provenance: Provenance, results: dict[str, Any], bars: list[Bar]) -> bool:
    """Prints the bars, writes the file (None: nowhere), and returns whether every bar was met."""
    for bar in bars:
        print(bar)
    if path is not None:
        document = {"provenance": provenance.as_dict(), **results, "bars": [bar.as_dict() for bar in bars]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {path}")
    return all(bar.met for bar in bars)
