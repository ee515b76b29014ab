"""Checks PromQL expressions against a real scrape: what they name exists, and what they join has the same labels.

Prometheus itself takes a misspelt series for one that has no samples, and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

TARGET_LABELS = frozenset({"job", "instance"})
"""What Prometheus adds to each sample."""
_NEEDS_COUNTER = ("rate", "increase", "irate")


class Scrape(NamedTuple):
    """What one scrape exported."""

    samples: Mapping[str, list[dict[str, str]]]
    """Labels of the samples, by name."""
    counters: frozenset[str]
    """Names of those that only grow."""
    families: frozenset[str]


def read_scrape(text: str) -> Scrape:
    samples: dict[str, list[dict[str, str]]] = {}
    counters: set[str] = set()
    families: set[str] = set()
    for family in text_string_to_metric_families(text):
        families.add(f"{family.name}_total" if family.type == "counter" else family.name)
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(dict(sample.labels))
            if family.type in ("counter", "histogram"):
                counters.add(sample.name)
    return Scrape(samples, frozenset(counters), frozenset(families))


def selectors(expression: str) -> set[str]:
    """Return the names of all series in an expression."""
    return {str(node.name) for node in _nodes(promql.parse(expression)) if isinstance(node, promql.VectorSelector)}


def problems(expression: str, scrape: Scrape) -> list[str]:
    """Say what is wrong with an expression; nothing if all it names exists and fits together."""
    return _Checker(scrape).check(expression)


def result_labels(expression: str, scrape: Scrape) -> frozenset[str]:
    """Return the labels that an expression's result has."""
    return _Checker(scrape).labels(promql.parse(expression)) or frozenset()


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node):
        yield from _nodes(child)


def _children(node: Any) -> list[Any]:
    named = [getattr(node, name) for name in ("lhs", "rhs", "expr", "vector_selector") if hasattr(node, name)]
    return named + list(getattr(node, "args", None) or [])


class _Checker:
    def __init__(self, scrape: Scrape) -> None:
        self._scrape = scrape
        self._found: list[str] = []

    def check(self, expression: str) -> list[str]:
        try:
            tree = promql.parse(expression)
        except ValueError as error:
            return [f"no PromQL: {error}"]
        self.labels(tree)
        self._check_rates(tree, parent="")
        return self._found

    def labels(self, node: Any) -> frozenset[str] | None:
        """The labels of a node's result, each node checked on the way; None: it is a number."""
        if isinstance(node, promql.VectorSelector):
            return self._of_selector(node)
        if isinstance(node, promql.MatrixSelector):
            return self._of_selector(node.vector_selector)
        if isinstance(node, promql.AggregateExpr):
            return self._of_aggregate(node)
        if isinstance(node, promql.Call):
            return self._of_call(node)
        if isinstance(node, promql.BinaryExpr):
            return self._of_pair(node)
        if isinstance(node, (promql.ParenExpr, promql.UnaryExpr, promql.SubqueryExpr)):
            return self.labels(node.expr)
        return None

    def _of_selector(self, node: Any) -> frozenset[str]:
        samples = self._scrape.samples.get(node.name, [])
        if not samples:
            self._found.append(f"{node.name} is not in the scrape")
            return TARGET_LABELS
        known = frozenset(samples[0])
        for matcher in node.matchers.matchers:
            if matcher.name in TARGET_LABELS:
                continue
            if matcher.name not in known:
                self._found.append(f"{node.name} has no label {matcher.name}")
                continue
            values = {sample[matcher.name] for sample in samples}
            is_pattern = matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe)
            wanted = matcher.value.split("|") if is_pattern else [re.escape(matcher.value)]
            self._found += [
                f"{node.name} has no {matcher.name} that is {want!r}"
                for want in wanted
                if not any(re.fullmatch(want, value) for value in values)
            ]
        return known | TARGET_LABELS

    def _of_aggregate(self, node: Any) -> frozenset[str]:
        inner = self.labels(node.expr) or frozenset()
        if node.modifier is None:
            return frozenset()
        named = frozenset(node.modifier.labels)
        if named - inner:
            self._found.append(f"{node.expr} has no label {', '.join(sorted(named - inner))} to aggregate by")
        return named if node.modifier.type == promql.AggModifierType.By else inner - named

    def _of_call(self, node: Any) -> frozenset[str]:
        of_arguments = [found for found in map(self.labels, node.args) if found is not None]
        inner = of_arguments[0] if of_arguments else frozenset()
        if node.func.name == "histogram_quantile":
            if "le" not in inner:
                self._found.append(f"no le is left for the quantile of {node.args[1]}")
            return inner - {"le"}
        return frozenset() if node.func.name == "absent" else inner

    def _of_pair(self, node: Any) -> frozenset[str] | None:
        left, right = self.labels(node.lhs), self.labels(node.rhs)
        if left is None or right is None:
            return right if left is None else left
        if str(node.op) == "or":
            return left | right
        left_key, right_key = left, right
        matching = node.modifier.matching if node.modifier else None
        if matching is not None:
            named = frozenset(matching.labels)
            is_on = matching.type == promql.LabelModifierType.Include
            if is_on and not named <= left & right:
                self._found.append(f"{', '.join(sorted(named - (left & right)))} is not on both sides of {node.op}")
            left_key, right_key = (named, named) if is_on else (left - named, right - named)
        if left_key != right_key:
            self._found.append(f"the sides of {node.op} have different labels: {sorted(left_key ^ right_key)}")
        return left if str(node.op) in ("and", "unless") or not matching else left_key

    def _check_rates(self, node: Any, parent: str) -> None:
        if isinstance(node, promql.VectorSelector):
            is_counter = node.name in self._scrape.counters
            if parent in _NEEDS_COUNTER and not is_counter:
                self._found.append(f"{parent} of {node.name}, which is no counter")
            if parent not in (*_NEEDS_COUNTER, "absent") and is_counter:
                self._found.append(f"{node.name} is a counter, and no rate is taken of it")
            return
        if isinstance(node, promql.Call):
            parent = node.func.name
        elif not isinstance(node, promql.MatrixSelector):
            parent = ""
        for child in _children(node):
            self._check_rates(child, parent)
