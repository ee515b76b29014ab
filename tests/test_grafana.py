"""The dashboard and the alert rules under docs/grafana, against what a real gateway with Redis exports."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import anchors
from gateway_servers import CHAT, question, request, run_gateway
from promql_checker import Scrape, problems, read_scrape, result_labels, selectors
from redis_servers import RedisServer
from stand_in_upstream import AT_ONCE, StandInUpstream
from worker_servers import wait_until

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "docs" / "grafana" / "dashboard.json"
ALERTS = ROOT / "docs" / "grafana" / "alerts.yml"
VARIABLES = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}
SEVERITIES = {"critical", "warning", "info"}
LATE = ("llm_edge_cache_l2_size_age_seconds", "llm_edge_cache_stream_contact_age_seconds")  # once measured


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Scrape]:
    """What a gateway that has answered a question exports."""
    redis = {"redis_url": redis_server.url, "key_prefix": "test-grafana:"}
    with (
        StandInUpstream(AT_ONCE) as upstream,
        run_gateway(tmp_path_factory.mktemp("grafana"), upstream, l2=redis) as gateway,
    ):

        def exported() -> Scrape | None:
            reply = asyncio.run(request(gateway.port, "GET", "/metrics"))
            assert reply.status == 200
            found = read_scrape(reply.body.decode())
            return found if all(name in found.samples for name in LATE) else None

        assert asyncio.run(request(gateway.port, "POST", CHAT, question("What is exported?"))).status == 200
        yield wait_until(exported, f"samples of {LATE}")


# ---- the dashboard ----


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text()))


def panels() -> list[dict[str, Any]]:
    return list(dashboard()["panels"])


def plots() -> list[dict[str, Any]]:
    return [panel for panel in panels() if panel["type"] != "row"]


def expanded(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def targets() -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    for panel in plots():
        for target in panel["targets"]:
            yield panel, target, expanded(target["expr"])


def test_every_series_of_the_dashboard_is_exported(scrape: Scrape) -> None:
    wrong = {f"{panel['title']}: {problem}" for panel, _, text in targets() for problem in problems(text, scrape)}
    assert wrong == set()


def test_every_exported_series_is_on_the_dashboard(scrape: Scrape) -> None:
    shown = {name.removesuffix("_bucket") for _, _, text in targets() for name in selectors(text)}
    assert scrape.families - shown == set()


def test_a_legend_names_labels_that_the_result_has(scrape: Scrape) -> None:
    for panel, target, text in targets():
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= result_labels(text, scrape), panel["title"]


def test_buckets_are_read_as_quantiles_or_heat_maps(scrape: Scrape) -> None:
    for panel, target, text in targets():
        if any(name.endswith("_bucket") for name in selectors(text)):
            is_heat_map = panel["type"] == "heatmap" and target["format"] == "heatmap"
            assert is_heat_map or text.startswith("histogram_quantile("), panel["title"]
            assert not is_heat_map or result_labels(text, scrape) == {"le"}, panel["title"]


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for panel in plots():
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    assert len({panel["title"] for panel in plots()}) >= 30


def test_every_query_goes_to_the_chosen_data_source() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert [panel["title"] for panel in plots() if panel["datasource"] != chosen] == []
    assert [panel["title"] for panel, target, _ in targets() if target["datasource"] != chosen] == []
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) == {"datasource", "job", "instance"}


def test_every_query_looks_at_the_chosen_hosts() -> None:
    for panel, target, text in targets():
        assert target["expr"].count('job=~"$job", instance=~"$instance"') >= len(selectors(text)), panel["title"]


def test_panels_have_a_number_and_a_place_of_their_own() -> None:
    identifiers = [panel["id"] for panel in panels()]
    assert len(set(identifiers)) == len(identifiers)
    cells: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["w"] > 0 < place["h"]
        assert place["x"] >= 0 <= place["y"]
        assert place["x"] + place["w"] <= 24
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in cells, (panel["title"], cells[cell])
            cells[cell] = panel["title"]


# ---- the rules ----


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def test_every_series_of_the_rules_is_exported(scrape: Scrape) -> None:
    wrong = {f"{rule['alert']}: {problem}" for rule in rules() for problem in problems(rule["expr"], scrape)}
    assert wrong == set()


def test_a_rule_says_how_long_how_bad_and_what_to_do(scrape: Scrape) -> None:
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[0-9]+[mh]", rule["for"]), rule["alert"]
        assert rule["labels"]["severity"] in SEVERITIES, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
        told = " ".join(rule["annotations"].values())
        named = set(re.findall(r"\$labels\.(\w+)", told))
        assert named <= result_labels(rule["expr"], scrape), rule["alert"]


def test_a_rule_leads_to_a_place_in_the_documents() -> None:
    for rule in rules():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor in anchors(ROOT / page), rule["alert"]


def test_rules_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the checker ----


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("sum(rate(llm_edge_cache_hit_total[5m]))", "llm_edge_cache_hit_total is not in the scrape"),
        ('rate(llm_edge_cache_hits_total{teir="l1"}[5m])', "llm_edge_cache_hits_total has no label teir"),
        ('rate(llm_edge_cache_hits_total{tier="l3"}[5m])', "llm_edge_cache_hits_total has no tier that is 'l3'"),
        ('rate(llm_edge_cache_hits_total{tier=~"l1|l3"}[5m])', "llm_edge_cache_hits_total has no tier that is 'l3'"),
        ("sum by (reason) (rate(llm_edge_cache_hits_total[5m]))", "has no label reason to aggregate by"),
        ("rate(llm_edge_cache_breaker_open[5m])", "rate of llm_edge_cache_breaker_open, which is no counter"),
        ("llm_edge_cache_hits_total", "llm_edge_cache_hits_total is a counter, and no rate is taken of it"),
        ("histogram_quantile(0.9, sum(rate(llm_edge_cache_wait_seconds_bucket[5m])))", "no le is left"),
        ("llm_edge_cache_memory_bytes / llm_edge_cache_limit_bytes", "the sides of / have different labels"),
        ("llm_edge_cache_limit_bytes and on (tier) llm_edge_cache_memory_bytes", "tier is not on both sides of and"),
        ("sum(rate(llm_edge_requests_total[5m])", "no PromQL"),
    ],
)
def test_the_checker_finds(scrape: Scrape, expression: str, complaint: str) -> None:
    assert any(complaint in problem for problem in problems(expression, scrape)), problems(expression, scrape)
