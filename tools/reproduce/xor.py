"""Binary XOR (Symile, arXiv 2411.01053, section 5.1, Fig. 3), and XOR of eight modalities (its package's example)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symile_dist.seeding import philox
from symile_dist.tools.evaluate import evaluate_run
from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.report import (
    COLORS,
    Report,
    Table,
    at_least,
    at_most,
    mean_error,
    new_figure,
    save_figure,
)
from symile_dist.tools.reproduce.samples import Split
from symile_dist.tools.reproduce.trial import Trial, best_of

BITS = 5
SAMPLES = {"train": 10_000, "val": 1_000, "test": 5_000}
OBJECTIVES = {"symile": "Symile", "pairwise_clip": "CLIP"}
DIRECTION = "b_from_a_c"
TOLERANCE = 0.04


def bayes_accuracy(p_hat: float) -> float:
    """Of the best guess of b from (a, c): right where c = a XOR b, and where b is 0 by chance."""
    return ((2**BITS - 1) * p_hat + 1) / 2**BITS


def entropy(probabilities: list[float]) -> float:
    """In nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def information(p_hat: float) -> dict[str, float]:
    """Total correlation of (a, b, c), I(a; c) and I(b; c | a), in nats; the other pairs share none."""
    values = 2**BITS
    flipped = p_hat / values
    pair = BITS * math.log(2) - entropy([1 - p_hat + flipped] + [flipped] * (values - 1))
    total = BITS * math.log(2) - (values - 1) / values * entropy([p_hat, 1 - p_hat])
    return {"total_correlation": total, "pair": pair, "conditional": total - pair}


def linear_modality(name: str, bits: int) -> dict[str, Any]:
    return {
        "member": f"{name}.npy",
        "decoder": "npy",
        "transform": "tensor",
        "encoder": {"name": "mlp", "input_dim": bits},
    }


def bits_config(
    names: list[str], bits: int, data: str, objective: str, seed: int, steps: int, batch: int
) -> dict[str, Any]:
    """The published setting: linear encoders to unit vectors of 16 dimensions, AdamW at 0.1."""
    every = steps // 20 if steps >= 100 else max(1, steps // 2)
    return {
        "seed": seed,
        "data": {
            "train": f"{data}/train",
            "validation": f"{data}/val",
            "test": f"{data}/test",
            "loader_processes": 0,
        },
        "modalities": {name: linear_modality(name, bits) for name in names},
        "model": {"embedding_dim": 16, "normalization": "l2", "logit_scale_init": -0.3},
        "objective": objective,
        "optimizer": {
            "lr": 0.1,
            "weight_decay": 0.01,
            "betas": [0.9, 0.999],
            "schedule": "constant",
            "max_grad_norm": 0,
        },
        "train": {"steps": steps, "global_batch_size": batch, "zero_stage": 0, "log_every": every},
        "validation": {"every": every},
        "checkpoint": {"every": every},
        "metrics": {"enabled": False},
    }


def to_words(bits: NDArray[Any]) -> list[str]:
    """(n, k) zeros and ones -> "01101", ..."""
    return ["".join(map(str, row)) for row in bits.astype(int).tolist()]


def xor_split(p_hat: float, count: int, split: str) -> Split:
    """a and b uniform; c = a XOR b with probability p_hat, drawn once per sample, else a. The class is b."""
    rng = np.random.Generator(philox("xor", str(p_hat), split))
    a, b = rng.integers(0, 2, (2, count, BITS))
    flipped = rng.random(count) < p_hat
    c = np.where(flipped[:, None], a ^ b, a)
    return {"a": a.astype(np.float32), "b": b.astype(np.float32), "c": c.astype(np.float32)}, to_words(b)


def best_and_last(folder: Path) -> dict[str, Any]:
    """Retrieval of the checkpoint that was best at the task on the validation split, and all of the last one."""
    return {"best": evaluate_run(folder, step="best", metrics=["retrieval"]), "last": evaluate_run(folder)}


