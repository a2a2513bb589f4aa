"""`symile-dist demo`: the whole chain on real images, speech and words, Symile against pairwise CLIP.

Nothing here that the other commands do not do: it makes the data of `shards demo`, runs `train` on configs/demo.yaml
twice, with each objective, evaluates both, and shows them side by side.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import symile_dist.configs
from symile_dist.config import Config, load_config
from symile_dist.data.demo import make_demo
from symile_dist.driver import launch
from symile_dist.metrics.history import read_history
from symile_dist.storage import write_json, write_text
from symile_dist.tools.evaluate import evaluate_run
from symile_dist.tools.progress import progress_bar

OBJECTIVES = {"symile": "Symile", "pairwise_clip": "pairwise CLIP"}
DIRECTION = "image_from_audio_text"
_KEYS = ("accuracy", "bootstrap_mean", "bootstrap_standard_error")
SPLITS = {"train": "train", "validation": "val", "test": "test"}
QUICK = ["train.steps=20", "validation.every=10", "checkpoint.every=10", "train.global_batch_size=64"]


def demo_config(out: Path, data: Path, objective: str, quick: bool) -> Config:
    """configs/demo.yaml with another objective and place."""
    overrides = [
        f"run.name=demo-{objective.replace('_', '-')}",
        f"run.directory={json.dumps(str(out / objective))}",
        f"objective.name={objective}",
        *(f"data.{split}={json.dumps(str(data / folder))}" for split, folder in SPLITS.items()),
        *(QUICK if quick else []),
    ]
    preset = Path(symile_dist.configs.__file__).parent / "demo.yaml"
    return load_config(preset, overrides).config.with_absolute_paths()


def run_demo(out: Path, data: Path, languages: int = 5, plain: bool | None = None, quick: bool = False) -> int:
    """Runs the demo; returns the exit code. A second call in the same folder goes on where the first one stopped."""
    console = Console()
    begin = time.monotonic()
    console.print(f"[bold]1/4[/bold] the data: M3-digits, {languages} languages, in {data}")
    size = {"train": 640, "val": 128, "test": 128} if quick else {"train": 20_000, "val": 2_000, "test": 2_000}
    with progress_bar("making demo data") as progress:
        make_demo(data, languages=languages, **size, progress=progress)
    results: dict[str, Any] = {"languages": languages, "chance": 0.01, "clip_ceiling": 1 / languages, "runs": {}}
    for number, (objective, title) in enumerate(OBJECTIVES.items(), start=2):
        console.print(f"[bold]{number}/4[/bold] training with {title}")
        config = demo_config(out, data, objective, quick)
        trained = launch(config, plain=plain)
        evaluated = evaluate_run(config.run_directory)
        results["runs"][objective] = {
            "title": title,
            "directory": str(config.run_directory),
            "steps": trained["step"],
            "seconds": trained["seconds"],
            **{key: evaluated["retrieval"][DIRECTION][key] for key in _KEYS},
        }
    console.print("[bold]4/4[/bold] the results")
    out.mkdir(parents=True, exist_ok=True)
    figure = out / "learning_curves.png"
    draw_learning_curves(out, results)
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(results))
    console.print(_table(results))
    console.print(_where_and_what_next(out, data, figure, time.monotonic() - begin), highlight=False, soft_wrap=True)
    return 0


def _rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [
        (
            row["title"],
            f"{row['accuracy']:.3f}",
            f"{row['bootstrap_mean']:.3f} ± {row['bootstrap_standard_error']:.3f}",
        )
        for row in results["runs"].values()
    ]
    ceiling = f"ceiling of pairs, 1/{results['languages']}"
    return [*rows, (ceiling, f"{results['clip_ceiling']:.3f}", ""), ("chance", f"{results['chance']:.3f}", "")]


def _table(results: dict[str, Any]) -> Table:
    table = Table(title="image from (audio, text): accuracy over all images of the test split")
    table.add_column("objective")
    table.add_column("accuracy", justify="right")
    table.add_column("bootstrap mean ± SE", justify="right")
    for row in _rows(results):
        table.add_row(*row)
    return table


def markdown(results: dict[str, Any]) -> str:
    lines = ["| objective | image from (audio, text) | bootstrap mean ± SE |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(results)]
    return "\n".join(lines) + "\n"


def draw_learning_curves(out: Path, results: dict[str, Any]) -> None:
    """Validation accuracy by step of every run, with chance and ceiling; PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (_, row), color in zip(results["runs"].items(), ("#1f6fb4", "#d1622b"), strict=True):
        records = [r for r in read_history(Path(row["directory"]) / "history.jsonl") if r["kind"] == "validation"]
        steps = [r["step"] for r in records]
        accuracy = [r[f"accuracy/{DIRECTION}"] for r in records]
        axes.plot(steps, accuracy, marker="o", markersize=4, color=color, label=row["title"])
    axes.axhline(results["clip_ceiling"], color="#d1622b", linestyle="--", linewidth=1)
    axes.annotate(
        f"ceiling of pairs, 1/{results['languages']}",
        (1, results["clip_ceiling"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    axes.axhline(results["chance"], color="gray", linestyle=":", linewidth=1, label="chance")
    axes.set(
        xlabel="step",
        ylabel="accuracy",
        xlim=(0, None),
        ylim=(0, 1),
        title="Image from (audio, text), validation split",
    )
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"learning_curves.{suffix}", dpi=160)
    pyplot.close(figure)


def _where_and_what_next(out: Path, data: Path, figure: Path, seconds: float) -> str:
    symile = out / "symile"
    return f"""
done in {seconds / 60:.1f} minutes

where everything lies
  {data}   the shards: plain tar files, with an index and a manifest
  {symile}   the run: config.yaml, checkpoints/, history.jsonl, tensorboard/, logs/, evaluation/
  {figure}   both learning curves
  {out / "results.md"}   the table

what to try next
  symile-dist evaluate {symile}                     every direction, with bootstrap
  symile-dist resume {symile} train.steps=1200      go on from the last checkpoint
  symile-dist train configs/demo.yaml train.zero_stage=3 run.name=zero3
  symile-dist config explain configs/demo.yaml       every key and what it means
  tensorboard --logdir {out}
"""
