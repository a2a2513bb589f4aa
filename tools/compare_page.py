"""What `symile-dist compare` writes: a figure per curve as PNG and SVG, and one page that holds everything."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from symile_dist.storage import write_atomic, write_text
from symile_dist.tools.compare import AXES, Comparison, Curve, Row, ends

PAGE = "compare.html"
COLORS = ("#2f7fc1", "#d1622b", "#2a9d62", "#a259c4", "#c23b55", "#8c7a2e", "#1f9aa8", "#7a7a7a")
"""Seen on white and on black."""
DASHES = ("-", "--", ":", "-.")
POINTS = 400
"""Of a curve in a figure; each stands for the mean of its neighbours, with their range behind it."""
_INK, _LINES = "#010203", "#040506"
"""Stand for the page's own colours, which are not known when a figure is drawn."""


def write_figures(found: Comparison, folder: Path, page: bool) -> list[Path]:
    """Writes KEY.png and KEY.svg per curve and, where asked for, the page; returns the files. Raises OSError."""
    files: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for key in found.keys:
        name = re.sub(r"[^\w.+-]+", "-", key)
        while name in taken:
            name += "-"
        taken.add(name)
        with _figure(found, key, legend=True) as figure:
            for suffix in ("png", "svg"):

                def save(stream: Any, suffix: str = suffix) -> None:
                    figure.savefig(
                        stream, format=suffix, dpi=160, **({"metadata": {"Date": None}} if suffix == "svg" else {})
                    )

                write_atomic(folder / f"{name}.{suffix}", save)
                files.append(folder / f"{name}.{suffix}")
    if page:
        write_text(folder / PAGE, page_of(found))
        files.append(folder / PAGE)
    return files


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


@contextmanager
def _figure(found: Comparison, key: str, legend: bool, ink: str = "black", lines: str = "#d9d9d9") -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.edgecolor": lines,
        "grid.color": lines,
        "svg.hashsalt": key,
        "svg.fonttype": "none" if ink != "black" else "path",
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
        try:
            span = ends(x for run in found.runs if key in run.curves for x in run.curves[key].over(found.axis))
            for index, run in enumerate(found.runs):
                if key in run.curves:
                    _draw(axes, run.curves[key], found, span, index, run.label)
            axes.set(title=key, xlabel=AXES[found.axis])
            axes.grid(alpha=0.6, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if legend:
                axes.legend(frameon=False, fontsize="small")
            yield figure
        finally:
            pyplot.close(figure)


def _draw(axes: Any, curve: Curve, found: Comparison, span: tuple[float, float], index: int, label: str) -> None:
    import numpy as np

    x, y = np.asarray(curve.over(found.axis)), np.asarray(curve.values)
    there = np.isfinite(x) & np.isfinite(y)
    odd = np.isfinite(x) & ~np.isfinite(y)
    x_there, y_there = x[there], y[there]
    style = _style(index)
    if len(x_there) > POINTS and span[1] > span[0]:
        bins = np.minimum(((x_there - span[0]) / (span[1] - span[0]) * POINTS).astype(int), POINTS - 1)
        order = np.argsort(bins, kind="stable")
        bins, y_there, x_there = bins[order], y_there[order], x_there[order]
        begins = np.flatnonzero(np.diff(bins, prepend=-1))
        counts = np.diff(np.append(begins, len(bins)))
        low, high = np.minimum.reduceat(y_there, begins), np.maximum.reduceat(y_there, begins)
        x_there, y_there = np.add.reduceat(x_there, begins) / counts, np.add.reduceat(y_there, begins) / counts
        axes.fill_between(x_there, low, high, color=style["color"], alpha=0.15, linewidth=0)
    marker = "o" if len(x_there) < 30 else None
    shown = f" {label}" if label.startswith("_") else label  # the legend leaves out what begins so
    axes.plot(x_there, y_there, label=shown, linewidth=1.4, marker=marker, markersize=3, **style)
    if odd.any():  # on the lower edge: there is no height for them
        places = np.unique(np.round(x[odd], 9))[:POINTS]
        edge = axes.get_xaxis_transform()
        axes.plot(places, np.zeros(len(places)), "x", color=style["color"], transform=edge, clip_on=False, markersize=5)


def _svg(found: Comparison, key: str) -> str:
    """A figure within a page, in the page's colours."""
    stream = io.StringIO()
    with _figure(found, key, legend=False, ink=_INK, lines=_LINES) as figure:
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(_INK, "var(--ink)").replace(_LINES, "var(--line)")


def page_of(found: Comparison) -> str:
    """One HTML file without any request to elsewhere, light or dark as the reader has it."""
    labels = [run.label for run in found.runs]
    title = f"{' · '.join(labels[:4])}{' · ...' if len(labels) > 4 else ''}"
    parts = [f"<h1>{_text(title)}</h1>"]
    parts += ["<h2>Results</h2>", _table("", found, found.rows, _result_cells)]
    if any(row.best for row in found.rows):
        parts.append('<p class="quiet">bold: the best of the row</p>')
    if found.keys:
        parts.append(f"<h2>Curves over {_text(AXES[found.axis])}</h2>")
        parts.append(f"<p>{''.join(map(_chip, range(len(labels)), labels))}</p>")
        parts.append(
            f'<div class="curves">{"".join(f"<figure>{_svg(found, key)}</figure>" for key in found.keys)}</div>'
        )
        parts.append('<p class="quiet">× on the lower edge: NaN or infinite</p>')
    if found.config:
        parts.append("<h2>Keys in which the configs differ</h2>")
        parts.append(_table("key", found, list(found.config.items()), _config_cells))
    else:
        parts.append("<p>Their configs do not differ.</p>")
    if found.notes:
        parts.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{_text(note)}</li>' for note in found.notes)}</ul>")
    return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(parts))


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _chip(index: int, label: str) -> str:
    dash = ("solid", "dashed", "dotted", "dashed")[index // len(COLORS) % len(DASHES)]
    style = f"border-color:{COLORS[index % len(COLORS)]};border-top-style:{dash}"
    return f'<span class="chip" style="{style}">{_text(label)}</span>'


def _table(first: str, found: Comparison, rows: Sequence[Any], cells: Callable[[Any], tuple[str, list[str]]]) -> str:
    heads = "".join(f"<th>{_chip(index, run.label)}</th>" for index, run in enumerate(found.runs))
    lines = [f"<tr><th>{_text(first)}</th>{heads}</tr>"]
    for row in rows:
        name, values = cells(row)
        lines.append(f"<tr><th>{_text(name)}</th>{''.join(values)}</tr>")
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _result_cells(row: Row) -> tuple[str, list[str]]:
    best = row.best
    return row.name, [f"<td{' class=best' if i in best else ''}>{_text(cell)}</td>" for i, cell in enumerate(row.shown)]


def _config_cells(item: tuple[str, list[str]]) -> tuple[str, list[str]]:
    return item[0], [f"<td>{_text(value)}</td>" for value in item[1]]


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #5b6570; --line: #d5dae0; --paper: #ffffff; --best: #e3f3e6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --quiet: #9aa5b1; --line: #3a424b; --paper: #14181d; --best: #1d3a26 }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin-top: 2rem }
.quiet { color: var(--quiet) } .table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; min-width: 6rem }
tr > th:first-child { font-weight: normal; color: var(--quiet) }
.best { font-weight: 700; background: var(--best) }
.chip { border-top: 3px solid; padding-top: .1rem; margin-right: 1.2rem; display: inline-block }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem }
figure { margin: 0 } figure svg { width: 100%; height: auto }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body>
{body}
</body></html>
"""
