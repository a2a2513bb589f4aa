"""docs/metrics.md: every metric, who exports it, where it is shown; made from the tables."""

from __future__ import annotations

import re
from collections.abc import Iterable

from symile_dist.metrics.names import METRICS, MetricSpec
from symile_dist.metrics.panels import PANELS, Panel
from symile_dist.tools.monitoring.alerts import Alert, alerts, records
from symile_dist.tools.monitoring.grafana import TITLES

BUILT_IN = {
    "up": "Prometheus: whether an endpoint has answered",
    "ALERTS": "Prometheus: the alerts that are pending or firing",
    "process_resident_memory_bytes": "every endpoint: memory of its process",
    "process_start_time_seconds": "every endpoint: when its process was started",
}
"""What expressions use beside the table."""
HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")

HEAD = """\
# Metrics, panels and alerts

(Made by `python -m tests.unit.test_monitoring` from symile_dist/metrics/names.py, symile_dist/metrics/panels.py and
tools/monitoring/alerts.py.)

Each rank and the driver serve their own endpoint. The labels `run`, `run_id` (tells runs of the same name apart),
`role` (`rank` or `driver`), `rank` and `host` come with the list of endpoints, `RUN/targets.json`, and stand on every
series. A process tells of itself, too (`process_resident_memory_bytes`, `process_cpu_seconds_total`,
`process_open_fds`, ...). Counters and histograms stand at 0 from the start where their labels are known; gauges appear
with their first value.
"""


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics in an expression, parts of histograms by the histogram's; recorded series by theirs."""
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    names = set(re.findall(r"\b(?:symile_\w+|process_\w+|up|ALERTS)\b(?!:)|\brun(?:_\w+)?:[\w:]+", without_strings))
    return {_histogram_of(name) for name in names if not _within_record(name, names)}


def _within_record(name: str, names: set[str]) -> bool:
    return any(name != other and name in other and ":" in other for other in names)


def _histogram_of(name: str) -> str:
    for part in HISTOGRAM_PARTS:
        stem = name.removesuffix(part)
        if stem != name and stem in METRICS and METRICS[stem].kind == "histogram":
            return stem
    return name


def seen_in() -> dict[str, list[str]]:
    """Per metric of the table, the panels and alerts that show it: `panel key` and `alert name`."""
    found: dict[str, list[str]] = {name: [] for name in METRICS}
    recorded = {record.name: metrics_of(record.expression) for record in records()}
    for panel in PANELS.values():
        _note(found, f"{panel.dashboard}: {panel.title}", (query.expression for query in panel.queries), recorded)
    for alert in alerts():
        _note(found, f"alert {alert.name}", [alert.expression], recorded)
    return found


def _note(found: dict[str, list[str]], place: str, expressions: Iterable[str], recorded: dict[str, set[str]]) -> None:
    names: set[str] = set()
    for expression in expressions:
        for name in metrics_of(expression):
            names |= recorded.get(name, {name})
    for name in names & found.keys():
        found[name].append(place)


def metrics_page() -> str:
    """The whole page."""
    seen = seen_in()
    parts = [HEAD]
    for owner, title in (("rank", "Of every rank"), ("driver", "Of the driver")):
        parts.append(f"## {title}\n")
        parts.append("| metric | kind | unit | labels | what it is | seen in |\n|---|---|---|---|---|---|")
        for spec in METRICS.values():
            if spec.owner == owner:
                parts.append(_row(spec, seen[spec.name]))
        parts.append("")
    parts.append("## Panels\n")
    parts.append(
        "One list makes Grafana's dashboards (configs/monitoring/grafana), the run's page and the terminal view.\n"
    )
    for name, title in TITLES.items():
        parts.append(f"### {title}\n")
        parts += [_panel(panel) for panel in PANELS.values() if panel.dashboard == name]
        parts.append("")
    parts.append("## Alerts\n")
    parts.append("What to do about each: [runbook.md](runbook.md).\n")
    parts.append("| alert | severity | holds for | fires where |\n|---|---|---|---|")
    parts += [_alert(alert) for alert in alerts()]
    parts.append("\nSeries that the rules record for themselves:\n")
    parts += [f"- `{record.name}`: `{record.expression}`" for record in records()]
    return "\n".join(parts) + "\n"


def _row(spec: MetricSpec, seen: list[str]) -> str:
    labels = ", ".join(f"{label} ({_values(spec, label)})" for label in spec.labels)
    cells = [f"`{spec.name}`", spec.kind, spec.unit, labels, spec.help, "; ".join(seen)]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _values(spec: MetricSpec, label: str) -> str:
    return ", ".join(spec.label_values[label]) if label in spec.label_values else "as the config says"


def _panel(panel: Panel) -> str:
    only = " Only on GPUs." if panel.needs_gpu else ""
    curves = ", ".join(f"`{curve.kind}: {curve.key}`" for curve in panel.curves)
    lines = [f"- **{panel.title}** ({panel.row}). {panel.description}{only}"]
    return "\n".join([*lines, *([f"  In history.jsonl: {curves}."] if curves else [])])


def _alert(alert: Alert) -> str:
    anchor = f"[{alert.name}](runbook.md#{alert.name.lower()})"
    expression = alert.expression.replace("|", "\\|")
    return f"| {anchor} | {alert.severity} | {alert.hold} | `{expression}` |"
