"""Results of an evaluation as a table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from symile_dist.storage import write_atomic

BAR, CHANCE = "#1f6fb4", "#d1622b"
SPREAD = "bootstrap mean ± SE"


def format_results(results: Mapping[str, Any]) -> str:
    """What `tools.evaluate.evaluate_run` returns, as Markdown that can be read as it is."""
    unreadable = f" ({results['unreadable']} more could not be read)" if results.get("unreadable") else ""
    parts = [
        f"run {results['run']}, step {results['step']}, {results['split']} split: {results['samples']} samples"
        f"{unreadable} of {results['classes']} classes (chance {1 / results['classes']:.3f})",
        *_retrieval(results),
    ]
    if results.get("zero_shot"):
        rows = [
            [name, _share(row["accuracy"]), _spread(row), _share(row["top5"]), _share(row["mean_per_class"])]
            for name, row in results["zero_shot"].items()
        ]
        parts.append(_table(["zero-shot classification", "accuracy", SPREAD, "top 5", "per class"], rows))
    if results.get("probe"):
        rows = [
            [name, _share(row["accuracy"]), _spread(row), f"{row['c']:.3g}", _share(row["validation_accuracy"])]
            for name, row in results["probe"].items()
        ]
        parts.append(_table(["linear probe", "accuracy", SPREAD, "C", "validation"], rows))
    parts += _statistics(results)
    loss = f"loss {_share(results['loss'])}"
    if results.get("total_correlation_bound") is not None:
        loss += (
            f"; total correlation at least {results['total_correlation_bound']:.3f} nats "
            f"(this bound cannot exceed log N = {results['total_correlation_ceiling']:.3f})"
        )
    if results.get("total_correlation_estimate") is not None:
        loss += f", about {results['total_correlation_estimate']:.3f} by the number of candidates (an estimate)"
    parts.append(loss)
    if "export" in results:
        parts.append(f"embeddings of {results['export']['samples']} samples in {results['export']['path']}")
    return "\n\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right, all cells of a column equally wide."""
    widths = [max(len(row[column]) for row in [names, *rows]) for column in range(len(names))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(names), f"|{rule}|", *map(line, rows)])


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _spread(row: Mapping[str, Any]) -> str:
    if row.get("bootstrap_mean") is None:
        return "–"
    return f"{row['bootstrap_mean']:.4f} ± {row['bootstrap_standard_error']:.4f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _words(row: Mapping[str, Any]) -> str:
    return f"{row['target']} from {' + '.join(row['queries'])}"


def _retrieval(results: Mapping[str, Any]) -> list[str]:
    if "retrieval" not in results:
        return []
    found = list(results["retrieval"].values())
    if not found:
        return ["no retrieval: this objective does not compare representations across modalities"]
    names = ["retrieval", "accuracy", SPREAD, "chance", *(f"R@{k}" for k in found[0]["recall"]), "median rank"]
    rows = []
    for row in found:
        rank = "–" if row["median_rank"] is None else f"{row['median_rank']:g}"
        recall = map(_share, row["recall"].values())
        rows.append([_words(row), _share(row["accuracy"]), _spread(row), _share(row["chance"]), *recall, rank])
    parts = [_table(names, rows)]
    if results["protocol"] == "candidates":
        sizes = f"{found[0]['samples']} queries, each among its own {found[0]['candidates']} candidates"
        parts.append(f"{sizes}; of candidates that score the same one is taken at random")
    elif any(row["samples"] < results["samples"] for row in found):
        parts.append("samples that lack a modality are left out of the directions that need it")
    return parts


def _statistics(results: Mapping[str, Any]) -> list[str]:
    if "statistics" not in results:
        return []
    rows = [
        [name, str(row["dimension"]), _number(row["effective_rank"]), _number(row["uniformity"])]
        for name, row in results["statistics"]["embeddings"].items()
    ]
    parts = [_table(["embedding", "dimension", "effective rank", "uniformity"], rows)]
    pairs = results["statistics"]["alignment"]
    if pairs:
        told = [[pair.replace("-", " and "), _number(value)] for pair, value in pairs.items()]
        parts.append(_table(["pair", "alignment"], told))
    return parts


def draw_retrieval(rows: Sequence[Mapping[str, Any]], title: str, path: Path, suffixes: Sequence[str]) -> list[Path]:
    """Accuracy by direction, with the bootstrap's standard error, against chance.

    Args:
        rows: values of `results["retrieval"]`.
        path: of the files, without suffix.

    Returns the files, one per suffix ("png", "svg").
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["accuracy"] is not None]
    figure, axes = pyplot.subplots(figsize=(7, 1.3 + 0.3 * len(shown)), layout="constrained")
    places = range(len(shown))
    errors = [row.get("bootstrap_standard_error") or 0.0 for row in shown]
    axes.barh(
        places, [row["accuracy"] for row in shown], xerr=errors, color=BAR, height=0.62, error_kw={"linewidth": 1}
    )
    axes.scatter([row["chance"] for row in shown], places, marker="|", s=140, color=CHANCE, label="chance", zorder=3)
    axes.set_yticks(places, [_words(row) for row in shown])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy", xlim=(0, 1), title=title)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    files = []
    for suffix in suffixes:
        file = path.with_name(f"{path.name}.{suffix}")

        def save(stream: BinaryIO, suffix: str = suffix) -> None:
            figure.savefig(stream, format=suffix, dpi=160)

        write_atomic(file, save)
        files.append(file)
    pyplot.close(figure)
    return files
