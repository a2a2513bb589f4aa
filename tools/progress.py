"""A progress bar with an ETA for long work; silent when nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Report = Callable[[str, int, int], None]
"""Called with (part, done, total)."""


def silent(part: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class _SpeedColumn(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.0f}/s" if speed else "", style="progress.data.speed")


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """Yields `report(part, done, total)`, drawn on the terminal's standard error."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(),
    )
    # A large shard may take minutes: the speed is that of the last hour.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True, speed_estimate_period=3600.0
    ) as bar:
        tasks = {}

        def report(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bar.add_task(f"{title}: {part}", total=total, completed=done)
            bar.update(tasks[part], completed=done, total=total)

        yield report
