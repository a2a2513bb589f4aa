"""One page of all experiments' results, for docs/."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from symile_dist.storage import write_text
from symile_dist.tools.reproduce.names import EXPERIMENTS

INTRODUCTION = """# Results

Every table and figure here was written by the command that stands above it, from fixed seeds. Run it again with
`--publish docs/results.md`, and this page is made of all that the folder `--out` holds. What does not hold, or differs
from the published setting, is said beside it. The datasets of the papers are not used: Symile-M3 and CC3M could not be
fetched where these ran, and Symile-MIMIC needs credentials; docs/presets.md has the configs that train on them.
"""


def check_page(page: Path) -> None:
    """Raises ValueError for what cannot be a page with a folder of figures beside it, or cannot be written there."""
    if page.suffix != ".md" or page.is_dir():
        raise ValueError(f"{page}: should be a file named like docs/results.md")
    if page.with_suffix("").exists() and not page.with_suffix("").is_dir():
        raise ValueError(f"{page.with_suffix('')}: is a file; the page's figures need a folder of that name")
    there = next(parent for parent in page.absolute().parents if parent.exists())
    # Of a file system that takes no files (/proc) the mode tells root nothing.
    if not there.is_dir() or not os.access(there, os.W_OK) or os.statvfs(there).f_blocks == 0:
        raise ValueError(f"{page}: cannot be written: {there} is not a folder that this user may write to")


def publish(out: Path, page: Path) -> list[str]:
    """Writes a page of what OUT holds, its figures in a folder beside it; returns the experiments' names.

    Raises ValueError where OUT holds no results, and as `check_page` does.
    """
    check_page(page)
    names = [name for name in EXPERIMENTS if (out / name / "results.md").exists()]
    if not names:
        raise ValueError(f"{out}: holds no results yet; run `symile-dist reproduce NAME --out {out}` first")
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION]
    for name in names:
        text = (out / name / "results.md").read_text(encoding="utf-8")
        for figure in sorted((out / name).glob("*.png")):
            for path in (figure, figure.with_suffix(".svg")):
                shutil.copyfile(path, folder / path.name)
            text = text.replace(f"]({figure.name})", f"]({folder.name}/{figure.name})")
        parts.append(f"#{text}")
    write_text(page, "\n".join(parts))
    return names
