"""Where a run's endpoints are, as Prometheus reads it: from a file (file_sd) or from the driver (HTTP SD)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from symile_dist.storage import read_json, write_json

TARGETS_FILE = "targets.json"
LABELS = ("run", "run_id", "role", "rank", "host")
_PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")


def run_id(directory: Path) -> str:
    """Tells runs of the same name apart."""
    return hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:8]


def targets(
    name: str, directory: Path, driver_url: str | None, ranks: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One entry per endpoint, with the labels that its series get.

    Args:
        driver_url: of the driver's metrics.
        ranks: `rank`, `host` and `metrics_url` of each, as in ranks.json.
    """
    labels = {"run": name, "run_id": run_id(directory)}
    found = [_target(driver_url, {**labels, "role": "driver"})] if driver_url else []
    for rank in ranks:
        if rank.get("metrics_url"):
            told = {"role": "rank", "rank": str(rank["rank"]), "host": str(rank["host"])}
            found.append(_target(str(rank["metrics_url"]), {**labels, **told}))
    return found


def _target(url: str, labels: Mapping[str, str]) -> dict[str, Any]:
    return {"targets": [urlsplit(url).netloc], "labels": dict(labels)}


def write_targets(directory: Path, found: list[dict[str, Any]]) -> None:
    """Atomically, as Prometheus may read at any time. Raises OSError."""
    write_json(directory / TARGETS_FILE, found)


def read_targets(directory: Path) -> list[dict[str, Any]]:
    """What a run has written; empty where there is nothing that can be read."""
    try:
        content = read_json(directory / TARGETS_FILE)
    except (OSError, ValueError):
        return []
    return [each for each in map(_read_target, content) if each] if isinstance(content, list) else []


def _read_target(entry: Any) -> dict[str, Any] | None:
    """An entry with what of it Prometheus takes; None for what is none. Only our own labels: others could send a
    scrape, and the token with it, elsewhere."""
    places = entry.get("targets") if isinstance(entry, dict) else None
    labels = entry.get("labels") if isinstance(entry, dict) else None
    if not isinstance(places, list) or not isinstance(labels, dict):
        return None
    places = [place for place in places if isinstance(place, str) and _PLACE.fullmatch(place)]
    labels = {name: str(labels[name]) for name in LABELS if isinstance(labels.get(name), (str, int))}
    return {"targets": places, "labels": labels} if places else None


def as_json(found: list[dict[str, Any]]) -> bytes:
    """The answer of HTTP SD."""
    return json.dumps(found).encode()
