"""Run directories as training leaves them, made in a moment: for tests of what shows a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from symile_dist.checkpoint.manifest import FileEntry, Manifest, folder_name
from symile_dist.metrics.history import HISTORY_FILE, _encoded

BEGIN = 1_760_000_000.0
MODALITIES = ("image", "text", "audio")
PHASES = {
    "data_wait": 0.004,
    "h2d": 0.006,
    "forward": 0.11,
    "gather": 0.03,
    "loss": 0.022,
    "backward": 0.21,
    "optimizer": 0.035,
    "checkpoint": 0.001,
    "eval": 0.0,
    "other": 0.006,
}
CONFIG = """\
run: {name: made}
seed: 0
data:
  train: s3://someone:verysecret@bucket/train
  validation: https://host/val?X-Amz-Signature=abcdef
modalities:
  image: {member: png, encoder: image_convnet}
  text: {member: txt, encoder: text_convnet}
  audio: {member: flac, encoder: audio_convnet}
objective: {name: symile}
train:
  steps: 5000
  global_batch_size: 4096
  zero_stage: 2
  precision: bf16
checkpoint: {every: 500, keep_last: 3, keep_every: 1000}
ray: {num_workers: 8}
"""


def phases(random_: random.Random, slow: float = 1.0) -> dict[str, float]:
    return {
        name: round(seconds * random_.uniform(0.9, 1.1) * (slow if name == "forward" else 1.0), 6)
        for name, seconds in PHASES.items()
    }


def train_record(step: int, random_: random.Random, total: int = 5000, batch: int = 4096) -> dict[str, Any]:
    done = step / total
    loss = math.log(batch) * (0.25 + 0.75 * math.exp(-4 * done)) + random_.gauss(0, 0.05)
    parts = phases(random_)
    seconds = sum(parts.values())
    queries = {"image": "audio+text", "text": "audio+image", "audio": "image+text"}
    return {
        "kind": "train",
        "step": step,
        "time": BEGIN + 0.45 * step,
        "samples_seen": step * batch,
        "loss": loss,
        "grad_norm": math.exp(random_.gauss(0, 0.4)),
        "learning_rate": 3e-4 * min(1, step / 500) * (0.5 + 0.5 * math.cos(math.pi * done)),
        "logit_scale": 1 + 9 * done,
        "skipped_steps": sum(step >= at for at in (1480, 1490, 3110)),
        "samples_per_second": batch / seconds,
        "step_seconds": seconds,
        "data_wait_fraction": parts["data_wait"] / seconds,
        "positive_score": 0.5 * done + random_.gauss(0, 0.01),
        "negative_score": random_.gauss(0, 0.01),
        "total_correlation_bound": math.log(batch) - loss,
        "alignment": 2 - done + random_.gauss(0, 0.02),
        **{f"uniformity/{name}": -1 - 2 * done + random_.gauss(0, 0.05) for name in MODALITIES},
        **{f"effective_rank/{name}": 20 + 200 * done + random_.gauss(0, 3) for name in MODALITIES},
        **{
            f"batch_accuracy/{name}_from_{queries[name]}": min(1, max(0, 0.8 * done + random_.gauss(0, 0.03)))
            for name in MODALITIES
        },
        "missing/audio": 0.05 + random_.uniform(0, 0.02),
        "phases": parts,
        "slowest": {"rank": 5, "phase": "forward", "seconds": 0.02, "ratio": 1.12 + random_.uniform(0, 0.05)},
        "memory_bytes": 61_000_000_000 + random_.randrange(10**9),
        "flops_per_second": 2.9e15 * random_.uniform(0.95, 1.05),
        "mfu": 0.37 * random_.uniform(0.95, 1.05),
        "data_bytes_per_second": 8.1e8 * random_.uniform(0.9, 1.1),
    }


def records(
    last: int = 4000, every: int = 10, total: int = 5000, seed: int = 0, end: str | None = None
) -> Iterator[dict[str, Any]]:
    """A run with all that may come by: validation, checkpoints, skipped steps, NaN, a spike, a rollback, a restart."""
    random_ = random.Random(seed)

    def note(kind: str, step: int, **values: Any) -> dict[str, Any]:
        return {"kind": kind, "step": step, "time": BEGIN + 0.45 * step, **values}

    start = {
        "wait": 2.0,
        "workers": 8.1,
        "import": 1.5,
        "checkpoint": 0.2,
        "data": 0.4,
        "model": 2.2,
        "first_step": 0.9,
    }
    yield note("start", 1, phases=start, seconds=sum(start.values()))
    for step in range(every, last + 1, every):
        record = train_record(step, random_, total)
        fraction = step / total
        if last >= 3200 and math.isclose(step, 0.7 * last, abs_tol=every / 2):
            record["grad_norm"] = 96.0
            record["loss"] += 3.5
        if step // every in (148, 149):
            record["loss"] = record["grad_norm"] = math.nan
            message = f"step {step} skipped: non-finite loss or gradient"
            yield note("event", step, about="skip", message=message, level="warning")
        if step // every == 311:
            record["grad_norm"] = math.inf
        yield record
        if step // every == 210:
            yield note(
                "event",
                step,
                about="spike",
                message=f"step {step} is a spike (loss): loss 9.1, gradient norm 40",
                level="warning",
            )
        if step % 250 == 0:
            accuracy = {
                f"accuracy/{name}": min(0.99, 0.9 * fraction + random_.gauss(0, 0.01))
                for name in ("image_from_text+audio", "text_from_image+audio", "audio_from_image+text")
            }
            values = {"loss": record["loss"] + 0.1, "total_correlation_ceiling": 8.317, **accuracy, "seconds": 6.4}
            yield note("validation", step, **values)
        if step % 500 == 0:
            yield note("checkpoint", step, bytes=2_310_000_000, seconds=7.4 + random_.uniform(0, 1), stall_seconds=0.03)
            yield note("mirror", step, seconds=21.0 + random_.uniform(0, 4))
        if step == 1500:
            yield note(
                "event",
                1490,
                about="skip",
                message="step 1490: loss or gradients were not finite for 3 steps in a row",
                level="error",
            )
            yield note(
                "event",
                1000,
                about="rollback",
                message="back to step 1000; steps 1480 to 1490 are left out",
                level="warning",
            )
            for again in range(1000 + every, 1500 + 1, every):
                yield train_record(again, random_, total)
        if step == 2600:
            message = "rank 3 was killed (signal 9) on node-1"
            yield note("restart", step, cause="rank_lost", message=message, rank=3)
            yield note("goodput", step, seconds={"init": 15.0, "productive": 1050.0, "checkpoint": 2.0, "lost": 40.0})
            yield note("event", 2500, about="resume", message="resumed from step 2500", level="info")
            yield note("start", 2501, phases={**start, "load": 3.1}, seconds=18.4)
    if end:
        seconds = {
            "init": 16.0,
            "productive": 0.43 * last,
            "checkpoint": 4.0,
            "eval": 60.0,
            "restart": 31.0,
            "lost": 52.0,
        }
        yield note("goodput", last, seconds=seconds)
        yield note("end", last, status=end, message="all steps are done" if end == "finished" else "")


def line(record: dict[str, Any]) -> str:
    return json.dumps(_encoded(record)) + "\n"


def write_history(directory: Path, **options: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / HISTORY_FILE
    with path.open("w") as file:
        file.writelines(map(line, records(**options)))
    return path


def write_long_history(directory: Path, count: int, every: int = 10) -> Path:
    """Many records in a hurry: the same few again and again, at later steps."""
    directory.mkdir(parents=True, exist_ok=True)
    random_ = random.Random(1)
    total = count * every
    texts = [json.dumps(_encoded(train_record(round(total * each / 97), random_, total)))[1:] for each in range(97)]
    tails = [text[text.index('"samples_seen"') :] for text in texts]
    path = directory / HISTORY_FILE
    with path.open("w") as file:
        for number in range(1, count + 1):
            tail = tails[97 * (number - 1) // count]
            step = number * every
            if number == count // 3:
                tail = tail.replace('"loss": ', '"loss": 77', 1)  # a spike of one record
            file.write(f'{{"kind": "train", "step": {step}, "time": {BEGIN + step}, {tail}\n')
    return path


def ranks(count: int, slow: int | None = None, step: int = 4000) -> list[dict[str, Any]]:
    random_ = random.Random(2)
    rows = []
    for rank in range(count):
        parts = phases(random_, 1.9 if rank == slow else 1.0)
        rows.append(
            {
                "rank": rank,
                "pid": 4000 + rank,
                "host": f"node-{rank // 8:03d}",
                "node": f"{rank // 8:x}",
                "metrics_url": f"http://node-{rank // 8:03d}:{9000 + rank % 8}/metrics",
                "step": step,
                "step_seconds": 0.42,
                "phases": parts,
                "memory_bytes": 60_000_000_000 + random_.randrange(10**9),
            }
        )
    return rows


def write_checkpoint(directory: Path, step: int, state: str = "complete", best: int | None = None) -> Path:
    """`state`: complete, incomplete (without its manifest) or damaged (a file is cut)."""
    folder = directory / "checkpoints" / folder_name(step)
    folder.mkdir(parents=True)
    (folder / "rank-0.pt").write_bytes(b"w" * (900 if state == "damaged" else 1000))
    if state != "incomplete":
        Manifest(
            step=step,
            world_size=8,
            zero_stage=2,
            precision="bf16",
            config_digest="0" * 64,
            code_version="0",
            fence=1,
            train_state={"samples_seen": step * 4096, "best_step": best},
            loader_state={},
            files=(FileEntry("rank-0.pt", 1000, "0" * 64),),
        ).write(folder)
    return folder


def evaluation_result(step: int) -> dict[str, Any]:
    rows = {}
    for target, queries in (("image", ["audio", "text"]), ("text", ["audio", "image"]), ("image", ["text"])):
        rows[f"{target}_from_{'_'.join(queries)}"] = {
            "target": target,
            "queries": queries,
            "accuracy": 0.894 if len(queries) > 1 else 0.213,
            "bootstrap_mean": 0.893,
            "bootstrap_standard_error": 0.006,
            "chance": 0.01,
            "recall": {"1": 0.71, "5": 0.93, "10": 0.97},
            "median_rank": 1.0,
            "samples": 2560,
            "candidates": 2560,
        }
    return {
        "run": "made",
        "step": step,
        "split": "test",
        "shards": "/somewhere/test",
        "samples": 2560,
        "classes": 100,
        "loss": 1.83,
        "total_correlation_bound": 4.4,
        "protocol": "all",
        "retrieval": rows,
        "statistics": {
            "embeddings": {
                name: {"dimension": 512, "effective_rank": 201.5, "uniformity": -3.4} for name in MODALITIES
            },
            "alignment": {"image-text": 1.2},
        },
    }


def write_run(
    directory: Path, *, status: str = "running", world_size: int = 8, slow: int | None = 5, **options: Any
) -> Path:
    """All files of a run; `options` are those of `records`."""
    write_history(directory, **options)
    write_files(directory, status=status, world_size=world_size, slow=slow)
    return directory


def write_files(directory: Path, *, status: str = "running", world_size: int = 8, slow: int | None = 5) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(CONFIG.replace("num_workers: 8", f"num_workers: {world_size}"))
    run = {
        "name": "made",
        "status": status,
        "message": "",
        "world_size": world_size,
        "restarts": 1,
        "created": BEGIN,
        "updated": BEGIN + 2000,
        "launch": {"backend": "slurm", "job": "20260101-120000", "handle": {"token": "hidden"}},
    }
    seconds = {"init": 16.2, "productive": 1610.0, "checkpoint": 3.9, "eval": 61.0, "restart": 31.5, "lost": 52.0}
    goodput = {"seconds": {**seconds, "pending": 24.0}, "restarts": {"rank_lost": 1}, "updated": BEGIN + 2000}
    (directory / "run.json").write_text(json.dumps(run))
    (directory / "goodput.json").write_text(json.dumps(goodput))
    (directory / "ranks.json").write_text(json.dumps(ranks(world_size, slow)))
    for step, state in ((1000, "complete"), (2000, "complete"), (3500, "complete"), (4000, "complete")):
        write_checkpoint(directory, step, state, best=3500)
    write_checkpoint(directory, 3000, "damaged", best=3000)
    write_checkpoint(directory, 4500, "incomplete")
    (directory / "evaluation").mkdir()
    (directory / "evaluation" / "test-step-4000.json").write_text(json.dumps(evaluation_result(4000)))
