"""`symile-dist checkpoints`: what a run has saved, whether it is whole, and its weights for use elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symile_dist import __version__
from symile_dist.checkpoint.attempts import usable_checkpoints
from symile_dist.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointError,
    Manifest,
    checkpoint_folders,
    complete_checkpoints,
    read_manifest,
    verify,
)
from symile_dist.config import Config, MetricsConfig, StorageConfig
from symile_dist.evaluation.report import format_results
from symile_dist.run_directory import load_run
from symile_dist.storage import read_json, sha256_of_file, sync_directory, without_secrets, write_json, write_text
from symile_dist.tools.results import RESULTS

if TYPE_CHECKING:
    from symile_dist.checkpoint.reshape import WholeWeights

Progress = Callable[[str, int, int], None]
"""(what, how many are done, of how many)"""


def find_checkpoint(config: Config, step: str) -> Path:
    """The folder of a checkpoint: of a step by number, the `latest`, or the `best` by validation.

    Raises CheckpointError when it is not there, naming those that are.
    """
    complete = dict(usable_checkpoints(config.run_directory / CHECKPOINTS))
    if not complete:
        raise CheckpointError(f"{config.run_directory}: has no complete checkpoint yet")
    newest = max(complete)
    if step == "latest":
        return complete[newest]
    if step == "best":
        best = read_manifest(complete[newest]).train_state.get("best_step")
        if best not in complete:
            raise CheckpointError(
                f"{config.run_directory}: the best step by validation ({best}) has no checkpoint; let "
                "validation.every be a multiple of checkpoint.every, or name a step"
            )
        return complete[best]
    if not step.isdecimal() or int(step) not in complete:
        known = ", ".join(str(number) for number in sorted(complete))
        raise CheckpointError(f"no checkpoint of step {step}; there are: {known} (or `latest`, `best`)")
    return complete[int(step)]


# -- list --------------------------------------------------------------------------------------------------------------


def list_checkpoints(run: str | Path) -> dict[str, Any]:
    """What a run has saved, by step, and what unfinished saves have left. No file but the manifests is read.

    Raises ConfigError where there is no run.
    """
    config = load_run(run)
    directory = config.run_directory / CHECKPOINTS
    complete = [step for step, _ in complete_checkpoints(directory)]
    manifests: dict[int, Manifest | str] = {}
    for step, folder in complete_checkpoints(directory):
        try:
            manifests[step] = read_manifest(folder)
        except CheckpointError as error:
            manifests[step] = str(error)
    whole = [manifest for manifest in manifests.values() if isinstance(manifest, Manifest)]
    best = whole[-1].train_state.get("best_step") if whole else None
    newest = complete[-config.checkpoint.keep_last :]
    every = config.checkpoint.keep_every
    rows = []
    for step, folder in checkpoint_folders(directory):
        manifest = manifests.get(step)
        row: dict[str, Any] = {"step": step, "folder": str(folder), "committed": manifest is not None}
        if isinstance(manifest, str):
            row["problem"] = manifest
        elif manifest is not None:
            row |= {
                "saved": (folder / MANIFEST).stat().st_mtime,
                "bytes": sum(entry.size for entry in manifest.files),
                "files": len(manifest.files),
                "world_size": manifest.world_size,
                "zero_stage": manifest.zero_stage,
                "precision": manifest.precision,
                "samples_seen": manifest.train_state.get("samples_seen"),
                "code_version": manifest.code_version,
                "best": step == best,
                "kept_as": [
                    reason
                    for reason, holds in (
                        ("newest", step in newest),
                        ("best", step == best),
                        ("keep_every", bool(every) and step % (every or 1) == 0),
                    )
                    if holds
                ],
            }
        row["leftovers"] = _leftovers(folder, manifest if isinstance(manifest, Manifest) else None)
        rows.append(row)
    return {"run": str(config.run_directory), "checkpoints": rows, "best_step": best}


def _leftovers(folder: Path, manifest: Manifest | None) -> list[str]:
    """Names of the files that belong to no save that was committed."""
    own = {MANIFEST}
    for entry in manifest.files if manifest else ():
        own |= {entry.path, str(Path(entry.path).with_suffix(".json"))}  # the note by which rank 0 learned of the file
    return sorted(path.name for path in folder.iterdir() if path.name not in own)


def checkpoints_table(found: Mapping[str, Any]) -> Any:
    """What `list_checkpoints` gives, for people."""
    from rich.table import Table

    rows = found["checkpoints"]
    if not rows:
        return f"{found['run']}: no checkpoint yet"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("step", "saved", "size", "ranks", "ZeRO", "precision", "kept as", "state"):
        table.add_column(name, justify="right" if name in ("step", "size", "ranks", "ZeRO") else "left")
    for row in rows:
        left = row["leftovers"]
        also = f"; {len(left)} files of a save that did not finish" if left else ""
        if "problem" in row:
            table.add_row(str(row["step"]), *[""] * 6, row["problem"])
        elif not row["committed"]:
            table.add_row(str(row["step"]), *[""] * 6, "not committed: a save under way, or what is left of one")
        else:
            table.add_row(
                str(row["step"]),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved"])),
                f"{row['bytes'] / 1e6:.1f} MB",
                str(row["world_size"]),
                str(row["zero_stage"]),
                row["precision"],
                ", ".join(row["kept_as"]) or "-",
                f"committed{also}",
            )
    return table


# -- verify ------------------------------------------------------------------------------------------------------------


def verify_checkpoints(run: str | Path, step: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Compares every file of one or of all committed checkpoints with its manifest.

    Args:
        step: a number, `latest` or `best`; all when left out.

    Raises ConfigError or CheckpointError where there is no such run, or no such checkpoint.
    """
    config = load_run(run)
    directory = config.run_directory / CHECKPOINTS
    folders = [find_checkpoint(config, step)] if step else [folder for _, folder in complete_checkpoints(directory)]
    if not folders:
        find_checkpoint(config, "latest")  # says that there is none
    found = []
    for folder in folders:
        row: dict[str, Any] = {"folder": str(folder), "files": 0, "bytes": 0, "problems": []}
        found.append(row)
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            row["problems"] = [str(error)]
            continue
        row |= {"step": manifest.step, "files": len(manifest.files)}
        row["bytes"] = sum(entry.size for entry in manifest.files)
        for number, entry in enumerate(manifest.files, start=1):
            row["problems"] += verify(folder, [entry])
            if progress:
                progress(folder.name, number, len(manifest.files))
    unfinished = [folder.name for _, folder in checkpoint_folders(directory) if not (folder / MANIFEST).exists()]
    damaged = sum(bool(row["problems"]) for row in found)
    return {
        "run": str(config.run_directory),
        "damaged": damaged,
        "checkpoints": found,
        "not_committed": [] if step else unfinished,
    }


