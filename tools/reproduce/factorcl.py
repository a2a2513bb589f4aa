"""FactorCL (NeurIPS 2023, arXiv 2306.05268): its bounds on Gaussians, and its experiment on synthetic data."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symile_dist.evaluation.probe import Split as ProbeSplit
from symile_dist.evaluation.probe import ridge_probe
from symile_dist.objectives.factorcl_critics import PairCritic, Pairs
from symile_dist.run_directory import load_run
from symile_dist.seeding import philox
from symile_dist.storage import read_json, write_json
from symile_dist.tools.checkpoints import find_checkpoint
from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.report import (
    Check,
    Report,
    Table,
    at_least,
    at_most,
    mean_error,
    new_figure,
    save_figure,
)
from symile_dist.tools.reproduce.samples import PARAMETERS, Split
from symile_dist.tools.reproduce.trial import Trial
from symile_dist.tools.trained import load_trained


def run(lab: Lab) -> Report:
    """The bounds first, then the trials beside each other."""
    bounds = {name: _estimated(lab, name) for name in GAUSSIANS}
    trials = {
        (method, seed): Trial(lab.config(f"{method}-seed{seed}", _config(lab, method, seed)), probe_run)
        for method in METHODS
        for seed in range(lab.seeds)
    }
    found = dict(zip(trials, lab.run(list(trials.values())), strict=True))
    probes = {method: [found[method, seed]["evaluation"] for seed in range(lab.seeds)] for method in METHODS}
    report = Report(
        "factorcl",
        "FactorCL: shared and unique information",
        "FactorCL (NeurIPS 2023, arXiv 2306.05268): NCE and NCE-CLUB on Gaussians of known mutual information (section "
        "4.1), and the synthetic data of its public code: x1 = [ws; w1] T1 and x2 = [ws; w2] T2, 100 dimensions each, "
        "and a label of all latents.",
        values={"bounds": bounds, "probes": probes},
    )
    report.tables += [_bounds_table(bounds), _accuracy_table(probes), _information_table(probes)]
    report.checks = _checks(lab, bounds, probes)
    report.figures.append(_figure(lab, bounds, probes))
    report.notes += _notes(lab)
    return report


# -- the bounds on Gaussians -----------------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """Pairs of Gaussian vectors whose mutual information is known."""

    title: str
    nats: float
    classes: int
    """1, or so many values of the condition Y, each with means of its own: nats are I(X1; X2 | Y)."""
    published: str


DIMENSION = 20
GAUSSIANS = {
    "unconditional": Gaussian("I(X1; X2)", 4.0, 1, "between the bounds, figure 3"),
    "conditional": Gaussian("I(X1; X2 given Y)", 2.32, 4, "NCE 2.18 to 2.30, NCE-CLUB 2.79 to 3.70"),
}


def _drawn(kind: Gaussian, means: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x1 and x2 (size, DIMENSION), with the condition beside them where there is one, and the condition."""
    correlation = math.sqrt(1 - math.exp(-2 * kind.nats / DIMENSION))
    label = torch.randint(kind.classes, (size,), generator=generator)
    x, noise = torch.randn(2, size, DIMENSION, generator=generator)
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    if kind.classes == 1:
        return x, y, label
    condition = torch.nn.functional.one_hot(label, kind.classes).float()
    return torch.cat([x + means[0][label], condition], 1), torch.cat([y + means[1][label], condition], 1), label


