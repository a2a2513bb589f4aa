"""Results of evaluations in a run's directory: a later one adds to what earlier ones have found."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from symile_dist.checkpoint.manifest import folder_name
from symile_dist.evaluation.report import draw_retrieval, format_results
from symile_dist.storage import read_json, write_json, write_text

RESULTS = "evaluation"
"""The folder of a run's directory that results are written to."""


def write_results(folder: Path, results: dict[str, Any], max_samples: int | None, figure: bool) -> None:
    """Writes RUN/evaluation/SPLIT-step-N.json, .md and the figures, beside what else was measured of these samples."""
    split = results["split"] if max_samples is None else f"{results['split']}-first-{max_samples}"
    name = f"{split}-{folder_name(results['step'])}"
    earlier = _earlier(folder / f"{name}.json")
    if earlier.get("shards", results["shards"]) != results["shards"]:  # another folder of that name
        name = f"{split}-{hashlib.sha256(results['shards'].encode()).hexdigest()[:8]}-{folder_name(results['step'])}"
        earlier = _earlier(folder / f"{name}.json")
    # What an earlier evaluation of the same weights, samples and classes has found besides stays.
    if any(earlier.get(key) != results[key] for key in ("run", "step", "shards", "label", "samples", "loss")):
        earlier = {}
    figures = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    if "retrieval" in results or not earlier:
        for file in figures:
            file.unlink(missing_ok=True)
        earlier.pop("figures", None)
    whole = _together(earlier, results)
    rows = list(whole.get("retrieval", {}).values())
    if figure and "retrieval" in results and any(row["accuracy"] is not None for row in rows):
        title = f"{results['run']}, step {results['step']}, {results['split']} split"
        draw_retrieval(rows, title, folder / name, ("png", "svg"))
        results["figures"] = whole["figures"] = list(map(str, figures))
    write_json(folder / f"{name}.json", whole)
    write_text(folder / f"{name}.md", format_results(whole) + "\n")


def _earlier(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _together(earlier: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    if "retrieval" not in results:
        return {**earlier, **results}
    protocol = ("protocol", "candidates", "queries_left_out")
    same = all(earlier.get(key) == results.get(key) for key in protocol)
    whole = {key: value for key, value in earlier.items() if key not in protocol} | results
    if same:
        rows = {**earlier["retrieval"], **results["retrieval"]}
        if len({tuple(row["recall"]) for row in rows.values()}) == 1:  # else they make no table
            whole["retrieval"] = rows
    return whole
