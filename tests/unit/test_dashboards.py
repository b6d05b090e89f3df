"""The Grafana dashboards: what they ask for exists, and the files are what the code makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hub_gateway.metrics import METRICS

pytest.importorskip("grafana_foundation_sdk", reason="not applicable: the dashboards are made with Python 3.11")

from deploy.grafana.dashboards import DASHBOARDS, DIRECTORY, rendered


def panels(name: str) -> Iterator[dict[str, Any]]:
    for panel in json.loads(rendered(name))["panels"]:
        if panel["type"] != "row":
            yield panel


def selectors(node: Any) -> Iterator[Any]:
    """Every selector of an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    if isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
        return
    for part in ("expr", "lhs", "rhs"):
        if hasattr(node, part):
            yield from selectors(getattr(node, part))
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Labels by name of sample. What is created at zero is exposed from the start."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(METRICS.expose().decode()):
        found.setdefault(family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_files_are_what_the_code_makes(name: str) -> None:
    assert (DIRECTORY / f"{name}.json").read_text() == rendered(name), "run `python -m deploy.grafana.dashboards`"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_expression_is_promql_over_metrics_that_exist(name: str, known: dict[str, set[str]]) -> None:
    for panel in panels(name):
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m")
            used = list(selectors(promql_parser.parse(expression)))
            assert used, panel["title"]
            for selector in used:
                assert selector.name in known, f"{panel['title']}: no metric {selector.name}"
                asked = {matcher.name for matcher in selector.matchers.matchers} - {"instance"}
                # A gauge whose label is the name of a policy has no series before there is a policy.
                assert asked <= known[selector.name] or not known[selector.name], panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_can_be_read(name: str) -> None:
    seen = []
    for panel in panels(name):
        seen.append(panel["title"])
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        # Whoever reads a dashboard sees no names of people.
        assert not {"user", "owner", "username"} & set(json.dumps(panel["targets"]).replace('"', " ").split())
    assert len(seen) == len(set(seen)) > 5
