"""A run's encoders in a folder of their own: `symile-dist checkpoints export` writes it, `load_encoders` reads it.

    export.json                what the rest comes from; every other file with its sha256
    config.yaml                the run's config, without what is of its machine alone
    encoders/NAME.safetensors  an encoder, its normalisation and its missing_embedding
    logit_scale.safetensors    objective.safetensors, where the objective has weights
    files/                     what the config's options name: a tokenizer's files, a model's config; no weights
    README.md                  a model card

Neither deepspeed nor ray is needed, and of a pretrained encoder no weights but those in the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symile_dist.config import Component, Config, load_config
from symile_dist.data.batches import Reader, collate
from symile_dist.hub import weights_follow
from symile_dist.model import TrainingModule
from symile_dist.registry import suggestion
from symile_dist.storage import read_json, sha256_of_file
from symile_dist.types import Inputs, Padded, Representation
from symile_dist.validate import embeddings_of

ABOUT, CONFIG, README, ENCODERS, FILES = "export.json", "config.yaml", "README.md", "encoders", "files"
VERSION = 1
LOGIT_SCALE = "model.logit_scale"
REST = {"logit_scale.safetensors": "model.", "objective.safetensors": "objective."}
"""Files beside those of the encoders -> what stands before their names in the whole model."""
PARTS = {"encoder": "encoders", "normalization": "normalizations", "missing_embedding": "missing_embeddings"}
"""What the names in an encoder's file begin with -> where the model has it."""


def place_of(name: str) -> tuple[str, str]:
    """A weight's name in the whole model -> the export's file that holds it, and its name there."""
    for part, module in PARTS.items():
        if name.startswith(f"model.{module}."):
            modality, _, rest = name.removeprefix(f"model.{module}.").partition(".")
            return f"{ENCODERS}/{modality}.safetensors", f"{part}.{rest}"
    file = "logit_scale.safetensors" if name == LOGIT_SCALE else "objective.safetensors"
    assert name.startswith(REST[file]), name
    return file, name.removeprefix(REST[file])


def _whole_name(file: str, name: str) -> str:
    """The other way round."""
    if file in REST:
        return f"{REST[file]}{name}"
    part, _, rest = name.partition(".")
    return f"model.{PARTS[part]}.{Path(file).stem}.{rest}"


def with_options(config: Config, change: Callable[[str, Any], Any]) -> Config:
    """The config with every single value among its components' options as `change(key, value)` has it."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(f"{key}.{name}", part) for name, part in value.items()}
        if isinstance(value, list):
            return [changed(f"{key}.{number}", part) for number, part in enumerate(value)]
        return change(key, value)

    def component(key: str, found: Component) -> Component:
        return Component(name=found.name, **changed(key, found.options))

    modalities = {
        name: modality.model_copy(
            update={
                part: component(f"modalities.{name}.{part}", getattr(modality, part))
                for part in ("decoder", "transform", "encoder")
            }
        )
        for name, modality in config.modalities.items()
    }
    return config.model_copy(update={"modalities": modalities, "objective": component("objective", config.objective)})


class Encoders:
    """The encoders of an export, in evaluation mode; see `load_encoders`."""

    def __init__(self, config: Config, module: TrainingModule, about: dict[str, Any], device: torch.device) -> None:
        self.config, self.about, self.device = config, about, device
        """`about`: run, step, code version and more, of export.json."""
        self.module = module.to(device).eval().requires_grad_(False)
        """Model and objective."""
        self._readers: dict[str, Reader] = {}

    @property
    def modalities(self) -> list[str]:
        """Their names, in the order of the config."""
        return list(self.config.modalities)

    @property
    def logit_scale(self) -> float:
        """What logits are multiplied with."""
        return float(self.module.model.multiplier())

    def transform(self, modality: str) -> Callable[[bytes], Tensor]:
        """Decoder and transform of a modality, as in evaluation: a file's bytes -> what `encode` takes of one sample.

        Raises ValueError for a modality that there is not; what it gives does for bytes that cannot be decoded.
        """
        reader = self._reader(modality)
        return lambda data: reader(data, None)

    def encode(self, modality: str, inputs: Inputs | Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """n samples of a modality -> (n, D) float32 on `device`, ready to be compared: what `evaluate --export` gives.

        Where the objective has embeddings of its own they are it, `MODALITY.PART` too; to one that makes them of all
        modalities together the others are zero.

        Args:
            modality: its name.
            inputs: what `transform` gave of each sample; or all of them in one, a tensor (n, ...) or `Padded`.
            present: (n,) bool; where False the sample lacks the modality, and the learned embedding stands for it.

        Raises ValueError for a modality that there is not, and for inputs that it does not take.
        """
        name = self._known(modality.partition(".")[0])
        batch = inputs if isinstance(inputs, Tensor | Padded) else self._collated(name, inputs)
        batch = (
            Padded(*(part.to(self.device) for part in batch)) if isinstance(batch, Padded) else batch.to(self.device)
        )
        count = len(batch.lengths) if isinstance(batch, Padded) else len(batch)
        there = torch.ones(count, dtype=torch.bool) if present is None else present
        if there.dtype != torch.bool or there.shape != (count,):
            raise ValueError(f"present should be ({count},) flags, not {tuple(there.shape)} {there.dtype}")
        with torch.no_grad():
            vectors = self._embeddings(name, self.module.model.encode(name, batch, there.to(self.device)))
        if modality not in vectors:
            known = ", ".join(vectors) or f"none of '{name}'"
            raise ValueError(f"there is no embedding '{modality}'; the objective has {known}")
        return vectors[modality].float()

    def _embeddings(self, name: str, emitted: Representation) -> dict[str, Tensor]:
        """What comes of a modality's representations alone."""
        embeddings = embeddings_of(self.module.objective)
        found = {name: emitted} if isinstance(emitted, Tensor) else {}
        if embeddings is None:
            return found
        count = len(emitted) if isinstance(emitted, Tensor) else len(emitted.vectors)
        zeros = torch.zeros(count, self.config.model.embedding_dim, device=self.device)
        made = embeddings({other: emitted if other == name else zeros for other in self.modalities})
        return found | {key: vectors for key, vectors in made.items() if key.partition(".")[0] == name}

    def _collated(self, modality: str, samples: Sequence[Tensor]) -> Inputs:
        reader, tensors = self._reader(modality), list(samples)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ValueError(f"'{modality}': inputs should be one tensor per sample, as transform('{modality}') gives")
        for tensor in tensors:
            if problem := reader.differs(tensor, tensors[0]):
                raise ValueError(f"'{modality}': a sample {problem}")
        return collate(tensors, reader.variable_length)

    def _reader(self, modality: str) -> Reader:
        """Made when it is first needed: a tokenizer may have to be fetched."""
        if modality not in self._readers:
            self._readers[modality] = Reader.from_config(modality, self.config.modalities[self._known(modality)])
        return self._readers[modality]

    def _known(self, modality: str) -> str:
        if modality not in self.config.modalities:
            raise ValueError(f"no modality '{modality}'{suggestion(modality, self.modalities)}")
        return modality


