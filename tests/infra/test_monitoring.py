"""What `infra/monitoring` promises.

* Alert rules and board use metrics that exist (the table in `jobs.metrics`, and Ray's own), with
  labels and label values that exist; every expression is PromQL.
* Ray tells the drivers of one run apart by a label that it adds to every metric of ours.
* Stuck runs, quarantine, idle GPUs and storage errors have a rule; every rule has a test in which
  it fires and one in which it does not (they run in tests/debian, with promtool).
* The board is well formed: no panel lies on another, each has a title, a sentence and a query, all
  queries follow the chosen run and tracker.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from jobs.metrics import COMMON_LABELS, METRICS, MetricKind
from tests.infra.files import INFRA, documents

MONITORING = INFRA / "monitoring"
OF_DRIVER = "WorkerId"
"""Ray adds it: the process that told a value, which for us is always a driver."""
LABELS: dict[str, dict[str, tuple[str, ...]]] = {
    metric.exported_name + suffix: {
        **dict.fromkeys((*COMMON_LABELS, OF_DRIVER), ()),
        **metric.labels,
        **({"le": ()} if suffix == "_bucket" else {}),
    }
    for metric in METRICS
    for suffix in (("_bucket", "_sum", "_count") if metric.kind is MetricKind.HISTOGRAM else ("",))
}
"""Labels of every series of maskmill, and their values where those are fixed."""
OF_RAY = {"ray_node_gpus_utilization": {"instance": (), "GpuIndex": ()}}


def rules() -> list[dict[str, Any]]:
    (document,) = documents(MONITORING / "alerts.yaml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def board() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((MONITORING / "board.json").read_text())
    return read


def queries() -> list[str]:
    return [target["expr"] for panel in board()["panels"] for target in panel["targets"]]


EXPRESSIONS = [rule["expr"] for rule in rules()] + queries()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_use_what_exists(expression: str) -> None:
    promql_parser.parse(re.sub(r"\$\w+", ".*", expression))
    named = re.findall(r"\bray_[a-z0-9_]+", expression)
    assert named
    known = LABELS | OF_RAY
    for name in named:
        assert name in known, name
    for name, matchers in re.findall(r"\b(ray_[a-z0-9_]+)\{([^}]*)\}", expression):
        for label, text in re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', matchers):
            assert label in known[name], f"{name} has no label {label}"
            if allowed := known[name][label]:
                assert set(text.split("|")) <= set(allowed), text
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        for label in re.split(r",\s*", labels):
            assert any(label in known[name] for name in named), label


def test_rays_own_metrics_exist() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    agent = Path(spec.origin).parent / "dashboard/modules/reporter/reporter_agent.py"
    for name, labels in OF_RAY.items():
        text = agent.read_text()
        assert f'"{name.removeprefix("ray_")}"' in text
        assert all(label in text for label in set(labels) - {"instance"})


def test_ray_tells_drivers_apart() -> None:
    from ray._private.telemetry.metric_cardinality import WORKER_ID_TAG_KEY, MetricCardinality

    assert WORKER_ID_TAG_KEY == OF_DRIVER
    for metric in METRICS:
        assert MetricCardinality.get_high_cardinality_labels_to_drop(metric.name) == []


def test_what_must_be_watched_is() -> None:
    found = {rule["alert"] for rule in rules()}
    assert found >= {
        "MaskmillStuck",
        "MaskmillQuarantineRate",
        "MaskmillIdleGpu",
        "MaskmillStorageErrors",
    }
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "action"} == set(rule["annotations"])


def test_every_rule_is_tested_both_ways() -> None:
    (document,) = documents(MONITORING / "alerts_test.yaml")
    cases = [case for test in document["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_panels_have_their_place_and_their_words() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["targets"]
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_the_board_follows_run_and_tracker() -> None:
    variables = {variable["name"]: variable for variable in board()["templating"]["list"]}
    assert list(variables) == ["datasource", *COMMON_LABELS]
    for label in COMMON_LABELS:
        asked = variables[label]["query"]["query"]
        series = re.fullmatch(rf"label_values\((\w+), {label}\)", asked)
        assert series is not None
        assert series[1] in LABELS
    for query in queries():
        for name in re.findall(r"\bray_maskmill_\w+", query):
            assert f'{name}{{run=~"$run", tracker=~"$tracker"' in query