def format_verified(found: Mapping[str, Any]) -> str:
    """What `verify_checkpoints` gives, in words: each damaged file by name."""
    lines = []
    for row in found["checkpoints"]:
        whole = f"{row['folder']}: whole ({row['files']} files, {row['bytes'] / 1e6:.1f} MB)"
        lines += [f"damaged: {problem}" for problem in row["problems"]] or [whole]
    lines += [f"{name}: not committed, hence no checkpoint" for name in found["not_committed"]]
    checked = len(found["checkpoints"])
    lines.append(f"{found['run']}: {found['damaged']} of {checked} checkpoints are damaged" if found["damaged"] else "")
    return "\n".join(line for line in lines if line)


# -- consolidate -------------------------------------------------------------------------------------------------------


def consolidate(run: str | Path, out: str | Path, step: str = "latest", force: bool = False) -> dict[str, Any]:
    """Writes the whole weights of a checkpoint to one safetensors file, which is whole or not there.

    Parameters are fp32, of any ZeRO stage and world size; buffers and the objective's inner modules come beside them,
    all under the names of `TrainingModule`. One tensor at a time is in memory.

    Raises ValueError for a file that is there already, unless `force`, CheckpointError for a damaged checkpoint.
    """
    from symile_dist.checkpoint.reshape import WholeWeights

    path = Path(out)
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"--out {path}: should be a file whose name ends in .safetensors")
    if path.exists() and not force:
        raise ValueError(f"{path}: is there already; name another file, or overwrite it by --force")
    config = load_run(run)
    weights = WholeWeights(find_checkpoint(config, step))
    _check_space(path.parent, weights)
    _write_weights(path, {name: name for name in weights.kinds}, weights, _origin(config, weights.manifest))
    return {
        "out": str(path),
        "step": weights.manifest.step,
        "tensors": len(weights.kinds),
        "parameters": _count(weights, weights.parameters),
        "bytes": path.stat().st_size,
    }