def load_encoders(path: str | Path, device: str | torch.device = "cpu") -> Encoders:
    """The encoders that `symile-dist checkpoints export RUN --out PATH` wrote.

        encoders = load_encoders("digits")
        picture = encoders.transform("image")(Path("seven.png").read_bytes())
        vector = encoders.encode("image", [picture])  # (1, D)

    A config names classes to call: load only what you trust. Pretrained encoders ask the hub for their config, never
    for weights; what came from a local folder is in the export.

    Raises ValueError for a folder that is no export, a damaged file, and for components that are not installed here.
    """
    folder = Path(path)
    about = _read_about(folder)

    def located(key: str, value: Any) -> Any:
        return str(folder / value) if isinstance(value, str) and value.startswith(f"{FILES}/") else value

    config = with_options(load_config(folder / CONFIG).config, located)
    with torch.random.fork_rng(devices=[]), weights_follow():
        module = TrainingModule(config)
    weights = _read_weights(folder, about["files"])
    kept = module.state_dict()
    expected = {*dict(module.named_parameters()), *module.inner_state()}
    expected |= {name for name, _ in module.named_buffers() if name in kept}
    try:
        lacking = sorted(expected - weights.keys())
        _, unknown = ([], []) if lacking else module.load_weights(weights)
    except RuntimeError as mismatch:  # of sizes
        raise ValueError(f"{folder}: does not hold the weights of the model in its {CONFIG}: {mismatch}") from None
    if lacking or unknown:
        raise ValueError(
            f"{folder}: does not hold the weights of the model in its {CONFIG}; lacking: "
            f"{', '.join(lacking[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}"
        )
    return Encoders(config, module, about, torch.device(device))


def _read_about(folder: Path) -> dict[str, Any]:
    """export.json, once every file that it names has been found to be as it says."""
    hint = f"{folder}: is no export; `symile-dist checkpoints export RUN --out DIR` writes one"
    try:
        about = read_json(folder / ABOUT)
        if about["version"] != VERSION:
            raise ValueError(f"{folder}: was written by another version of symile_dist; export the run again")
        files: dict[str, str] = about["files"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(hint) from None
    except (KeyError, TypeError):
        raise ValueError(f"{folder / ABOUT}: is damaged") from None
    for name, digest in files.items():
        try:
            damaged = sha256_of_file(folder / name) != digest
        except OSError as error:
            raise ValueError(f"{folder / name}: {error.strerror or error}") from None
        if damaged:
            raise ValueError(f"{folder / name}: its bytes do not match the sha256 in {ABOUT}")
    return dict(about)


def _read_weights(folder: Path, files: Sequence[str]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {
        _whole_name(file, name): tensor
        for file in files
        if file in REST or (file.startswith(f"{ENCODERS}/") and file.endswith(".safetensors"))
        for name, tensor in load_file(folder / file).items()
    }


__all__ = ["Encoders", "load_encoders"]
