"""The endpoints of all runs that are known here, as one list for Prometheus."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from symile_dist.metrics.discovery import TARGETS_FILE, read_targets
from symile_dist.run_directory import RANKS_FILE
from symile_dist.storage import write_text

FORGET_SECONDS = 24 * 3600
"""A run whose driver was killed keeps its list, and its alerts, for so long; a driver writes every few seconds."""


def merged_targets(directories: Iterable[Path]) -> list[dict[str, Any]]:
    """Each endpoint once; two runs may tell the same one where a port has gone from one to the other: the newer has
    it."""
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for directory in directories:
        written = _last_sign(directory)
        if written < time.time() - FORGET_SECONDS:
            continue
        for entry in read_targets(directory):
            targets, labels = entry.get("targets"), entry.get("labels", {})
            if not (isinstance(targets, list) and isinstance(labels, dict)):
                continue
            for target in targets:
                # A path of its own makes it another endpoint.
                key = f"{target}{labels.get('__metrics_path__', '')}"
                if key not in found or found[key][0] < written:
                    found[key] = written, {"targets": [target], "labels": labels}
    return [entry for _, entry in found.values()]


def _last_sign(directory: Path) -> float:
    """When the driver has last written; 0 where it never has."""
    times = [0.0]
    for name in (TARGETS_FILE, RANKS_FILE):
        with contextlib.suppress(OSError):
            times.append((directory / name).stat().st_mtime)
    return max(times)


def write_merged(path: Path, directories: Iterable[Path]) -> int:
    """Writes the list to a file, atomically, where it has changed. Returns the number of endpoints.

    Raises OSError where the file cannot be written.
    """
    found = merged_targets(directories)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if text != before:
        write_text(path, text)
    return len(found)