def _count(weights: WholeWeights, names: Any) -> int:
    """Of numbers."""
    import math

    return sum(math.prod(weights.kinds[name][1]) for name in names)


def _check_space(folder: Path, weights: WholeWeights) -> None:
    from symile_dist.tools.shard_folder import check_space

    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, 4 * _count(weights, weights.kinds))


def _origin(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Where weights come from."""
    return {
        "run": config.run.name,
        "step": manifest.step,
        "samples_seen": manifest.train_state.get("samples_seen"),
        "objective": config.objective.name,
        "config_digest": manifest.config_digest,
        "code_version": manifest.code_version,
        "written_by": __version__,
    }


def _write_weights(path: Path, names: Mapping[str, str], weights: WholeWeights, origin: Mapping[str, Any]) -> None:
    """`names`: in the file -> in the checkpoint."""
    from symile_dist.checkpoint.shard import write_tensors
    from symile_dist.storage import write_atomic

    kinds = {name: weights.kinds[whole] for name, whole in names.items()}
    about = {"format": "pt", **{key: str(value) for key, value in origin.items()}}
    write_atomic(path, lambda file: write_tensors(file, kinds, lambda name: weights.read(names[name]), about))


# -- export ------------------------------------------------------------------------------------------------------------

PAPERS = {
    "symile": "Symile (NeurIPS 2024, arXiv 2411.01053)",
    "pairwise_clip": "CLIP (arXiv 2103.00020) over all pairs of modalities, as in Symile (arXiv 2411.01053)",
    "pairwise_sigmoid": "SigLIP (arXiv 2303.15343) over all pairs of modalities",
    "gram": "GRAM (ICLR 2025, arXiv 2412.11959)",
    "triangle": "TRIANGLE (NeurIPS 2025)",
    "confu": "ConFu (arXiv 2511.21331)",
    "gated_symile": "Gated Symile (arXiv 2604.05834)",
    "wpse": "Weighted Point Set Embedding (ICLR 2025, arXiv 2404.19228)",
    "factorcl": "FactorCL (NeurIPS 2023, arXiv 2306.05268)",
}
"""Objective -> the paper that it comes from."""
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
"""Ends of the names of files that hold weights, which an export has anyway."""
_SECRET = re.compile(
    r"(^|_)(password|passwd|secret|api_?key|access_?key|credentials?)$|^(\w*(auth|access|hf|api)_)?token$"
)
LEFT_OUT = "<left out>"


def export(run: str | Path, out: str | Path, step: str = "latest", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Writes a checkpoint's encoders to a folder that `symile_dist.load_encoders` reads; its layout is in
    symile_dist/exported.py. The folder is whole or not there.

    Args:
        step: a number, `latest` or `best`.
        overrides: `key=value`, laid on the run's config.

    Raises ValueError for a folder that holds something, CheckpointError for a checkpoint that is damaged or of another
    model than the config.
    """
    from symile_dist.checkpoint.reshape import WholeWeights
    from symile_dist.exported import ABOUT, CONFIG, ENCODERS, FILES, README, VERSION, place_of

    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out {out}: is there already and not empty; name another folder")
    config = load_run(run, list(overrides))
    folder = find_checkpoint(config, step)
    weights = WholeWeights(folder)
    files: dict[str, dict[str, str]] = {}  # file -> name in it -> name in the checkpoint
    for name in weights.kinds:
        file, short = place_of(name)
        files.setdefault(file, {})[short] = name
    own = {f"{ENCODERS}/{name}.safetensors" for name, modality in config.modalities.items() if not modality.encoder_of}
    unknown = sorted(file for file in files if file.startswith(f"{ENCODERS}/") and file not in own)
    if unknown:
        raise CheckpointError(
            f"{folder}: has an encoder '{Path(unknown[0]).stem}', the run's config has none: they differ"
        )
    _check_space(target.parent, weights)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        origin = _origin(config, weights.manifest)
        for file, names in files.items():
            _write_weights(temporary / file, names, weights, origin)
        portable, warnings = _portable(config, temporary / FILES)
        write_text(temporary / CONFIG, without_secrets(portable.to_yaml()))
        counts = {
            Path(file).stem: _count(weights, set(names.values()) & weights.parameters) for file, names in files.items()
        }
        results = _results(config, weights.manifest.step)
        write_text(temporary / README, _card(portable, weights.manifest, counts, results, target.name))
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        digests = {
            path.relative_to(temporary).as_posix(): sha256_of_file(path)
            for path in written
            if path.name not in (CONFIG, README) or path.parent != temporary  # these two may be edited
        }
        write_json(temporary / ABOUT, {"version": VERSION, **origin, "files": digests})
        os.rename(temporary, target)  # an empty folder may stand there
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)
    return {
        "out": str(out),
        "step": weights.manifest.step,
        "modalities": list(config.modalities),
        "parameters": sum(counts.values()),
        "files": sorted([*digests, ABOUT, CONFIG, README]),
        "warnings": warnings,
    }


