"""Compiles floor.c with the system's compiler and sets it up beside a workload."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import mmap
import os
import random
import subprocess
import sysconfig
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import Workload

SOURCE = Path(__file__).with_name("floor.c")
ENTRY_HEADER_BYTES = 56 + 64  # what the slab keeps beside a value: the area must be as large, or it caches better
LINE = 64


@functools.cache
def _module() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        include = sysconfig.get_paths()["include"]
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-std=c11", "-O3", "-fPIC", "-shared", f"-I{include}", str(SOURCE), "-o", str(library)],
            check=True,
        )
        loader = importlib.machinery.ExtensionFileLoader("floor", str(library))
        specification = importlib.util.spec_from_file_location("floor", str(library), loader=loader)
        assert specification is not None
        module = importlib.util.module_from_spec(specification)
        loader.exec_module(module)
        return module


class CopyFloor:
    """The floor for one workload and one size of value, in this process."""

    def __init__(self, workload: Workload, value_bytes: int) -> None:
        stride = -(-(value_bytes + ENTRY_HEADER_BYTES) // LINE) * LINE
        self._area = mmap.mmap(-1, stride * len(workload.keys))  # shared pages, as the slab's are
        generator = random.Random(workload.seed)
        for place in range(0, len(self._area), mmap.PAGESIZE):
            self._area[place : place + 8] = generator.randbytes(8)
        where = list(range(len(workload.keys)))
        generator.shuffle(where)
        self._places = array("Q", (where[rank] * stride for rank in workload.ranks))
        self._value_bytes = value_bytes
        self.rewind()

    def rewind(self) -> None:
        """Back to the first request of the workload; also claims the (one) floor of this process."""
        _module().setup(self._area, self._places, self._value_bytes)

    @property
    def copy(self) -> Callable[[bytes], bytes]:
        function: Callable[[bytes], bytes] = _module().copy
        return function
