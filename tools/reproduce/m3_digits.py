"""Symile-M3's experiment on M3-digits: accuracy against the number of languages (Symile, arXiv 2411.01053, 4b)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import symile_dist.configs
from symile_dist.data.demo import DIGIT_WORDS, make_demo
from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.report import (
    COLORS,
    Check,
    Report,
    Table,
    at_least,
    at_most,
    mean_error,
    new_figure,
    save_figure,
)
from symile_dist.tools.reproduce.trial import Trial, best_of

OBJECTIVES = {"symile": "Symile", "pairwise_clip": "CLIP"}
SYMILE = {"name": "symile", "negative_sampling": "sheets", "sheets": 16}
"""Sixteen planes of the cube of negatives, not one permutation: at ten languages half as many samples do."""
DIRECTION = "image_from_audio_text"
HELD_OUT = 2000
TINY_TRAIN = 320
PUBLISHED = {2: ("0.941", "0.475"), 5: ("0.921", "0.188"), 10: ("0.882", "0.093")}
"""Symile-M3's validation runs by its authors: Symile, CLIP."""


def digits_data(lab: Lab, languages: int, train: int) -> Path:
    """The folder of M3-digits with so many languages and training samples, made where it is not there."""
    folder = lab.data(f"m3-digits-{languages}-{train}")
    held_out = 100 if lab.tiny else HELD_OUT
    make_demo(folder, languages=languages, train=train, val=held_out, test=held_out, progress=lab.progress)
    return folder


