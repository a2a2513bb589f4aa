"""What a run's directory says beside its history, in sections for the page and the terminal.

All of it may be missing, half written by another version, or damaged: what cannot be read is left out.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from symile_dist.checkpoint.attempts import left_behind
from symile_dist.checkpoint.manifest import CHECKPOINTS, MANIFEST, CheckpointError, checkpoint_folders, parse_manifest
from symile_dist.masking import masked, masked_data
from symile_dist.metrics.goodput import GOODPUT_FILE
from symile_dist.metrics.names import OWN_PHASES, STRAGGLER_RATIO
from symile_dist.run_directory import CONFIG_FILE, RANKS_FILE, RUN_FILE
from symile_dist.view.following import RunHistory

T = TypeVar("T")

MAX_FILE_BYTES = 2**25
EVALUATION = "evaluation"
MAX_RESULTS = 50
MAX_CHECKPOINTS = 500
SIZES_AGAIN_SECONDS = 600.0
MAX_FILES_LOOKED_AT = 5000
"""Of a checkpoint, for their sizes: a shared file system may answer slowly."""
SILENT_SECONDS = 120.0
"""Or 20 steps: a live run of which nothing is heard for so long may be dead."""
LIVE = ("starting", "running", "restarting")
_PHASES_KEPT = 24


class _Cached(Generic[T]):
    """What a file holds, parsed again only when it has changed; None where it cannot be read."""

    def __init__(self, path: Path, parse: Callable[[bytes], T]) -> None:
        self.path = path
        self.changed = 0.0
        """Unix time of its last change."""
        self._parse = parse
        self._signature: tuple[int, int, int] | None = None
        self._value: T | None = None

    def get(self) -> T | None:
        try:
            status = self.path.stat()
            signature = (status.st_mtime_ns, status.st_size, status.st_ino)
            if signature != self._signature:
                self._signature, self.changed = signature, status.st_mtime
                self._value = self._parse(self.path.read_bytes()) if status.st_size <= MAX_FILE_BYTES else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError):
            self._value = None
        return self._value


def _json_object(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError
    return found


def _rank_rows(content: bytes) -> list[dict[str, Any]]:
    """The ranks of ranks.json, in order; `own_seconds` is the time of a step in which a rank waits for no other."""
    found = json.loads(content)
    rows: dict[int, dict[str, Any]] = {}
    for each in found if isinstance(found, list) else ():
        if not isinstance(each, dict) or type(each.get("rank")) is not int:
            continue
        phases = dict(list(_numbers_of(each.get("phases")).items())[:_PHASES_KEPT])
        rows[each["rank"]] = {
            "rank": each["rank"],
            "host": _word(each.get("host")) or _word(each.get("node")),
            "pid": each.get("pid") if isinstance(each.get("pid"), int) else None,
            "metrics_url": _word(each.get("metrics_url")),
            "step": _number(each.get("step")),
            "step_seconds": _number(each.get("step_seconds")),
            "own_seconds": sum(phases.get(name, 0.0) for name in OWN_PHASES) if phases else None,
            "memory_bytes": _number(each.get("memory_bytes")),
            "phases": phases,
        }
    return [rows[rank] for rank in sorted(rows)]


class _ConfigFile:
    def __init__(self, content: bytes) -> None:
        text = content.decode("utf-8", errors="replace")
        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
            found = yaml.load(text, Loader=loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            found = None
        self._content = found if isinstance(found, dict) else {}

    def shown(self) -> str:
        """Its text, as far as it may be shown."""
        if not self._content:  # no YAML: whatever it is, it is not to be taken apart
            return "(config.yaml cannot be read)"
        return yaml.safe_dump(masked_data(self._content), sort_keys=False, allow_unicode=True, width=10**6)

    def at(self, *keys: str) -> Any:
        found: Any = self._content
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found


class RunFolder:
    """The small files of a run, each read again when it has changed. Not for several threads at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._run = _Cached(directory / RUN_FILE, _json_object)
        self._ranks = _Cached(directory / RANKS_FILE, _rank_rows)
        self._goodput = _Cached(directory / GOODPUT_FILE, _json_object)
        self._config: _Cached[_ConfigFile] | None = None
        self._manifests: dict[Path, _Cached[dict[str, Any]]] = {}
        self._sizes: dict[Path, tuple[float, int, list[str]]] = {}
        self._results: dict[Path, _Cached[dict[str, Any]]] = {}

    # The run

    def config(self) -> _ConfigFile | None:
        if self._config is None or self._config.get() is None:
            submitted = sorted(self.directory.glob(f"jobs/*/{CONFIG_FILE}"), reverse=True)
            file = next((file for file in (self.directory / CONFIG_FILE, *submitted) if file.exists()), None)
            if file is None:
                return None
            self._config = _Cached(file, _ConfigFile)
        return self._config.get()

    def total_steps(self) -> int | None:
        """The step at which the run ends."""
        config = self.config()
        steps = config.at("train", "steps") if config else None
        return steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else None

    def name(self) -> str:
        config = self.config()
        name = (self._run.get() or {}).get("name") or (config.at("run", "name") if config else None)
        return str(name or self.directory.name)

    def status(self, history: RunHistory) -> str:
        """As in run.json; without it, what the history says, or "unknown"."""
        status = (self._run.get() or {}).get("status")
        if isinstance(status, str) and status:
            return status
        end = history.latest.get("end", {})
        step, total = history.step, self.total_steps()
        if isinstance(end.get("status"), str):
            return str(end["status"])
        return "finished" if step is not None and total is not None and step >= total else "unknown"

    def run(self, history: RunHistory) -> dict[str, Any]:
        told = self._run.get() or {}
        config = self.config()
        status = self.status(history)
        modalities = config.at("modalities") if config else None
        launch = told.get("launch")
        lineage = told.get("lineage")
        failures = told.get("failures")
        world = told.get("world_size") or (config.at("ray", "num_workers") if config else None)
        return {
            "name": self.name(),
            "directory": self.directory.name,
            "status": status,
            "live": self.is_live(history),
            "message": str(told.get("message") or history.latest.get("end", {}).get("message") or ""),
            "world_size": world if isinstance(world, int) else None,
            "created": _moment(told.get("created")),
            "updated": _moment(told.get("updated")),
            "restarts": self.restarts(history),
            "failures": [
                {key: each.get(key) for key in ("cause", "message", "step", "rank", "node", "checkpoint")}
                for each in (failures if isinstance(failures, list) else [])[-20:]
                if isinstance(each, dict)
            ],
            "lineage": [
                each for each in (lineage if isinstance(lineage, list) else [])[-20:] if isinstance(each, dict)
            ],
            "launch": {key: launch.get(key) for key in ("backend", "job")} if isinstance(launch, dict) else None,
            "objective": _component(config.at("objective")) if config else None,
            "precision": _word(config.at("train", "precision")) if config else None,
            "zero_stage": _number(config.at("train", "zero_stage")) if config else None,
            "global_batch_size": _number(config.at("train", "global_batch_size")) if config else None,
            "modalities": [str(name) for name in modalities] if isinstance(modalities, dict) else [],
        }

    def is_live(self, history: RunHistory) -> bool:
        """Whether more is to come; where nothing says so, whether something has of late."""
        status = self.status(history)
        heard = self.heard()
        return status in LIVE or (status == "unknown" and heard is not None and time.time() - heard < SILENT_SECONDS)

    def silent_seconds(self, history: RunHistory) -> float:
        """How long nothing has been heard of a run that is live, where that is longer than it should be; else 0."""
        heard = self.heard()
        silent = time.time() - heard if heard is not None and self.is_live(history) else 0.0
        return silent if silent > max(SILENT_SECONDS, 20 * (history.step_seconds() or 0.0)) else 0.0

    def heard(self) -> float | None:
        """Unix time of the last sign of life: a record, or a file of the driver's."""
        moments = []
        for name in ("history.jsonl", RANKS_FILE, GOODPUT_FILE, RUN_FILE):
            try:
                moments.append((self.directory / name).stat().st_mtime)
            except OSError:
                continue
        return max(moments, default=None)

    def restarts(self, history: RunHistory) -> int:
        """How often the group of ranks was started again, over all of the run's time where that is known."""
        told = (self._run.get() or {}).get("restarts")
        by_cause = (self._goodput.get() or {}).get("restarts")
        known = [told if isinstance(told, int) else 0, history.counts.get("restart", 0)]
        if isinstance(by_cause, dict):
            known.append(sum(count for count in by_cause.values() if isinstance(count, int)))
        return max(known)

    # How far it is

    def progress(self, history: RunHistory) -> dict[str, Any]:
        total, train = self.total_steps(), history.latest.get("train", {})
        table = history.tables.get("train")
        step = float(table.steps[-1]) if table is not None and len(table.steps) else history.step
        step = int(step) if step is not None and step == int(step) else step
        seconds = history.step_seconds()
        live = self.status(history) in LIVE
        left = max(0.0, total - step) * seconds if live and total and step is not None and seconds else None
        return {
            "step": step,
            "total": total,
            "fraction": min(1.0, max(0.0, step / total)) if total and step is not None else None,
            "step_seconds": seconds,
            # Beyond a century it is no estimate.
            "eta_seconds": left if left is not None and left < 3e9 else None,
            "samples_seen": train.get("samples_seen"),
            "heard": self.heard(),
            "read": round(history.complete, 4),
            "records": history.records,
        }

    def latest(self, history: RunHistory) -> dict[str, Any]:
        """The last record of each kind that holds numbers, and the best of validation."""
        kept = {kind: record for kind, record in history.latest.items() if kind in history.tables}
        return {"records": kept, "best": history.best}

    # Ranks

    def ranks(self, history: RunHistory) -> dict[str, Any]:
        """All ranks, and who is behind, by its own work: what it does before it waits for others."""
        slowest = history.latest.get("train", {}).get("slowest")
        return {
            "expected": self.run(history)["world_size"],
            "rows": self._ranks.get() or [],
            "slowest": slowest if isinstance(slowest, dict) else None,
            "straggler_ratio": STRAGGLER_RATIO,
        }

    # Goodput

    def goodput(self, history: RunHistory) -> dict[str, Any]:
        told = self._goodput.get() or {}
        given = told.get("seconds")
        seconds = _numbers_of(given if isinstance(given, dict) else history.latest.get("goodput", {}).get("seconds"))
        total = sum(seconds.values())
        restarts = told.get("restarts")
        return {
            "seconds": seconds,
            "goodput": seconds.get("productive", 0.0) / total if total > 0 else None,
            "restarts": {str(key): value for key, value in restarts.items()} if isinstance(restarts, dict) else {},
            "updated": _moment(told.get("updated")),
        }

    # Checkpoints

    def checkpoints(self, history: RunHistory) -> dict[str, Any]:
        """What is saved, newest first, without reading more than manifests and the sizes of files."""
        directory = self.directory / CHECKPOINTS
        try:
            folders = checkpoint_folders(directory)[-MAX_CHECKPOINTS:]
        except OSError:
            folders = []
        config = self.config()
        keep_last = config.at("checkpoint", "keep_last") if config else None
        keep_every = config.at("checkpoint", "keep_every") if config else None
        verified = self._verified(history)
        rows: list[dict[str, Any]] = []
        best = None
        for step, folder in folders:
            row = {"step": step, "folder": folder.name, **self._checkpoint(step, folder)}
            best = row.pop("best_step", best)
            row["verified"] = verified.get(step)
            rows.append(row)
        committed = [row["step"] for row in rows if row["state"] != "incomplete"]
        newest = committed[-keep_last:] if isinstance(keep_last, int) and keep_last > 0 else committed[-1:]
        for row in rows:
            every = isinstance(keep_every, int) and keep_every > 0 and row["step"] % keep_every == 0
            reasons = [("newest", row["step"] in newest), ("best", row["step"] == best), ("keep_every", every)]
            row["kept_as"] = [name for name, holds in reasons if holds and row["state"] != "incomplete"]
        mirror = history.latest.get("mirror", {}).get("step")
        known = {path / MANIFEST for _, path in folders}
        self._manifests = {path: each for path, each in self._manifests.items() if path in known}
        return {"rows": rows[::-1], "best_step": best, "mirrored_step": mirror}

    def _checkpoint(self, step: int, folder: Path) -> dict[str, Any]:
        path = folder / MANIFEST
        cached = self._manifests.setdefault(path, _Cached(path, lambda content: _told_of(content, path)))
        told = cached.get()
        if told is None:
            if path.exists():
                return {"state": "damaged", "problem": "its manifest cannot be read"}
            try:
                return {"state": "incomplete", "saved": folder.stat().st_mtime}
            except OSError:
                return {"state": "incomplete"}
        if "problem" in told:
            return {"state": "damaged", **told}
        row = {key: value for key, value in told.items() if key not in ("entries", "manifest")} | {
            "saved": cached.changed
        }
        if told["manifest_step"] != step:
            return {"state": "damaged", **row, "problem": f"its manifest is that of step {told['manifest_step']}"}
        problems = self._sizes_of(folder, told["entries"])
        if problems:
            return {"state": "damaged", **row, "problem": problems[0]}
        if left_behind(folder.parent, told["manifest"]):
            return {"state": "left behind", **row, "problem": "a later attempt went on from before it"}
        return {"state": "complete", **row}

    def _sizes_of(self, folder: Path, entries: list[tuple[str, int]]) -> list[str]:
        """What is missing or of another size than the manifest says; looked at again now and then."""
        if len(entries) > MAX_FILES_LOOKED_AT:
            return []
        now = time.monotonic()
        try:
            changed = folder.stat().st_mtime_ns
            looked, seen, problems = self._sizes.get(folder, (-math.inf, 0, []))
            if seen == changed and now - looked < SIZES_AGAIN_SECONDS:
                return problems
            problems = []
            for name, size in entries:
                try:
                    there = (folder / name).stat().st_size
                except FileNotFoundError:
                    problems.append(f"{name} is missing")
                else:
                    if there != size:
                        problems.append(f"{name} has {there} bytes, the manifest says {size}")
            self._sizes[folder] = (now, changed, problems)
        except OSError:
            return []
        return problems

    @staticmethod
    def _verified(history: RunHistory) -> dict[int, float | None]:
        """Step -> when its checksums were last compared, as far as the history tells: whoever resumes compares them."""
        found: dict[int, float | None] = {}
        for event in history.events():
            if event.sort in ("resume", "rollback"):
                match = re.search(r"(?:resumed from|back to) step (\d{1,15})", event.message)
                if match:
                    found[int(match[1])] = event.time
        return found

    # Events, evaluation, config

    def events(self, history: RunHistory) -> dict[str, Any]:
        rows = [event._asdict() for event in history.events()]
        return {"rows": rows, "counts": history.counts}

    def evaluation(self) -> dict[str, Any]:
        try:
            files = sorted((self.directory / EVALUATION).glob("*.json"), key=lambda path: path.name)[-MAX_RESULTS:]
        except OSError:
            files = []
        self._results = {file: self._results.get(file) or _Cached(file, _result_of) for file in files}
        found = [{"file": file.name, **content} for file, each in self._results.items() if (content := each.get())]
        return {"rows": sorted(found, key=lambda each: (-(_number(each.get("step")) or 0), str(each.get("split"))))}

    def config_text(self) -> dict[str, Any]:
        config = self.config()
        return {"text": config.shown() if config else None}


