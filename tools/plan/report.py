"""A plan for people: tables, and a figure of a sweep."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 120


def amount(value: float, unit: str = "B") -> str:
    """1.23e9 -> "1.23 GB"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.3g} h" if seconds >= 7200 else f"{seconds / 60:.3g} min"


def plan_text(plan: Mapping[str, Any]) -> str:
    """One setting's plan."""
    return _printed(*_parts(plan))


def _printed(*parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, emoji=False, markup=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n")


def _parts(plan: Mapping[str, Any]) -> list[RenderableType]:
    train, device, data = plan["train"], plan["device"], plan["data"]
    passes = f", in two passes of {train['micro_batch_size']} at once" if train["passes"] == 2 else ""
    head = (
        f"{plan['config']}: {plan['world_size']} x {device['name']} ({plan['nodes']} node(s)), global batch "
        f"{train['global_batch_size']} = {train['local_batch_size']} per rank{passes}, ZeRO stage "
        f"{train['zero_stage']}, {train['precision']}, {train['objective']}"
    )
    return [
        head,
        f"device: {device['source']}",
        f"data: {data['source']}",
        "",
        _summary(plan),
        "",
        _memory(plan),
        "",
        _stages(plan["memory"]["by_stage"]),
        "",
        _communication(plan["communication"]),
        "",
        "assumed, not measured:",
        *(f"  - {words}" for words in plan["assumptions"]),
    ]


def _table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _summary(plan: Mapping[str, Any]) -> Table:
    time, flops, memory, run = plan["time"], plan["flops"], plan["memory"], plan["run"]
    saves, data, parameters = plan["checkpoint"], plan["data"], plan["parameters"]
    table = Table(box=box.MARKDOWN)
    table.add_column("what")
    table.add_column("plan", overflow="fold")
    parts = ", ".join(f"{name} {amount(number, '')}" for name, number in parameters["by_part"].items())
    rows = [
        ("parameters", f"{amount(parameters['total'], '')}, trained {amount(parameters['trained'], '')} ({parts})"),
        (
            "memory of a rank",
            f"{amount(memory['device_bytes'])} of {amount(plan['device']['memory_bytes'])}"
            + ("" if memory["fits"] else ": DOES NOT FIT"),
        ),
        (
            "work per step and rank",
            f"{amount(flops['model_per_rank'], 'FLOP')} (objective {amount(flops['objective_per_rank'], 'FLOP')}); "
            f"done {amount(flops['done_per_rank'], 'FLOP')}",
        ),
        ("communication", f"{plan['communication']['calls']} calls, {_wire(plan)} sent by a rank per step"),
        (
            "step",
            f"{duration(time['step_s'])}: encoders {duration(time['forward_backward_s'] + time['second_forward_s'])}, "
            f"objective {duration(time['objective_s'])}, optimizer {duration(time['optimizer_s'])}, communication "
            f"{duration(time['exposed_s'])} ({duration(time['communication_s'])} in all), host "
            f"{duration(time['host_s'])}",
        ),
        ("MFU", f"{time['mfu']:.1%} of {amount(plan['device']['peak_flops_per_s'], 'FLOP/s')}"),
        ("throughput", f"{time['samples_per_s']:,.0f} samples/s"),
        (
            "data",
            "not known: the data cannot be read here"
            if data["bytes_per_s"] is None
            else f"{amount(data['bytes_per_s'])}/s, {amount(data['bytes_per_s_per_node'])}/s a node; "
            f"{data['loader_samples_per_s_per_process']:,.0f} samples/s of each loader process",
        ),
        (
            "checkpoint",
            f"{amount(saves['bytes'])}, written in {duration(saves['write_s'])}, the loop stands for "
            f"{duration(saves['stall_s'])}; one every {duration(saves['interval_s'])}",
        ),
        (
            "run",
            f"{run['steps']:,} steps"
            + (f" = {run['epochs']:.3g} epochs" if run["epochs"] is not None else "")
            + f", {run['hours']:.4g} h undisturbed",
        ),
        (
            "interruptions",
            f"{run['interruptions']:.2g} expected (one in {run['mean_hours_to_failure']:.3g} h), goodput "
            f"{run['goodput']:.1%}: {run['hours_with_interruptions']:.4g} h",
        ),
        (
            "cost",
            f"{run['gpu_hours']:,.4g} device hours"
            + ("" if run["cost"] is None else f", {run['cost']:,.2f} at {run['price_per_gpu_hour']:g} each"),
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _wire(plan: Mapping[str, Any]) -> str:
    return amount(plan["communication"]["wire_bytes_per_rank"])


def _memory(plan: Mapping[str, Any]) -> Table:
    memory = plan["memory"]
    table = _table("memory of a rank", "bytes")
    for name, value in memory["at_rest"].items():
        table.add_row(f"at rest: {name}", amount(value))
    for name, value in memory["parts"].items():
        table.add_row(f"in a step: {name}", amount(value))
    for name, value in memory["phases"].items():
        table.add_row(f"at the most, {name}", amount(value))
    for name, value in memory["host"].items():
        table.add_row(f"host: {name}", amount(value))
    return table


def _stages(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("ZeRO stage", "weights", "masters", "moments", "at rest", "at the most", "fits", "sent per step")
    for row in rows:
        table.add_row(
            str(row["zero_stage"]),
            *(amount(row[key]) for key in ("weights", "masters", "moments", "at_rest_bytes", "device_bytes")),
            "yes" if row["fits"] else "no",
            amount(row["wire_bytes_per_rank"]),
        )
    return table


def _communication(communication: Mapping[str, Any]) -> RenderableType:
    if not communication["collectives"]:
        return "one rank: no communication"
    table = Table(box=box.MARKDOWN)
    for column in ("for", "collective", "dtype"):
        table.add_column(column)
    for column in ("calls", "whole, bytes", "own input, bytes", "sent by a rank"):
        table.add_column(column, justify="right")
    for row in communication["collectives"]:
        figures = (f"{row[key]:,}" for key in ("calls", "full_bytes", "own_bytes", "wire_bytes"))
        table.add_row(row["purpose"], row["collective"], row["dtype"], *figures)
    return table


def sweep_text(rows: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> str:
    """A table with a row per combination."""
    names = [name for name in swept if name in ("batch", "zero_stage", "nodes", "micro_batch_size")]
    table = Table(box=box.MARKDOWN)
    for name in (*names, "ranks", "memory", "step", "MFU", "samples/s", "hours", "goodput", "device hours", "cost"):
        table.add_column(name, justify="right")
    reasons = []
    for row in rows:
        chosen = [str(row[name]) for name in names]
        if "problem" in row:
            table.add_row(*chosen, "-")
            reasons.append(f"does not go: {', '.join(f'{name}={row[name]}' for name in names)}: {row['problem']}")
            continue
        table.add_row(
            *chosen,
            str(row["world_size"]),
            amount(row["device_bytes"]) + ("" if row["fits"] else " (!)"),
            duration(row["step_s"]),
            f"{row['mfu']:.1%}",
            f"{row['samples_per_s']:,.0f}",
            f"{row['hours']:,.4g}",
            f"{row['goodput']:.1%}",
            f"{row['gpu_hours']:,.4g}",
            "" if row["cost"] is None else f"{row['cost']:,.0f}",
        )
    last: list[RenderableType] = []
    if any(not row.get("fits", True) for row in rows):
        last.append("(!): more than the device has")
    return _printed(table, *last, *reasons)


def draw_sweep(rows: Sequence[Mapping[str, Any]], swept: Sequence[str], memory_bytes: float, file: Path) -> None:
    """Step time, MFU, memory with the device's limit, and cost over the last thing swept (nodes where they are).

    Raises ValueError for a file that is neither PNG nor SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = "nodes" if "nodes" in swept else swept[-1]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "problem" not in row:
            rest = ", ".join(f"{name} {row[name]}" for name in swept if name != across)
            lines.setdefault(rest, []).append(row)
    money = any(row.get("cost") is not None for row in rows)
    panels = [
        ("step, s", "step_s", 1.0),
        ("MFU, %", "mfu", 0.01),
        ("memory of a rank, GB", "device_bytes", 1e9),
        ("cost" if money else "device hours", "cost" if money else "gpu_hours", 1.0),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (title, key, unit) in zip(axes.flat, panels, strict=True):
        for name, points in lines.items():
            axis.plot([p[across] for p in points], [p[key] / unit for p in points], marker="o", label=name or None)
        axis.set(title=title, xlabel=across)
        axis.set_ylim(bottom=0)
        if across != "zero_stage":
            axis.set_xscale("log", base=2)
        if key == "device_bytes":
            axis.axhline(memory_bytes / unit, color="black", linestyle="--", label="the device's")
    if len(lines) > 1 or any(lines):
        axes.flat[0].legend(fontsize="small")
    axes.flat[2].legend(fontsize="small")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


__all__ = ["amount", "draw_sweep", "duration", "plan_text", "sweep_text"]
