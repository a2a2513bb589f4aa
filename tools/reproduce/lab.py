"""Where an experiment works: its folders, seeds, size, and how it runs trials."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from symile_dist.config import Config, parse_config
from symile_dist.errors import RunFailed, RunStopped
from symile_dist.tools.progress import Report, silent
from symile_dist.tools.reproduce.samples import Split, write_dataset
from symile_dist.tools.reproduce.trial import Trial, run_trials


@dataclass(frozen=True)
class Lab:
    out: Path
    """Of all experiments: OUT/data is shared, OUT/NAME is one experiment's."""
    name: str
    seeds: int = 3
    quick: bool = False
    tiny: bool = False
    """As small as it can be and still run every line: what tests use."""
    processes: int = os.cpu_count() or 1
    """Trials at once."""
    progress: Report = silent
    seconds: list[float] = field(default_factory=list)
    """Of each trial so far, whichever call ran it."""

    def with_options(self, seeds: int | None, processes: int | None) -> Lab:
        """With what the user has chosen, or the defaults: three seeds, or one if it is to be quick."""
        return replace(
            self, seeds=seeds or (1 if self.quick or self.tiny else 3), processes=processes or os.cpu_count() or 1
        )

    @property
    def folder(self) -> Path:
        return self.out / self.name

    def data(self, name: str) -> Path:
        """The folder of a dataset."""
        return self.out / "data" / name

    def dataset(
        self, name: str, parameters: Mapping[str, Any], make: Callable[[str], Split], splits: Sequence[str]
    ) -> Path:
        """The folder of a dataset of synthetic samples, made where it is not there: see `write_dataset`."""
        return write_dataset(self.data(name), parameters, make, splits, self.progress)

    def config(self, run: str, content: dict[str, Any]) -> Config:
        """The config of a trial, checked as any config is."""
        directory = self.folder / "runs" / run
        whole = {**content, "run": {"name": run, "directory": str(directory)}}
        return parse_config(yaml.safe_dump(whole, sort_keys=False), run).config.with_absolute_paths()

    def run(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        try:
            found = run_trials(trials, self.processes, self.progress)
        except (RunFailed, RunStopped) as error:
            raise type(error)(
                f"{error} (if it is the data in {self.data('')} that are damaged: what is removed there is made anew)"
            ) from None
        self.seconds.extend(result["seconds"] for result in found)
        return found

    def size(self, full: int, quick: int, tiny: int) -> int:
        return tiny if self.tiny else quick if self.quick else full
