"""Symile beside what came after it: GRAM, TRIANGLE, ConFu and Gated Symile, and pairwise CLIP."""

from __future__ import annotations

from typing import Any, NamedTuple

from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.m3_digits import BATCH, SYMILE, TINY_TRAIN, digits_config, digits_data
from symile_dist.tools.reproduce.report import Report, Table, at_least, mean_error, new_figure, save_figure
from symile_dist.tools.reproduce.trial import Trial, best_of
from symile_dist.tools.reproduce.xor import BITS, SAMPLES, bits_config, xor_split


class Method(NamedTuple):
    title: str
    objective: dict[str, Any]
    model: dict[str, Any]
    """What its paper says of normalisation and logit scale, where it is not Symile's."""
    color: str


UNIT = {"normalization": "l2", "logit_scale_init": 2.66}  # 1 / 0.07
METHODS = {
    "symile": Method("Symile", {"name": "symile"}, {}, "#1f6fb4"),
    "symile_pairs": Method("Symile + CLIP", {"name": "symile", "pairwise_weight": 0.1}, {}, "#6fb3e0"),
    "pairwise_clip": Method("CLIP", {"name": "pairwise_clip"}, UNIT, "#d1622b"),
    "gram": Method("GRAM", {"name": "gram"}, UNIT, "#8a6fb0"),
    "triangle": Method("TRIANGLE", {"name": "triangle"}, UNIT, "#b0a13f"),
    "confu": Method("ConFu", {"name": "confu"}, UNIT, "#3a8f4d"),
    "gated_symile": Method(
        "Gated Symile", {"name": "gated_symile"}, {"normalization": "l2", "logit_scale_init": 0.0}, "#c04f7c"
    ),
}
LANGUAGES = 2
TRAIN, STEPS = 50_000, 400
DIGITS = {
    "both": "image_from_audio_text",
    "text": "image_from_text",
    "audio": "image_from_audio",
    "image to text": "text_from_image",
}


def _trials(lab: Lab) -> dict[Any, Trial]:
    samples = {split: count // (10 if lab.tiny else 1) for split, count in SAMPLES.items()}
    bits = lab.dataset(
        f"xor-1.0{'-tiny' if lab.tiny else ''}",
        {"p_hat": 1.0, "bits": BITS, "samples": samples},
        lambda split: xor_split(1.0, samples[split], split),
        list(SAMPLES),
    )
    digits = digits_data(lab, LANGUAGES, lab.size(TRAIN, 20_000, TINY_TRAIN))
    trials: dict[Any, Trial] = {}
    for name, method in METHODS.items():
        for seed in range(lab.seeds):
            steps, batch = lab.size(1000, 300, 20), lab.size(1000, 500, 250)
            content = bits_config(["a", "b", "c"], BITS, str(bits), "symile", seed, steps, batch)
            content["objective"] = dict(method.objective)
            content["model"] |= {key: value for key, value in method.model.items() if key == "logit_scale_init"}
            trials["xor", name, seed] = Trial(lab.config(f"xor-{name}-seed{seed}", content), best_of)
            objective = (SYMILE if method.objective["name"] == "symile" else {}) | method.objective
            content = digits_config(digits, objective, seed, lab.size(STEPS, 250, 4), lab.size(BATCH, BATCH, 64))
            content["model"] |= method.model
            trials["digits", name, seed] = Trial(lab.config(f"digits-{name}-seed{seed}", content), best_of)
    return trials


def run(lab: Lab) -> Report:
    """XOR, and M3-digits of two languages: 2 -> 1 and 1 -> 1 retrieval."""
    trials = _trials(lab)
    found = dict(zip(trials, lab.run(list(trials.values())), strict=True))

    def accuracy(task: str, name: str, direction: str) -> list[float]:
        return [found[task, name, seed]["evaluation"]["retrieval"][direction]["accuracy"] for seed in range(lab.seeds)]

    values: dict[str, Any] = {
        name: {
            "xor": accuracy("xor", name, "b_from_a_c"),
            **{key: accuracy("digits", name, direction) for key, direction in DIGITS.items()},
        }
        for name in METHODS
    }
    report = Report(
        "successors",
        "Symile and what came after it",
        "GRAM (ICLR 2025, arXiv 2412.11959), TRIANGLE (NeurIPS 2025), ConFu (arXiv 2511.21331) and Gated Symile (arXiv "
        "2604.05834) with Symile's encoders, data and steps; each with its own normalisation and initial logit scale.",
        values=values,
    )
    rows = [
        [method.title, *(str(mean_error(values[name][key])) for key in ("xor", *DIGITS))]
        for name, method in METHODS.items()
    ]
    header = ["objective", "XOR: b from a, c", "image from audio + text", "image from text", "image from audio"]
    report.tables.append(
        Table("Accuracy: XOR (chance 0.031), M3-digits, w = 2 (chance 0.01)", [*header, "text from image"], rows)
    )
    symile = {key: mean_error(seen).mean for key, seen in values["symile"].items()}
    report.checks = [
        at_least("Symile on XOR", symile["xor"], 0.96),
        at_least("Symile's image from audio + text", symile["both"], 0.85 if lab.quick else 0.9),
    ]
    report.notes.append("Of the two numbers in a text one is the image's: text alone names it in half of the cases.")
    report.figures.append(_figure(lab, values))
    if lab.quick:
        report.notes.append("Quick: 300 steps of 500 on XOR; 250 steps of 512 on 20,000 samples of M3-digits.")
    return report


def _figure(lab: Lab, values: dict[str, Any]) -> str:
    figure, (axes,) = new_figure(width=9)
    groups = ["xor", *DIGITS]
    labels = [
        "XOR\nb from a, c",
        "image from\naudio + text",
        "image from\ntext",
        "image from\naudio",
        "text from\nimage",
    ]
    width = 0.8 / len(METHODS)
    for number, (name, method) in enumerate(METHODS.items()):
        means = [mean_error(values[name][key]) for key in groups]
        places = [group + (number - (len(METHODS) - 1) / 2) * width for group in range(len(groups))]
        errors = [mean.error if mean.error == mean.error else 0.0 for mean in means]
        axes.bar(places, [mean.mean for mean in means], width, yerr=errors, color=method.color, label=method.title)
    axes.set(ylabel="accuracy", ylim=(0, 1.02))
    axes.set_xticks(range(len(groups)), labels)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return save_figure(figure, lab.folder, "successors")
