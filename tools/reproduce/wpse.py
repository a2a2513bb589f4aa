"""WPSE (arXiv 2404.19228): its random features, what its similarity can learn and CLIP's cannot, images and words."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from symile_dist.data.demo import number_name, scan_split
from symile_dist.objectives import PairwiseClipLoss, WPSELoss
from symile_dist.objectives.kernels import draw_waves, make_kernel
from symile_dist.run_directory import load_run
from symile_dist.seeding import philox
from symile_dist.storage import write_text
from symile_dist.tools.checkpoints import find_checkpoint
from symile_dist.tools.evaluate import evaluate_run
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
from symile_dist.tools.reproduce.samples import Split
from symile_dist.tools.reproduce.trial import Trial, best_of
from symile_dist.tools.reproduce.xor import to_words
from symile_dist.tools.trained import load_trained


class Method(NamedTuple):
    title: str
    objective: dict[str, Any]
    makes_points: bool
    """Else its encoders emit vectors, which are points of weight 1."""
    color: str


METHODS = {
    "clip": Method("CLIP: one point", {"alphas": [1, 0]}, False, COLORS["pairwise_clip"]),
    "linear": Method("points, linear", {"alphas": [1, 0]}, True, "#b0a13f"),
    "gaussian": Method("points, linear + Gaussian", {"kernel": "gaussian"}, True, COLORS["symile"]),
    "imq": Method("points, linear + IMQ", {"kernel": "imq"}, True, "#3a8f4d"),
}
POINTS = 8
"""Of an image, a caption, or a vector of bits."""
SHORT = {"clip": "CLIP", "linear": "linear", "gaussian": "Gaussian", "imq": "IMQ"}
KERNELS = {"gaussian": "Gaussian", "imq": "IMQ"}
# The scale's logarithm is learned: in so few steps the paper's form, the scale itself, would hardly move.
SCALE = {"logit_scale_init": 2.66, "logit_scale_range": [1, 100], "normalization": "none"}


def run(lab: Lab) -> Report:
    """All of it; the training runs beside each other."""
    trials = {**_digits_trials(lab), **_pmi_trials(lab), **_xor_trials(lab)}
    found = dict(zip(trials, lab.run(list(trials.values())), strict=True))
    report = Report(
        "wpse",
        "Weighted point sets: kernels, pointwise mutual information, XOR, images and words",
        "WPSE (ICLR 2025, arXiv 2404.19228). The paper trains on CC3M and CC12M (configs/wpse-cc3m.yaml); what is here "
        "needs no download.",
    )
    _approximation(lab, report)
    _clip_equality(report)
    _pmi(lab, report, found)
    _xor(lab, report, found)
    _digits(lab, report, found)
    report.figures.append(_figure(lab, report.values))
    if lab.quick:
        report.notes.append(
            f"Quick: {PMI_STEPS[1]} steps for the mutual information, {XOR_STEPS[1]} for XOR, {DIGITS_STEPS[1]} for "
            "images and words."
        )
    return report


def _config(
    data: Path, modalities: dict[str, Any], objective: dict[str, Any], seed: int, steps: int, batch: int, dimension: int
) -> dict[str, Any]:
    """What all training runs here have in common."""
    every = steps // 10 if steps >= 100 else max(1, steps // 2)
    splits = {"train": "train", "validation": "val", "test": "test"}
    return {
        "seed": seed,
        "data": {split: str(data / folder) for split, folder in splits.items()} | {"loader_processes": 0},
        "modalities": modalities,
        "model": {"embedding_dim": dimension, **SCALE},
        "objective": {"name": "wpse", **objective},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.0, "warmup_steps": min(50, steps // 4), "max_grad_norm": 1.0},
        "train": {"steps": steps, "global_batch_size": batch, "zero_stage": 0, "log_every": every},
        "validation": {"every": every},
        "checkpoint": {"every": every},
        "metrics": {"enabled": False},
    }


def _methods(lab: Lab) -> dict[str, Method]:
    return {name: method for name, method in METHODS.items() if not lab.tiny or name in ("clip", "gaussian")}


def _encoder(method: Method, name: str, width: int, points: int, **options: Any) -> dict[str, Any]:
    """An encoder of vectors as it is, or with points made of a vector that is `width` long."""
    encoder = {"name": name, **options}
    if not method.makes_points:
        return encoder
    return {"name": "points", "encoder": encoder, "width": width, "points": points}


# -- random features ---------------------------------------------------------------------------------------------------

FEATURES = (256, 1024, 4096)
DRAWS = 10


def approximation_error(kernel: str, features: int, dimension: int = 512, number: int = 2) -> float:
    """Mean |product of random features - kernel| over unit vectors at all distances from each other."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(number, 256, dimension, generator=generator), dim=2)
    away = torch.linspace(0, 1, 256)[:, None]
    vectors[1:] = torch.nn.functional.normalize(torch.lerp(vectors[:1], vectors[1:], away), dim=2)
    chosen = make_kernel(kernel, 0.5, number)
    squares = [(u - v).square().sum(dim=1) for u, v in combinations(vectors, 2)]
    exact = chosen(torch.stack(squares).mean(dim=0))
    errors = []
    for draw in range(DRAWS):
        waves = draw_waves(chosen, features, dimension, number, "approximation", draw)
        product = torch.stack([waves(vector, m) for m, vector in enumerate(vectors)]).prod(dim=0).sum(dim=1)
        errors.append(float((product - exact).abs().mean()))
    return sum(errors) / len(errors)


