"""Imports point down, and what is built is what lies in the folders."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_edge_cache import native

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "llm_edge_cache"
NAME = "llm_edge_cache"

# A module may import from what stands before it; a package's modules also from one another, without circles.
ORDER = [
    "_native",
    "errors",
    "native",
    "slabconfig",
    "naming",
    "namelock",
    "memory",
    "segment",
    "slab",
    "canonical",
    "model",
    "keys",
    "codec",
    "redis_target",
    "regions",
    "whatif",
    "settings",
    "redis_commands",
    "redis_route",
    "redis_links",
    "redis_client",
    "effects",
    "redis_records",
    "breaker",
    "redis_tier",
    "invalidation",
    "deferred",
    "sizing",
    "follower",
    "flight",
    "upkeep",
    "waiting",
    "lookup",
    "core",
    "fetch",
    "engine",
    "manager_base",
    "manager",
    "sync_manager",
    "faces",
    "callkeys",
    "decorator",
    "series",
    "metrics",
    "reading",
    "snapshot_file",
    "snapshot",
    "__init__",
    "gateway",
    "adapters",
    "cli",
    "workers",
    "__main__",
]


def _layer(module: str) -> str:
    return module.split(".", 1)[0]


def _modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def _targets(node: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of this package that one import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        yield from (
            name.removeprefix(NAME).lstrip(".") or "__init__" for name in names if name.split(".", 1)[0] == NAME
        )
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".", 1)[0] == NAME:
        module = node.module.removeprefix(NAME).lstrip(".")
        for alias in node.names:
            submodule = f"{module}.{alias.name}".lstrip(".")
            is_module = submodule in modules or f"{submodule}.__init__" in modules or submodule == "_native"
            yield submodule if is_module else module or "__init__"


def _imports(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    return {target for node in ast.walk(ast.parse(path.read_text())) for target in _targets(node, modules)}


def test_every_module_has_a_layer() -> None:
    assert {_layer(module) for module in _modules()} <= set(ORDER)


@pytest.mark.parametrize("module", _modules())
def test_imports_point_down(module: str) -> None:
    modules = _modules()
    for target in _imports(module, modules[module], modules):
        here, there = _layer(module), _layer(target)
        assert ORDER.index(there) < ORDER.index(here) or ("." in module and here == there), f"{module} imports {target}"


@pytest.mark.parametrize("module", _modules())
def test_no_import_of_our_own_hides_in_a_function(module: str) -> None:
    modules = _modules()
    tree = ast.parse(modules[module].read_text())
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hidden = {target for node in ast.walk(function) for target in _targets(node, modules)}
            assert not hidden, f"{module}.{function.name} imports {hidden}"


def test_imports_are_absolute() -> None:
    for module, path in _modules().items():
        relative = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert not relative, module


def test_a_package_s_modules_import_one_another_without_circles() -> None:
    modules = _modules()
    graph = {module: _imports(module, path, modules) for module, path in modules.items()}
    done: set[str] = set()
    while graph:
        free = [module for module, targets in graph.items() if not (targets & set(graph)) - {module}]
        assert free, f"a circle among {sorted(graph)}"
        done.update(free)
        for module in free:
            del graph[module]


@pytest.mark.parametrize(("folder", "allowed"), [("kernel", {"kernel"}), ("binding", {"binding", "kernel"})])
def test_c_includes_point_down(folder: str, allowed: set[str]) -> None:
    ours = {path.name: path.parent.name for path in (ROOT / "src").rglob("*.[ch]")}
    for path in (ROOT / "src" / folder).glob("*.[ch]"):
        for header in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert ours[header] in allowed, f"{path.name} includes {header}"


def _included(path: Path) -> set[str]:
    return set(re.findall(r'#include "([^"]+)"', path.read_text()))


UNITS = ("kernel.c", "kernel_replay.c")  # of the kernel; the second one has the policy once more


def test_the_binding_sees_the_kernel_s_public_face_only() -> None:
    binding = ROOT / "src" / "binding"
    included = set().union(*(_included(path) for path in binding.glob("*.[ch]") if path.name not in UNITS))
    assert included == {"binding.h", "kernel.h"}


def test_the_two_units_hold_the_whole_kernel_and_nothing_else() -> None:
    present = {path.name for path in (ROOT / "src" / "kernel").glob("*.c")}
    assert _included(ROOT / "src" / "binding" / "kernel.c") == present - {"miniature.c"}
    replaying = {"miniature.c", "policy.c", "samples.c", "shadow.c", "sketch.c"}
    assert _included(ROOT / "src" / "binding" / "kernel_replay.c") == replaying


def test_what_is_built_is_what_lies_in_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = settings["tool"]["setuptools"]["ext-modules"]
    present = {"sources": ["src/binding/*.c"], "depends": ["src/binding/*.h", "src/kernel/*.[ch]"]}
    for field, patterns in present.items():
        assert sorted(extension[field]) == sorted(
            str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)
        )


# ---- elsewhere than where it runs ----


@pytest.mark.parametrize(
    ("platform", "machine", "largest_int"),
    [
        ("darwin", "arm64", 2**63 - 1),
        ("win32", "AMD64", 2**63 - 1),
        ("linux", "riscv64", 2**63 - 1),
        ("linux", "x86_64", 2**31 - 1),
    ],
)
def test_other_platforms_get_a_clear_error(platform: str, machine: str, largest_int: int) -> None:
    reason = native._refusal(platform, machine, largest_int)
    assert reason is not None
    assert "needs Linux on x86-64 or aarch64" in reason
    assert f"{platform} on {machine}" in reason


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_these_platforms_are_fine(machine: str) -> None:
    assert native._refusal("linux", machine, 2**63 - 1) is None


def test_a_native_part_that_is_missing_is_a_clear_error(run_python: object) -> None:
    program = """
import sys
sys.modules["llm_edge_cache._native"] = None
try:
    import llm_edge_cache
except ImportError as error:
    print(error)
"""
    assert callable(run_python)
    printed = run_python(program)
    assert "native part cannot be loaded" in printed
    assert "C compiler" in printed
