"""From which step each attempt at a run went on: how a checkpoint that came too late is known."""

from __future__ import annotations

import logging
from pathlib import Path

from symile_dist.checkpoint.manifest import CheckpointError, Manifest, complete_checkpoints, read_manifest
from symile_dist.storage import read_json, write_json

logger = logging.getLogger(__name__)
ATTEMPTS = "attempts.json"


def read_attempts(directory: Path) -> list[tuple[int, int]]:
    """(fence, step that it went on from) of the attempts so far; none where nobody can read them: they guard against
    late commits alone."""
    try:
        return [(int(fence), int(step)) for fence, step in read_json(directory / ATTEMPTS)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s: not readable: %s", directory / ATTEMPTS, error)
        return []


def write_attempt(directory: Path, fence: int, step: int) -> None:
    """Adds one, which takes the place of what the same attempt has said before."""
    # Those of a higher fence were made where this directory stood before it was moved or copied.
    attempts = [each for each in read_attempts(directory) if each[0] < fence]
    write_json(directory / ATTEMPTS, [*attempts, (fence, step)][-1000:])


def left_behind(directory: Path, manifest: Manifest, before: int | None = None) -> bool:
    """Whether a later attempt has begun from before a checkpoint: it did not see it, so it was not there.

    `before`: only attempts of lower fences count.
    """
    return any(
        (before is None or fence < before) and fence > manifest.fence and step < manifest.step
        for fence, step in read_attempts(directory)
    )


def usable_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of those that the run would go on from, by step; their files are not looked at."""
    found = []
    for step, folder in complete_checkpoints(directory):
        try:
            if not left_behind(directory, read_manifest(folder)):
                found.append((step, folder))
        except CheckpointError:  # damaged: whoever looks at it closer says so
            found.append((step, folder))
    return found