def format_exported(summary: Mapping[str, Any]) -> str:
    lines = [
        f"{summary['out']}: {', '.join(summary['modalities'])} of step {summary['step']} "
        f"({summary['parameters']:,} parameters)",
        *(f"  {warning}" for warning in summary["warnings"]),
        f'  load them   symile_dist.load_encoders("{summary["out"]}")',
    ]
    return "\n".join(lines)


def _portable(config: Config, files: Path) -> tuple[Config, list[str]]:
    """The config without what is of this machine alone or a secret, and what could not be brought along.

    Files and folders that components' options name are copied to `files`, weights excepted, and named from there.
    """
    from symile_dist.exported import CONFIG, with_options

    copied: dict[Path, str] = {}
    warnings: list[str] = []

    def option(key: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if _SECRET.search(key.rpartition(".")[2].lower()):
            warnings.append(f"{key}: looks like a secret and is left out")
            return LEFT_OUT
        source = Path(value).expanduser()
        if "/" in value and source.exists():
            return _copied(source.resolve(), files, copied)
        if value.startswith(("/", "~/", "./", "../")):
            if value.endswith(WEIGHT_FILES):
                return f"{files.name}/{source.name}"
            warnings.append(f"{key}: {value} is not there, and stays in {CONFIG} as it is")
        return value

    def name_of(path: str | None) -> str | None:
        return path if path is None else Path(path).name

    def named(path: str | None) -> str | None:
        return path if path is None or "://" in path else "/".join(Path(path).parts[-2:]).lstrip("/")

    def expert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: expert(part) for key, part in value.items()}
        return name_of(value) if isinstance(value, str) and value.startswith(("/", "~/")) else value

    candidates = config.evaluation.candidates
    evaluation: dict[str, Any] = {"zero_shot": name_of(config.evaluation.zero_shot)}
    if candidates:
        evaluation["candidates"] = candidates.model_copy(update={"file": name_of(candidates.file)})
    train = {
        name: dataset.model_copy(update={"path": named(dataset.path)}) for name, dataset in config.data.train.items()
    }
    data = {
        "train": train,
        "validation": named(config.data.validation),
        "test": named(config.data.test),
        "storage": StorageConfig(),
    }
    sections = {
        "run": config.run.model_copy(update={"directory": None, "init_from": named(config.run.init_from)}),
        "data": config.data.model_copy(update=data),
        "evaluation": config.evaluation.model_copy(update=evaluation),
        "metrics": MetricsConfig(),
        "checkpoint": config.checkpoint.model_copy(update={"mirror": None}),
        "deepspeed": expert(config.deepspeed),
    }
    return with_options(config, option).model_copy(update=sections), list(dict.fromkeys(warnings))


def _copied(source: Path, files: Path, copied: dict[Path, str]) -> str:
    """Copies a file, or the files of a folder, unless they hold weights; returns the name in the export."""
    if source not in copied:
        name, number = source.name, 1
        while f"{files.name}/{name}" in copied.values():
            number += 1
            name = f"{source.stem}-{number}{source.suffix}"
        copied[source] = f"{files.name}/{name}"
        for path in sorted(source.iterdir()) if source.is_dir() else [source]:
            if path.is_file() and not path.name.endswith(WEIGHT_FILES):
                copy = files / name / path.name if source.is_dir() else files / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    return copied[source]


