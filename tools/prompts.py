"""Zero-shot classification's classes: a YAML file of names and prompt templates, and what an encoder makes of it.

```yaml
text: text              # the modality that reads the prompts; left out: the only one whose decoder is `text`
queries: [[image]]      # what is classified, one task each; left out: every other modality alone
normalize: false        # L2-normalise features and their means; left out: as the run's similarity does
templates: ["a photo of a {}.", "a drawing of a {}."]
classes:                # label in the metadata -> its name, or several; or a list, where name and label agree
  n02123045: [tabby, tabby cat]
  n02124075: Egyptian cat
```
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from symile_dist.config import Config
from symile_dist.data.batches import StepDataset, collate
from symile_dist.evaluation.zero_shot import class_features
from symile_dist.model import TrainingModule
from symile_dist.registry import suggestion
from symile_dist.types import Inputs, Padded, PointSet, Representation

PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class ZeroShotTask:
    """What such a file says."""

    text: str
    queries: tuple[tuple[str, ...], ...]
    normalize: bool | None
    labels: tuple[str, ...]
    """Of the classes, in order."""
    prompts: tuple[tuple[str, ...], ...]
    """Of each class."""


def read_task(path: str | Path, config: Config) -> ZeroShotTask:
    """Reads the file and fits it to a run's modalities. Raises ValueError, naming the file, for what is wrong."""
    try:
        # Everything is text as it stands there: the labels 01, 1.0 and no are not 1, 1 and false.
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it should hold templates and classes (docs/evaluation.md)") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    try:
        return _task(content, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _task(content: Any, config: Config) -> ZeroShotTask:
    known = ["text", "queries", "normalize", "templates", "classes"]
    if not isinstance(content, dict):
        raise ValueError("should be a map with `templates` and `classes`")
    for key in content:
        if key not in known:
            raise ValueError(f"unknown key '{key}'{suggestion(key, known)}")
    names = list(config.modalities)
    readers = [name for name, modality in config.modalities.items() if modality.decoder.name == "text"]
    if "text" not in content and len(readers) != 1:
        raise ValueError(f"`text` should name the modality that reads the prompts, one of {', '.join(names)}")
    text = content.get("text", readers[0] if readers else "")
    queries = content.get("queries", [name for name in names if name != text])
    queries = [queries] if isinstance(queries, str) else queries
    queries = [[query] if isinstance(query, str) else query for query in queries]
    if not queries or not all(_are_texts(query) for query in queries):
        raise ValueError("`queries` should be a list of modalities, or of lists of them")
    for name in [text, *(name for query in queries for name in query)]:
        if name not in names:
            raise ValueError(f"no modality '{name}'{suggestion(str(name), names)}")
    if any(text in query for query in queries):
        raise ValueError(f"`queries` should name modalities other than '{text}'")
    classes: Any = content.get("classes")
    if _are_texts(classes):
        classes = {name: name for name in classes}
    if not isinstance(classes, dict) or len(classes) < 2:
        raise ValueError("`classes` should be a map of labels to names, or a list of names, two or more")
    named = {label: [found] if isinstance(found, str) else found for label, found in classes.items()}
    for label, found in named.items():
        if not _are_texts(found):
            raise ValueError(f"`classes`: '{label}' should have a name, or a list of names")
    templates = content.get("templates", ["{}"])
    if not _are_texts(templates) or not all("{}" in template for template in templates):
        raise ValueError("`templates` should be a list of texts, each with {} where the name goes")
    normalize = content.get("normalize")
    if normalize not in (None, "true", "false"):
        raise ValueError(f"`normalize` should be true or false, not {normalize!r}")
    return ZeroShotTask(
        text=text,
        # In the order of the config, which similarities of one direction go by.
        queries=tuple(dict.fromkeys(tuple(name for name in names if name in query) for query in queries)),
        normalize=None if normalize is None else normalize == "true",
        labels=tuple(named),
        prompts=tuple(
            tuple(template.replace("{}", name) for name in found for template in templates) for found in named.values()
        ),
    )


def _are_texts(value: Any) -> bool:
    """Whether it is a list of one text or more, none of them empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def encoded_classes(
    task: ZeroShotTask,
    dataset: StepDataset,
    module: TrainingModule,
    embeddings: Callable[[dict[str, Representation]], dict[str, Tensor]] | None,
    normalize: bool,
    device: torch.device,
) -> Tensor:
    """(C, D): the prompts, through the text modality's decoder, transform and encoder, averaged by class.

    Raises ValueError where the objective emits no embedding of the text modality alone.
    """
    names = [reader.name for reader in dataset.readers]
    reader = dataset.readers[names.index(task.text)]
    others = {} if embeddings is None else _examples(dataset, module, device)
    prompts = [prompt for of_class in task.prompts for prompt in of_class]
    numbers = torch.tensor([number for number, of_class in enumerate(task.prompts) for _ in of_class])
    features = []
    with torch.no_grad():
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            try:
                tensors = [reader(prompt.encode(), None) for prompt in prompts[first : first + PROMPTS_AT_ONCE]]
            except ValueError as error:
                raise ValueError(
                    f"zero-shot classification: '{task.text}' cannot read prompts ({error}); `text` should name a "
                    "modality of texts"
                ) from None
            inputs = _inputs(tensors, reader.variable_length, device)
            there = torch.ones(len(tensors), dtype=torch.bool, device=device)
            emitted: Any = {name: _repeated(other, len(tensors)) for name, other in others.items()}
            emitted[task.text] = module.model.encode(task.text, inputs, there)
            vectors = emitted if embeddings is None else embeddings(emitted)
            if not isinstance(vectors.get(task.text), Tensor):
                raise ValueError(f"zero-shot classification: the objective has no embedding '{task.text}' of prompts")
            features.append(vectors[task.text].float().cpu())
    return class_features(torch.cat(features), numbers, normalize)


def _examples(dataset: StepDataset, module: TrainingModule, device: torch.device) -> dict[str, Representation]:
    """One representation of every modality: an objective's embeddings may take all of them at once (Symile-WPSE)."""
    one = torch.ones(1, dtype=torch.bool, device=device)
    found: dict[str, Representation] = {}
    with torch.no_grad():
        for reader, example in zip(dataset.readers, dataset.examples, strict=True):
            inputs = _inputs([example], reader.variable_length, device)
            found[reader.name] = module.model.encode(reader.name, inputs, one)
    return found


def _repeated(representation: Representation, times: int) -> Representation:
    if isinstance(representation, Tensor):
        return representation.expand(times, *representation.shape[1:])
    return PointSet(*(part.expand(times, *part.shape[1:]) for part in representation))


def _inputs(tensors: list[Tensor], variable_length: bool, device: torch.device) -> Inputs:
    inputs = collate(tensors, variable_length)
    return Padded(*(part.to(device) for part in inputs)) if isinstance(inputs, Padded) else inputs.to(device)
