"""From shards of raw media to shards of features: the plan, the restart, the manifest, the summary."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from symile_dist.config import Config
from symile_dist.data.manifest import Manifest, ShardEntry, index_directory, read_manifest
from symile_dist.errors import RunFailed
from symile_dist.storage import Folder
from symile_dist.tools.features.recipe import FeatureType, Recipe, make_recipe, warnings
from symile_dist.tools.features.shard import LeftOut, is_complete, read_left_out
from symile_dist.tools.features.snippet import feature_config, feature_shapes, snippet_text
from symile_dist.tools.shard_folder import (
    compare_parameters,
    damaged_plan,
    not_complete,
    parse_part,
    read_plan,
    refuse_strangers,
    tidy,
    work_in,
    write_new,
)

PLAN, LOCK = "encode.json", ".encode.lock"
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_logger = logging.getLogger(__name__)


def encode(
    config: Config,
    out: str | Path,
    *,
    shards: str | None = None,
    modalities: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    actors: int | None = None,
    gpus_per_actor: float = 0,
    batch_size: int = 64,
    dtype: FeatureType = "float16",
    part: str = "1/1",
    on_error: Literal["leave-out", "stop"] = "leave-out",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the config's encoders over a folder of shards and writes their features into `out`, a shard for a shard.

    The bytes depend on the source, the weights and the options alone: not on actors, parts or kills. Calling it again
    goes on where a killed call stopped.

    Args:
        shards: folder or URL of indexed shards; `data.train` of the config when left out.
        modalities: which are encoded; all when left out.
        keep: members that are copied; all that belong to no encoded modality when left out.
        actors: Ray actors, each with `ray.cpus_per_worker` CPUs; when left out one, or as many as the GPUs allow.
        gpus_per_actor: 0 encodes on CPUs; a fraction shares a GPU.
        batch_size: samples that an encoder sees at once; another one may give other last digits.
        part: "i/n": encode every n-th shard only, beginning with the i-th.
        on_error: a member that cannot be used is left out and told in the end, or ends the call.
        progress: called from the calling thread.

    Returns a summary: samples, shards, what was left out, "complete", "config", "message".

    Raises ValueError for a user's mistake, before anything is written where it can be known then; RunFailed where the
    work cannot go on; StorageError for an object store that fails.
    """
    started = time.monotonic()
    mine, parts = parse_part(part)
    source = Folder(shards if shards is not None else _only_dataset(config), config.data.storage)
    folder = _output(out, source)
    manifest = read_manifest(source.url, source.storage, check=False)
    _check_files(source, manifest)
    _check_actors(actors, gpus_per_actor)
    device: Literal["cpu", "cuda"] = "cuda" if gpus_per_actor else "cpu"
    recipe = make_recipe(
        config, manifest, modalities, keep, dtype, batch_size, device, stop_on_error=on_error == "stop"
    )
    for warning in warnings(recipe):
        _logger.warning("%s", warning)
    names = [entry.name for entry in manifest.shards]
    parameters = recipe.parameters(manifest)
    weights = _written_weights(folder, parameters)
    refuse_strangers(folder, names)
    share = list(manifest.shards[mine - 1 :: parts])
    todo = [entry for entry in share if not is_complete(folder, entry.name)]
    with contextlib.ExitStack() as open_files:
        lock: list[BinaryIO] = []

        def begin(found: dict[str, str]) -> None:
            nonlocal started
            started = time.monotonic()  # how fast it encodes is counted from here on: Ray and the encoders are there
            _agree(folder, {**parameters, "weights": found})
            lock.append(open_files.enter_context(open(folder / LOCK, "ab")))
            work_in(folder, lock[0], [entry.name for entry in share])

        if todo:
            _encode_all(recipe, source, folder, share, todo, actors, gpus_per_actor, begin, progress)
        elif weights:
            begin(weights)
        missing = [number for number, name in enumerate(names) if not is_complete(folder, name)]
        seconds = time.monotonic() - started
        summary = _summary(recipe, manifest, folder, missing, parts)
        if not missing:
            refuse_strangers(folder, names)
            made = index_directory(folder)
            tidy(folder, lock[0])
            summary |= _features(recipe, made, folder)
    encoded = sum(entry.samples for entry in todo)
    summary |= {"written": len(todo), "encoded": encoded, "seconds": seconds, "samples_per_second": encoded / seconds}
    return {**summary, "message": format_summary(summary)}


def _only_dataset(config: Config) -> str:
    datasets = config.data.train
    if len(datasets) > 1:
        raise ValueError(f"data.train is a mixture of {', '.join(datasets)}: name one folder with --shards")
    return next(iter(datasets.values())).path


def _output(out: str | Path, source: Folder) -> Path:
    if "://" in str(out):
        raise ValueError(f"{out}: encode into a local or mounted folder, then copy it to the object store")
    folder = Path(out).absolute()
    if source.path is not None and source.path.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the folder of the raw shards: name another one for the features")
    return folder


def _check_files(source: Folder, manifest: Manifest) -> None:
    """Raises ValueError for shards or indices that are not there. Damaged ones are met sample by sample."""
    files = source.list()
    lost = [name for entry in manifest.shards for name in (entry.name, f"{entry.name}.idx") if name not in files]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"{source / lost[0]}{more}: in the manifest, but not in the folder; put it back, or make the manifest "
            f"again with: symile-dist shards index {source.url}"
        )


def _check_actors(actors: int | None, gpus: float) -> None:
    if actors is not None and actors < 1:
        raise ValueError(f"--actors must be at least 1, not {actors}")
    if not 0 <= gpus < float("inf") or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(f"--gpus-per-actor must be 0, a fraction of 1 or a whole number, not {gpus:g}")


