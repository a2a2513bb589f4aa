"""`symile-dist checkpoints` and `load_encoders`: what is told of checkpoints; exported encoders are the run's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import symile_dist
from symile_dist import load_encoders
from symile_dist.checkpoint.manifest import CHECKPOINTS, MANIFEST, FileEntry, Manifest, folder_name, read_manifest
from symile_dist.checkpoint.reshape import consolidated_weights
from symile_dist.checkpoint.shard import HostCopy
from symile_dist.checkpoint.shards import PIECES
from symile_dist.cli import main
from symile_dist.config import Config, load_config, parse_config
from symile_dist.data.manifest import index_directory
from symile_dist.evaluation.embeddings import load_embeddings
from symile_dist.model import TrainingModule
from symile_dist.registry import OBJECTIVES
from symile_dist.tools import checkpoints as tool
from symile_dist.tools.checkpoints import PAPERS, export, list_checkpoints, verify_checkpoints
from symile_dist.tools.evaluate import evaluate_run
from symile_dist.tools.trained import load_trained
from tests.pretrained import save_clip, save_text, save_whisper
from tests.shards import config_text, key_of, npy_bytes, sample_array, sample_members, write_tar
from tests.untrained import untrained_run

SAMPLES = 16
TEXTS = ["one two", "three", "a b c", "two"]
LACKING = {3: "b", 10: "t"}


def text_of(number: int) -> str:
    return TEXTS[number % len(TEXTS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays a and b, a text t; two samples lack one of them."""
    members: list[tuple[str, bytes]] = []
    for number in range(SAMPLES):
        found = sample_members(number, ("a", "b"), [LACKING.get(number, "")])
        if LACKING.get(number) != "t":
            found["txt"] = text_of(number).encode()
        members += [(f"{key_of(number)}.{suffix}", content) for suffix, content in found.items()]
    folder = tmp_path_factory.mktemp("data") / "train"
    write_tar(folder / "shard-00000.tar", members)
    index_directory(folder)
    return folder


TEXT = "{member: txt, decoder: text, transform: characters, encoder: {name: text_convnet, width: 8, pooled: 8}"


def configured(data: Path, folder: Path, *overrides: str, more: str = "") -> Config:
    text = config_text(data, ("a", "b")).replace("model:", f"  t: {TEXT}, missing_embedding: true}}\n{more}model:")
    always = [f"run.directory={folder / 'run'}", "data.require=1", f"data.validation={data}"]
    return parse_config(text, "test.yaml", [*always, *overrides]).config


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    return untrained_run(configured(data, tmp_path))


def another_step(run: Path, step: int, **changes: Any) -> Path:
    """A second checkpoint, with the first one's file."""
    source = run / CHECKPOINTS / folder_name(4)
    folder = run / CHECKPOINTS / folder_name(step)
    folder.mkdir()
    entry = read_manifest(source).files[0]
    (folder / entry.path).write_bytes((source / entry.path).read_bytes())
    values = {"world_size": 1, "zero_stage": 0, "precision": "fp32", "train_state": {"best_step": 4}, **changes}
    Manifest(
        step=step, config_digest="", code_version="test", fence=0, loader_state={}, files=(entry,), **values
    ).write(folder)
    return folder


# -- list --------------------------------------------------------------------------------------------------------------


