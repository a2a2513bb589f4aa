"""Grafana's dashboards, one per dashboard of the panel list (Grafana 11 and newer).

A dashboard names no data source of its own: the variable `datasource` offers those that there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from symile_dist.metrics.panels import PANELS, Dashboard, Panel, Threshold, Unit

SCHEMA_VERSION = 39
TAG = "symile-dist"
MIN_INTERVAL = "1m"
"""Between two points: the windows of rates are a little longer, and hold a few steps even where steps are slow."""
WIDTH, COLUMNS = 24, 3
STAT_HEIGHT, CURVE_HEIGHT = 4, 8
WINDOW = "$__rate_interval"

TITLES: dict[Dashboard, str] = {
    "training": "Training",
    "performance": "Performance",
    "data": "Data",
    "reliability": "Reliability",
    "contrastive": "Contrastive learning",
}
UNITS: dict[Unit, str] = {
    "": "short",
    "seconds": "s",
    "bytes": "bytes",
    "bytes/second": "Bps",
    "samples/second": "si:samples/s",
    "steps": "none",
    "samples": "short",
    "ratio": "percentunit",
    "nats": "suffix: nats",
    "flops/second": "si:FLOP/s",
}
COLOURS = {"good": "green", "warning": "orange", "bad": "red"}
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboards() -> dict[Dashboard, dict[str, Any]]:
    """By name: the content of a dashboard's JSON file."""
    return {name: _dashboard(name, title) for name, title in TITLES.items()}


def dashboard_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _dashboard(name: Dashboard, title: str) -> dict[str, Any]:
    return {
        "uid": f"symile-dist-{name}",
        "title": f"symile_dist: {title}",
        "description": "Made from symile_dist/metrics/panels.py; docs/metrics.md tells what the metrics are.",
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timepicker": {"refresh_intervals": ["5s", "15s", "30s", "1m", "5m", "15m"]},
        "fiscalYearStartMonth": 0,
        "links": [
            {
                "type": "dashboards",
                "title": "symile_dist",
                "icon": "external link",
                "tooltip": "The other dashboards, at the same time and of the same runs",
                "tags": [TAG],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "url": "",
            }
        ],
        "templating": {"list": _variables()},
        "annotations": {"list": _annotations()},
        "panels": _panels(name),
    }


def _variables() -> list[dict[str, Any]]:
    def of_label(name: str, label: str, query: str) -> dict[str, Any]:
        return {
            "type": "query",
            "name": name,
            "label": label,
            "datasource": _SOURCE,
            "definition": query,
            "query": {"qryType": 1, "query": query, "refId": f"PrometheusVariableQueryEditor-{name}"},
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "refresh": 2,  # when the time range changes
            "sort": 7,  # naturally, so that rank 10 stands after 9
            "hide": 0,
            "skipUrlSync": False,
            "regex": "",
            "options": [],
        }

    return [
        {
            "type": "datasource",
            "name": "datasource",
            "label": "Prometheus",
            "query": "prometheus",
            "multi": False,
            "includeAll": False,
            "current": {},
            "refresh": 1,
            "hide": 0,
            "skipUrlSync": False,
            "regex": "",
            "options": [],
        },
        of_label("run", "Run", 'label_values(up{role="driver"}, run)'),
        of_label("rank", "Rank", 'label_values(up{role="rank", run=~"$run"}, rank)'),
    ]


def _annotations() -> list[dict[str, Any]]:
    def mark(name: str, colour: str, expression: str, title: str, tags: str) -> dict[str, Any]:
        return {
            "name": name,
            "datasource": _SOURCE,
            "enable": True,
            "hide": False,
            "iconColor": colour,
            "expr": expression,
            "step": "60s",
            "titleFormat": title,
            "textFormat": "",
            "tagKeys": tags,
            "useValueForTime": False,
        }

    restarts = 'sum by (run, cause) (increase(symile_run_restarts_total{run=~"$run"}[2m])) > 0'
    firing = 'count by (run, alertname) (ALERTS{alertstate="firing", run=~"$run"}) > 0'
    return [
        mark("Restarts", "orange", restarts, "{{run}} restarted: {{cause}}", "run,cause"),
        mark("Alerts", "red", firing, "{{run}}: {{alertname}}", "run,alertname"),
    ]


