"""The command line as a user meets it: help with examples, and mistakes told in words, with exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from symile_dist.cli import build_parser, main
from symile_dist.config import load_config
from symile_dist.run_directory import prepare
from tests.shards import config_text, write_shards


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command that runs something."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words
    for group in groups:
        for name, child in group.choices.items():
            yield from commands(child, (*words, name))


COMMANDS = list(commands(build_parser()))


@pytest.fixture
def config(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid config over the synthetic shards; relative paths lead to tmp_path."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.yaml"
    path.write_text(config_text(shards))
    return path


def user_mistake(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What `symile-dist WORDS` says on standard error; fails unless it is a user's mistake told as one."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 2, f"exit code {code}\n{captured.err}"
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


# -- help ------------------------------------------------------------------------------------------------------------


def test_commands_are_found() -> None:
    assert {("train",), ("resume",), ("evaluate",), ("config", "validate"), ("shards", "index")} <= set(COMMANDS)


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_help_has_an_example_that_parses(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "example" in text
    examples = [line.split() for line in text[text.index("example") :].splitlines()[1:] if line.strip()]
    assert examples
    for example in examples:
        assert example[: 1 + len(words)] == ["symile-dist", *words], example
        arguments = example[1 : example.index(">")] if ">" in example else example[1:]
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("words", [["trian"], [], ["train"], ["config"], ["evaluate", "run", "--split", "tset"]])
def test_words_that_are_no_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and "error: " in captured.err and "usage: " in captured.err


# -- what works ------------------------------------------------------------------------------------------------------


def test_config_commands(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(config)]) == 0
    digest = load_config(config).config.digest()
    assert f"valid (run 'test', digest {digest[:12]})" in capsys.readouterr().out
    assert main(["config", "validate", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "digest": digest}
    assert main(["config", "explain", str(config), "optimizer.lr=1e-4"]) == 0
    assert "optimizer.lr = 0.0001   [override 'optimizer.lr=1e-4']" in capsys.readouterr().out
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_overrides_may_stand_anywhere(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", str(config), "--json", "seed=3", "train.steps=9"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert (explained["seed"], explained["train"]["steps"]) == (3, 9)
    for words in (["config", "validate", str(config), "--jsn"], ["shards", "stats", "folder", "seed=3"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_shards_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "train", [3, 4])
    assert main(["shards", "index", str(folder)]) == 0
    assert "7 samples in 2 shards, members a.npy, b.npy, c.npy, json" in capsys.readouterr().out
    assert main(["shards", "index", str(folder), str(folder), "--force", "--json"]) == 0
    assert [each["samples"] for each in json.loads(capsys.readouterr().out)] == [7, 7]


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_a_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train"], ["config", "validate"], ["config", "explain"]):
        assert "nowhere.yaml: no such file" in user_mistake(capsys, *command, "nowhere.yaml")


def test_unknown_keys_and_names(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = user_mistake(capsys, "train", config, "optimizer.lrr=1", "objective=simile")
    assert "optimizer.lrr: unknown key; did you mean 'lr'?" in said
    said = user_mistake(capsys, "config", "validate", config, "objective=simile")
    assert "unknown objective 'simile'; did you mean 'symile'?" in said


def test_an_option_that_the_component_does_not_take(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = user_mistake(capsys, "train", config, "objective.negative_smpling=n", "modalities.a.encoder.widht=3")
    assert "objective 'symile': unknown option 'negative_smpling'; did you mean 'negative_sampling'?" in said
    assert "encoder 'mlp': unknown option 'widht'" in said, "all at once"


def test_a_batch_that_the_ranks_do_not_divide(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = user_mistake(capsys, "train", config, "ray.num_workers=5")
    assert "train.global_batch_size: 12 is not divisible by ray.num_workers = 5; use 10 or 15" in said


def test_data_that_is_not_there(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = user_mistake(capsys, "train", config, "data.train=nowhere")
    assert f"{tmp_path}/nowhere: no such folder of shards" in said
    (tmp_path / "empty").mkdir()
    assert "holds no .tar shards" in user_mistake(capsys, "train", config, "data.train=empty")
    assert "nowhere: no such folder of shards" in user_mistake(capsys, "shards", "index", "nowhere")


def test_shards_without_an_index_name_the_command(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "raw", [12])
    said = user_mistake(capsys, "train", config, "data.train=raw", "data.validation=raw")
    assert f"the shards have no index; make it with: symile-dist shards index {folder}" in said
    assert said.count("no index") == 1, "the same problem is told once"
    assert main(["shards", "index", str(folder)]) == 0, "the remedy works"


def test_damaged_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "train", [3, 4])
    os.truncate(folder / "shard-00001.tar", 3000)
    said = user_mistake(capsys, "shards", "index", folder)
    assert "shard-00001.tar: " in said and ("truncated" in said or "damaged" in said)


def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "resume"):
        assert "not a run directory (it has no config.yaml)" in user_mistake(capsys, command, tmp_path)
        assert "nowhere: not a run directory" in user_mistake(capsys, command, tmp_path / "nowhere")


def test_evaluating_a_run_without_checkpoints(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_config(config).config.with_absolute_paths()
    prepare(run, fresh=False, resume=False)
    assert "has no complete checkpoint yet" in user_mistake(capsys, "evaluate", run.run_directory)
    assert "--resamples 1" in user_mistake(capsys, "evaluate", run.run_directory, "--resamples", "1")


def test_a_run_directory_that_holds_another_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_config(config).config.with_absolute_paths()
    prepare(run, fresh=False, resume=False)
    said = user_mistake(capsys, "train", config, "train.steps=9")
    assert "holds a run of another config (train.steps: 4 -> 9)" in said
    assert f"symile-dist resume {run.run_directory}" in said and "--fresh" in said


def test_a_place_that_cannot_be_written(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = user_mistake(capsys, "train", config, f"run.directory={config}/run")
    assert f"{config}/run: cannot be written" in said
    assert f"{config}: is a file, not a folder" in user_mistake(capsys, "train", config, f"run.directory={config}")


def test_the_installed_command_ends_with_the_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "symile_dist.cli", "config", "validate", "nowhere.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nowhere.yaml: no such file\n")


def test_the_hub_s_warnings_are_told_once() -> None:
    code = (
        "from symile_dist.cli import main\n"
        "main(['config', 'schema'])\n"
        "from huggingface_hub.utils import logging\n"
        "logging.get_logger('huggingface_hub.http').warning('the hub does not answer')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("the hub does not answer") == 1, done.stderr