def _told_of(content: bytes, path: Path) -> dict[str, Any]:
    try:
        manifest = parse_manifest(content, path)
    except CheckpointError as error:
        return {"problem": str(error).removeprefix(f"{path}: ")}
    state = manifest.train_state
    return {
        "manifest": manifest,
        "manifest_step": manifest.step,
        "entries": [(entry.path, entry.size) for entry in manifest.files],
        "bytes": sum(entry.size for entry in manifest.files),
        "files": len(manifest.files),
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "precision": manifest.precision,
        "samples_seen": state.get("samples_seen"),
        "best_step": state.get("best_step"),
    }


def _result_of(content: bytes) -> dict[str, Any]:
    found = _json_object(content)
    hidden = ("shards", "export", "figures", "files")
    return {key: value for key, value in found.items() if key not in hidden}


def _component(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("name")
    return str(value) if value is not None else None


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) >= 1e300 or value != value:
        return None
    return value


def _numbers_of(value: Any) -> dict[str, float]:
    """The finite numbers of an object; none of anything else."""
    found = value.items() if isinstance(value, dict) else ()
    return {str(key): number for key, each in found if (number := _number(each)) is not None}


def _moment(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 < number < 1e11 else None


def _word(value: Any) -> str | None:
    return value[:300] if isinstance(value, str) and value else None


def plain(value: Any) -> Any:
    """The same as it may be shown: what JSON does not know as words ("NaN", "Infinity", "-Infinity"), texts masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
