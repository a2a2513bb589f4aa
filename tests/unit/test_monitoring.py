"""The panel list and all that is made of it: dashboards, alert rules, their pages; tried with Prometheus's own tools.

`python -m tests.unit.test_monitoring` writes configs/monitoring and docs/metrics.md anew: look at the difference before
you keep it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from symile_dist.cli import main
from symile_dist.config import Config
from symile_dist.metrics.discovery import targets, write_targets
from symile_dist.metrics.exporter import Exporter
from symile_dist.metrics.names import METRICS
from symile_dist.metrics.panels import PANELS, TERMINAL
from symile_dist.tools.monitoring import command
from symile_dist.tools.monitoring.alerts import alerts, duration, records, rules_text
from symile_dist.tools.monitoring.documentation import BUILT_IN, metrics_of, metrics_page, seen_in
from symile_dist.tools.monitoring.grafana import annotation_expressions, dashboards, expressions
from symile_dist.tools.monitoring.prometheus import SAMPLE_LIMIT, config_text, scrape_config
from symile_dist.tools.monitoring.targets import FORGET_SECONDS, merged_targets, write_merged
from tests.alerts import Scenario, scenarios, unit_tests_text

ROOT = Path(__file__).parents[2]
CONFIGS, METRICS_PAGE, RUNBOOK = (
    ROOT / "configs" / "monitoring",
    ROOT / "docs" / "metrics.md",
    ROOT / "docs" / "runbook.md",
)
DISCOVERED = {"run", "run_id", "role", "rank", "host", "job", "instance"}
"""Labels that come with the endpoints."""
UNSEEN: dict[str, str] = {}
"""Metrics that no panel and no alert shows, with the reason."""

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="apt-get install prometheus (promtool)")
needs_amtool = pytest.mark.skipif(not shutil.which("amtool"), reason="apt-get install prometheus-alertmanager (amtool)")

EVERY_EXPRESSION = [
    *((f"panel {panel.key}", query.expression) for panel in PANELS.values() for query in panel.queries),
    *((f"alert {alert.name}", alert.expression) for alert in alerts()),
    *((f"record {record.name}", record.expression) for record in records()),
    *(("annotation", each) for content in dashboards().values() for each in annotation_expressions(content)),
]


def run_tool(*arguments: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, arguments)), cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# The list


def test_panels_are_whole() -> None:
    assert 40 <= len(PANELS) <= 60
    assert {panel.dashboard for panel in PANELS.values()} == set(dashboards())
    for key, panel in PANELS.items():
        assert key == panel.key and re.fullmatch(r"[a-z0-9_]+", key)
        assert panel.queries and panel.title and panel.description.endswith("."), key
        assert [each.value for each in panel.thresholds] == sorted(each.value for each in panel.thresholds), key
        titles = [other.title for other in PANELS.values() if other.dashboard == panel.dashboard]
        assert titles.count(panel.title) == 1, f"{panel.dashboard} has two panels called {panel.title}"
    assert set(TERMINAL) <= set(PANELS)
    assert all(PANELS[key].curves for key in TERMINAL), "the terminal has nothing but the history"


def test_curves_are_keys_of_the_history() -> None:
    kinds = {"train", "validation", "checkpoint", "mirror", "start", "goodput"}
    for panel in PANELS.values():
        for curve in panel.curves:
            assert curve.kind in kinds, (panel.key, curve.kind)
            assert re.fullmatch(r"[a-z_]+(\.[a-z_]+|\.\*|/\*)?", curve.key), (panel.key, curve.key)
            assert curve.label or curve.key.endswith("*"), f"{panel.key}: {curve.key} would stand there as it is"


def test_what_rank_0_alone_serves_is_not_sought_on_a_chosen_rank() -> None:
    alone = {name for name, spec in METRICS.items() if "rank 0" in spec.help}
    assert {"symile_validation_loss", "symile_contrastive_batch_accuracy_ratio"} <= alone
    for panel in PANELS.values():
        for query in panel.queries:
            for name in metrics_of(query.expression) & alone:
                assert "$rank" not in query.expression, f"{panel.title}: {name} is there of rank 0 only"


@pytest.mark.parametrize("key", PANELS)
def test_no_panel_draws_a_line_per_rank(key: str) -> None:
    for query in PANELS[key].queries:
        outermost = re.match(
            r"(?:60 \* |ln\(|time\(\) - |clamp_min\(|histogram_quantile\([\d.]+, )?(\w+) by \((.*?)\)", query.expression
        )
        assert outermost, f"{key}: {query.expression} does not begin with an aggregation"
        labels = outermost[2].split(", ")
        assert labels[:2] == ["run", "run_id"], f"{key}: two runs would be one"
        assert "rank" not in labels, f"{key}: 1,024 ranks would be 1,024 lines"
        shown = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        missing = set(labels) - {"run_id", "le"} - shown
        assert not missing, f"{key}: its legend does not tell {missing} apart"
        of_ranks = {"rank"} if outermost[1] == "topk" else set()
        assert shown <= set(labels) | of_ranks, f"{key}: its legend names labels that the result has not"


def test_every_metric_is_seen() -> None:
    blind = {name for name, places in seen_in().items() if not places}
    assert blind == set(UNSEEN), "a metric that nobody sees: give it a panel, or a reason in UNSEEN"


@pytest.mark.parametrize(("place", "expression"), EVERY_EXPRESSION)
def test_expressions_name_what_is_exported(place: str, expression: str) -> None:
    recorded = {record.name for record in records()}
    for name in metrics_of(expression):
        assert name in METRICS or name in BUILT_IN or name in recorded, f"{place}: no metric is called {name}"
    for name, matchers in re.findall(r"([\w:]+)\{(.*?)\}", expression):
        if name in recorded:
            continue
        spec = METRICS.get(re.sub(r"_(bucket|sum|count)$", "", name)) or METRICS.get(name)
        known = DISCOVERED | ({"alertname", "alertstate"} if name == "ALERTS" else set())
        for label, value in re.findall(r'(\w+)\s*[=!]~?"(.*?)"', matchers):
            assert label in known or (spec and label in spec.labels), f"{place}: {name} has no label {label}"
            allowed = spec.label_values.get(label, ()) if spec else ()
            for each in value.split("|") if allowed else ():
                assert each in allowed, f"{place}: {name}{{{label}}} is never {each}"


@pytest.mark.parametrize(("place", "expression"), EVERY_EXPRESSION)
def test_aggregations_keep_labels_that_there_are(place: str, expression: str) -> None:
    labels = {label for name in metrics_of(expression) if name in METRICS for label in METRICS[name].labels}
    for group in re.findall(r"(?:by|on) \((.*?)\)", expression):
        unknown = set(group.split(", ")) - labels - DISCOVERED - {"le", "alertname"}
        assert not unknown, f"{place}: {unknown} are no labels of {metrics_of(expression)}"


# Dashboards


def lost(given: Any, kept: Any, path: str = "") -> set[str]:
    """Paths, with `[]` for any number, of what is missing or otherwise in a copy."""
    if isinstance(given, dict) and isinstance(kept, dict):
        parts = (lost(value, kept.get(key), f"{path}.{key}") for key, value in given.items())
        return set().union(*parts)
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return set().union(*(lost(one, other, f"{path}[]") for one, other in zip(given, kept, strict=True)))
    return set() if given == kept else {path}


@pytest.mark.parametrize("name", dashboards())
def test_grafana_knows_every_field(name: str) -> None:
    sdk = pytest.importorskip("grafana_foundation_sdk", reason="pip install 'symile-dist[dev]'")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    assert sdk
    register_default_plugins()
    given = json.loads(command.files_of_dashboards()[f"{name}.json"])
    kept = json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder))
    # Of the Prometheus plugin, whose annotations the SDK does not model; and a variable's text for people.
    plugin = {
        f".annotations.list[].{key}" for key in ("step", "titleFormat", "textFormat", "tagKeys", "useValueForTime")
    }
    assert lost(given, kept) <= plugin | {".templating.list[].definition"}
    given["panels"][1]["targets"][0]["legendFormatt"] = "x"
    given["panels"][1]["tittle"] = "x"
    kept = json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder))
    assert {".panels[].targets[].legendFormatt", ".panels[].tittle"} <= lost(given, kept), "a mistake is not found"


@pytest.mark.parametrize("name", dashboards())
def test_dashboards_are_whole(name: str) -> None:
    content = dashboards()[name]  # type: ignore[index]
    panels = [made for made in content["panels"] if made["type"] != "row"]
    assert [each.panel for each in expressions(content)] == [
        panel.key for panel in PANELS.values() if panel.dashboard == name for _ in panel.queries
    ] or {made["title"] for made in panels} == {panel.title for panel in PANELS.values() if panel.dashboard == name}
    numbers = [made["id"] for made in content["panels"]]
    assert len(set(numbers)) == len(numbers)
    cells: set[tuple[int, int]] = set()
    for made in content["panels"]:
        at = made["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells, f"{made['title']} lies over another"
        cells |= mine
    for each in expressions(content):
        assert "$" not in each.expression, each


# What is committed


def test_committed_files_are_as_made() -> None:
    for name, text in command.files_of_configs().items():
        assert (CONFIGS / name).read_text(encoding="utf-8") == text, f"{name}: `python -m tests.unit.test_monitoring`"
    assert METRICS_PAGE.read_text(encoding="utf-8") == metrics_page(), "`python -m tests.unit.test_monitoring`"
    made = {CONFIGS / name for name in command.files_of_configs()}
    for path in CONFIGS.rglob("*.json"):
        assert path in made, f"{path} is made by nothing"


def test_each_alert_has_its_part_in_the_runbook() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(parts) == [alert.name for alert in alerts()]
    for name, part in parts.items():
        assert "- Look:" in part and "- Do:" in part, name
    for alert in alerts():
        assert f"runbook.md#{alert.name.lower()}" in rules_text()


@pytest.mark.parametrize("path", [RUNBOOK, METRICS_PAGE, ROOT / "tools/monitoring/alerts.py"])
def test_advice_names_keys_and_commands_that_there_are(path: Path) -> None:
    from symile_dist.cli import build_parser

    text = path.read_text(encoding="utf-8")
    sections = "|".join(Config.model_fields)
    for key in re.findall(rf"(?<![\w./-])((?:{sections})(?:\.[a-z_]+)+)", text):
        model: Any = Config
        for part in key.split("."):
            if part in ("md", "py", "json") or not hasattr(model, "model_fields"):
                break  # a file, or within a map
            assert part in model.model_fields, f"{path.name}: the config has no {key}"
            model = model.model_fields[part].annotation
    parser = build_parser()
    commands = next(action for action in parser._actions if action.dest == "run_command" or action.choices).choices
    assert commands
    for name in re.findall(r"symile-dist ([a-z]+)", text):
        assert name in commands, f"{path.name}: there is no symile-dist {name}"


def test_everything_of_monitoring_is_in_the_wheel() -> None:
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    suffixes = {Path(pattern).suffix for pattern in patterns["symile_dist.configs"]}
    assert {path.suffix for path in CONFIGS.rglob("*") if path.is_file()} <= suffixes


def test_containers_are_pinned_and_hold_no_password() -> None:
    compose = yaml.safe_load((CONFIGS / "docker-compose.yml").read_text())
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name} has no version"
        assert "ports" not in service or all(str(port).startswith("127.0.0.1:") for port in service["ports"])
        words = " ".join([*service.get("command", []), *map(str, service.get("environment", {}).values())])
        assert "127.0.0.1" in words, f"{name} listens beyond loopback"
    assert compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_")
    source = yaml.safe_load((CONFIGS / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    scraped = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped, "the windows of rates would be too short"


# Prometheus's own tools


@needs_promtool
def test_promtool_takes_every_expression(tmp_path: Path) -> None:
    found = [each.expression for content in dashboards().values() for each in expressions(content)]
    found += [each for content in dashboards().values() for each in annotation_expressions(content)]
    rules = [{"record": f"tried:{number}", "expr": each} for number, each in enumerate(found)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "tried", "rules": rules}]}))
    assert f"{len(found)} rules found" in run_tool("promtool", "check", "rules", file)
    assert len(found) >= len(PANELS)
    file.write_text(file.read_text() + "  - expr: sum by (\n    record: wrong\n")
    with pytest.raises(AssertionError, match="parse error"):
        run_tool("promtool", "check", "rules", file)


@needs_promtool
@pytest.mark.parametrize("time_scale", [1.0, 0.1, 0.01])
def test_promtool_takes_the_rules(tmp_path: Path, time_scale: float) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(rules_text(time_scale))
    assert f"{len(alerts()) + len(records())} rules found" in run_tool("promtool", "check", "rules", file)


@needs_promtool
def test_promtool_takes_the_configuration(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS, tmp_path / "shipped")
    (tmp_path / "shipped/targets").mkdir()
    (tmp_path / "shipped/targets/runs.json").write_text(
        json.dumps(targets("demo", tmp_path, "http://127.0.0.1:9/metrics", []))
    )
    assert "WARNING" not in run_tool("promtool", "check", "config", tmp_path / "shipped/prometheus.yml")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "rules.yml").write_text(rules_text())
    content = scrape_config(None, "http://head:9390/targets", token_file=str(tmp_path / "token"))
    (tmp_path / "prometheus.yml").write_text(config_text(content))
    run_tool("promtool", "check", "config", tmp_path / "prometheus.yml")


@needs_amtool
def test_amtool_takes_the_configuration() -> None:
    assert "SUCCESS" in run_tool("amtool", "check-config", CONFIGS / "alertmanager.yml")

    def goes_to(*labels: str) -> str:
        arguments = ("amtool", "config", "routes", "test", "--config.file", CONFIGS / "alertmanager.yml")
        return run_tool(*arguments, *labels).splitlines()[0]

    for alert in alerts():
        receiver = {"critical": "on-call", "warning": "team"}[alert.severity]
        assert goes_to(f"alertname={alert.name}", f"severity={alert.severity}", "run=demo") == receiver
    known = {alert.name for alert in alerts()}
    for rule in yaml.safe_load((CONFIGS / "alertmanager.yml").read_text())["inhibit_rules"]:
        for matcher in [*rule["source_matchers"], *rule["target_matchers"]]:
            assert set(re.findall(r"[A-Z]\w+", matcher)) <= known, matcher


def try_scenarios(folder: Path, tried: list[Scenario]) -> None:
    (folder / "rules.yml").write_text(rules_text())
    severities = {alert.name: alert.severity for alert in alerts()}
    (folder / "tests.yml").write_text(unit_tests_text("rules.yml", severities, tried))
    run_tool("promtool", "test", "rules", "tests.yml", cwd=folder)


@needs_promtool
@pytest.mark.parametrize("scenario", scenarios(), ids=lambda scenario: scenario.name)
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path, scenario: Scenario) -> None:
    try_scenarios(tmp_path, [scenario])


def test_each_alert_is_tried_firing_and_not_firing() -> None:
    fired = {name for scenario in scenarios() for names in scenario.firing.values() for name in names}
    assert fired == {alert.name for alert in alerts()}
    healthy = [scenario for scenario in scenarios() if not any(scenario.firing.values())]
    assert len(healthy) >= 10


@needs_promtool
def test_a_wrong_expectation_is_found(tmp_path: Path) -> None:
    healthy = scenarios()[0]
    with pytest.raises(AssertionError, match="RanksMissing"):
        try_scenarios(tmp_path, [Scenario(name="wrong", series=healthy.series, firing={10: ("RanksMissing",)})])


@needs_promtool
def test_the_straggler_is_named(tmp_path: Path) -> None:
    tried = next(scenario for scenario in scenarios() if "computes for longer" in scenario.name)
    content = yaml.safe_load(unit_tests_text("rules.yml", {alert.name: alert.severity for alert in alerts()}, [tried]))
    (alert,) = [alert for alert in alerts() if alert.name == "Straggler"]
    content["tests"][0]["alert_rule_test"] = [
        {
            "eval_time": "82m",
            "alertname": "Straggler",
            "exp_alerts": [
                {
                    "exp_labels": {"severity": "warning", "run": "demo", "run_id": "0123abcd"},
                    "exp_annotations": {
                        "summary": "demo: all ranks wait for one, 25% of the time",
                        "description": "The most own work: rank 3; the shortest wait: rank 3. First: its host, in "
                        "symile-dist status demo",
                        "runbook_url": "docs/runbook.md#straggler",
                    },
                }
            ],
        }
    ]
    assert alert.hold == "15m"
    (tmp_path / "rules.yml").write_text(rules_text())
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(content))
    run_tool("promtool", "test", "rules", "tests.yml", cwd=tmp_path)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (7200, 300, 90, 0.3, 0.0001)] == ["2h", "5m", "90s", "300ms", "1ms"]
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--time-scale"):
            alerts(wrong)
    fast = {alert.name: alert for alert in alerts(0.1)}
    assert fast["RanksMissing"].hold == "30s" and "> 720 or" in fast["CheckpointStale"].expression


# Endpoints


def test_a_rank_has_few_series() -> None:
    values = {"modality": ["image", "text", "audio"], "dataset": ["one", "two"]}
    exporter = Exporter(label_values=values)
    try:
        directions = [f"{name}_from_others" for name in values["modality"]]
        for spec in METRICS.values():
            if spec.owner != "rank":
                continue
            every = {**values, "query": directions, **spec.label_values}
            rows = (
                [{}]
                if not spec.labels
                else [dict(zip(spec.labels, row, strict=True)) for row in _product(spec.labels, every)]
            )
            for labels in rows:
                if spec.kind == "gauge":
                    exporter.set(spec.name, 1.0, **labels)
                elif spec.kind == "counter":
                    exporter.increment(spec.name, 1.0, **labels)
                else:
                    exporter.observe(spec.name, 1.0, **labels)
        text = scraped(exporter)
    finally:
        exporter.close()
    series = sum(len(family.samples) for family in text_string_to_metric_families(text))
    assert 150 <= series <= 300, series
    assert series * 4 < SAMPLE_LIMIT, "with more modalities a rank would be left out"


def _product(labels: tuple[str, ...], values: dict[str, Any]) -> list[tuple[str, ...]]:
    from itertools import product

    return list(product(*(values[label] for label in labels)))


def scraped(exporter: Exporter) -> str:
    """What an exporter serves, without a connection."""
    answer = exporter.application({"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics"}, lambda status, headers: None)
    return b"".join(answer).decode()


def run_of(folder: Path, name: str, ports: list[int]) -> Path:
    folder.mkdir(parents=True)
    ranks = [
        {"rank": rank, "host": "here", "metrics_url": f"http://127.0.0.1:{port}/metrics"}
        for rank, port in enumerate(ports)
    ]
    write_targets(folder, targets(name, folder, "http://127.0.0.1:9390/metrics" if ports else None, ranks))
    return folder


def test_lists_of_several_runs_become_one(tmp_path: Path) -> None:
    import os
    import time

    first, second = run_of(tmp_path / "a", "a", [9401, 9402]), run_of(tmp_path / "b", "b", [9402, 9403])
    ended = run_of(tmp_path / "c", "c", [])
    old = time.time() - 60
    os.utime(first / "targets.json", (old, old))
    found = merged_targets([first, second, ended, tmp_path / "gone"])
    places = {entry["targets"][0]: entry["labels"] for entry in found}
    assert len(found) == len(places) == 4
    assert places["127.0.0.1:9402"]["run"] == "b", "a port that has gone from one run to another is the newer's"
    assert set(places["127.0.0.1:9401"]) == {"run", "run_id", "role", "rank", "host"}
    forgotten = time.time() - FORGET_SECONDS - 60
    os.utime(first / "targets.json", (forgotten, forgotten))
    assert {entry["labels"]["run"] for entry in merged_targets([first, second])} == {"b"}
    (first / "ranks.json").write_text("[]")
    assert {entry["labels"]["run"] for entry in merged_targets([first, second])} == {"a", "b"}, "its driver writes"


def test_a_list_is_written_where_it_has_changed(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", "a", [9401])
    file = tmp_path / "targets.json"
    assert write_merged(file, [run]) == 2
    before = file.stat().st_ino
    assert write_merged(file, [run]) == 2 and file.stat().st_ino == before
    (run / "targets.json").write_text('[{"targets": "torn')
    assert write_merged(file, [run]) == 0 and json.loads(file.read_text()) == []
    (run / "targets.json").write_text('[{"targets": 7}, 3, {"labels": {}}]')
    assert write_merged(file, [run]) == 0


# The command line


def test_rules_and_dashboards_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runbook = "https://wiki.example.org/runbook"
    assert main(["monitoring", "rules", "--out", str(tmp_path / "p"), "--runbook", runbook, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["files"]
    assert {Path(path).name for path in written} == {"rules.yml", "prometheus.yml", "alertmanager.yml"}
    assert f"{runbook}#ranksmissing" in (tmp_path / "p/rules.yml").read_text()
    assert main(["monitoring", "dashboards", "--out", str(tmp_path / "d")]) == 0
    assert {path.stem for path in (tmp_path / "d").glob("*.json")} == set(dashboards())


def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "file").touch()
    tried = {
        "--time-scale": ["rules", "--out", "new", "--time-scale", "0"],
        "is a file, not a folder": ["rules", "--out", "file"],
        "--follow": ["targets", "--follow"],
        "no run of that name": ["targets", "no-such-run"],
    }
    for words, arguments in tried.items():
        assert main(["monitoring", *arguments]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["monitoring", "up", "--out", "new"]) == 2
    assert "apt-get install prometheus" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


if __name__ == "__main__":
    command.write_files(CONFIGS, command.files_of_configs())
    METRICS_PAGE.write_text(metrics_page(), encoding="utf-8")
