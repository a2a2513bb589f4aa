"""The plan of a run: every part put together, for one setting or many."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from symile_dist.config import Config, load_config
from symile_dist.tools.plan.collectives import summed
from symile_dist.tools.plan.communication import (
    Communication,
    step_communication,
    trained_modalities,
    wire_bytes,
)
from symile_dist.tools.plan.hardware import Device, peak_of
from symile_dist.tools.plan.memory import CONTEXT_BYTES, FRAGMENTATION, Memory, step_memory
from symile_dist.tools.plan.objective import Objective, run_objective
from symile_dist.tools.plan.shapes import DataFacts, data_facts
from symile_dist.tools.plan.step import FEW, Encoders, run_encoders
from symile_dist.tools.plan.time import RESTART_SECONDS, checkpoints, mean_time_to_failure, run_time, step_time
from symile_dist.tools.plan.zero import settings_of

SWEPT = {
    "batch": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "zero_stage": "train.zero_stage",
    "nodes": "",
}


@dataclass(frozen=True)
class Ask:
    """What a person wants planned."""

    config: str
    overrides: Sequence[str]
    device: Device
    nodes: int
    gpus_per_node: int
    shapes: Mapping[str, str] = field(default_factory=dict)
    """Modality -> shape of a sample, where a person tells it."""
    samples: int | None = None
    epochs: float | None = None
    price_per_gpu_hour: float | None = None

    def load(self, nodes: int, overrides: Sequence[str] = ()) -> Config:
        """Raises ConfigError with one line per mistake."""
        world = nodes * self.gpus_per_node
        ours = [f"ray.num_workers={world}", "ray.min_workers=null", "metrics.port=0"]
        ours.append(f"ray.gpus_per_worker={int(self.device.kind == 'cuda')}")
        return load_config(self.config, [*self.overrides, *overrides, *ours]).config


class Planner:
    """Plans of one config; what does not depend on batch and nodes is worked out once."""

    def __init__(self, ask: Ask, sweeps: bool = False) -> None:
        """
        Args:
            sweeps: many settings are to come: the encoders are run for any number of rows.

        Raises ValueError for a config, shapes or a precision that do not go.
        """
        self.ask, self.sweeps = ask, sweeps
        config = ask.load(ask.nodes)
        peak_of(ask.device.peak_flops, config.train.precision, config.train.float32_matmul_precision, ask.device.name)
        self.data: DataFacts = data_facts(config, ask.shapes)
        self.samples = ask.samples or self.data.samples
        self._encoders: dict[Any, Encoders] = {}
        self._objectives: dict[tuple[int, int], Objective] = {}

    def encoders(self, config: Config) -> Encoders:
        local = config.train.global_batch_size // config.world_size
        rows, two_passes = config.encoded_at_once, config.encoded_at_once < local
        world = config.world_size if config.train.sync_batch_norm else 0
        key = (config.train.zero_stage == 3, two_passes, world, None if self.sweeps else rows)
        if key not in self._encoders:
            known = next((one.model for one in self._encoders.values()), None)
            number = FEW if self.sweeps else (rows,)
            self._encoders[key] = run_encoders(config, self.data.inputs, number, known)
        return self._encoders[key].with_parts(-(-local // rows))

    def objective(self, config: Config, encoders: Encoders) -> Objective:
        local = config.train.global_batch_size // config.world_size
        key = (local, config.world_size)
        if key not in self._objectives:
            self._objectives[key] = run_objective(
                encoders.model,
                encoders.representations,
                config.train.precision,
                trained_modalities(config),
                local,
                config.world_size,
                self.ask.device.kind,
            )
        return self._objectives[key]

    def memory(self, config: Config) -> tuple[Memory, Communication]:
        encoders = self.encoders(config)
        objective = self.objective(config, encoders)
        communication = step_communication(config, encoders.model, encoders.passes, objective)
        inputs, kind = self.data.inputs, self.ask.device.kind
        return step_memory(config, encoders, communication, objective.held, inputs, kind), communication

    def plan(self, nodes: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """One setting's plan, as JSON. Raises ValueError for a setting that does not go."""
        ask, device = self.ask, self.ask.device
        config = ask.load(nodes, overrides)
        train, world = config.train, config.world_size
        encoders = self.encoders(config)
        objective = self.objective(config, encoders)
        memory, communication = self.memory(config)
        calls = communication.calls
        local = train.global_batch_size // world
        seconds = step_time(config, encoders, objective, calls, device, ask.gpus_per_node)
        model_flops = encoders.model_flops * local + objective.tile_flops
        again = encoders.forward_flops * local if encoders.passes.encode else 0.0
        done = float(encoders.work.flops.at(config.encoded_at_once).sum()) * encoders.passes.parts
        peak = peak_of(device.peak_flops, train.precision, train.float32_matmul_precision, device.name)
        saves = checkpoints(config, encoders, device, seconds.total, nodes)
        steps = train.steps
        if ask.epochs is not None:
            if self.samples is None:
                raise ValueError("--epochs: the data's index cannot be reached here; say --samples too")
            steps = max(1, math.ceil(ask.epochs * self.samples / train.global_batch_size))
        run = run_time(config, steps, seconds.total, saves, ask.price_per_gpu_hour)
        needed = memory.on_device(device.kind)
        per_second = train.global_batch_size / seconds.total
        return {
            "config": ask.config,
            "nodes": nodes,
            "gpus_per_node": ask.gpus_per_node,
            "world_size": world,
            "device": {
                "name": device.name,
                "kind": device.kind,
                "source": device.source,
                "memory_bytes": device.memory_bytes,
                "peak_flops_per_s": peak,
            },
            "train": {
                "global_batch_size": train.global_batch_size,
                "local_batch_size": local,
                "micro_batch_size": config.encoded_at_once,
                "passes": 2 if encoders.passes.encode else 1,
                "zero_stage": train.zero_stage,
                "precision": train.precision,
                "activation_checkpointing": train.activation_checkpointing,
                "offload": train.offload,
                "objective": config.objective.name,
                "reduce_bucket_size": settings_of(config).reduce_bucket_size,
            },
            "data": {
                "source": self.data.source,
                "samples": self.samples,
                "inputs": {
                    name: {
                        "shape": list(one.shape),
                        "dtype": str(one.dtype).removeprefix("torch."),
                        "source": one.source,
                        "assumed": one.assumed,
                    }
                    for name, one in self.data.inputs.items()
                },
                "bytes_per_sample": self.data.bytes_per_sample,
                "samples_per_s": per_second,
                "bytes_per_s": None if self.data.bytes_per_sample is None else self.data.bytes_per_sample * per_second,
                "bytes_per_s_per_node": None
                if self.data.bytes_per_sample is None
                else self.data.bytes_per_sample * per_second / nodes,
                "loader_samples_per_s_per_process": per_second / world / max(1, config.data.loader_processes),
            },
            "parameters": parameters(encoders),
            "memory": {
                "at_rest": memory.at_rest,
                "phases": memory.phases,
                "parts": memory.parts,
                "peak_bytes": memory.peak,
                "device_bytes": needed,
                "fits": needed <= device.memory_bytes,
                "host": memory.host,
                "by_stage": self.memory_by_stage(nodes, overrides),
            },
            "flops": {
                "per_sample_forward": encoders.forward_flops,
                "per_sample": encoders.model_flops,
                "encoders_per_rank": encoders.model_flops * local,
                "objective_per_rank": objective.tile_flops,
                "model_per_rank": model_flops,
                "done_per_rank": done + again + objective.tile_flops,
                "model_per_step": model_flops * world,
            },
            "communication": {
                "collectives": summed(calls, world) if world > 1 else [],
                "calls": len(calls),
                "full_bytes": sum(call.full_bytes for call in calls),
                "own_bytes": sum(call.own_bytes for call in calls),
                "wire_bytes_per_rank": wire_bytes(calls, world) if world > 1 else 0.0,
            },
            "time": {
                "step_s": seconds.total,
                **{f"{name}_s": value for name, value in asdict(seconds).items()},
                "samples_per_s": per_second,
                "mfu": model_flops / seconds.total / peak,
                "hardware_utilization": (done + again + objective.tile_flops) / seconds.total / peak,
            },
            "checkpoint": {
                "bytes": saves.bytes,
                "bytes_per_rank": saves.bytes / world,
                "write_s": saves.seconds,
                "stall_s": saves.stall_seconds,
                "interval_s": saves.interval_seconds,
            },
            "run": {
                "steps": run.steps,
                "epochs": None if self.samples is None else run.steps * train.global_batch_size / self.samples,
                "hours": run.hours,
                "hours_with_interruptions": run.hours_with_interruptions,
                "mean_hours_to_failure": mean_time_to_failure(world) / 3600,
                "interruptions": run.interruptions,
                "goodput": run.goodput,
                "gpu_hours": run.hours_with_interruptions * world,
                "price_per_gpu_hour": ask.price_per_gpu_hour,
                "cost": run.cost,
            },
            "assumptions": self.assumptions(config),
        }

    def memory_by_stage(self, nodes: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
        """The same run at every ZeRO stage that goes with its other options."""
        rows = []
        for stage in range(4):
            try:
                config = self.ask.load(nodes, [*overrides, f"train.zero_stage={stage}"])
            except ValueError:
                continue
            memory, communication = self.memory(config)
            wire = wire_bytes(communication.calls, config.world_size) if config.world_size > 1 else 0.0
            needed = memory.on_device(self.ask.device.kind)
            rows.append(
                {
                    "zero_stage": stage,
                    **{key: memory.at_rest.get(key, 0.0) for key in ("weights", "masters", "moments")},
                    "at_rest_bytes": sum(memory.at_rest.values()),
                    "peak_bytes": memory.peak,
                    "device_bytes": needed,
                    "fits": needed <= self.ask.device.memory_bytes,
                    "wire_bytes_per_rank": wire,
                }
            )
        return rows

    def assumptions(self, config: Config) -> list[str]:
        """What of the plan nobody has measured or read."""
        found = [*self.ask.device.assumptions]
        for name, one in self.data.inputs.items():
            if one.assumed or one.padded:
                words = f"{name}: a sample is {'x'.join(map(str, one.shape))} ({one.source})"
                found.append(words + (", and so long is every batch" if one.padded else ""))
        if self.ask.device.kind == "cuda":
            found.append(
                f"beside tensors a GPU holds {CONTEXT_BYTES / 2**30:.0f} GiB of CUDA and NCCL, and its allocator "
                f"{FRAGMENTATION - 1:.0%} more than is used"
            )
            found.append("attention runs in fused kernels where it has no dropout")
        found.append(
            f"a device fails once in {mean_time_to_failure(1) / 3600:.0f} h at the most, in 8,000 h / ranks at scale; "
            f"a restart takes {RESTART_SECONDS:.0f} s"
        )
        if self.samples is None:
            found.append("the number of samples is not known here: say --samples")
        if config.train.compile:
            found.append("train.compile is not modelled: time and memory are those of plain torch")
        return found

    def sweep(self, swept: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
        """Every combination; one that does not go has its reason. Raises ValueError where none goes."""
        rows: list[dict[str, Any]] = []
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values, strict=True))
            nodes = chosen.get("nodes", self.ask.nodes)
            overrides = [f"{SWEPT[name]}={value}" for name, value in chosen.items() if SWEPT[name]]
            try:
                rows.append({**chosen, **self._row(nodes, overrides)})
            except ValueError as error:
                rows.append({**chosen, "problem": str(error).splitlines()[0]})
        if all("problem" in row for row in rows):
            raise ValueError(f"--sweep: no combination goes; the first: {rows[0]['problem']}")
        return rows

    def _row(self, nodes: int, overrides: Sequence[str]) -> dict[str, Any]:
        ask, device = self.ask, self.ask.device
        config = ask.load(nodes, overrides)
        encoders = self.encoders(config)
        objective = self.objective(config, encoders)
        memory, communication = self.memory(config)
        seconds = step_time(config, encoders, objective, communication.calls, device, ask.gpus_per_node)
        train, world = config.train, config.world_size
        local = train.global_batch_size // world
        peak = peak_of(device.peak_flops, train.precision, train.float32_matmul_precision, device.name)
        flops = encoders.model_flops * local + objective.tile_flops
        saves = checkpoints(config, encoders, device, seconds.total, nodes)
        # The same number of samples for all.
        seen = train.steps * ask.load(ask.nodes).train.global_batch_size
        if ask.epochs is not None:
            if self.samples is None:
                raise ValueError("--epochs: the data's index cannot be reached here; say --samples too")
            seen = math.ceil(ask.epochs * self.samples)
        run = run_time(
            config, max(1, math.ceil(seen / train.global_batch_size)), seconds.total, saves, ask.price_per_gpu_hour
        )
        needed = memory.on_device(device.kind)
        return {
            "world_size": world,
            "global_batch_size": train.global_batch_size,
            "local_batch_size": local,
            "stage": train.zero_stage,
            "device_bytes": needed,
            "fits": needed <= device.memory_bytes,
            "step_s": seconds.total,
            "exposed_communication_s": seconds.exposed,
            "samples_per_s": train.global_batch_size / seconds.total,
            "mfu": flops / seconds.total / peak,
            "steps": run.steps,
            "hours": run.hours_with_interruptions,
            "goodput": run.goodput,
            "interruptions": run.interruptions,
            "gpu_hours": run.hours_with_interruptions * world,
            "cost": run.cost,
        }