def _approximation(lab: Lab, report: Report) -> None:
    columns = FEATURES[:2] if lab.tiny else FEATURES
    errors = {kernel: [approximation_error(kernel, features) for features in columns] for kernel in KERNELS}
    three = {kernel: approximation_error(kernel, 1024, number=3) for kernel in KERNELS}
    report.values["random_features"] = {"features": columns, "error": errors, "three_vectors": three}
    rows = [
        [KERNELS[kernel], *(f"{error:.4f}" for error in errors[kernel]), f"{three[kernel]:.4f}"] for kernel in KERNELS
    ]
    header = ["kernel", *(f"D = {features}" for features in columns), "three vectors, D = 1024"]
    report.tables.append(Table("Mean |random features − kernel|, vectors of 512 dimensions", header, rows))
    for kernel, title in KERNELS.items():
        report.checks.append(at_most(f"error at D = 1024, {title}", errors[kernel][columns.index(1024)], 0.035))


def _clip_equality(report: Report) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(256, 64, generator=generator) for _ in range(2))
    found = WPSELoss(alphas=(1, 0))([image, text], 14.2857, step=0)
    clip = PairwiseClipLoss(normalize=True)([image, text], 14.2857)
    difference = abs(float(found) - float(clip))
    report.values["clip_equality"] = {"wpse": float(found), "clip": float(clip)}
    claim = "one point of weight 1, linear: |loss − CLIP's| ≤ 1e-6"
    report.checks.append(Check(claim, f"{difference:.1e}", difference <= 1e-6))


# -- pointwise mutual information --------------------------------------------------------------------------------------

SYMBOLS, PMI_DIMENSION, PMI_POINTS = 8, 2, 4
PMI_SAMPLES = {"train": 60_000, "val": 4_096, "test": 8_192}
PMI_STEPS = (1200, 400, 20)


def joint_distribution() -> NDArray[np.float64]:
    """(SYMBOLS, SYMBOLS): exp of normal numbers, brought to uniform marginals. The centred PMI has full rank."""
    joint = np.exp(np.random.Generator(philox("wpse joint")).standard_normal((SYMBOLS, SYMBOLS)))
    for _ in range(200):
        joint /= joint.sum(axis=1, keepdims=True) * SYMBOLS
        joint /= joint.sum(axis=0, keepdims=True) * SYMBOLS
    return joint


