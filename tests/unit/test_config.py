"""The config: mistakes told at once with place and remedy, overrides, origins, digest, schema, the shipped files."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

import symile_dist.configs
from symile_dist.config import Config, ConfigError, LoadedConfig, explain, load_config, parse_config

GOOD = """\
run: {name: try}
data: {train: shards/train}
modalities:
  image:
    member: png
    decoder: {name: image, mode: L}
    transform: image
    encoder: image_convnet
  text:
    member: txt
    decoder: text
    transform: characters
    encoder: {name: text_convnet}
optimizer:
  lr: 1e-3
train:
  steps: 10
  global_batch_size: 12
"""
CONFIGS = sorted(
    path for path in Path(symile_dist.configs.__path__[0]).rglob("*.yaml") if "monitoring" not in path.parts
)


def good(*overrides: str, text: str = GOOD) -> LoadedConfig:
    return parse_config(text, "my.yaml", overrides)


def mistakes(*overrides: str, text: str = GOOD) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "my.yaml", overrides)
    return str(caught.value).splitlines()


def with_line(after: str, line: str) -> str:
    """GOOD with a line put in after the line `after`."""
    assert GOOD.count(after + "\n") == 1
    return GOOD.replace(after + "\n", f"{after}\n{line}\n")


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_all_mistakes_at_once_each_with_its_line() -> None:
    text = GOOD.replace("  lr: 1e-3", "  lrr: 1e-3\n  betas: [0.9, 1.5]").replace("steps: 10", "stepps: 10")
    text += "trian: {}\nmodel: {normalization: l3}\n"
    assert sorted(mistakes("ray.num_workers=0", text=text)) == sorted(
        [
            "my.yaml:15: optimizer.lrr: unknown key; did you mean 'lr'?",
            "my.yaml:16: optimizer.betas.1: should be less than 1 (got 1.5)",
            "my.yaml:17: train.steps: is missing",
            "my.yaml:18: train.stepps: unknown key; did you mean 'steps'?",
            "my.yaml:20: trian: unknown key; did you mean 'train'?",
            "my.yaml:21: model.normalization: should be 'layer_norm', 'l2' or 'none' (got 'l3')",
            "override 'ray.num_workers=0': ray.num_workers: should be greater than 0 (got 0)",
        ]
    )


def test_an_unknown_key_unlike_any_other_lists_what_is_known() -> None:
    (line,) = mistakes(text=with_line("  lr: 1e-3", "  zzzzzz: 1"))
    assert line.startswith("my.yaml:16: optimizer.zzzzzz: unknown key; known: betas, eps, inner, lr,")


def test_names_of_components_are_checked_without_importing_them() -> None:
    text = GOOD.replace("encoder: image_convnet", "encoder: image_convnett").replace("decoder: text", "decoder: txet")
    lines = mistakes("objective.name=simile", text=text)
    assert [line.partition(", or package")[0] for line in lines] == [
        "override 'objective.name=simile': objective.name: unknown objective 'simile'; did you mean 'symile'?",
        "my.yaml:8: modalities.image.encoder.name: unknown encoder 'image_convnett'; did you mean 'image_convnet'?",
        "my.yaml:11: modalities.text.decoder.name: unknown decoder 'txet'; did you mean 'text'?",
    ]


def test_unknown_keys_of_a_modality_and_of_a_component() -> None:
    (line,) = mistakes(text=with_line("    member: png", "    learning_rate: 1"))
    assert line.startswith("my.yaml:6: modalities.image.learning_rate: unknown key; known: decoder, encoder")
    # A component's options belong to whatever the name stands for: preflight checks them against its signature.
    config = good("modalities.image.encoder={name: image_convnet, whatever: 3}").config
    assert config.modalities["image"].encoder.options == {"whatever": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: [1\n", "my.yaml:2: not valid YAML"),
        ("run: {name: x}\n\tdata: 1\n", "my.yaml:2: not valid YAML"),
        ("run: !!python/object/apply:os.system ['true']\n", "my.yaml:1: not valid YAML"),
        ("a: &a [*a]\n", "not valid YAML"),
        ("run: *nowhere\n", "my.yaml:1: not valid YAML"),
        ("- run\n- data\n", "my.yaml: should be a map of sections"),
        ("just words\n", "my.yaml: should be a map of sections"),
    ],
)
def test_what_is_no_map_of_yaml(text: str, words: str) -> None:
    (line,) = mistakes(text=text)
    assert words in line


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_misses_what_has_no_default(text: str) -> None:
    assert mistakes(text=text) == [f"my.yaml: {key}: is missing" for key in ("run", "data", "modalities", "train")]


def test_a_section_that_is_a_value() -> None:
    (line,) = mistakes(text=GOOD.replace("run: {name: try}", "run: try"))
    assert line.startswith("my.yaml:1: run: should be a valid dictionary")


@pytest.mark.parametrize(
    ("after", "line", "expected"),
    [
        ("  lr: 1e-3", "  lr: 2e-3", "my.yaml:16: optimizer.lr: the key stands twice (also in line 15)"),
        ("run: {name: try}", "run: {name: t}", "my.yaml:2: run: the key stands twice (also in line 1)"),
        ("    member: png", "  image: {}", "my.yaml:6: modalities.image: the key stands twice (also in line 4)"),
    ],
)
def test_duplicate_keys(after: str, line: str, expected: str) -> None:
    text = with_line(after, line)
    if line.startswith("  image"):  # the rest of the first map would hang in the air
        text = text.replace(
            "    decoder: {name: image, mode: L}\n    transform: image\n    encoder: image_convnet\n", ""
        )
    assert mistakes(text=text) == [expected]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "override 'train.steps': write key=value, e.g. train.steps=100"),
        ("=3", "override '=3': write key=value, e.g. train.steps=100"),
        ("train..steps=3", "override 'train..steps=3': write key=value, e.g. train.steps=100"),
        ("train.steps.x=3", "override 'train.steps.x=3': train.steps is a value, not a section"),
        ("train.stps=3", "override 'train.stps=3': train.stps: unknown key; did you mean 'steps'?"),
        ("train.steps=many", "override 'train.steps=many': train.steps: should be a valid integer"),
        ("train.steps=", "override 'train.steps=': train.steps: should be a valid integer (got None)"),
        ("seed=-1", "override 'seed=-1': seed: should be greater than or equal to 0 (got -1)"),
        ("optimizer.lr=nan", "override 'optimizer.lr=nan': optimizer.lr:"),
        ("optimizer.lr=.inf", "override 'optimizer.lr=.inf': optimizer.lr: should be a finite number"),
        ("optimizer.betas=[0.9", "override 'optimizer.betas=[0.9':1: not valid YAML"),
        ("run.name=../x", "override 'run.name=../x': run.name:"),
    ],
)
def test_wrong_overrides(override: str, expected: str) -> None:
    (line,) = mistakes(override)
    assert line.startswith(expected)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        load_config(tmp_path / "binary.yaml")


# -- mistakes that no single field shows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ray.num_workers=5"], "my.yaml:18: train.global_batch_size: 12 is not divisible by ray.num_workers = 5; "
                                "use 10 or 15"),
        (["ray.num_workers=16"], "my.yaml:18: train.global_batch_size: 12 is not divisible by ray.num_workers = 16; "
                                 "use 16"),
        (["data.lanes=5"], "override 'data.lanes=5': data.lanes: 5 does not divide train.global_batch_size = 12"),
        (["validation.every=3"], "override 'validation.every=3': validation.every: needs data.validation"),
        (["run.directory=s3://bucket/run"], "override 'run.directory=s3://bucket/run': run.directory: only local"),
        (["metrics.port=65535", "ray.num_workers=2"], "override 'metrics.port=65535': metrics.port: port + "),
        (["metrics.port=9000", "metrics.driver_port=9001", "ray.num_workers=2"], "override 'metrics.driver_port=9001': "
                                                                                 "metrics.driver_port: is among"),
        (["train.profile_steps=[7,3]"], "override 'train.profile_steps=[7,3]': train.profile_steps: should be [first,"),
        (["train.profile_steps=[1,999999]"], "override 'train.profile_steps=[1,999999]': train.profile_steps: should"),
        (["train.profile_ranks=[7]", "train.profile_steps=[1,2]"],
         "override 'train.profile_ranks=[7]': train.profile_ranks: there is no rank 7"),
        (["deepspeed.train_batch_size=3"], "override 'deepspeed.train_batch_size=3': deepspeed.train_batch_size: "
                                           "follows from the config; set train.global_batch_size in its place"),
        (["deepspeed.bf16={enabled: true}"], "override 'deepspeed.bf16={enabled: true}': deepspeed.bf16: follows from "
                                             "the config; set train.precision in its place"),
        (["deepspeed.fp16.enabled=true"], "override 'deepspeed.fp16.enabled=true': deepspeed.fp16.enabled: follows "
                                          "from the config; set train.precision in its place"),
        (["train.precision=fp16", "train.zero_stage=0"], "override 'train.precision=fp16': train.precision: fp16 needs "
                                                         "train.zero_stage = 1 or more"),
        (["train.offload=optimizer", "train.zero_stage=0"], "override 'train.offload=optimizer': train.offload: "
                                                            "'optimizer' needs train.zero_stage = 1, it is 0"),
        (["train.offload=parameters"], "override 'train.offload=parameters': train.offload: 'parameters' needs "
                                       "train.zero_stage = 3, it is 1"),
        (["train.partitioned_init=true"], "override 'train.partitioned_init=true': train.partitioned_init: needs "
                                          "train.zero_stage = 3, it is 1"),
        (["train.compile=true", "train.zero_stage=3"], "override 'train.compile=true': train.compile: gains nothing"),
        (["train.sync_batch_norm=true", "train.freeze_batch_norm=true"], "override 'train.sync_batch_norm=true': "
                                                                         "train.sync_batch_norm: there is nothing to"),
        (["deepspeed.gradient_accumulation_steps=2"], "override 'deepspeed.gradient_accumulation_steps=2': "
                                                      "deepspeed.gradient_accumulation_steps: follows from the config"),
        (["deepspeed.zero_optimization.stage=3"], "override 'deepspeed.zero_optimization.stage=3': "
                                                  "deepspeed.zero_optimization.stage: follows from the config; "
                                                  "set train.zero_stage in its place"),
        (["modalities.image.freeze=true", "modalities.text.freeze=true"],
         "my.yaml:3: modalities: every encoder is frozen: there is nothing to train"),
    ],
)  # fmt: skip
def test_cross_checks(overrides: list[str], expected: str) -> None:
    (line,) = mistakes(*overrides)
    assert line.startswith(expected)


def test_several_cross_checks_at_once() -> None:
    lines = mistakes("ray.num_workers=5", "data.lanes=7", "deepspeed.optimizer={}", "validation.every=2")
    assert [line.split(": ")[1] for line in lines] == [
        "train.global_batch_size",
        "data.lanes",
        "validation.every",
        "deepspeed.optimizer",
    ]


def test_remedies_of_an_indivisible_batch_are_valid() -> None:
    for batch in (10, 15):
        assert good("ray.num_workers=5", f"train.global_batch_size={batch}").config.train.global_batch_size == batch


def test_one_modality_is_too_few_and_odd_names_are_refused() -> None:
    text = GOOD[: GOOD.index("  text:")] + GOOD[GOOD.index("optimizer:") :]
    (line,) = mistakes(text=text)
    assert line.startswith("my.yaml:3: modalities: ") and "at least 2 items" in line
    (line,) = mistakes(text=GOOD.replace("  text:", "  te-xt:"))
    assert line.startswith("my.yaml:9: modalities.te-xt: a modality's name is made of")


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr=2.5E+1", "optimizer.lr", 25.0),
        ("optimizer.lr=.5e-3", "optimizer.lr", 0.0005),
        ("optimizer.betas=[0.8, 9e-1]", "optimizer.betas", (0.8, 0.9)),
        ("model={embedding_dim: 7, normalization: l2}", "model.embedding_dim", 7),
        ("model.logit_scale_init=-6", "model.logit_scale_init", -6.0),
        ("data.label=null", "data.label", None),
        ("data.label=", "data.label", None),
        ("train.zero_stage = 3", "train.zero_stage", 3),
        ("run.init_from=a=b", "run.init_from", "a=b"),
    ],
)
def test_overrides(override: str, key: str, value: Any) -> None:
    found: Any = good(override).config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_numbers_in_exponent_form_are_numbers_in_a_file_too() -> None:
    assert good().config.optimizer.lr == 0.001
    options = good("modalities.image.encoder.gain=1e-4").config.modalities["image"].encoder.options
    assert options == {"gain": 1e-4} and type(options["gain"]) is float


def test_overrides_into_a_component_given_as_a_bare_string() -> None:
    loaded = good("modalities.image.encoder.width=32", "objective.negative_sampling=n")
    encoder = loaded.config.modalities["image"].encoder
    assert (encoder.name, encoder.options) == ("image_convnet", {"width": 32})
    assert loaded.config.objective.options == {"negative_sampling": "n"}


def test_the_last_override_of_a_key_holds() -> None:
    assert good("train.steps=3", "train.steps=5").config.train.steps == 5


def test_values_cannot_change_once_made() -> None:
    with pytest.raises(ValueError, match="frozen"):
        good().config.train.steps = 3


def test_the_order_of_the_modalities_is_that_of_the_file() -> None:
    assert list(good().config.modalities) == ["image", "text"]


def test_to_yaml_gives_the_same_config_back() -> None:
    config = good("objective.seeded=[1, {x: 2}]", "deepspeed.zero_optimization.reduce_bucket_size=10").config
    again = parse_config(config.to_yaml(), "again.yaml").config
    assert again == config and again.digest() == config.digest()


# -- explain, digest, schema -----------------------------------------------------------------------------------------


def test_explain_tells_every_value_with_its_origin() -> None:
    overrides = [
        "train.steps=20",
        "modalities.text.encoder={name: text_convnet, channels: 8}",
        "modalities.image.encoder.channels=[4, 8]",
        "deepspeed.comms_logger.enabled=true",
    ]
    rows = explain(good(*overrides, text=with_line("  lr: 1e-3", "  betas: [0.8, 0.9]"))).splitlines()
    for row in [
        'run.name = "try"   [my.yaml:1]',
        "optimizer.lr = 0.001   [my.yaml:15]",
        "optimizer.betas = [0.8, 0.9]   [my.yaml:16]",
        "optimizer.eps = 1e-08   [default]",
        f"train.steps = 20   [override '{overrides[0]}']",
        "train.global_batch_size = 12   [my.yaml:19]",
        'modalities.image.decoder.name = "image"   [my.yaml:6]',
        'modalities.image.decoder.mode = "L"   [my.yaml:6]',
        # A bare string became a map when an override reached into it: the name still stands in the file.
        'modalities.image.encoder.name = "image_convnet"   [my.yaml:8]',
        f"modalities.image.encoder.channels = [4, 8]   [override '{overrides[2]}']",
        f"modalities.text.encoder.name = \"text_convnet\"   [override '{overrides[1]}']",
        f"modalities.text.encoder.channels = 8   [override '{overrides[1]}']",
        f'deepspeed = {{"comms_logger": {{"enabled": true}}}}   [override \'{overrides[3]}\']',
        "seed = 0   [default]",
    ]:
        assert row in rows, f"missing: {row}\namong:\n" + "\n".join(rows)
    for row, meaning in itertools.pairwise(rows):
        if not row.startswith(" ") and not row.startswith("modalities.image.decoder.mode"):
            assert meaning.startswith("    "), f"{row}: nothing is said of its meaning"


def test_a_value_of_an_override_is_not_blamed_on_the_file() -> None:
    lines = mistakes("optimizer.betas=[3, 0.9]", text=with_line("  lr: 1e-3", "  betas: [0.8, 0.9]"))
    assert lines == ["override 'optimizer.betas=[3, 0.9]': optimizer.betas.0: should be less than 1 (got 3)"]


def test_digest_is_of_everything_but_the_runs_name_and_place() -> None:
    digest = good().config.digest()
    assert good("run.name=other", "run.directory=elsewhere").config.digest() == digest
    for override in [
        "seed=1",
        "optimizer.lr=2e-3",
        "run.init_from=a",
        "objective=pairwise_clip",
        "modalities.image.encoder.width=3",
        "deepspeed.x=1",
    ]:
        assert good(override).config.digest() != digest, override


def test_digest_knows_the_order_of_modalities_that_the_permutations_are_drawn_by() -> None:
    parts = yaml.safe_load(GOOD)
    parts["modalities"] = dict(reversed(parts["modalities"].items()))
    parts["optimizer"]["lr"] = 1e-3
    other = good(text=yaml.safe_dump(parts, sort_keys=False)).config
    assert list(other.modalities) == ["text", "image"]
    assert other.digest() != good().config.digest()


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = good("data.test=s3://bucket/test", "data.validation=/v").config.with_absolute_paths()
    assert config.data.train["train"].path == str(tmp_path / "shards/train")
    assert (config.data.validation, config.data.test) == ("/v", "s3://bucket/test")
    assert config.run_directory == tmp_path / "runs/try"


def test_schema_is_a_json_schema_that_agrees_with_the_parser() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def errors(override: str | None = None) -> list[str]:
        content = json.loads(json.dumps({**yaml.safe_load(GOOD), "optimizer": {"lr": 1e-3}}))
        if override:
            content[override] = {}
        return [error.message for error in validator.iter_errors(content)]

    assert errors() == []  # bare strings for components included
    assert len(errors("trian")) == 1
    assert "description" in schema["$defs"]["OptimizerConfig"]["properties"]["lr"]


# -- the shipped configs ---------------------------------------------------------------------------------------------


def test_configs_are_found() -> None:
    assert "demo.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_shipped_config_is_valid(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.config.train.steps > 0
    explain(loaded)


def test_validating_a_config_imports_no_torch() -> None:
    code = (
        "import sys; from symile_dist.cli import main\n"
        f"codes = [main(['config', 'validate', {str(CONFIGS[0])!r}]), main(['config', 'explain', {str(CONFIGS[0])!r}]),"
        " main(['config', 'schema'])]\n"
        "heavy = sorted({'torch', 'ray', 'deepspeed', 'numpy'} & set(sys.modules))\n"
        "sys.exit(f'codes {codes}, imported {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_few_lines_that_stand_for_billions_of_values() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match=r"bomb\.yaml: holds more than 100000 values"):
        parse_config("\n".join(lines), "bomb.yaml")