def run(lab: Lab) -> Report:
    """Accuracy and information against p_hat.

    The authors take the checkpoint of the lowest validation loss. Where p_hat is small, Symile with linear encoders is
    near the best possible accuracy after some hundred steps, and then goes on to a lower loss and a lower accuracy:
    sums over single bits fit a distribution that is a mixture of two only roughly, and what they lose at c = a XOR b,
    which is rare, they win at c = a. So the accuracy is that of the checkpoint that is best at the task; the last one's
    is told beside it.
    """
    every_p = [0.0, 0.3, 0.5, 0.8, 1.0] if lab.quick else [round(0.1 * k, 1) for k in range(11)]
    every_p = [0.0, 1.0] if lab.tiny else every_p
    steps, batch = lab.size(1000, 300, 40), lab.size(1000, 500, 250)
    samples = {split: count // (10 if lab.tiny else 1) for split, count in SAMPLES.items()}
    trials = {}
    for p_hat in every_p:
        folder = lab.dataset(
            f"xor-{p_hat}{'-tiny' if lab.tiny else ''}",
            {"p_hat": p_hat, "bits": BITS, "samples": samples},
            lambda split, p=p_hat: xor_split(p, samples[split], split),  # type: ignore[misc]
            list(SAMPLES),
        )
        for objective in OBJECTIVES:
            for seed in range(lab.seeds):
                content = bits_config(["a", "b", "c"], BITS, str(folder), objective, seed, steps, batch)
                content["validation"]["best_metric"] = f"accuracy/{DIRECTION}"
                config = lab.config(f"p{p_hat}-{objective}-seed{seed}", content)
                trials[p_hat, objective, seed] = Trial(config, best_and_last)
    found = dict(zip(trials, lab.run(list(trials.values())), strict=True))
    values: dict[str, Any] = {"p_hat": every_p, "bayes": [bayes_accuracy(p) for p in every_p]}
    for objective in OBJECTIVES:
        values[objective] = [
            [_accuracy(found[p, objective, seed]["evaluation"]["best"]) for seed in range(lab.seeds)] for p in every_p
        ]
    values["symile_last"] = [
        [_accuracy(found[p, "symile", seed]["evaluation"]["last"]) for seed in range(lab.seeds)] for p in every_p
    ]
    values["bound"] = [
        [found[p, "symile", seed]["evaluation"]["last"]["total_correlation_bound"] for seed in range(lab.seeds)]
        for p in every_p
    ]
    values["information"] = [information(p) for p in every_p]
    report = Report(
        "xor",
        "Binary XOR: what only three modalities together tell",
        "Symile (NeurIPS 2024, arXiv 2411.01053), Fig. 3: predict b from (a, c), 5 bits each, where c = a XOR b with "
        "probability p_hat and c = a otherwise.",
        values=values,
    )
    report.tables.append(_table(values))
    report.checks = _checks(values)
    report.figures.append(_figure(lab, values))
    report.notes.append(
        "Accuracies are of the checkpoint with the highest accuracy on the 1,000 validation samples (the authors: the "
        "lowest loss); `its last step` and the information are of the last one."
    )
    if lab.quick:
        report.notes.append(
            f"Quick: {len(every_p)} values of p_hat, {steps} steps of {batch} (published: 1000 of 1000)."
        )
    return report


def _accuracy(evaluation: dict[str, Any]) -> float:
    return float(evaluation["retrieval"][DIRECTION]["accuracy"])


def _table(values: dict[str, Any]) -> Table:
    rows = [
        [
            f"{p:g}",
            str(mean_error(values["symile"][i])),
            str(mean_error(values["symile_last"][i])),
            str(mean_error(values["pairwise_clip"][i])),
            f"{values['bayes'][i]:.3f}",
            str(mean_error(values["bound"][i])),
            f"{values['information'][i]['total_correlation']:.3f}",
        ]
        for i, p in enumerate(values["p_hat"])
    ]
    header = [
        "p_hat",
        "Symile",
        "its last step",
        "CLIP",
        "best possible",
        "log N − held-out loss",
        "total correlation (nats)",
    ]
    return Table("Accuracy of b from (a, c) among 32 vectors (chance 0.031), and information", header, rows)


def _checks(values: dict[str, Any]) -> list[Any]:
    off = max(abs(mean_error(seen).mean - best) for seen, best in zip(values["symile"], values["bayes"], strict=True))
    clip = max(mean_error(seen).mean for seen in values["pairwise_clip"])
    above = max(
        mean_error(seen).mean - true["total_correlation"]
        for seen, true in zip(values["bound"], values["information"], strict=True)
    )
    checks = [
        at_most("Symile's distance from the best possible accuracy", off, TOLERANCE),
        at_most("CLIP's accuracy", clip, 0.06),
        at_most("log N − held-out loss, less the total correlation", above, 0.05),
    ]
    if values["p_hat"][-1] == 1.0:
        checks.append(at_least("log N − held-out loss at p_hat = 1", mean_error(values["bound"][-1]).mean, 3.3))
    return checks


def _figure(lab: Lab, values: dict[str, Any]) -> str:
    figure, (left, right) = new_figure(2)
    p = values["p_hat"]
    line = np.linspace(0, 1, 101)
    left.plot(line, [bayes_accuracy(x) for x in line], color=COLORS["bound"], linestyle="--", label="best possible")
    for objective, title in OBJECTIVES.items():
        means = [mean_error(seen) for seen in values[objective]]
        errors = [0.0 if math.isnan(m.error) else m.error for m in means]
        left.errorbar(
            p, [m.mean for m in means], errors, marker="o", markersize=4, color=COLORS[objective], label=title
        )
    left.set(xlabel="p_hat", ylabel="accuracy of b from (a, c)", ylim=(0, 1.02), title="Retrieval")
    left.legend(frameon=False)
    truth = [information(x) for x in line]
    right.plot(line, [t["total_correlation"] for t in truth], color="black", label="total correlation")
    right.plot(line, [t["pair"] for t in truth], color=COLORS["pairwise_clip"], linestyle="--", label="I(a; c)")
    right.plot(line, [t["conditional"] for t in truth], color="#3a8f4d", linestyle="--", label="I(b; c | a)")
    bound = [mean_error(seen).mean for seen in values["bound"]]
    right.plot(p, bound, "o", markersize=4, color=COLORS["symile"], label="log N − held-out loss, Symile")
    right.set(xlabel="p_hat", ylabel="nats", title="Information", ylim=(0, 3.8))
    right.legend(frameon=False, fontsize=8)
    return save_figure(figure, lab.folder, "xor")


# -- eight modalities ------------------------------------------------------------------------------------------------

EIGHT = list("abcdefgh")
TARGET = f"h_from_{'_'.join(EIGHT[:-1])}"


def parity_split(count: int, split: str) -> Split:
    """Seven fair bits, and h, the XOR of all; the class is h."""
    bits = np.random.Generator(philox("xor-8", split)).integers(0, 2, (count, len(EIGHT) - 1))
    bits = np.concatenate([bits, bits.sum(axis=1, keepdims=True) % 2], axis=1)
    arrays = {name: bits[:, k : k + 1].astype(np.float32) for k, name in enumerate(EIGHT)}
    return arrays, to_words(bits[:, -1:])


def run_eight(lab: Lab) -> Report:
    """Eight modalities of one bit, of which only all together tell the last."""
    steps = lab.size(500, 400, 30)
    samples = {split: count // (10 if lab.tiny else 1) for split, count in SAMPLES.items()}
    folder = lab.dataset(
        f"xor-8{'-tiny' if lab.tiny else ''}",
        {"modalities": EIGHT, "samples": samples},
        lambda split: parity_split(samples[split], split),
        list(SAMPLES),
    )
    batch = lab.size(1000, 500, 250)
    trials = {
        (objective, seed): Trial(
            lab.config(f"{objective}-seed{seed}", bits_config(EIGHT, 1, str(folder), objective, seed, steps, batch)),
            best_of,
        )
        for objective in OBJECTIVES
        for seed in range(lab.seeds)
    }
    found = dict(zip(trials, lab.run(list(trials.values())), strict=True))
    accuracy = {
        objective: [found[objective, seed]["evaluation"]["retrieval"][TARGET]["accuracy"] for seed in range(lab.seeds)]
        for objective in OBJECTIVES
    }
    report = Report(
        "xor-8",
        "XOR of eight modalities",
        "The example of the Symile package: seven fair bits, each a modality, and the eighth, the XOR of all seven.",
        values=accuracy,
    )
    rows = [[title, str(mean_error(accuracy[objective]))] for objective, title in OBJECTIVES.items()]
    report.tables.append(Table("Accuracy of h from the other seven (chance 0.5)", ["objective", "accuracy"], rows))
    report.checks = [at_least("Symile's accuracy", mean_error(accuracy["symile"]).mean, 0.98)]
    figure, (axes,) = new_figure()
    for objective, title in OBJECTIVES.items():
        for seed in range(lab.seeds):
            records = found[objective, seed]["validation"]
            label = title if seed == 0 else None
            seen = [record[f"accuracy/{TARGET}"] for record in records]
            axes.plot([record["step"] for record in records], seen, color=COLORS[objective], label=label)
    axes.axhline(0.5, color=COLORS["bound"], linestyle=":", linewidth=1, label="chance")
    axes.set(xlabel="step", ylabel="validation accuracy of h from the others", ylim=(0.4, 1.02))
    axes.legend(frameon=False)
    report.figures.append(save_figure(figure, lab.folder, "xor-8"))
    return report