def pointwise_information() -> NDArray[np.float64]:
    """log p(x, y) / (p(x) p(y)), in nats."""
    return np.log(joint_distribution() * SYMBOLS**2)


def centred(matrix: NDArray[Any]) -> NDArray[Any]:
    """Less the means of rows and columns: what the symmetric InfoNCE determines."""
    centred: NDArray[Any] = matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()
    return centred


def symbols_split(split: str, count: int) -> Split:
    drawn = np.random.Generator(philox("wpse symbols", split)).random(count)
    cells = np.searchsorted(joint_distribution().cumsum(), drawn).clip(max=SYMBOLS**2 - 1)
    one_hot = np.eye(SYMBOLS, dtype=np.float32)
    return {"x": one_hot[cells // SYMBOLS], "y": one_hot[cells % SYMBOLS]}, None


def symbols_of(folder: Path) -> dict[str, Any]:
    """The exact similarity of all pairs of symbols, times the scale, and the bound on their mutual information."""
    config = load_run(folder)
    module = load_trained(config, find_checkpoint(config, "latest"))
    every = torch.eye(SYMBOLS)
    there = torch.ones(SYMBOLS, dtype=torch.bool)
    loss: Any = module.objective.loss
    with torch.no_grad():
        sets = [module.model.encode(name, every, there) for name in config.modalities]
        logits: Tensor = module.model.multiplier() * loss.similarity(sets)
    held_out = evaluate_run(folder, metrics=(), write=False)["loss"]
    return {"logits": logits.tolist(), "information": math.log(config.train.global_batch_size) - held_out}


def _pmi_trials(lab: Lab) -> dict[Any, Trial]:
    samples = {split: count // (50 if lab.tiny else 1) for split, count in PMI_SAMPLES.items()}
    data = lab.dataset(
        f"wpse-symbols{'-tiny' if lab.tiny else ''}",
        {"symbols": SYMBOLS, "samples": samples},
        lambda split: symbols_split(split, samples[split]),
        list(samples),
    )
    trials: dict[Any, Trial] = {}
    for name, method in _methods(lab).items():
        for seed in range(lab.seeds):
            modalities = {
                modality: {
                    "member": f"{modality}.npy",
                    "decoder": "npy",
                    "transform": "tensor",
                    "encoder": _encoder(method, "mlp", 64, PMI_POINTS, input_dim=SYMBOLS),
                }
                for modality in ("x", "y")
            }
            objective = {**method.objective, "features": lab.size(512, 256, 64)}
            # Large batches: with one sample per pair of symbols a batch tells little of their joint distribution.
            steps, batch = lab.size(*PMI_STEPS), lab.size(1024, 1024, 64)
            content = _config(data, modalities, objective, seed, steps, batch, PMI_DIMENSION)
            content["optimizer"]["lr"] = 1e-2
            trials["pmi", name, seed] = Trial(lab.config(f"pmi-{name}-seed{seed}", content), symbols_of)
    return trials


def _pmi(lab: Lab, report: Report, found: dict[Any, dict[str, Any]]) -> None:
    truth = centred(pointwise_information())
    information = float((joint_distribution() * pointwise_information()).sum())
    correlations: dict[str, list[float]] = {}
    bounds: dict[str, list[float]] = {}
    methods = _methods(lab)
    for name in methods:
        results = [found["pmi", name, seed]["evaluation"] for seed in range(lab.seeds)]
        correlations[name] = [
            float(np.corrcoef(centred(np.array(result["logits"])).ravel(), truth.ravel())[0, 1]) for result in results
        ]
        bounds[name] = [result["information"] for result in results]
    report.values["pmi"] = {
        "correlation": correlations,
        "information": {"true": information, **bounds},
        "truth": truth.tolist(),
        "logits": {name: found["pmi", name, 0]["evaluation"]["logits"] for name in methods},
        "rank": int((np.linalg.svd(truth, compute_uv=False) > 1e-6).sum()),
    }
    rows = [
        [method.title, str(mean_error(correlations[name])), str(mean_error(bounds[name])), f"{information:.3f}"]
        for name, method in methods.items()
    ]
    header = ["similarity", "correlation with the PMI", "log N − held-out loss (nats)", "mutual information"]
    title = (
        f"Pointwise mutual information of {SYMBOLS} x {SYMBOLS} symbols (rank {report.values['pmi']['rank']}), vectors "
        f"of {PMI_DIMENSION} dimensions"
    )
    report.tables.append(Table(title, header, rows))
    seen, clip = (mean_error(correlations[name]).mean for name in ("gaussian", "clip"))
    report.checks.append(at_least("correlation with the PMI, Gaussian", seen, 0.95))
    report.checks.append(Check("it is above CLIP's", f"by {seen - clip:.3f}", seen > clip))


# -- XOR ---------------------------------------------------------------------------------------------------------------

XOR_SAMPLES = {"train": 10_000, "val": 1_000, "test": 2_000}
XOR_STEPS = (150, 100, 10)
XOR_BITS = {1: (8, 512), 3: (8, 512), 5: (16, 4096)}
"""-> points and random features."""
XOR_FORMS = {"symile": "Symile-WPSE, kernel alone", "pairwise": "pairwise WPSE, kernel alone"}


def bits_of(number: int) -> str:
    return f"{number} bit{'s' if number > 1 else ''}"


def xor_bits_split(bits: int, split: str, count: int) -> Split:
    """a, b fair, c = a XOR b; the class is b."""
    a, b = np.random.Generator(philox("wpse xor", bits, split)).integers(0, 2, (2, count, bits))
    arrays = {"a": a.astype(np.float32), "b": b.astype(np.float32), "c": (a ^ b).astype(np.float32)}
    return arrays, to_words(b)


def _xor_trials(lab: Lab) -> dict[Any, Trial]:
    samples = {split: count // (10 if lab.tiny else 1) for split, count in XOR_SAMPLES.items()}
    trials: dict[Any, Trial] = {}
    chosen = [3] if lab.tiny else [1, 3] if lab.quick else XOR_BITS
    for bits in chosen:
        points, features = XOR_BITS[bits]
        data = lab.dataset(
            f"wpse-xor-{bits}{'-tiny' if lab.tiny else ''}",
            {"bits": bits, "samples": samples},
            lambda split, bits=bits: xor_bits_split(bits, split, samples[split]),  # type: ignore[misc]
            list(samples),
        )
        encoder = _encoder(METHODS["gaussian"], "mlp", 32, points, input_dim=bits) | {"landmarks": True}
        for form in list(XOR_FORMS)[:1] if lab.tiny else XOR_FORMS:
            for seed in range(lab.seeds):
                modalities = {
                    name: {
                        "member": f"{name}.npy",
                        "decoder": "npy",
                        "transform": "tensor",
                        "encoder": encoder,
                    }
                    for name in "abc"
                }
                objective = {"form": form, "alphas": [0, 1], "bandwidth": 0.3}
                objective["features"] = lab.size(features, features, 64)
                steps, batch = lab.size(*XOR_STEPS), lab.size(256, 256, 64)
                content = _config(data, modalities, objective, seed, steps, batch, 16)
                content["optimizer"]["lr"] = 1e-2
                trials["xor", bits, form, seed] = Trial(lab.config(f"xor{bits}-{form}-seed{seed}", content), best_of)
    return trials


def _xor(lab: Lab, report: Report, found: dict[Any, dict[str, Any]]) -> None:
    settings = sorted({key[1] for key in found if key[0] == "xor"})
    accuracy = {
        form: {
            bits: [
                found["xor", bits, form, seed]["evaluation"]["retrieval"]["b_from_a_c"]["accuracy"]
                for seed in range(lab.seeds)
            ]
            for bits in settings
        }
        for form in sorted({key[2] for key in found if key[0] == "xor"}, reverse=True)
    }
    report.values["xor"] = accuracy
    rows = [[XOR_FORMS[form], *(str(mean_error(seen[bits])) for bits in settings)] for form, seen in accuracy.items()]
    rows.append(["chance", *(f"{2.0**-bits:.3f}" for bits in settings)])
    header = ["objective", *map(bits_of, settings)]
    report.tables.append(Table("XOR of three modalities: accuracy of b from (a, c)", header, rows))
    for bits in settings:
        seen = mean_error(accuracy["symile"][bits]).mean
        report.checks.append(at_least(f"XOR of {bits_of(bits)} from the kernel alone", seen, 0.95))


# -- images and words --------------------------------------------------------------------------------------------------

DIGITS_DIMENSION = 16
DIGITS_SAMPLES = {"train": 20_000, "val": 2_000, "test": 2_000}
DIGITS_STEPS = (1200, 300, 4)
WHOLE = ("the number {}", "a scan of {}", "{}", "two digits, {}")
LEFT = ("it begins with {}", "the digit on the left is {}", "{} comes first")
RIGHT = ("it ends with {}", "the digit on the right is {}", "{} comes last")


def pictures_split(split: str, count: int) -> Split:
    """Two scans of handwritten digits side by side, and a caption of the number or of one digit.

    The class is the number. No scan of one split occurs in another.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = (digits.images * (255 / 16)).astype(np.uint8)
    of_digit = scan_split(digits.target, 0)[split]
    random = np.random.Generator(philox("wpse pictures", split))
    images, captions, classes = [], [], []
    for _ in range(count):
        number = int(random.integers(100))
        left, right = divmod(number, 10)
        chosen = [scans[of_digit[digit][int(random.integers(len(of_digit[digit])))]] for digit in (left, right)]
        images.append(np.concatenate(chosen, axis=1))
        names = number_name(number, "en").split()
        templates, name = ((WHOLE, " ".join(names)), (LEFT, names[0]), (RIGHT, names[1]))[int(random.integers(3))]
        captions.append(templates[int(random.integers(len(templates)))].format(name))
        classes.append(f"{number:02d}")
    return {"image": np.stack(images), "caption": captions}, classes


def pictures_of(folder: Path) -> dict[str, Any]:
    """Zero-shot classification with prompts, and a linear probe of the images."""
    found = evaluate_run(folder, step="best", metrics=(), probe=["image"], probe_samples=5_000)
    return {"zero_shot": found["zero_shot"]["image"], "probe": found["probe"]["image"]}


def _digits_trials(lab: Lab) -> dict[Any, Trial]:
    samples = {split: count // (20 if lab.tiny else 1) for split, count in DIGITS_SAMPLES.items()}
    data = lab.dataset(
        f"wpse-digits{'-tiny' if lab.tiny else ''}",
        {"captions": [WHOLE, LEFT, RIGHT], "samples": samples},
        lambda split: pictures_split(split, samples[split]),
        list(samples),
    )
    classes = lab.data("wpse-digits-classes.yaml")
    names = {f"{number:02d}": number_name(number, "en") for number in range(100)}
    write_text(classes, yaml.safe_dump({"text": "caption", "templates": list(WHOLE), "classes": names}))
    trials: dict[Any, Trial] = {}
    for name, method in _methods(lab).items():
        for seed in range(lab.seeds):
            modalities = {
                "image": {
                    "member": "image.npy",
                    "decoder": "npy",
                    "transform": {"name": "image", "mean": 0.3, "std": 0.35, "shift": 1},
                    "encoder": _encoder(method, "image_convnet", 128, POINTS),
                },
                "caption": {
                    "member": "caption.txt",
                    "decoder": "text",
                    "transform": "characters",
                    "encoder": _encoder(method, "text_convnet", 128, POINTS, dilations=[1, 2, 4], pooled=128),
                },
            }
            objective = {**method.objective, "features": lab.size(512, 512, 64)}
            steps, batch = lab.size(*DIGITS_STEPS), lab.size(256, 256, 64)
            content = _config(data, modalities, objective, seed, steps, batch, DIGITS_DIMENSION)
            content["optimizer"]["lr"] = 2e-3
            content["evaluation"] = {"zero_shot": str(classes)}
            trials["digits", name, seed] = Trial(lab.config(f"digits-{name}-seed{seed}", content), pictures_of)
    return trials


def _digits(lab: Lab, report: Report, found: dict[Any, dict[str, Any]]) -> None:
    values = {
        what: {
            name: [found["digits", name, seed]["evaluation"][what]["accuracy"] for seed in range(lab.seeds)]
            for name in _methods(lab)
        }
        for what in ("zero_shot", "probe")
    }
    report.values["digits"] = values
    rows = [
        [method.title, str(mean_error(values["zero_shot"][name])), str(mean_error(values["probe"][name]))]
        for name, method in _methods(lab).items()
    ]
    title = (
        f"Pairs of handwritten digits and captions of the number or of one digit, vectors of {DIGITS_DIMENSION} "
        "dimensions; accuracy among 100 numbers (chance 0.01)"
    )
    report.tables.append(Table(title, ["similarity", "zero-shot, 4 prompts per class", "linear probe"], rows))


def _figure(lab: Lab, values: dict[str, Any]) -> str:
    figure, (left, middle, right) = new_figure(3, width=4.4)
    truth = np.array(values["pmi"]["truth"]).ravel()
    for name in ("clip", "gaussian"):
        seen = centred(np.array(values["pmi"]["logits"][name])).ravel()
        left.plot(truth, seen, ".", markersize=3, color=METHODS[name].color, label=METHODS[name].title)
    limits = [truth.min(), truth.max()]
    left.plot(limits, limits, color=COLORS["bound"], linewidth=1)
    left.set(xlabel="pointwise mutual information, centred (nats)", ylabel="learned logit, centred", title="PMI")
    left.legend(frameon=False, fontsize=8)
    settings = sorted(values["xor"]["symile"])
    for offset, (form, accuracy) in enumerate(values["xor"].items()):
        means, title = [mean_error(accuracy[bits]).mean for bits in settings], XOR_FORMS[form]
        color = COLORS["symile"] if form == "symile" else COLORS["pairwise_clip"]
        middle.bar([place + 0.4 * offset for place in range(len(settings))], means, 0.38, color=color, label=title)
    middle.set(ylabel="accuracy of b from (a, c)", title="XOR of three modalities", ylim=(0, 1.25))
    middle.set_xticks([place + 0.2 for place in range(len(settings))], [*map(bits_of, settings)])
    middle.legend(frameon=False, fontsize=8)
    methods = _methods(lab)
    for offset, what in enumerate(("zero_shot", "probe")):
        accuracies = [mean_error(values["digits"][what][name]) for name in methods]
        errors = [0.0 if math.isnan(mean.error) else mean.error for mean in accuracies]
        places = [place + 0.4 * offset for place in range(len(methods))]
        colors = [method.color for method in methods.values()]
        label = "zero-shot" if what == "zero_shot" else "linear probe (pale)"
        right.bar(
            places,
            [mean.mean for mean in accuracies],
            0.38,
            yerr=errors,
            color=colors,
            alpha=1 - 0.5 * offset,
            label=label,
        )
    right.set(ylabel="accuracy among 100 numbers", title="Images and words", ylim=(0, 1.05))
    right.set_xticks([place + 0.2 for place in range(len(methods))], [SHORT[name] for name in methods])
    return save_figure(figure, lab.folder, "wpse")
