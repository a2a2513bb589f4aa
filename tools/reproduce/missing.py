"""Missing modalities: XOR (an example of the Symile package) and M3-digits (Symile, arXiv 2411.01053, Fig. 4c)."""

from __future__ import annotations

from typing import Any

from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.m3_digits import (
    BATCH,
    OBJECTIVES,
    TINY_TRAIN,
    accuracies,
    digits_config,
    digits_data,
    draw,
    of_name,
)
from symile_dist.tools.reproduce.report import (
    Check,
    Report,
    Table,
    at_least,
    mean_error,
    new_figure,
    save_figure,
)
from symile_dist.tools.reproduce.trial import Trial, best_of
from symile_dist.tools.reproduce.xor import BITS, DIRECTION, SAMPLES, bits_config, xor_split

P_XOR = 0.2
P_DIGITS = (0.5, 0.6, 0.7)
TRAIN = 60_000
STEPS = {0.5: 1000, 0.6: 2000, 0.7: 2000}
"""The rarer whole samples are, the longer it takes until the loss begins to fall."""
QUICK_STEPS = 400
PUBLISHED = {0.5: "0.915", 0.6: "", 0.7: "0.638"}
"""Symile on Symile-M3, w = 2, by its authors."""
LANGUAGES = 2


def with_missing(content: dict[str, Any], probability: float) -> dict[str, Any]:
    """A config whose samples lack each modality with a probability; a learned vector stands where it lacks."""
    content["data"]["missing_probability"] = probability
    for modality in content["modalities"].values():
        modality["missing_embedding"] = True
    return content


def run(lab: Lab) -> Report:
    """Trains on samples that lack modalities, tests on whole ones."""
    xor_steps = lab.size(1000, 400, 40)
    samples = {split: count // (10 if lab.tiny else 1) for split, count in SAMPLES.items()}
    folder = lab.dataset(
        f"xor-1.0{'-tiny' if lab.tiny else ''}",
        {"p_hat": 1.0, "bits": BITS, "samples": samples},
        lambda split: xor_split(1.0, samples[split], split),
        list(SAMPLES),
    )
    trials: dict[Any, Trial] = {}
    for seed in range(lab.seeds):
        content = bits_config(["a", "b", "c"], BITS, str(folder), "symile", seed, xor_steps, lab.size(1000, 500, 250))
        config = lab.config(f"xor-symile-seed{seed}", with_missing(content, P_XOR))
        trials["xor", "symile", seed] = Trial(config, best_of)
    probabilities = P_DIGITS if not lab.quick else P_DIGITS[:1]
    data = digits_data(lab, LANGUAGES, lab.size(TRAIN, 20_000, TINY_TRAIN))
    for p in probabilities:
        for objective in OBJECTIVES:
            for seed in range(lab.seeds):
                steps = lab.size(STEPS[p], QUICK_STEPS, 4)
                content = digits_config(data, of_name(objective), seed, steps, lab.size(BATCH, BATCH, 64))
                config = lab.config(f"p{p}-{objective}-seed{seed}", with_missing(content, p))
                trials[p, objective, seed] = Trial(config, best_of)
    found = dict(zip(trials, lab.run(list(trials.values())), strict=True))
    xor = [found["xor", "symile", seed]["evaluation"]["retrieval"][DIRECTION]["accuracy"] for seed in range(lab.seeds)]
    digits = {
        str(p): {objective: accuracies(found, lab, p, objective) for objective in OBJECTIVES} for p in probabilities
    }
    report = Report(
        "missing",
        "Missing modalities",
        "Symile (NeurIPS 2024, arXiv 2411.01053), Fig. 4c, and the missing-data example of its package: each modality "
        "of a training or validation sample is withheld with probability p; test samples are whole. What an encoder "
        "makes of a modality that is not there is a learned vector.",
        values={"xor": xor, "m3-digits": digits},
    )
    report.tables.append(
        Table(
            f"XOR, p = {P_XOR:g}: b from (a, c) among 32 vectors",
            ["objective", "accuracy"],
            [["Symile", str(mean_error(xor))]],
        )
    )
    rows = [
        [
            str(p),
            f"{(1 - p) ** 3:.1%}",
            *(str(mean_error(digits[str(p)][objective])) for objective in OBJECTIVES),
            f"{1 / LANGUAGES:.1f}",
            PUBLISHED[p],
        ]
        for p in probabilities
    ]
    header = ["p", "whole samples", "Symile", "CLIP", "ceiling of pairs", "Symile-M3: Symile"]
    report.tables.append(Table("M3-digits, two languages: the image from (audio, text)", header, rows))
    report.checks.append(at_least(f"Symile on XOR with p = {P_XOR:g}", mean_error(xor).mean, 0.95))
    for p in [p for p in probabilities if p < 0.7]:
        seen = digits[str(p)]
        margin = mean_error(seen["symile"]).mean - mean_error(seen["pairwise_clip"]).mean
        report.checks.append(Check(f"Symile above CLIP at p = {p}", f"by {margin:.3f}", margin > 0))
    figure, (axes,) = new_figure()
    for objective, title in OBJECTIVES.items():
        draw(axes, list(probabilities), [digits[str(p)][objective] for p in probabilities], objective, title)
    axes.axhline(1 / LANGUAGES, color="#7a7a7a", linestyle="--", linewidth=1, label="ceiling of pairs, 1/w")
    axes.set(xlabel="probability p that a modality is missing", ylabel="accuracy of the image", ylim=(0, 1.02))
    axes.set_xticks(list(probabilities))
    axes.legend(frameon=False)
    report.figures.append(save_figure(figure, lab.folder, "missing"))
    if lab.quick:
        report.notes.append(f"Quick: 20,000 training samples, {QUICK_STEPS} steps, p = 0.5 alone.")
    return report