def _panels(name: Dashboard) -> list[dict[str, Any]]:
    """Rows with their panels, three in a line, numbers before curves."""
    chosen = [panel for panel in PANELS.values() if panel.dashboard == name]
    made: list[dict[str, Any]] = []
    y = 0
    for row in dict.fromkeys(panel.row for panel in chosen):
        made.append(
            {
                "id": len(made) + 1,
                "type": "row",
                "title": row,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for stat, height in ((True, STAT_HEIGHT), (False, CURVE_HEIGHT)):
            group = [panel for panel in chosen if panel.row == row and (panel.shape == "stat") == stat]
            for start in range(0, len(group), COLUMNS):
                line = group[start : start + COLUMNS]
                for column, panel in enumerate(line):
                    width = WIDTH // len(line)
                    position = {"x": column * width, "y": y, "w": width, "h": height}
                    made.append({"id": len(made) + 1, "gridPos": position, **_panel(panel)})
                y += height
    return made


def _panel(panel: Panel) -> dict[str, Any]:
    stat = panel.shape == "stat"
    return {
        "type": "stat" if stat else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "interval": MIN_INTERVAL,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "editorMode": "code",
                "expr": query.expression.replace("$window", WINDOW),
                "legendFormat": query.legend,
                "instant": stat,
                "range": not stat,
            }
            for number, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _STAT if stat else _CURVES,
    }


_STAT: dict[str, Any] = {
    "colorMode": "value",
    "graphMode": "none",
    "justifyMode": "auto",
    "orientation": "auto",
    "textMode": "value_and_name",
    "wideLayout": True,
    "showPercentChange": False,
    "percentChangeColorMode": "standard",
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
}
_CURVES: dict[str, Any] = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {
        "unit": UNITS[panel.unit],
        "color": {"mode": "thresholds" if panel.shape == "stat" and panel.thresholds else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": _steps(panel.thresholds)},
        "mappings": [],
    }
    if panel.shape == "stat":
        return field
    field["custom"] = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 60 if panel.shape == "stacked" else 0,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.shape == "stacked" else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
        "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
    }
    if panel.shape == "stacked":
        field["min"] = 0
    return field


def _steps(thresholds: tuple[Threshold, ...]) -> list[dict[str, Any]]:
    """Grafana's first step has no value: it is what lies below the first threshold."""
    base = COLOURS["good"] if not thresholds or thresholds[0].level != "good" else COLOURS["bad"]
    return [
        {"color": base, "value": None},
        *({"color": COLOURS[threshold.level], "value": threshold.value} for threshold in thresholds),
    ]


@dataclass(frozen=True)
class Expression:
    """One query of a panel, as Prometheus takes it."""

    dashboard: str
    panel: str
    title: str
    expression: str
    needs_gpu: bool


def expressions(
    content: Mapping[str, Any], run: str = ".*", rank: str = ".*", window: str = "1m"
) -> Iterator[Expression]:
    """What Grafana would ask of Prometheus for a dashboard, read from its JSON alone: variables have these values.

    Raises KeyError where a panel is none of the list's.
    """
    by_title = {(TITLES[panel.dashboard], panel.title): panel for panel in PANELS.values()}
    name = content["title"].partition(": ")[2]
    for made in content["panels"]:
        for target in made.get("targets", ()):
            panel = by_title[(name, made["title"])]
            text = target["expr"]
            for variable, value in ((WINDOW, window), ("$run", run), ("$rank", rank)):
                text = text.replace(variable, value)
            yield Expression(panel.dashboard, panel.key, panel.title, text, panel.needs_gpu)


def annotation_expressions(content: Mapping[str, Any], run: str = ".*") -> list[str]:
    return [each["expr"].replace("$run", run) for each in content["annotations"]["list"]]
