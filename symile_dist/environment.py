"""What a launcher tells the processes of a job, by environment variables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EXPECTED_NODES = "SYMILE_DIST_EXPECTED_NODES"
"""So many nodes are coming: wait for them."""
LAUNCH = "SYMILE_DIST_LAUNCH"
"""JSON: where the job runs, for run.json."""
SECRETS = "SYMILE_DIST_SECRETS"
"""JSON: variable -> the file that holds its value."""


def expected_nodes() -> int:
    text = os.environ.get(EXPECTED_NODES, "")
    return int(text) if text.isdecimal() else 0


def launch_record() -> dict[str, Any] | None:
    """None where the run was not submitted."""
    try:
        content = json.loads(os.environ.get(LAUNCH, ""))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def take_secrets() -> None:
    """Sets the variables whose values stand in files. Raises ValueError for a file that cannot be read."""
    for name, file in json.loads(os.environ.get(SECRETS) or "{}").items():
        try:
            os.environ[name] = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(f"the secret {name}: {file} cannot be read: {error.strerror}") from None