def test_what_a_run_has_saved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (6, 8, 10):
        another_step(run, step, zero_stage=2, world_size=3, precision="bf16")
    unfinished = run / CHECKPOINTS / folder_name(12)
    unfinished.mkdir()
    (unfinished / "rank-00000.abc-1.safetensors").write_bytes(b"half")
    (run / CHECKPOINTS / folder_name(8) / "rank-00001.old-1.safetensors").write_bytes(b"half")
    (run / CHECKPOINTS / folder_name(6) / MANIFEST).write_text("{")
    found = list_checkpoints(run)
    rows = {row["step"]: row for row in found["checkpoints"]}
    assert list(rows) == [4, 6, 8, 10, 12] and found["best_step"] == 4
    assert [rows[step]["committed"] for step in rows] == [True, True, True, True, False]
    assert [rows[step]["kept_as"] for step in (4, 8, 10)] == [["best"], ["newest"], ["newest"]]
    assert (rows[10]["world_size"], rows[10]["zero_stage"], rows[10]["precision"]) == (3, 2, "bf16")
    assert rows[4]["bytes"] == sum(entry.size for entry in read_manifest(Path(rows[4]["folder"])).files)
    assert "damaged manifest" in rows[6]["problem"]
    assert rows[8]["leftovers"] == ["rank-00001.old-1.safetensors"] and rows[10]["leftovers"] == []
    assert rows[12]["leftovers"] == ["rank-00000.abc-1.safetensors"]
    assert main(["checkpoints", "list", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["checkpoints", "list", str(run)]) == 0
    printed = capsys.readouterr().out
    for words in ("best", "newest", "bf16", "damaged manifest", "not committed", "a save that did not finish"):
        assert words in printed, words


def test_a_step_that_keep_every_divides_is_kept(data: Path, tmp_path: Path) -> None:
    run = untrained_run(configured(data, tmp_path, "checkpoint.keep_every=6"))
    for step in (6, 8, 10):
        another_step(run, step)
    assert [row["kept_as"] for row in list_checkpoints(run)["checkpoints"]][1] == ["keep_every"]


def test_a_run_without_checkpoints(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CHECKPOINTS).rename(tmp_path / "elsewhere")
    assert main(["checkpoints", "list", str(run)]) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
    for words in (["verify"], ["consolidate", "--out", "w.safetensors"], ["export", "--out", "exported"]):
        assert main(["checkpoints", words[0], str(run), *words[1:]]) == 2, words
        assert "has no complete checkpoint yet" in capsys.readouterr().err
        assert main(["checkpoints", words[0], str(tmp_path), *words[1:]]) == 2, words
        assert "not a run directory" in capsys.readouterr().err


# -- verify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest"])
def test_damage_is_found_and_named(run: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = another_step(run, 6)
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert "damaged" not in capsys.readouterr().out
    file = folder / (MANIFEST if damage == "manifest" else read_manifest(folder).files[0].path)
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-9])
    assert main(["checkpoints", "verify", str(run)]) == 1
    printed = capsys.readouterr().out
    assert f"damaged: {file}" in printed and "1 of 2 checkpoints are damaged" in printed
    assert f"{run / CHECKPOINTS / folder_name(4)}: whole" in printed
    assert main(["checkpoints", "verify", str(run), "--step", "4"]) == 0
    assert main(["checkpoints", "verify", str(run), "--step", "6", "--json"]) == 1
    found = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert found["damaged"] == 1 and str(file) in found["checkpoints"][0]["problems"][0]
    for words in (["consolidate", "--out", "w.safetensors"], ["export", "--out", "exported"]):
        assert main(["checkpoints", words[0], str(run), *words[1:]]) == 2, "nothing is made of a damaged checkpoint"
        assert file.name in capsys.readouterr().err


def test_what_was_not_committed_is_told_and_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CHECKPOINTS / folder_name(6)).mkdir()
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert "step-00000006: not committed" in capsys.readouterr().out
    assert verify_checkpoints(run, "4")["not_committed"] == []
    assert main(["checkpoints", "verify", str(run), "--step", "6"]) == 2
    assert "no checkpoint of step 6; there are: 4" in capsys.readouterr().err


# -- consolidate -------------------------------------------------------------------------------------------------------


