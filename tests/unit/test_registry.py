"""From a name in a config to an object, and every way in which that goes wrong."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from symile_dist.registry import DECODERS, ENCODERS, OBJECTIVES, TRANSFORMS, build, check_options, resolve, unknown_name

REGISTRIES = {"decoder": DECODERS, "transform": TRANSFORMS, "encoder": ENCODERS, "objective": OBJECTIVES}


class Thing:
    """A component of a user's own."""

    def __init__(self, width: int, depth: int, flat: bool = False) -> None:
        self.width, self.depth, self.flat = width, depth, flat


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in REGISTRIES for name in REGISTRIES[kind]])
def test_every_registered_name_leads_to_something_documented(kind: str, name: str) -> None:
    target = resolve(name, REGISTRIES[kind], kind)
    assert callable(target)
    assert inspect.getdoc(target), f"{kind} '{name}' has no docstring"


@pytest.mark.parametrize("kind", REGISTRIES)
def test_the_page_of_parts_has_every_name_and_option(kind: str) -> None:
    """docs/parts.md, of which a config's author sees what options there are."""
    page = (Path(__file__).parents[2] / "docs" / "parts.md").read_text(encoding="utf-8")
    section = page.partition(f"| {kind} | options | |")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*?) \|", section, re.MULTILINE))
    ours = {"data", "seed", "embedding_dim", "modalities", "global_batch_size"}
    wanted = {}
    for name in REGISTRIES[kind]:
        parameters = inspect.signature(resolve(name, REGISTRIES[kind], kind)).parameters.values()
        shown = [f"`{_option(parameter)}`" for parameter in parameters if parameter.name not in ours]
        wanted[name] = ", ".join(shown)
    assert {name: options.strip() for name, options in rows.items()} == wanted


def _option(parameter: inspect.Parameter) -> str:
    """As YAML has it."""
    default = parameter.default
    if default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}: {default if isinstance(default, str) else json.dumps(default)}"


def test_names_of_ones_own() -> None:
    thing = build(f"{__name__}:Thing", {"depth": 2}, {}, "encoder", width=3)
    assert (thing.width, thing.depth, thing.flat) == (3, 2, False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("image_convnt", ["unknown encoder 'image_convnt'", "did you mean 'image_convnet'?", "package.module:Name"]),
        ("zzz", ["unknown encoder 'zzz'", f"known: {', '.join(sorted(ENCODERS))}"]),
        ("my module:Name", ["not of the form package.module:Name"]),
        ("os:", ["not of the form package.module:Name"]),
        ("no_such_package_here:Thing", ["no package 'no_such_package_here' is found", "PYTHONPATH"]),
        ("collections.nothing:Thing", ["cannot import collections.nothing"]),
        ("collections:NoSuchThing", ["collections has no 'NoSuchThing'"]),
    ],
)
def test_a_wrong_name_is_told_with_its_remedy(name: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(name, ENCODERS, "encoder")
    for word in words:
        assert word in str(caught.value)


def test_unknown_name_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_users_own.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert unknown_name("a_users_own:Thing", ENCODERS, "encoder") is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 1, "flatt": True}, ["encoder 'thing': unknown option 'flatt'", "did you mean 'flat'?"]),
        ({"depth": 1, "width": 9}, ["unknown option 'width'"]),  # ours to give, not the user's
        ({}, ["encoder 'thing': option 'depth' is missing"]),
        ({"depth": 1, "flat": "no"}, ["encoder 'thing': flat = 'no' should be true or false"]),
    ],
)
def test_wrong_options_are_told(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        check_options(Thing, options, "encoder", "thing", fixed=("width",))
    for word in words:
        assert word in str(caught.value)


def test_any_option_goes_where_the_target_takes_any() -> None:
    def target(**anything: object) -> None:
        """Takes what comes."""

    check_options(target, {"whatever": 1}, "encoder", "target")
