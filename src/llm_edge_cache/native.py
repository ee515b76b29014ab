"""The native part, or a clear error that says why there is none."""

from __future__ import annotations

import os
import sys

__all__ = ["native"]

_MACHINES = ("x86_64", "aarch64")


def _refusal(platform: str, machine: str, largest_int: int) -> str | None:
    if platform == "linux" and machine in _MACHINES and largest_int > 2**32:
        return None
    return (
        "llm_edge_cache's shared slab needs Linux on x86-64 or aarch64 and a 64-bit Python; "
        f"this is {platform} on {machine}, {'64' if largest_int > 2**32 else '32'}-bit"
    )


_reason = _refusal(sys.platform, os.uname().machine if hasattr(os, "uname") else "an unknown machine", sys.maxsize)
if _reason is not None:
    raise ImportError(_reason)
try:
    from llm_edge_cache import _native as native
except ImportError as error:
    raise ImportError(
        f"llm_edge_cache's native part cannot be loaded ({error}); install a wheel for this Python, "
        "or build from source with a C compiler and Python's headers"
    ) from error
