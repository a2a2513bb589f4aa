"""FactorCL: presets on a tiny dataset of MultiBench's layout, its sequence encoder, the experiment's data and peer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from symile_dist.checkpoint.manifest import read_manifest
from symile_dist.cli import main
from symile_dist.config import Config, load_config
from symile_dist.encoders.sequence import FeatureTransformer
from symile_dist.preflight import preflight
from symile_dist.tools.evaluate import evaluate_run
from symile_dist.tools.reproduce.factorcl import latents, synthetic
from symile_dist.tools.reproduce.simclr import SimCLRObjective
from symile_dist.types import Batch, Outputs, Padded
from tests.processes import run_distributed

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = ("factorcl-sup", "factorcl-ssl")
SAMPLES = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factorcl")
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        arrays = {"vision": (SAMPLES, 50, 713), "text": (SAMPLES, 50, 300)}
        source = folder / "mosei" / split
        source.mkdir(parents=True)
        for name, shape in arrays.items():
            np.save(source / f"{name}.npy", rng.standard_normal(shape, dtype=np.float32))
        np.save(source / "label.npy", np.arange(SAMPLES) % 2)
        words = [f"--array={name}={source}/{name}.npy" for name in (*arrays, "label")]
        out = str(folder / "data" / "mosei" / split)
        assert main(["shards", "pack", "arrays", *words, "--class", f"{source}/label.npy", "--out", out]) == 0
    return folder


def in_folder(folder: Path, name: str) -> Config:
    overrides = [
        f"run.name={name}",
        "train.steps=2",
        "train.global_batch_size=4",
        "train.log_every=1",
        "validation.every=2",
        "checkpoint.every=2",
        "data.loader_processes=0",
        "ray.gpus_per_worker=0",
        "metrics.enabled=false",
        "objective.hidden=8",
    ]
    overrides += [f"modalities.{modality}.encoder.feedforward=8" for modality in ("vision", "text")]
    before = Path.cwd()
    os.chdir(folder)
    try:
        return load_config(CONFIGS / f"{name}.yaml", overrides).config.with_absolute_paths()
    finally:
        os.chdir(before)


def held_out(folder: Path) -> dict[str, Any]:
    return evaluate_run(folder, split="validation")


def train_and_evaluate(work: str) -> dict[str, Any]:
    from symile_dist.tools.reproduce.trial import Trial, run_trials

    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    configs = [in_folder(Path(work), name) for name in PRESETS]
    for config in configs:
        preflight(config)
    results = run_trials([Trial(config, held_out) for config in configs], 0, lambda *progress: None)
    return dict(zip(PRESETS, results, strict=True))


@pytest.fixture(scope="module")
def results(work: Path) -> dict[str, Any]:
    (found,) = run_distributed(train_and_evaluate, 1, str(work), timeout=280.0)
    return dict(found)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_saves_both_optimizers_and_is_evaluated(results: dict[str, Any], work: Path, name: str) -> None:
    result, run = results[name], work / "runs" / name
    records = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [1, 2] and trained[-1]["skipped_steps"] == 0
    terms = [key for key in trained[-1] if key.startswith("nats/")]
    assert len(terms) == 6 and all(np.isfinite(trained[-1][key]) for key in (*terms, "loss", "inner_loss"))
    folder = run / "checkpoints" / "step-00000002"
    with safe_open(str(folder / read_manifest(folder).files[0].path), framework="pt") as saved:
        kinds = {key.partition("/")[0] for key in saved.keys()}  # noqa: SIM118 - it is no dict
    assert {"inner", "inner_adam", "weights", "exp_avg"} <= kinds
    # The loss depends on the CLUB critics: evaluation alone has the ones that training had.
    assert result["evaluation"]["loss"] == pytest.approx(result["validation"][-1]["loss"], rel=1e-5)
    assert not result["evaluation"]["retrieval"], "critics compare, not vectors"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--array", "vision.npy"], "write NAME=FILE"),
        (["--array", "A=vision.npy"], "in small letters"),
        (["--array", "a={0}/label.npy", "--array", "a={0}/label.npy"], "the name stands twice"),
        (["--array", "a={0}/label.npy", "--array", "b={0}/short.npy"], "the arrays are not equally long"),
        (["--array", "a={0}/label.npy", "--class", "{0}/text.npy"], "needs one number per sample"),
    ],
)
def test_arrays_that_cannot_be_packed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    source = work / "mosei" / "train"
    np.save(source / "short.npy", np.zeros(2))
    filled = [word.format(source) for word in words]
    assert main(["shards", "pack", "arrays", *filled, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err


def test_a_sequence_s_last_step_counts_and_padding_does_not() -> None:
    torch.manual_seed(0)
    encoder = FeatureTransformer(embedding_dim=8, input_dim=3, layers=2, heads=2, feedforward=16).eval()
    values, lengths = torch.randn(3, 5, 3), torch.tensor([5, 2, 0])
    found = encoder(Padded(values, lengths))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:1], encoder(values[:1]))
    torch.testing.assert_close(found[1:2], encoder(values[1:2, :2]))
    longer = torch.cat([values, torch.full((3, 4, 3), 9.0)], dim=1)
    torch.testing.assert_close(encoder(Padded(longer, lengths)), found)
    assert not torch.allclose(encoder(values[:1].flip(1)), found[:1]), "the last step is told from the others"
    with pytest.raises(ValueError, match="no multiple of heads = 3"):
        FeatureTransformer(embedding_dim=8, input_dim=3, heads=3)
    encoder = FeatureTransformer(embedding_dim=8, input_dim=3, layers=1, heads=2, feedforward=16)
    for wrong in (torch.ones(2, 3), torch.ones(2, 5, 4), torch.ones(2, 0, 3)):
        with pytest.raises(ValueError, match=r"not \(n, T, 3\)"):
            encoder(wrong)


def test_the_sequence_encoder_s_layers_are_torch_s() -> None:
    torch.manual_seed(0)
    (layer,) = FeatureTransformer(embedding_dim=8, input_dim=3, layers=1, heads=2, feedforward=16).eval().layers
    other = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    names = {
        "self_attn.in_proj_weight": "into.weight",
        "self_attn.in_proj_bias": "into.bias",
        "self_attn.out_proj.weight": "out.weight",
        "self_attn.out_proj.bias": "out.bias",
        "linear1.weight": "wide.weight",
        "linear1.bias": "wide.bias",
        "linear2.weight": "narrow.weight",
        "linear2.bias": "narrow.bias",
        "norm1.weight": "first_norm.weight",
        "norm1.bias": "first_norm.bias",
        "norm2.weight": "second_norm.weight",
        "norm2.bias": "second_norm.bias",
    }
    own = layer.state_dict()
    other.load_state_dict({theirs: own[ours] for theirs, ours in names.items()})
    steps = torch.randn(2, 4, 8)
    torch.testing.assert_close(layer(steps, None), other(steps))


# -- the experiment --------------------------------------------------------------------------------------------------


def test_the_synthetic_data_is_the_authors() -> None:
    parameters = {"seed": 0, "samples": {"train": 2000, "test": 500}, "label": ["w1"]}
    arrays, classes = synthetic(parameters, "train")
    drawn = latents(parameters, "train")
    assert {name: values.shape[1] for name, values in drawn.items()} == {"w1": 6, "w2": 6, "ws": 10}
    for values in drawn.values():
        assert values.std() == pytest.approx(np.sqrt(0.5), rel=0.03) and abs(values.mean()) < 0.02
    both = np.concatenate([drawn["ws"], drawn["w1"]], axis=1)
    transform, residual, rank, _ = np.linalg.lstsq(both, arrays["x1"].astype(np.float64), rcond=None)
    assert rank == 16 and residual.max() < 1e-6 and transform.min() > -1e-5 and transform.max() < 1 + 1e-5
    assert arrays["x2"].shape == (2000, 100)
    assert np.array_equal(arrays["y"], drawn["w1"].mean(axis=1) >= 0) and classes is not None
    assert classes[:3] == [str(label) for label in arrays["y"][:3]]
    test, _ = synthetic(parameters, "test")
    again, _ = synthetic(parameters, "test")
    assert np.array_equal(test["x1"], again["x1"]) and not np.array_equal(test["x1"], arrays["x1"][:500])
    # The same mixing in both splits, or nothing learned on one would hold on the other.
    found, *_ = np.linalg.lstsq(
        np.concatenate([latents(parameters, "test")[name] for name in ("ws", "w1")], axis=1), test["x1"], rcond=None
    )
    np.testing.assert_allclose(found, transform, atol=1e-4)


def test_simclr_contrasts_each_view_with_all_others() -> None:
    torch.manual_seed(0)
    objective = SimCLRObjective(embedding_dim=4, head_layers=1)
    vectors = {"x1": torch.randn(5, 4), "x2": torch.randn(5, 4), "y": torch.zeros(5, 4)}
    valid = torch.tensor([True, True, False, True, True])
    batch = Batch({}, valid[:, None].expand(-1, 3), valid, torch.arange(5))
    report = objective(Outputs(vectors, torch.tensor(1.0)), batch, 0)
    z = torch.cat([head(v)[valid] for head, v in zip(objective.heads, list(vectors.values())[:2], strict=True)])
    logits = (z @ z.T / 0.07).fill_diagonal_(-torch.inf)
    want = torch.nn.functional.cross_entropy(logits, torch.arange(8).roll(4))
    torch.testing.assert_close(report.loss.float(), want)
    # What a row holds that is not valid reaches neither loss nor gradients.
    vectors["x1"][2] = torch.nan
    again = objective(Outputs(vectors, torch.tensor(1.0)), batch, 0)
    torch.testing.assert_close(again.loss, report.loss)
    for gradient in torch.autograd.grad(again.loss, [*objective.parameters()]):
        assert gradient.isfinite().all()
    assert list(objective.embeddings(vectors)) == ["x1.encoder", "x2.encoder"] and objective.similarity is None