def _written_weights(folder: Path, parameters: dict[str, Any]) -> dict[str, str]:
    """The digests of the weights that stand in the folder's plan. Raises ValueError for a plan of other parameters."""
    plan = read_plan(folder, PLAN)
    if plan is None:
        return {}
    try:
        present = dict(plan["parameters"])
        weights = {str(name): str(digest) for name, digest in present.pop("weights").items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged_plan(folder / PLAN, error) from None
    compare_parameters(folder, present, parameters)
    return weights


def _agree(folder: Path, parameters: dict[str, Any]) -> None:
    """Writes the plan, unless another part was first: then its plan holds."""
    folder.mkdir(parents=True, exist_ok=True)
    write_new(folder / PLAN, (json.dumps({"parameters": parameters}, indent=2, ensure_ascii=False) + "\n").encode())
    compare_parameters(folder, read_plan(folder, PLAN)["parameters"], parameters)


def _encode_all(
    recipe: Recipe,
    source: Folder,
    folder: Path,
    share: Sequence[ShardEntry],
    todo: Sequence[ShardEntry],
    actors: int | None,
    gpus: float,
    begin: Callable[[dict[str, str]], None],
    progress: Progress | None,
) -> None:
    from symile_dist.cluster import join_ray
    from symile_dist.signals import terminated_like_interrupted
    from symile_dist.tools.features.actors import encode_shards

    cpus = recipe.config.ray.cpus_per_worker
    nodes = join_ray(cpus * min(actors or 1, len(todo)))
    there = {what: sum(node.resources.get(what, 0) for node in nodes) for what in ("CPU", "GPU")}
    if actors is None:
        actors = max(1, int(there["GPU"] / gpus)) if gpus else 1
    actors = min(actors, len(todo))
    for what, need, option in (
        ("CPU", cpus * actors, "ray.cpus_per_worker"),
        ("GPU", gpus * actors, "--gpus-per-actor"),
    ):
        if there[what] < need:
            raise ValueError(f"{actors} actors need {need:g} {what}s (--actors x {option}), Ray has {there[what]:g}")
    total = sum(entry.samples for entry in share)
    done = total - sum(entry.samples for entry in todo)
    left = {entry.name for entry in todo}
    left_out = sum(len(read_left_out(folder, entry.name)) for entry in share if entry.name not in left)
    if progress:
        progress("samples", done, total)
    with terminated_like_interrupted():
        for entry in encode_shards(recipe, source, folder, todo, actors, gpus, begin):
            done += entry.samples
            if progress:
                progress("samples", done, total)
            new = read_left_out(folder, entry.name)
            left_out += len(new)
            if new and done >= 1000 and left_out > (limit := recipe.config.data.max_bad_fraction) * done:
                raise RunFailed(
                    f"{left_out} members of {done} samples could not be used, more than "
                    f"data.max_bad_fraction={limit:g}; the last: {new[-1]}"
                )


def _summary(recipe: Recipe, manifest: Manifest, folder: Path, missing: Sequence[int], parts: int) -> dict[str, Any]:
    by_part: dict[str, int] = {}
    for number in missing:
        name = f"{number % parts + 1}/{parts}"
        by_part[name] = by_part.get(name, 0) + 1
    absent = {manifest.shards[number].name for number in missing}
    there = [entry for entry in manifest.shards if entry.name not in absent]
    left_out: list[LeftOut] = []
    for entry in there:
        left_out += read_left_out(folder, entry.name)
    return {
        "directory": str(folder),
        "complete": not missing,
        "modalities": list(recipe.modalities),
        "kept": list(recipe.kept),
        "shards": len(there),
        "samples": sum(entry.samples for entry in there),
        "bytes": sum((folder / entry.name).stat().st_size for entry in there),
        "left_out": [each._asdict() for each in left_out],
        "missing_shards": len(missing),
        "missing_parts": by_part,
    }


def _features(recipe: Recipe, made: Manifest, folder: Path) -> dict[str, Any]:
    """What is known once all shards are there."""
    shapes = feature_shapes(folder, made, recipe.modalities)
    sections = feature_config(recipe.config, shapes, made.members, folder)
    return {
        "digest": made.digest,
        "features": {
            name: {"shape": list(found.shape), "variable_length": found.variable_length}
            for name, found in shapes.items()
        },
        "config": snippet_text(sections),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{summary['directory']}: {summary['samples']} samples in {summary['shards']} shards, "
        f"{summary['bytes'] / 1e6:.1f} MB; {summary['encoded']} samples encoded in {summary['seconds']:.0f} s "
        f"({summary['samples_per_second']:.1f}/s)"
    ]
    left_out = [LeftOut(**each) for each in summary["left_out"]]
    if left_out:
        lines.append(f"  {len(left_out)} members could not be used and are left out:")
        lines += [f"    {each}" for each in left_out[:20]]
        if len(left_out) > 20:
            lines.append(f"    (and {len(left_out) - 20} more: SHARD.left-out.jsonl beside the shards)")
    if summary["missing_shards"]:
        lines.append(not_complete(summary["missing_shards"], summary["missing_parts"]))
        return "\n".join(lines)
    for name in summary["modalities"]:
        if name not in summary["features"]:
            lines.append(f"  no sample has a feature of '{name}'")
    return "\n".join([*lines, "in the config of the training:", "", summary["config"].rstrip("\n")])


__all__ = ["LOCK", "PLAN", "encode", "format_summary"]