def parameters(encoders: Encoders) -> dict[str, Any]:
    """Numbers of parameters: all, trained, by part."""
    by_part: Counter[str] = Counter()
    trained = 0
    for name, parameter in zip(encoders.model.names, encoders.model.parameters, strict=True):
        parts = name.split(".")
        of = parts[2] if parts[0] == "model" and len(parts) > 2 else parts[-1] if parts[0] == "model" else parts[0]
        by_part[of] += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    inner = sum(p.numel() for m in encoders.model.module.inner_modules().values() for p in m.parameters())
    if inner:
        by_part["inner modules"] = inner
    return {"total": sum(by_part.values()), "trained": trained + inner, "by_part": dict(by_part)}


def parse_sweep(words: Sequence[str]) -> dict[str, list[int]]:
    """["batch=4096,8192", "nodes=1,2"] -> {"batch": [4096, 8192], "nodes": [1, 2]}. Raises ValueError for others."""
    found: dict[str, list[int]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = {"stage": "zero_stage", "global_batch_size": "batch"}.get(name, name)
        if not equals or name not in SWEPT:
            known = ", ".join(f"{key}=..." for key in SWEPT)
            raise ValueError(f"--sweep {word}: write {known} with numbers, e.g. nodes=1,2,4")
        try:
            numbers = [int(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {word}: '{values}' should be whole numbers, such as 1,2,4") from None
        if min(numbers) < (0 if name == "zero_stage" else 1):
            raise ValueError(f"--sweep {word}: should be 1 or more")
        found[name] = numbers
    return found


__all__ = ["SWEPT", "Ask", "Planner", "parameters", "parse_sweep"]