def over_two_ranks(run: Path) -> dict[str, Tensor]:
    """Puts the checkpoint's stretches on two ranks; returns its weights."""
    folder = run / CHECKPOINTS / folder_name(4)
    weights = consolidated_weights(folder)
    manifest = read_manifest(folder)
    buffers = {name for name in weights if ".fill" in name}
    entries = []
    for rank in (0, 1):
        tensors, pieces = {}, {}
        for name in weights.keys() - buffers:
            flat = weights[name].reshape(-1)
            start, end = len(flat) * rank // 2, len(flat) * (rank + 1) // 2
            if start < end:
                tensors[f"weights/{name}"] = flat[start:end]
                pieces[name] = [start, end, list(weights[name].shape)]
        if rank == 0:
            tensors |= {f"buffers/{name}": weights[name] for name in buffers}
        copy = HostCopy()
        copy.take(tensors, {PIECES: json.dumps(pieces)})
        path = folder / f"rank-{rank:05d}.two.safetensors"
        entries.append(FileEntry(path.name, copy.size, copy.write(path)))
    values = {**vars(manifest), "world_size": 2, "files": tuple(entries)}
    Manifest(**values).write(folder)
    return weights


def test_whole_weights_in_one_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = "modalities.b.encoder={name: features, input_dim: 4}"  # has a buffer
    config = configured(data, tmp_path, features, "modalities.b.missing_embedding=true")
    run = untrained_run(config)
    weights = over_two_ranks(run)
    out = tmp_path / "deep" / "weights.safetensors"
    arguments = ["checkpoints", "consolidate", str(run), "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    parameters = sum(tensor.numel() for name, tensor in weights.items() if not name.endswith(".fill"))
    assert (told["step"], told["tensors"], told["parameters"]) == (4, len(weights), parameters)
    found = load_file(out)
    assert found.keys() == weights.keys() and "model.encoders.b.fill" in found
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == torch.float32
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert (about["run"], about["step"], about["code_version"], about["format"]) == ("test", "4", "test", "pt")
    assert TrainingModule(config).load_weights(found) == ([], [])
    # It is not overwritten unless that is asked for.
    out.write_bytes(b"precious")
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err and out.read_bytes() == b"precious"
    assert main([*arguments, "--force"]) == 0 and load_file(out).keys() == weights.keys()
    assert main([*arguments[:-1], "weights.bin"]) == 2
    assert "should be a file whose name ends in .safetensors" in capsys.readouterr().err


def test_a_file_of_weights_is_whole_or_as_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from symile_dist.checkpoint.reshape import WholeWeights

    out = tmp_path / "weights.safetensors"
    out.write_bytes(b"precious")

    def fails(self: WholeWeights, name: str) -> Tensor:
        raise OSError("the disk is gone")

    monkeypatch.setattr(WholeWeights, "read", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        tool.consolidate(run, out, force=True)
    assert out.read_bytes() == b"precious" and [path.name for path in tmp_path.glob("*weights*")] == [out.name]
    assert not list(tmp_path.glob(".*"))[1:], "but the run's lock, nothing is left"


# -- export ------------------------------------------------------------------------------------------------------------


def samples_of(encoders: symile_dist.exported.Encoders, name: str, numbers: Sequence[int]) -> list[Tensor]:
    transform = encoders.transform(name)
    if encoders.config.modalities[name].member == "txt":
        return [transform(text_of(number).encode()) for number in numbers]
    member = encoders.config.modalities[name].member[0]
    return [transform(npy_bytes(sample_array(member, number))) for number in numbers]


def assert_equal_to_evaluation(run: Path, exported: Path, names: Sequence[str], tmp_path: Path) -> None:
    """Of every sample that has the modality."""
    file = tmp_path / "embeddings.parquet"
    evaluate_run(run, export=file, metrics=())
    wanted = load_embeddings(file)
    encoders = load_encoders(exported)
    for name in names:
        modality = name.partition(".")[0]
        rows = np.flatnonzero(~np.isnan(wanted.vectors[name]).any(axis=1))
        assert len(rows) >= SAMPLES - 1
        found = encoders.encode(name, samples_of(encoders, modality, rows.tolist()))
        assert found.dtype == torch.float32 and not found.requires_grad
        np.testing.assert_allclose(found.numpy(), wanted.vectors[name][rows], rtol=1e-5, atol=1e-6, err_msg=name)


def test_exported_encoders_give_what_evaluation_exports(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = "  view: {member: a.npy, decoder: npy, transform: tensor, encoder_of: a}\n"
    run = untrained_run(configured(data, tmp_path, "model.normalization=l2", more=shared))
    out = tmp_path / "exported"
    out.mkdir()  # an empty folder is as good as none
    assert main(["checkpoints", "export", str(run), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["modalities"] == ["a", "b", "t", "view"] and told["warnings"] == []
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    weights = {f"encoders/{name}.safetensors" for name in "abt"} | {"logit_scale.safetensors"}
    assert found == weights | {"config.yaml", "export.json", "README.md"} == set(told["files"])
    assert_equal_to_evaluation(run, out, ["a", "b", "t", "view"], tmp_path)
    encoders = load_encoders(out)
    assert encoders.modalities == ["a", "b", "t", "view"] and encoders.about["step"] == 4
    assert encoders.logit_scale == pytest.approx(np.exp(-4.0)) and encoders.module.training is False
    inputs = samples_of(encoders, "a", range(3))
    assert torch.equal(encoders.encode("view", inputs), encoders.encode("a", torch.stack(inputs)))
    torch.testing.assert_close(encoders.encode("a", inputs).norm(dim=1), torch.ones(3))


def test_a_sample_that_lacks_a_modality_has_the_learned_vector(run: Path, data: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "exported")
    encoders = load_encoders(tmp_path / "exported")
    inputs = samples_of(encoders, "t", range(4))
    present = torch.tensor([True, False, True, False])
    found = encoders.encode("t", inputs, present)
    config = configured(data, tmp_path)
    model = load_trained(config, run / CHECKPOINTS / folder_name(4)).model
    expected = model.normalizations["t"](model.missing_embeddings["t"].vector[None])[0]
    for row in (1, 3):
        torch.testing.assert_close(found[row], expected)
    torch.testing.assert_close(found[present], encoders.encode("t", inputs)[present])
    with pytest.raises(ValueError, match=r"present should be \(4,\) flags"):
        encoders.encode("t", inputs, torch.ones(3, dtype=torch.bool))


def test_neither_deepspeed_nor_ray_is_needed(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "exported")
    code = f"""
import sys
for name in ("deepspeed", "ray", "webdataset"):
    sys.modules[name] = None  # whoever imports it fails
import symile_dist
encoders = symile_dist.load_encoders({str(tmp_path / "exported")!r})
sample = encoders.transform("t")(b"one two")
assert encoders.encode("t", [sample, sample]).shape == (2, 8)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# -- what pretrained encoders need -------------------------------------------------------------------------------------


def test_a_pretrained_encoder_needs_its_weights_no_more(data: Path, tmp_path: Path) -> None:
    """Config and tokenizer come along, weights only once: the folder that they came from may be gone."""
    home = save_text(tmp_path / "home" / "xlmr")
    pretrained = f"{{name: pretrained, model: {home}}}"
    tokens = f"{{name: tokens, model: {home}}}"
    xlm = f"""  x: {{member: txt, decoder: text, transform: {tokens},
    encoder: {{name: xlm_roberta, model: {home}, max_length: 12, missing_token: true}}}}\n"""
    config = configured(
        data, tmp_path, f"modalities.t.encoder={pretrained}", f"modalities.t.transform={tokens}", more=xlm
    )
    run = untrained_run(config)
    # Not the weights that it began with.
    module = TrainingModule(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    (run / CHECKPOINTS).rename(tmp_path / "untrained")
    untrained_run(config, module.state_dict())
    summary = export(run, tmp_path / "exported")
    copied = {name for name in summary["files"] if name.startswith("files/")}
    assert "files/xlmr/config.json" in copied and "files/xlmr/tokenizer.json" in copied
    assert not any(name.endswith(".safetensors") for name in copied), "the weights stand there once"
    assert str(home) not in (tmp_path / "exported" / "config.yaml").read_text()
    file = tmp_path / "embeddings.parquet"
    evaluate_run(run, export=file, metrics=())
    home.parent.rename(tmp_path / "moved away")
    wanted, encoders = load_embeddings(file), load_encoders(tmp_path / "exported")
    for name in ("t", "x"):
        rows = np.flatnonzero(~np.isnan(wanted.vectors[name]).any(axis=1))
        found = encoders.encode(name, samples_of(encoders, name, rows.tolist()))
        np.testing.assert_allclose(found.numpy(), wanted.vectors[name][rows], rtol=1e-4, atol=1e-5, err_msg=name)


def test_parts_of_models_of_several_parts(tmp_path: Path) -> None:
    """Built from their configs alone they are what their weights say, whatever precision those are stored in."""
    from symile_dist.encoders.pretrained import PretrainedEncoder
    from symile_dist.hub import weights_follow

    clip, whisper = save_clip(tmp_path / "clip"), save_whisper(tmp_path / "whisper")
    images, frames = torch.randn(2, 3, 16, 16), torch.randn(2, 100, 8)
    for folder, part, inputs in ((clip, "vision", images), (whisper, "encoder", frames)):
        trained = PretrainedEncoder(8, str(folder), part=part).eval()  # type: ignore[arg-type]
        (folder / "model.safetensors").unlink()
        with weights_follow():
            built = PretrainedEncoder(8, str(folder), part=part).eval()  # type: ignore[arg-type]
        assert {p.dtype for p in built.parameters()} == {torch.float32}
        built.load_state_dict(trained.state_dict())
        with torch.no_grad():
            assert torch.equal(built(inputs), trained(inputs)), part
        with pytest.raises(ValueError, match=r"holds no \.safetensors weights"):
            PretrainedEncoder(8, str(folder), part=part)  # type: ignore[arg-type]


def test_files_that_an_encoder_began_with_are_not_read_again(data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mean.npy", np.full(4, 7, np.float32))
    fill = f"modalities.b.encoder={{name: features, input_dim: 4, fill: {tmp_path / 'mean.npy'}}}"
    run = untrained_run(configured(data, tmp_path, fill))
    export(run, tmp_path / "exported")
    (tmp_path / "mean.npy").unlink()
    found = load_encoders(tmp_path / "exported").module.model.encoders["b"].fill
    assert found.tolist() == [7.0] * 4, "it is a buffer, and the buffer is in the export"


def test_a_residual_network_that_began_with_weights(tmp_path: Path) -> None:
    from symile_dist.encoders.resnet import ResNet
    from symile_dist.hub import weights_follow

    save_file(ResNet(8, depth=18, width=4).state_dict(), tmp_path / "resnet.safetensors")
    ResNet(8, depth=18, width=4, weights=str(tmp_path / "resnet.safetensors"))
    with weights_follow():
        ResNet(8, depth=18, width=4, weights=str(tmp_path / "gone.safetensors"))
    with pytest.raises(ValueError, match="no such file"):
        ResNet(8, depth=18, width=4, weights=str(tmp_path / "gone.safetensors"))


# -- objectives with weights or embeddings of their own ----------------------------------------------------------------


def test_point_sets_become_the_objective_s_vectors(data: Path, tmp_path: Path) -> None:
    """They depend on the modality's place among the others (Symile's form)."""
    points = [
        f"modalities.{name}.encoder={{name: points, width: 8, points: 3, encoder: {{name: mlp, input_dim: 4}}}}"
        for name in "ab"
    ]
    text = "modalities.t={member: txt, decoder: text, transform: characters, encoder: {name: text_points, width: 8}}"
    objective = "objective={name: wpse, form: symile, features: 6}"
    run = untrained_run(configured(data, tmp_path, *points, text, objective))
    export(run, tmp_path / "exported")
    assert_equal_to_evaluation(run, tmp_path / "exported", ["a", "b", "t"], tmp_path)
    encoders = load_encoders(tmp_path / "exported")
    assert encoders.encode("a", samples_of(encoders, "a", [0])).shape == (1, 14)


def test_an_objective_s_own_weights_and_embeddings(data: Path, tmp_path: Path) -> None:
    objective = "objective={name: factorcl, label: t, hidden: 8, missing: placeholder}"
    label = "modalities.t={member: a.npy, decoder: npy, transform: tensor, encoder: identity}"
    run = untrained_run(configured(data, tmp_path, objective, label))
    export(run, tmp_path / "exported")
    weights = load_file(tmp_path / "exported" / "objective.safetensors")
    assert any(name.startswith("heads.") for name in weights) and any(name.startswith("inner.") for name in weights)
    assert_equal_to_evaluation(run, tmp_path / "exported", ["a", "b.shared", "a.encoder"], tmp_path)
    encoders = load_encoders(tmp_path / "exported")
    with pytest.raises(ValueError, match=r"no embedding 'a\.sharde'; the objective has a, a\.encoder, a\.shared"):
        encoders.encode("a.sharde", samples_of(encoders, "a", [0]))


# -- what comes with them ----------------------------------------------------------------------------------------------


def test_the_model_card_tells_what_it_is(data: Path, tmp_path: Path) -> None:
    run = untrained_run(configured(data, tmp_path, "data.source=made by tests", "objective=gated_symile"))
    export(run, tmp_path / "first")
    assert f"symile-dist evaluate RUN --step {4}" in (tmp_path / "first" / "README.md").read_text()
    evaluate_run(run, resamples=2, export=tmp_path / "embeddings.parquet")
    export(run, tmp_path / "exported", "best")
    card = (tmp_path / "exported" / "README.md").read_text()
    results = (run / "evaluation" / "test-step-00000004.md").read_text()
    assert "| a from b + t" in card and "| embedding" in card
    assert all(line in card for line in results.splitlines() if line.startswith("|")), "the whole table"
    parameters = (
        sum(p.numel() for p in load_encoders(tmp_path / "exported").module.model.encoders["t"].parameters()) + 8
    )
    for words in (
        "arXiv 2604.05834",
        "| data | made by tests |",
        "| step | 4 of 4 |",
        'load_encoders("exported")',
        "| t | `.txt`: `text`, then `characters` | `text_convnet` (width=8, pooled=8), with a learned vector for "
        f"samples that lack it | {parameters + 16:,} |",
    ):
        assert words in card, words
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    for path in (tmp_path / "exported").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), (
            f"{path.name} names this machine's paths"
        )


def test_every_objective_has_its_paper() -> None:
    assert PAPERS.keys() == OBJECTIVES.keys()


def test_the_config_tells_neither_secrets_nor_this_machine(data: Path, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "list.txt").write_text("one")
    (tmp_path / "words" / "weights.bin").write_bytes(b"0" * 100)
    own = [f"modalities.t.transform.name={__name__}:OwnTransform", f"modalities.t.transform.words={tmp_path / 'words'}"]
    own += ["modalities.t.transform.api_key=hunter2", "modalities.t.transform.elsewhere=/nowhere/at/all"]
    machine = [
        "data.storage.endpoint_url=http://minio.inside:9000",
        "data.storage.profile=mine",
        f"data.storage.cache_directory={tmp_path / 'cache'}",
        f"deepspeed={{zero_optimization: {{offload_param: {{nvme_path: {tmp_path / 'nvme'}}}}}}}",
        f"evaluation.zero_shot={tmp_path / 'classes.yaml'}",
        f"run.init_from={tmp_path / 'older' / 'run'}",
        f"checkpoint.mirror={tmp_path / 'mirror'}",
    ]
    run = untrained_run(configured(data, tmp_path, *own, *machine))
    summary = export(run, tmp_path / "exported")
    text = (tmp_path / "exported" / "config.yaml").read_text()
    for words in (str(tmp_path), "hunter2", "minio", "mine"):
        assert words not in text, words
    assert "files/words/list.txt" in summary["files"] and "files/words/weights.bin" not in summary["files"]
    assert any("api_key" in warning for warning in summary["warnings"])
    assert any("/nowhere/at/all is not there" in warning for warning in summary["warnings"])
    config = load_config(tmp_path / "exported" / "config.yaml").config
    assert config.data.train["train"].path.endswith("/train") and config.train == configured(data, tmp_path).train
    transform = load_encoders(tmp_path / "exported").transform("t")
    assert transform(b"xyz").tolist() == [3], "it found its list of words in the export"


class OwnTransform:
    variable_length = True

    def __init__(self, words: str, api_key: str, elsewhere: str) -> None:
        self.words = (Path(words) / "list.txt").read_text().split()

    def __call__(self, decoded: str, rng: np.random.Generator | None) -> Tensor:
        return torch.tensor([len(decoded)])


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_whole_or_not_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exports" / "one"
    out.mkdir(parents=True)
    (out / "precious").write_text("mine")
    assert main(["checkpoints", "export", str(run), "--out", str(out)]) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]

    def fails(*_: object) -> str:
        raise OSError("the disk is gone")

    monkeypatch.setattr(tool, "_card", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        export(run, tmp_path / "exports" / "two")
    assert [path.name for path in out.parent.iterdir()] == ["one"], "nothing is left of what failed"


def test_a_damaged_export_is_not_loaded(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    export(run, out)
    file = out / "encoders" / "b.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"encoders/b\.safetensors: its bytes do not match"):
        load_encoders(out)
    file.unlink()
    with pytest.raises(ValueError, match=r"encoders/b\.safetensors: No such file"):
        load_encoders(out)
    with pytest.raises(ValueError, match="is no export; `symile-dist checkpoints export RUN --out DIR` writes one"):
        load_encoders(run)
    with pytest.raises(ValueError, match="is no export"):
        load_encoders(tmp_path / "nowhere")


def test_an_export_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has an encoder 't', the run's config has none"):
        shared = "modalities.t={member: txt, decoder: text, transform: characters, encoder_of: a}"
        export(run, tmp_path / "exported", overrides=[shared])


def test_a_config_that_was_changed_is_told(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    export(run, out)
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("embedding_dim: 8", "embedding_dim: 9"))
    with pytest.raises(ValueError, match=r"does not hold the weights of the model in its config\.yaml: "):
        load_encoders(out)
    (out / "config.yaml").write_text(text.replace("missing_embedding: true", "missing_embedding: false"))
    with pytest.raises(ValueError, match=r"unknown: model\.missing_embeddings\.t\.vector"):
        load_encoders(out)
    (out / "config.yaml").write_text(text.replace("missing_embedding: false", "missing_embedding: true"))
    with pytest.raises(
        ValueError, match=r"lacking: model\.missing_embeddings\.a\.vector, model\.missing_embeddings\.b"
    ):
        load_encoders(out)


def test_inputs_that_cannot_be_encoded(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "exported")
    encoders = load_encoders(tmp_path / "exported")
    with pytest.raises(ValueError, match="no modality 'aa'; did you mean 'a'"):
        encoders.encode("aa", [torch.ones(4)])
    with pytest.raises(ValueError, match="no modality 'image'"):
        encoders.transform("image")
    with pytest.raises(ValueError, match=r"one tensor per sample, as transform\('a'\) gives"):
        encoders.encode("a", [b"bytes"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"'a': a sample is torch\.float32"):
        encoders.encode("a", [torch.ones(4), torch.ones(5)])
    with pytest.raises(ValueError, match=r"not a readable \.npy array"):
        encoders.transform("a")(b"bytes")
    with pytest.raises(ValueError, match="modality 'a': MLP: a sample has 5 values"):
        encoders.encode("a", torch.ones(2, 5))