def estimate(kind: Gaussian, batch: int, hidden: int, steps: int, seed: int, progress: Any = None) -> dict[str, Any]:
    """Trains a critic by NCE on fresh samples; both bounds at every step, in nats."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, kind.classes, DIMENSION, generator=generator)
    width = DIMENSION + (kind.classes if kind.classes > 1 else 0)
    critic = PairCritic(width, width, hidden)
    optimizer = torch.optim.Adam(critic.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    lower, upper = [], []
    for step in range(steps):
        x, y, label = _drawn(kind, means, batch, generator)
        # Contrasted with samples of the same condition: that is what makes the bounds those of I(X1; X2 | Y).
        pairs = Pairs.all_of(batch, x)._replace(copies=(label[:, None] == label).float())
        club, loss = critic.upper_bound(x, y, pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        lower.append(-float(loss.detach()))
        upper.append(float(club.detach()))
        if progress:
            progress(step + 1)
    return {"lower": lower, "upper": upper, "nats": kind.nats}


LEARNING_RATE = 1e-3


def _estimated(lab: Lab, name: str) -> dict[str, Any]:
    """`estimate`, unless an earlier call in the same folder has done it."""
    settings = {
        "batch": lab.size(256, 256, 32),
        "hidden": lab.size(256, 128, 16),
        "steps": lab.size(1500, 300, 20),
        "seed": 0,
    }
    path = lab.folder / f"bounds-{name}.json"
    if path.exists() and (found := read_json(path))["settings"] == settings:
        return dict(found)
    found = estimate(
        GAUSSIANS[name], **settings, progress=lambda step: lab.progress(f"bounds, {name}", step, settings["steps"])
    )
    found["settings"] = settings
    write_json(path, found)
    return found


def smoothed(values: list[float]) -> float:
    """The mean over the last tenth of the steps."""
    return float(np.mean(values[-max(1, len(values) // 10) :]))


# -- the synthetic data ----------------------------------------------------------------------------------------------

UNIQUE, SHARED, WIDTH = 6, 10, 100
LATENTS = {"w1": UNIQUE, "w2": UNIQUE, "ws": SHARED}


def latents(parameters: dict[str, Any], split: str) -> dict[str, NDArray[np.float64]]:
    """w1, w2 and ws of a split: N(0, 0.5 I)."""
    rng = np.random.Generator(philox("factorcl", parameters["seed"], split))
    count = parameters["samples"][split]
    return {name: rng.normal(0.0, math.sqrt(0.5), (count, width)) for name, width in LATENTS.items()}


def synthetic(parameters: dict[str, Any], split: str) -> Split:
    """x1 and x2, and y: whether the mean of the latents that `label` names is 0 or more; the class is y."""
    drawn = latents(parameters, split)
    rng = np.random.Generator(philox("factorcl", parameters["seed"], "transforms"))
    arrays: dict[str, NDArray[Any]] = {}
    for number in ("1", "2"):
        mixed = np.concatenate([drawn["ws"], drawn[f"w{number}"]], axis=1)
        arrays[f"x{number}"] = (mixed @ rng.uniform(0.0, 1.0, (mixed.shape[1], WIDTH))).astype(np.float32)
    named = np.concatenate([drawn[name] for name in parameters["label"]], axis=1)
    arrays["y"] = (named.mean(axis=1) >= 0).astype(np.int64)
    return arrays, [str(label) for label in arrays["y"].tolist()]


class Method(NamedTuple):
    title: str
    objective: Any
    published: float | None
    """Accuracy, by the authors' notebook."""
    label: tuple[str, ...] = ("ws", "w1", "w2")
    """The latents that y depends on."""
    color: str = "#7a7a7a"


VIEWS = {"x1": "x1_view", "x2": "x2_view"}
METHODS = {
    "sup": Method("FactorCL-SUP", {"name": "factorcl", "label": "y"}, 0.9863, color="#1f6fb4"),
    "ssl": Method("FactorCL-SSL", {"name": "factorcl", "views": VIEWS}, 0.9717, color="#3a8f4d"),
    "simclr": Method("SimCLR", "symile_dist.tools.reproduce.simclr:SimCLRObjective", 0.9555, color="#d1622b"),
    "sup-w1": Method("FactorCL-SUP, y of w1 alone", {"name": "factorcl", "label": "y"}, None, ("w1",), "#8fb8dc"),
}


