"""A run's model, ready to look at splits: on one process or several that torchrun starts."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from symile_dist import gradcache
from symile_dist.checkpoint.manifest import CheckpointError
from symile_dist.checkpoint.reshape import consolidated_weights
from symile_dist.config import Component, Config
from symile_dist.data.batches import StepDataset
from symile_dist.data.loader import Loader, open_validation
from symile_dist.distributed import gather_objects, rank, world_size
from symile_dist.errors import RunFailed
from symile_dist.model import TrainingModule
from symile_dist.run_directory import CONFIG_FILE, load_run
from symile_dist.tools.checkpoints import find_checkpoint
from symile_dist.tools.progress import Report, silent
from symile_dist.types import Batch, Fault, Representation, StepReport
from symile_dist.validate import HeldOutPart, embeddings_of, held_out_parts, telling

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=1)
"""How long processes wait for each other, where torch has 10 minutes on GPUs: rank 0 fits probes alone, perhaps for
hours. When one dies, torchrun ends them all."""


def split_directory(config: Config, split: str) -> str:
    """The folder of a split's shards; the validation shards stand in for a test split that the config lacks."""
    data = config.data
    if split == "train" and len(data.train) > 1:
        raise ValueError(f"data.train is a mixture of {', '.join(data.train)}: set data.test to one of their folders")
    train = next(iter(data.train.values())).path
    directory = {"test": data.test or data.validation, "validation": data.validation, "train": train}[split]
    if directory is None:
        raise ValueError(f"the config names no shards for the {split} split (data.{split}); try --split train")
    return directory


def find_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu` or `cuda`. Raises ValueError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: should be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def processes_of_torchrun(device: torch.device) -> Iterator[None]:
    """The process group that torchrun's environment describes, where there is one and none is made yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_trained(config: Config, folder: Path) -> TrainingModule:
    """The model and objective of a config with a checkpoint's weights, on the CPU, in evaluation mode.

    Raises CheckpointError for a checkpoint that is damaged or of another model.
    """
    module = TrainingModule(config)
    weights = consolidated_weights(folder)
    try:
        missing, unknown = module.load_weights(weights)
    except RuntimeError as mismatch:  # of sizes
        raise CheckpointError(
            f"{folder}: was made by another model than the run's config describes: {mismatch}"
        ) from None
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: was made by another model than {config.run_directory / CONFIG_FILE} describes; "
            f"lacking: {', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}"
        )
    return module.eval()


class Trained(NamedTuple):
    """A run's model, ready to look at splits."""

    config: Config
    """With as many workers as there are processes here."""
    module: TrainingModule
    device: torch.device
    encoded_at_once: int

    def parts(
        self,
        directory: str,
        max_samples: int | None = None,
        metadata: Sequence[str] = (),
        progress: Report = silent,
        stage: str = "encoding",
    ) -> Pass:
        """One pass over a folder of shards; the parts raise RunFailed at their end where too much was unreadable."""
        dataset, steps = open_validation(self.config, directory, rank(), max_samples, metadata=metadata)
        samples = sum(dataset.populations[0].sizes(0))
        samples = samples if max_samples is None else min(samples, max_samples)
        faults: list[Fault] = []
        batches = telling(Loader(dataset, self.config, 0, steps), faults)
        made = held_out_parts(self._forward, batches, embeddings_of(self.module.objective))

        def parts() -> Iterator[HeldOutPart]:
            read = 0
            progress(stage, 0, steps)
            for done, part in enumerate(made, 1):
                read += len(part.labels)
                yield part
                progress(stage, done, steps)
            _tell_unreadable(self.config, directory, faults, read, samples)

        return Pass(dataset, samples, parts())

    def _forward(self, batch: Batch, step: int) -> tuple[StepReport, dict[str, Representation]]:
        encode = partial(self.module, step=None)
        return gradcache.forward(encode, self.module, batch.to(self.device), step, size=self.encoded_at_once)


class Pass(NamedTuple):
    dataset: StepDataset
    samples: int
    """That can be read, if nothing is damaged."""
    parts: Iterator[HeldOutPart]


def _tell_unreadable(config: Config, directory: str, faults: list[Fault], read: int, total: int) -> None:
    """Warns of samples that could not be read, on any rank; raises RunFailed, on all, where they are too many.

    Figures of a part of a split should not be taken for those of the split.
    """
    told = [fault for part in gather_objects(faults) for fault in part]
    if not told:
        return
    words = (
        f"{directory}: {total - read} of {total} samples could not be read: {'; '.join(map(str, told[:3]))}"
        f"{f' and {len(told) - 3} more' if len(told) > 3 else ''}"
    )
    stop = config.data.on_error == "stop"
    if stop or total - read > config.data.max_bad_fraction * total:
        limit = "data.on_error = stop" if stop else f"more than data.max_bad_fraction = {config.data.max_bad_fraction}"
        raise RunFailed(
            f"{words}; {limit}. Mend the shards (symile-dist shards verify {directory} names everything that is wrong "
            "with them), or evaluate what can be read with data.on_error=quarantine data.max_bad_fraction=1"
        )
    if rank() == 0:
        logger.warning("%s", words)


def open_trained(run: str | Path, step: str, overrides: Sequence[str], device: torch.device) -> tuple[Trained, Path]:
    """The model of a run\'s checkpoint on a device, with `key=value` laid on the config; and the checkpoint\'s folder.

    Raises ValueError for a run or step that does not exist, or a number of processes that does not fit the batch,
    CheckpointError for a damaged checkpoint.
    """
    found = load_run(run, list(overrides))
    world = world_size()
    if found.train.global_batch_size % world:
        raise ValueError(
            f"{world} processes do not divide train.global_batch_size = {found.train.global_batch_size}, the batch of "
            "the loss"
        )
    # These processes read what all ranks read together, and as many samples are encoded at once as a rank held.
    config = found.model_copy(update={"ray": found.ray.model_copy(update={"num_workers": world})})
    if config.objective.options.get("backend") == "triton" and device.type == "cpu":  # the loss is the same
        options = config.objective.options | {"backend": "auto"}
        config = config.model_copy(update={"objective": Component(name=config.objective.name, **options)})
    folder = find_checkpoint(config, step)
    return Trained(config, load_trained(config, folder).to(device), device, found.encoded_at_once), folder