def word_tokenizer(folder: Path) -> int:
    """Saves a tokenizer of all languages' number words, "_" being one of its own; returns its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "_", *sorted({word for words in DIGIT_WORDS.values() for word in words})]
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        split = pre_tokenizers.Split("_", "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        fast.save_pretrained(str(folder))
    return len(words)


def of_name(objective: str) -> dict[str, Any]:
    return SYMILE if objective == "symile" else {"name": objective}


def digits_config(data: Path, objective: dict[str, Any], seed: int, steps: int, batch: int) -> dict[str, Any]:
    """configs/demo.yaml on one rank, with words as tokens in place of characters: Symile-M3's text has tokens too."""
    content: dict[str, Any] = yaml.safe_load(
        (Path(symile_dist.configs.__file__).parent / "demo.yaml").read_text(encoding="utf-8")
    )
    every = steps // 10 if steps >= 100 else max(1, steps // 2)
    content |= {"seed": seed, "objective": objective}
    content["data"] = {split: str(data / folder) for split, folder in SPLITS.items()} | {"loader_processes": 0}
    tokenizer = data.parent / "number-words"
    content["modalities"]["text"] = {
        "member": "txt",
        "decoder": "text",
        "transform": {"name": "tokens", "model": str(tokenizer)},
        "encoder": {
            "name": "text_convnet",
            "vocabulary_size": word_tokenizer(tokenizer),
            "dilations": [1, 2],
            "pooled": 384,
        },
    }
    content["train"] |= {"steps": steps, "global_batch_size": batch}
    content["modalities"]["image"]["transform"]["noise"] = 0.1  # against learning 1,300 scans by heart
    content["optimizer"] |= {"lr": 2e-3, "weight_decay": 0.05, "warmup_steps": min(50, steps // 4)}
    content["validation"] = {"every": every}
    content["checkpoint"] = {"every": every}
    content["ray"] = {"num_workers": 1}
    content["metrics"] = {"enabled": False}
    return content


SPLITS = {"train": "train", "validation": "val", "test": "test"}


def accuracies(found: dict[Any, dict[str, Any]], lab: Lab, setting: Any, objective: str) -> list[float]:
    """Of every seed."""
    return [
        found[setting, objective, seed]["evaluation"]["retrieval"][DIRECTION]["accuracy"] for seed in range(lab.seeds)
    ]


LANGUAGES = (2, 5, 10)
LEAST = {2: 0.90, 5: 0.85, 10: 0.75}
LEAST_QUICK = {2: 0.90, 5: 0.65}
"""What Symile has to reach."""
TRAIN = {2: 50_000, 5: 50_000, 10: 200_000}
STEPS = {2: 500, 5: 900, 10: 2000}
QUICK_STEPS = {2: 180, 5: 400, 10: 0}
BATCH = 256


def run(lab: Lab) -> Report:
    """Accuracy against the number of languages, with the most that pairs of modalities can tell."""
    trials = {}
    languages = [w for w in LANGUAGES if lab.size(STEPS[w], QUICK_STEPS[w], 4 if w == 2 else 0)]
    for w in languages:
        data = digits_data(lab, w, lab.size(TRAIN[w], 20_000, TINY_TRAIN))
        for objective in OBJECTIVES:
            for seed in range(lab.seeds):
                steps = lab.size(STEPS[w], QUICK_STEPS[w], 4)
                content = digits_config(data, of_name(objective), seed, steps, lab.size(BATCH, BATCH, 64))
                trials[w, objective, seed] = Trial(lab.config(f"w{w}-{objective}-seed{seed}", content), best_of)
    found = dict(zip(trials, lab.run(list(trials.values())), strict=True))
    values = {str(w): {objective: accuracies(found, lab, w, objective) for objective in OBJECTIVES} for w in languages}
    report = Report(
        "m3-digits",
        "M3-digits: the image that audio and text name together",
        "Symile (NeurIPS 2024, arXiv 2411.01053), Fig. 4b, on M3-digits in place of Symile-M3: one of the w numbers in "
        "the text is the image's, and the clip tells by its language which. Scans and voices of the test split are in "
        "no other split.",
        values=values,
    )
    rows = [
        [
            str(w),
            *(str(mean_error(values[str(w)][objective])) for objective in OBJECTIVES),
            f"{1 / w:.3f}",
            *PUBLISHED[w],
        ]
        for w in languages
    ]
    header = ["languages w", "Symile", "CLIP", "ceiling of pairs 1/w", "Symile-M3: Symile", "Symile-M3: CLIP"]
    report.tables.append(Table("Accuracy of the image from (audio, text), 100 classes", header, rows))
    report.checks = _checks(values, LEAST_QUICK if lab.quick else LEAST)
    report.figures.append(_figure(lab, values))
    report.notes.append(
        f"Symile has {SYMILE['sheets']} sheets of negatives, and batches of {BATCH}; the paper has permutations (`n`)."
    )
    report.notes.append("The last two columns are the authors' figures on Symile-M3: photographs of 1,000 classes.")
    if lab.quick:
        report.notes.append(
            f"Quick: 20,000 training samples, {QUICK_STEPS[2]} and {QUICK_STEPS[5]} steps; not w = 10. At w = 5 Symile "
            f"has to reach {LEAST_QUICK[5]:g} only."
        )
    return report


def _checks(values: dict[str, dict[str, list[float]]], least: dict[int, float]) -> list[Check]:
    checks = []
    for w, seen in values.items():
        checks.append(at_least(f"Symile at w = {w}", mean_error(seen["symile"]).mean, least[int(w)]))
        checks.append(at_most(f"CLIP at w = {w}", mean_error(seen["pairwise_clip"]).mean, round(1 / int(w) + 0.03, 3)))
    return checks


def _figure(lab: Lab, values: dict[str, dict[str, list[float]]]) -> str:
    figure, (axes,) = new_figure()
    languages = [int(w) for w in values]
    for objective, title in OBJECTIVES.items():
        draw(axes, languages, [values[str(w)][objective] for w in languages], objective, title)
    line = np.linspace(min(languages), max(languages), 50)
    axes.plot(line, 1 / line, color=COLORS["bound"], linestyle="--", label="ceiling of pairs, 1/w")
    axes.set(xlabel="languages w", ylabel="accuracy of the image", ylim=(0, 1.02), xticks=languages)
    axes.legend(frameon=False)
    return save_figure(figure, lab.folder, "m3-digits")


def draw(axes: Any, places: list[Any], seen: list[list[float]], objective: str, title: str) -> None:
    """Means over seeds with their standard errors, and every seed as a small dot."""
    means = [mean_error(values) for values in seen]
    errors = [0.0 if math.isnan(mean.error) else mean.error for mean in means]
    color = COLORS[objective]
    axes.errorbar(places, [mean.mean for mean in means], errors, marker="o", markersize=4, color=color, label=title)
    for place, values in zip(places, seen, strict=True):
        axes.plot([place] * len(values), values, ".", markersize=3, color=color, alpha=0.5)