def _dataset(lab: Lab, label: tuple[str, ...]) -> Path:
    samples = {"train": lab.size(24_000, 24_000, 256), "test": lab.size(6_000, 6_000, 64)}
    parameters = {"seed": 0, "samples": samples, "label": list(label)}
    name = f"factorcl-{'all' if len(label) > 1 else label[0]}{'-tiny' if lab.tiny else ''}"
    return lab.dataset(name, parameters, lambda split: synthetic(parameters, split), list(samples))


def _config(lab: Lab, method: str, seed: int) -> dict[str, Any]:
    """The published setting, or with --quick a smaller one."""
    data = _dataset(lab, METHODS[method].label)
    hidden = lab.size(512, 256, 16)
    dimension = lab.size(128, 64, 8)
    encoder = {"name": "mlp", "input_dim": WIDTH, "hidden": [hidden] * 3, "activation": "relu"}
    modalities: dict[str, Any] = {
        name: {"member": f"{name}.npy", "decoder": "npy", "transform": "tensor", "encoder": encoder}
        for name in ("x1", "x2")
    }
    objective: Any = METHODS[method].objective
    if isinstance(objective, dict):
        objective = {**objective, "hidden": lab.size(512, 128, 16)}
        if "views" in objective:
            for name, view in VIEWS.items():
                of_view = {"transform": "features", "encoder_of": name}
                modalities[view] = {"member": f"{name}.npy", "decoder": "npy", **of_view}
        else:
            label = {"transform": {"name": "tensor", "dtype": "int64"}, "encoder": {"name": "one_hot", "classes": 2}}
            modalities["y"] = {"member": "y.npy", "decoder": "npy", **label}
    batch = lab.size(256, 128, 32)
    epochs = EPOCHS[method][0] if not lab.quick else EPOCHS[method][1]
    steps = 4 if lab.tiny else math.ceil(epochs * 24_000 / batch)
    lr = 1e-4 if not lab.quick else QUICK_RATE
    return {
        "seed": seed,
        "data": {"train": str(data / "train"), "test": str(data / "test"), "loader_processes": 0},
        "modalities": modalities,
        "model": {"embedding_dim": dimension, "normalization": "none"},
        "objective": objective,
        "optimizer": {
            "lr": lr,
            "betas": [0.9, 0.999],
            "weight_decay": 0,
            "schedule": "constant",
            "max_grad_norm": 0,
            "inner": {"lr": lr},
        },
        "train": {
            "steps": steps,
            "global_batch_size": batch,
            "zero_stage": 0,
            "log_every": max(1, steps // 20),
            "float32_matmul_precision": "medium",  # faster on CPUs that multiply bf16
        },
        "checkpoint": {"every": max(1, steps // 10)},
        "metrics": {"enabled": False},
    }


EPOCHS = {"sup": (10, 2), "ssl": (10, 2), "simclr": (20, 4), "sup-w1": (10, 2)}
"""Published, and with --quick."""
QUICK_RATE = 3e-4


# -- probes ----------------------------------------------------------------------------------------------------------


def probe_run(folder: Path) -> dict[str, Any]:
    """What a linear map reads from the frozen embeddings of a run: the label, and the latents (R^2)."""
    config = load_run(folder)
    module = load_trained(config, find_checkpoint(config, "latest"))
    parameters = read_json(Path(next(iter(config.data.train.values())).path).parent / PARAMETERS)["parameters"]
    embeddings, truths = {}, {}
    labels: dict[str, NDArray[Any]] = {}
    for split in ("train", "test"):
        arrays, _ = synthetic(parameters, split)
        inputs = {name: torch.from_numpy(arrays[name]) for name in ("x1", "x2")}
        embeddings[split] = _embedded(module, inputs)
        truths[split], labels[split] = latents(parameters, split), np.asarray(arrays["y"])
    found: dict[str, Any] = {"accuracy": {}, "r2": {}}
    for kind in (".encoder", ""):
        if f"x1{kind}" in embeddings["train"]:
            features = [
                np.concatenate([embeddings[s][f"x{k}{kind}"] for k in (1, 2)], axis=1) for s in ("train", "test")
            ]
            found["accuracy"]["encoders" if kind else "heads"] = _accuracy(features, labels)
    for name in embeddings["train"]:
        if "." in name:
            found["r2"][name] = {
                latent: ridge_probe(
                    ProbeSplit(embeddings["train"][name], truths["train"][latent]),
                    ProbeSplit(embeddings["test"][name], truths["test"][latent]),
                    alphas=[RIDGE],
                ).r2
                for latent in LATENTS
            }
    return found


RIDGE = 1e-5


def _embedded(module: Any, inputs: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    there = torch.ones(len(inputs["x1"]), dtype=torch.bool)
    with torch.no_grad():
        vectors = {name: module.model.encode(name, values, there) for name, values in inputs.items()}
        return {name: found.numpy() for name, found in module.objective.embeddings(vectors).items()}


def _accuracy(features: list[NDArray[Any]], labels: dict[str, NDArray[Any]]) -> float:
    """Of logistic regression with scikit-learn's defaults and at most 200 iterations, as the authors have it."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(
            LogisticRegression(max_iter=200).fit(features[0], labels["train"]).score(features[1], labels["test"])
        )


# -- the report ------------------------------------------------------------------------------------------------------

OF_PARTS = {
    "x1.unique": ("Z_U1", "7.83 / 0.06 / 9.47"),
    "x2.unique": ("Z_U2", "0.03 / 7.17 / 9.89"),
    "x1.shared": ("Z_S1", "6.25 / 0.05 / 10.13"),
    "x2.shared": ("Z_S2", "0.04 / 5.79 / 9.40"),
}
NATS = {("simclr", "x1.encoder"): ("SimCLR Z1", "4.45 / 0.17 / 12.61")} | {
    (method, name): (f"{METHODS[method].title}: {part}", "" if method == "sup-w1" else nats)
    for method in ("sup", "ssl", "sup-w1")
    for name, (part, nats) in OF_PARTS.items()
}
"""Method and embedding -> title, and the paper's table 1: I(Z; w1) / I(Z; w2) / I(Z; ws) in nats."""


def _bounds_table(bounds: dict[str, Any]) -> Table:
    rows = []
    for name, kind in GAUSSIANS.items():
        lower, upper = (smoothed(bounds[name][which]) for which in ("lower", "upper"))
        rows.append([kind.title, f"{kind.nats:.2f}", f"{lower:.2f}", f"{upper:.2f}", kind.published])
    header = ["of Gaussians", "truth", "NCE (lower)", "NCE-CLUB (upper)", "published"]
    return Table("The two bounds, in nats", header, rows)


def _accuracies(probes: dict[str, list[Any]], method: str, kind: str) -> list[float]:
    return [found["accuracy"][kind] for found in probes[method] if kind in found["accuracy"]]


def _r2(probes: dict[str, list[Any]], method: str, name: str, latent: str) -> list[float]:
    return [found["r2"][name][latent] for found in probes[method]]


def _accuracy_table(probes: dict[str, list[Any]]) -> Table:
    rows = []
    for name, method in METHODS.items():
        seen = [_accuracies(probes, name, kind) for kind in ("encoders", "heads")]
        told = [str(mean_error(values)) if values else "" for values in seen]
        rows.append([method.title, *told, "" if method.published is None else f"{method.published:.4f}"])
    header = ["objective", "encoders", "heads", "published (encoders)"]
    return Table("Accuracy of logistic regression on the concatenated frozen embeddings", header, rows)


def _information_table(probes: dict[str, list[Any]]) -> Table:
    rows = []
    for (method, name), (title, nats) in NATS.items():
        rows.append([title, *(str(mean_error(_r2(probes, method, name, latent))) for latent in LATENTS), nats])
    header = ["embedding", "w1", "w2", "ws", "published nats w1 / w2 / ws"]
    return Table("What a linear map reads of the latents (R² on the test split)", header, rows)


def _checks(lab: Lab, bounds: dict[str, Any], probes: dict[str, list[Any]]) -> list[Check]:
    lower, upper = (smoothed(bounds["unconditional"][which]) for which in ("lower", "upper"))
    accuracy = {name: mean_error(_accuracies(probes, name, "encoders")).mean for name in METHODS}
    least = LEAST_QUICK if lab.quick else LEAST
    checks = [
        at_most("NCE where 4 nats are the truth", lower, 4.1),
        Check("NCE ≤ NCE-CLUB", f"{lower:.3f} ≤ {upper:.3f}", lower <= upper),
        at_least("NCE-CLUB where 4 nats are the truth", upper, 3.9),
    ]
    for name, bound in least.items():
        checks.append(at_least(f"{METHODS[name].title}: accuracy", accuracy[name], bound))
        above = accuracy[name] > accuracy["simclr"]
        checks.append(
            Check(f"{METHODS[name].title} above SimCLR", f"{accuracy[name]:.3f}, {accuracy['simclr']:.3f}", above)
        )
    of_w1, of_w2 = (mean_error(_r2(probes, "sup-w1", "x1.unique", latent)).mean for latent in ("w1", "w2"))
    checks.append(at_most("Z_U1, y of w1 alone: R² of w2", of_w2, 0.05))
    checks.append(at_least("Z_U1, y of w1 alone: R² of w1", of_w1, 0.5))
    return checks


LEAST = {"sup": 0.97, "ssl": 0.95}
LEAST_QUICK = {"sup": 0.95, "ssl": 0.90}


def _figure(lab: Lab, bounds: dict[str, Any], probes: dict[str, list[Any]]) -> str:
    figure, (left, right) = new_figure(2)
    for (name, kind), color in zip(GAUSSIANS.items(), ("#1f6fb4", "#d1622b"), strict=True):
        window = max(1, len(bounds[name]["lower"]) // 40)
        for which, style, title in (("lower", "-", "NCE"), ("upper", "--", "NCE-CLUB")):
            values = np.convolve(bounds[name][which], np.ones(window) / window, mode="valid")
            left.plot(np.arange(len(values)) + window, values, style, color=color, label=f"{title}, {kind.title}")
        left.axhline(kind.nats, color=color, linewidth=1, linestyle=":")
    left.set(xlabel="step", ylabel="nats", title="Bounds (dotted: the truth)")
    left.set_ylim(0, 1.1 * max(smoothed(bounds[name]["upper"]) for name in GAUSSIANS))  # not the rise from the ground
    left.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.68))
    shown = [place for place in NATS if place[0] != "sup-w1" and place[1].startswith("x1")] + [("sup-w1", "x1.unique")]
    for number, latent in enumerate(LATENTS):
        heights = [max(0.0, mean_error(_r2(probes, *place, latent)).mean) for place in shown]
        places = np.arange(len(shown)) + (number - 1) * 0.26
        right.barh(places, heights, 0.24, label=latent, color=("#1f6fb4", "#d1622b", "#3a8f4d")[number])
    right.set_yticks(range(len(shown)), [NATS[place][0] for place in shown], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="R² of a linear map", title="Latents in the embeddings", xlim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    return save_figure(figure, lab.folder, "factorcl")


def _notes(lab: Lab) -> list[str]:
    notes = [
        "The condition: four values of Y with means of their own, contrasted within a value; the paper's conditional "
        "setting is not public, so its figures are beside ours, not a target.",
        "SimCLR as the authors have it: NT-Xent between the two modalities, through heads, 20 epochs.",
        "The paper's table of latents has one FactorCL: its figures, in nats, stand beside SUP's and SSL's. Here R² is "
        "what a linear map reads.",
    ]
    if lab.quick:
        notes.append(
            "Quick: half as wide (embeddings of 64, heads too), critics of 128 in place of 512, batches of 128 in "
            f"place of 256; {EPOCHS['sup'][1]} epochs in place of 10, at a learning rate of {QUICK_RATE:g} in place of "
            f"1e-4. SUP has to reach {LEAST_QUICK['sup']:g} and SSL {LEAST_QUICK['ssl']:g} only."
        )
    return notes
