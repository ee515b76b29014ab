"""What the pages and files on deployment name is there: links, variables, commands and their options, fields."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import ROOT, anchors, links, pages
from gunicorn.config import Config

from llm_edge_cache import settings
from llm_edge_cache.cli import main
from llm_edge_cache.workers.gateway import GatewayWorker

DEPLOYMENT = ROOT / "docs" / "deployment"
PAGES = [ROOT / "docs" / "deployment.md", *sorted(DEPLOYMENT.glob("*.md")), ROOT / "docs" / "grafana" / "README.md"]
UNITS = sorted([*DEPLOYMENT.glob("*.service"), *DEPLOYMENT.glob("*.socket")])
MANIFESTS = sorted(DEPLOYMENT.glob("*.yaml"))
KUBERNETES = "1.37"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    linked = {target for target, _ in links(ROOT / "docs" / "deployment.md")}
    assert set(DEPLOYMENT.glob("*.md")) <= linked


@pytest.mark.parametrize("file", [*PAGES, *UNITS, *MANIFESTS, DEPLOYMENT / "Dockerfile"], ids=lambda file: file.name)
def test_every_variable_is_one_that_is_read(file: Path) -> None:
    named = set(re.findall(r"\bLLM_EDGE_CACHE_[A-Z0-9_]*[A-Z0-9]\b", file.read_text()))
    assert named <= {variable.name for variable in settings._VARIABLES}


# ---- commands ----


def command_line() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all commands, and each command's own."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for group in main._GROUPS:
        group.add_parsers(commands)
    return parser, dict(commands.choices)


def code(text: str) -> list[str]:
    """The lines of a page's blocks of code, and its spans of code."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + re.findall(
        r"`([^`\n]+)`", text
    )


def parsed(arguments: list[str]) -> argparse.Namespace:
    try:
        return command_line()[0].parse_args(arguments)
    except SystemExit:
        pytest.fail(f"no such command: llm-edge-cache {shlex.join(arguments)}")


@pytest.mark.parametrize("page", [ROOT / "docs" / "commands.md", *PAGES], ids=lambda page: page.name)
def test_every_command_and_option_is_one_that_there_is(page: Path) -> None:
    _, commands = command_line()
    for line in code(page.read_text()):
        for name, rest in re.findall(r"(?<![\w.-])(?<!build of )llm-edge-cache ([a-z]+)\b([^|&;#`]*)", line):
            assert name in commands, line
            options = set(re.findall(r"(?<!\S)--[a-z-]+", rest))
            assert options <= set(commands[name]._option_string_actions), line


# ---- units and images ----


def unit(file: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(file.read_text().replace("\\\n", " "))
    return parser


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.name)
def test_a_unit_has_its_sections(file: Path) -> None:
    kind = "Socket" if file.suffix == ".socket" else "Service"
    assert set(unit(file).sections()) == {"Unit", kind, "Install"}


def test_the_service_starts_a_command_that_there_is() -> None:
    started = shlex.split(unit(DEPLOYMENT / "llm-edge-cache.service")["Service"]["ExecStart"])
    assert Path(started[0]).name == "llm-edge-cache"
    assert parsed(started[1:]).workers == 4


def test_the_service_starts_gunicorn_with_our_hooks_and_worker() -> None:
    started = shlex.split(unit(DEPLOYMENT / "llm-edge-cache-gunicorn.service")["Service"]["ExecStart"])
    given = Config().parser().parse_args(started[1:])
    assert given.config == "python:llm_edge_cache.workers.gunicorn"
    assert given.worker_class == f"{GatewayWorker.__module__}.{GatewayWorker.__qualname__}"
    assert given.args == ["llm_edge_cache.gateway.app:from_environment()"]


@pytest.mark.parametrize("name", ["llm-edge-cache", "llm-edge-cache-gunicorn"])
def test_a_service_is_given_longer_than_a_stream_takes(name: str) -> None:
    service = unit(DEPLOYMENT / f"{name}.service")["Service"]
    assert int(service["TimeoutStopSec"]) >= 330
    assert service["KillMode"] == "mixed"
    assert service["User"] == "llm-edge-cache"
    assert "DynamicUser" not in service


def test_the_image_starts_a_command_that_there_is() -> None:
    lines = (DEPLOYMENT / "Dockerfile").read_text().splitlines()
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT ")]
    (command,) = [line for line in lines if line.startswith("CMD ")]
    started = [*json.loads(entry.partition(" ")[2]), *json.loads(command.partition(" ")[2])]
    assert started[0] == "llm-edge-cache"
    assert parsed(started[1:]).host == "0.0.0.0"


# ---- Kubernetes ----


def manifests(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def pods() -> Iterator[dict[str, Any]]:
    for file in MANIFESTS:
        for manifest in manifests(file):
            if "template" in manifest["spec"]:
                yield manifest["spec"]["template"]["spec"]


def mebibytes(quantity: str) -> int:
    number, unit_name = re.fullmatch(r"(\d+)(Mi|Gi|MiB|GiB)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * (1024 if unit_name.startswith("G") else 1)


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


def test_containers_that_are_restarted_find_their_slab() -> None:
    found = list(pods())
    assert len(found) == 3
    for pod in found:
        assert pod.get("shareProcessNamespace") or pod.get("hostPID")
        assert pod["securityContext"]["runAsNonRoot"]


def test_there_is_room_for_the_slab_in_shared_memory_and_in_the_limit() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        slab = mebibytes(variables(container)["LLM_EDGE_CACHE_L1_MEMORY"])
        limit = mebibytes(container["resources"]["limits"]["memory"])
        assert limit >= slab + 400  # five processes, and some
        if pod.get("hostIPC"):
            continue
        (volume,) = pod["volumes"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert slab + 64 <= mebibytes(volume["emptyDir"]["sizeLimit"]) <= limit
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]


def test_a_gateway_s_pod_is_probed_and_may_end_in_peace() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        if container["args"][0] == "serve":
            assert parsed(container["args"]).port == container["ports"][0]["containerPort"]
            assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
            assert container["lifecycle"]["preStop"]
            assert pod["terminationGracePeriodSeconds"] >= 330


@pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None, reason="100 MB of schemas: not in the extra"
)
@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_the_schemas_of_kubernetes_allow_it(file: Path) -> None:
    kubernetes_validate = importlib.import_module("kubernetes_validate")
    for manifest in manifests(file):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