def _results(config: Config, step: int) -> list[dict[str, Any]]:
    """What `symile-dist evaluate` has written of a step, split by split, without this machine's paths."""
    found = []
    for path in sorted((config.run_directory / RESULTS).glob("*.json")):
        content = read_json(path)
        if isinstance(content, dict) and content.get("step") == step and "split" in content:
            found.append({key: value for key, value in content.items() if key not in ("export", "figures", "shards")})
    return found


def _card(
    config: Config, manifest: Manifest, counts: Mapping[str, int], results: Sequence[Mapping[str, Any]], folder: str
) -> str:
    """The model card; `config` is the portable one."""
    names = list(config.modalities)
    paper = PAPERS.get(config.objective.name, "an objective of the run's own")
    tags = json.dumps(["contrastive-learning", "multimodal", *names])
    rows = ["| modality | comes from | encoder | parameters |", "|---|---|---|---:|"]
    for name, modality in config.modalities.items():
        made = f"`{modality.encoder.name}`{_words(modality.encoder.options)}"
        if modality.encoder_of:
            made = f"that of {modality.encoder_of}"
        made += ", frozen" if modality.freeze else ""
        made += ", with a learned vector for samples that lack it" if modality.missing_embedding else ""
        comes = f"`.{modality.member}`: `{modality.decoder.name}`{_words(modality.decoder.options)}, then "
        comes += f"`{modality.transform.name}`{_words(modality.transform.options)}"
        parameters = "" if modality.encoder_of else f"{counts.get(name, 0):,}"
        rows.append(f"| {name} | {comes} | {made} | {parameters} |")
    first = names[0]
    train, state = config.train, manifest.train_state
    data = config.data.source or ", ".join(f"{name}: {dataset.path}" for name, dataset in config.data.train.items())
    facts = {
        "objective": f"`{config.objective.name}`{_words(config.objective.options)}: {paper}",
        "data": " ".join(without_secrets(data).split()),
        "step": f"{manifest.step} of {train.steps}",
        "samples seen": state.get("samples_seen", "unknown"),
        "global batch size": train.global_batch_size,
        "optimizer": f"AdamW, peak learning rate {config.optimizer.lr:g}, {config.optimizer.schedule}",
        "precision": train.precision,
        "embedding_dim": config.model.embedding_dim,
        "normalization": config.model.normalization,
        "seed": config.seed,
        "code": f"symile_dist {manifest.code_version}",
        "config digest": manifest.config_digest,
    }
    if state.get("best_step") is not None:
        facts["best step so far by validation"] = (
            f"{state['best_step']} ({config.validation.best_metric} {state['best_value']:.4f})"
            if isinstance(state.get("best_value"), float)
            else state["best_step"]
        )
    evaluated = [f"### {each['split']}\n\n{format_results(each)}" for each in results]
    if not evaluated:
        evaluated = [
            f"Not evaluated at this step: `symile-dist evaluate RUN --step {manifest.step}` does, before an export."
        ]
    parts = [
        f"---\nlibrary_name: symile_dist\ntags: {tags}\n---",
        f"# {config.run.name}, step {manifest.step}",
        f"Encoders of {len(names)} modalities ({', '.join(names)}), trained together by a contrastive objective: "
        f"{paper}. What belongs together gets vectors that fit each other.",
        "\n".join(rows),
        "## Use",
        "```python\n"
        "from pathlib import Path\n\nfrom symile_dist import load_encoders\n\n"
        f'encoders = load_encoders("{folder}")\n'
        f'sample = encoders.transform("{first}")(Path("sample.{config.modalities[first].member}").read_bytes())\n'
        f'vector = encoders.encode("{first}", [sample])  # one row per sample\n'
        "```",
        "Neither deepspeed nor ray is needed. Components of one's own (`package.module:Name` in config.yaml) have to "
        "be importable. A config names classes to call: load only what you trust.",
        "## Training",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items())]),
        "## Evaluation",
        *evaluated,
    ]
    return "\n\n".join(parts) + "\n"


def _words(options: Mapping[str, Any]) -> str:
    return (
        f" ({_cell(', '.join(f'{key}={json.dumps(value, default=str)}' for key, value in options.items()))})"
        if options
        else ""
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")
