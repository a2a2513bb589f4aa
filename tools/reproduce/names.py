"""The experiments' names, and where they work; apart, so that the command line knows them without torch."""

from __future__ import annotations

from pathlib import Path

MAX_SEEDS = 1000
EXPERIMENTS: dict[str, str] = {
    "xor": "symile_dist.tools.reproduce.xor:run",
    "xor-8": "symile_dist.tools.reproduce.xor:run_eight",
    "missing": "symile_dist.tools.reproduce.missing:run",
    "m3-digits": "symile_dist.tools.reproduce.m3_digits:run",
    "wpse": "symile_dist.tools.reproduce.wpse:run",
    "factorcl": "symile_dist.tools.reproduce.factorcl:run",
    "successors": "symile_dist.tools.reproduce.successors:run",
}
"""Name -> the function that makes its report from a `Lab`."""


def folder_of(out: str | None, quick: bool) -> Path:
    """Where everything goes. Raises ValueError for what cannot be a folder."""
    if out == "":
        raise ValueError("--out: should name a folder; leave it out for the default")
    folder = Path(out) if out else Path("runs/reproduce-quick" if quick else "runs/reproduce")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"--out {folder}: {there} is a file, not a folder")
    return folder
