"""The recorded traces and the tables of other policies' hit ratios beside them; a synthetic trace where they are
absent.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

HINDSIGHT = ("WTLFU best W", "OPT")  # no online policy could have done it


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: hit ratios in percent of one trace at one size."""

    trace: str
    size: int
    percent: dict[str, float]  # by column
    best_online: str | None  # the starred column

    @property
    def best_online_percent(self) -> float | None:
        return None if self.best_online is None else self.percent[self.best_online]


def read_keys(path: Path) -> Sequence[int]:
    """The requested keys, in order. Format: a line of JSON, then a column of 32-bit little-endian differences."""
    with gzip.open(path, "rb") as file:
        header = json.loads(file.readline())
        differences = array("i")
        differences.frombytes(file.read(4 * header["n"]))
    return array("I", accumulate(differences))


def read_tables(readme: Path) -> list[Row]:
    rows: list[Row] = []
    trace, columns = "", [""]
    for line in readme.read_text().splitlines():
        if heading := re.match(r"\*\*(\w+)\*\* \(", line):
            trace = heading[1]
        elif line.startswith("| size |"):
            columns = [cell.strip() for cell in line.strip("|").split("|")]
        elif trace and re.match(r"\| [\d,]+ \|", line):
            rows.append(_row(trace, columns, [cell.strip() for cell in line.strip("|").split("|")]))
    return rows


def _row(trace: str, columns: list[str], cells: list[str]) -> Row:
    percent = {}
    best = None
    for column, cell in zip(columns[1:], cells[1:], strict=True):
        percent[column] = float(cell.split("@")[0].rstrip("* "))
        if "*" in cell and column not in HINDSIGHT:
            best = column
    return Row(trace, int(cells[0].replace(",", "")), percent, best)


SYNTHETIC = "synthetic"
SYNTHETIC_ROWS = [Row(SYNTHETIC, size, {}, None) for size in (100, 1000)]


def synthetic_keys(seed: int = 1, requests: int = 60_000) -> Sequence[int]:
    """Zipf(0.9) over 10,000 keys, every fifth thousand of requests a scan of keys that never come back."""
    generator = random.Random(seed)
    weights = list(accumulate((rank + 1) ** -0.9 for rank in range(10_000)))
    keys = array("I", generator.choices(range(10_000), cum_weights=weights, k=requests))
    for begin in range(4000, requests, 5000):
        for i in range(begin, min(begin + 1000, requests)):
            keys[i] = 10_000 + i
    return keys
