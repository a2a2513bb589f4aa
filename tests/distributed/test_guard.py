"""Steps that are not taken, on all ranks alike, and runs that go back: ZeRO 0-3 on two real processes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from symile_dist.config import Config, parse_config
from symile_dist.objectives.symile import SymileObjective
from symile_dist.types import Batch, Outputs, StepReport
from tests.processes import run_distributed
from tests.shards import DIMENSION, config_text, write_shards

TWO_PASSES = "train.micro_batch_size=2"
OFFLOADED = ("train.zero_stage=2", "train.offload=optimizer")
FP16 = ("train.precision=fp16", "deepspeed.fp16.initial_scale_power=8")
# Of an engine's step.
CASES: dict[str, tuple[str, ...]] = {
    **{f"stage {stage}": (f"train.zero_stage={stage}",) for stage in range(4)},
    **{f"stage {stage}, bf16": (f"train.zero_stage={stage}", "train.precision=bf16") for stage in range(4)},
    **{f"stage {stage}, fp16": (f"train.zero_stage={stage}", *FP16) for stage in (1, 2, 3)},
    **{f"stage {stage}, two passes": (f"train.zero_stage={stage}", TWO_PASSES) for stage in range(4)},
    "offloaded": OFFLOADED,
    "offloaded, two passes": (*OFFLOADED, TWO_PASSES),
    "parameters offloaded": ("train.zero_stage=3", "train.offload=parameters"),
}
REFUSED = 3
STAGES = range(4)
GUARD = ("guard.window=6", "guard.threshold=12", "guard.patience=3", "guard.margin=1")


class Forgetful(nn.Sequential):
    """Draws from the random state, so that a run that goes back must go back with it."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(nn.Linear(DIMENSION, 16), nn.Dropout(0.2), nn.Linear(16, embedding_dim))


class Faulty(SymileObjective):
    """Symile that goes wrong on rank 1 alone: in some steps, by their numbers in the history, its gradients get the
    one or the other value as a factor."""

    def __init__(self, seed: int, not_finite: list[int], spikes: list[int], value: float = float("nan")) -> None:
        super().__init__(seed)
        self.not_finite, self.spikes, self.value = not_finite, spikes, value

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        report = super().forward(outputs, batch, step)
        bad = step + 1 in self.not_finite or step + 1 in self.spikes
        if not torch.is_grad_enabled() or dist.get_rank() != 1 or not bad:
            return report
        factor = self.value if step + 1 in self.not_finite else 1e6
        return report._replace(loss=report.loss + factor * next(iter(outputs.representations.values())).sum())


def faulty(not_finite: list[int] | None = None, spikes: list[int] | None = None, value: str = ".nan") -> str:
    options = f"not_finite: {not_finite or []}, spikes: {spikes or []}, value: {value}"
    return f"objective={{name: '{__name__}:Faulty', {options}}}"


def prepare_environment() -> None:
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")


def configured(data: str, *overrides: str) -> Config:
    fixed = [
        f"ray.num_workers={dist.get_world_size()}", "train.steps=14", "checkpoint.every=2", "checkpoint.keep_last=20",
        "train.log_every=1", "optimizer.schedule=constant", "optimizer.lr=1e-2", *GUARD,
    ]  # fmt: skip
    return parse_config(config_text(data), "guard.yaml", [*fixed, *overrides]).config


# -- a step that is refused -------------------------------------------------------------------------------------------


def batch_of(step: int, spoilt: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    inputs: dict[str, Any] = {name: torch.randn(6, DIMENSION, generator=generator) for name in "abc"}
    if spoilt:
        inputs["a"] *= 1e3
    return Batch(inputs, torch.ones(6, 3, dtype=torch.bool), torch.ones(6, dtype=torch.bool), torch.arange(6))


def state_of(engine: Any) -> dict[str, Tensor]:
    """All that this rank keeps: weights, moments and counts."""
    return {name: tensor.clone() for name, tensor in engine.saved_state()[0].items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def refused(*overrides: str) -> dict[str, Any]:
    """Steps, one of which is refused; the same without its batch."""
    from symile_dist.engine import Engine
    from symile_dist.metrics.recorder import Recorder
    from symile_dist.step import train_step

    config = configured("none", *overrides)
    engine, asked, results, kept = Engine(config, torch.device("cpu")), [], [], []
    for step in range(6):

        def admits(loss: Tensor, grad_norm: float, step: int = step) -> bool:
            asked.append(grad_norm)
            return step != REFUSED

        before, scaler = state_of(engine), engine.saved_state()[1]["loss_scaler"]
        trained = train_step(engine, batch_of(step, step == REFUSED), step, Recorder(), admits)
        kept.append((same(before, state_of(engine)), scaler == engine.saved_state()[1]["loss_scaler"]))
        results.append(trained.result)
    other = Engine(config, torch.device("cpu"))
    for step in range(6):
        if step != REFUSED:
            train_step(other, batch_of(step), step, Recorder())
    return {
        "asked": asked,
        "results": [tuple(result) for result in results],
        "kept": kept,
        "like without": same(state_of(engine), state_of(other)),
    }


def one_rank_alone_sees_a_spike() -> dict[str, Any]:
    """Its loss, or the norm it knows, is another: all follow it."""
    from symile_dist.config import GuardConfig
    from symile_dist.health.guard import Guard, GuardState

    guard = Guard(GuardConfig(action="skip", window=4), GuardState([1.0] * 4, [1.0] * 4))
    wild = dist.get_rank() == 1
    found = [guard.admits(torch.tensor(50.0 if wild else 1.0), 1.0), guard.found]
    found += [guard.admits(torch.tensor(1.0), 50.0 if wild else 1.0), guard.found]
    return {"found": [*found, guard.admits(torch.tensor(1.0), 1.0), guard.found]}


def every_refusal() -> dict[str, Any]:
    prepare_environment()
    found = {case: refused(*overrides) for case, overrides in CASES.items()}
    return {**found, "one rank": one_rank_alone_sees_a_spike()}


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, Any]]:
    return run_distributed(every_refusal, 2, timeout=240.0)


@pytest.mark.parametrize("case", CASES)
def test_a_refused_step_changes_nothing_on_any_rank(refusals: list[Any], case: str) -> None:
    for rank, found in enumerate(each[case] for each in refusals):
        assert found["asked"] == refusals[0][case]["asked"], "the ranks are asked with other norms"
        assert len(found["asked"]) == 6, "asked once in each step"
        for step, (applied, norm, _, rescaled, _, was_refused) in enumerate(found["results"]):
            assert (applied, was_refused) == (step != REFUSED, step == REFUSED) and not rescaled, f"step {step}"
            assert norm == pytest.approx(found["asked"][step], rel=1e-6), f"asked with another norm in step {step}"
            unchanged, same_scaler = found["kept"][step]
            assert unchanged == (step == REFUSED), f"rank {rank}, step {step}: weights or moments"
            assert same_scaler or step != REFUSED, "fp16's scaler took a refused step for an overflow"
        assert found["like without"], "the run is not that without the refused batch"


def test_what_one_rank_alone_takes_for_a_spike_no_rank_admits(refusals: list[Any]) -> None:
    for found in refusals:
        assert found["one rank"]["found"] == [False, "loss_spike", False, "grad_spike", True, None]


# -- whole runs -------------------------------------------------------------------------------------------------------


class Counting:
    """In the place of an exporter."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        self.counts[" ".join([name.removeprefix("symile_train_"), *labels.values()])] += int(value)

    def observe(self, name: str, value: float, **labels: str) -> None: ...
    def set(self, name: str, value: float, **labels: str) -> None: ...


def run(data: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """A run to its end, or to what stops it: what it leaves, and says."""
    from symile_dist.checkpoint.manifest import complete_checkpoints, read_manifest
    from symile_dist.errors import RunStopped
    from symile_dist.metrics.history import read_history
    from symile_dist.metrics.recorder import Recorder
    from symile_dist.rank import train_rank

    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    config = configured(data, f"run.directory={folder}", *overrides)
    counting: Any = Counting()
    recorder, stopped = Recorder(counting), None
    try:
        train_rank(config, dist.get_rank(), torch.device("cpu"), recorder)
    except RunStopped as error:
        stopped = str(error)
    if recorder.history:
        recorder.history.close()
    dist.barrier()
    complete = complete_checkpoints(folder / "checkpoints")
    states: dict[int, dict[str, Tensor]] = {}
    manifests = {}
    for step, place in complete:
        manifests[step] = read_manifest(place)
        files = [load_file(place / entry.path) for entry in manifests[step].files]
        states[step] = {f"{rank} {name}": tensor for rank, file in enumerate(files) for name, tensor in file.items()}
    history = read_history(folder / "history.jsonl")
    dist.barrier()
    return {
        "stopped": stopped,
        "states": states,
        "train_states": {step: manifest.train_state for step, manifest in manifests.items()},
        "steps": [record["step"] for record in history if record["kind"] == "train"],
        "saved": [record["step"] for record in history if record["kind"] == "checkpoint"],
        "events": [(record["step"], record["message"]) for record in history if record["kind"] == "event"],
        "samples": [record["samples"] for record in history if "samples" in record],
        "counts": dict(counting.counts),
    }


DROPOUT = f"modalities.b.encoder={__name__}:Forgetful"
ROW, SPIKES = [6, 7, 8], [7, 11]
WITHOUT_ROW = f"guard.exclude={[5, *ROW]}"
SKIPPING = ("guard.action=skip",)


def every_run(folder: str) -> dict[str, Any]:
    from symile_dist.data.loader import open_training

    prepare_environment()
    data = f"{folder}/train"

    def go(name: str, *overrides: str) -> dict[str, Any]:
        return run(data, Path(folder) / name, *overrides)

    found: dict[str, Any] = {}
    for stage in STAGES:
        zero = f"train.zero_stage={stage}"
        found[f"faults {stage}"] = go(f"faults-{stage}", zero, faulty([3], SPIKES, ".inf"), *SKIPPING)
        found[f"without them {stage}"] = go(f"without-{stage}", zero, f"guard.exclude={[3, *SPIKES]}")
        found[f"row {stage}"] = go(f"row-{stage}", zero, DROPOUT, faulty(ROW))
        found[f"without it {stage}"] = go(f"without-row-{stage}", zero, DROPOUT, WITHOUT_ROW)
    two_passes = ("train.zero_stage=2", TWO_PASSES, DROPOUT)
    found["row, two passes"] = go("row-two", *two_passes, faulty(ROW))
    found["without it, two passes"] = go("without-row-two", *two_passes, WITHOUT_ROW)
    fp16 = ("train.zero_stage=2", *FP16)
    found["row, fp16"] = go("row-fp16", *fp16, faulty(ROW))
    found["without it, fp16"] = go("without-row-fp16", *fp16, WITHOUT_ROW)
    found["row of spikes"] = go("spikes", DROPOUT, faulty([], ROW), *SKIPPING)
    found["told"] = go("told", faulty([], SPIKES))
    for stage in (0, 1):
        zero = f"train.zero_stage={stage}"
        first = ("guard.margin=2", "guard.exclude=[1, 2]")
        found[f"first steps {stage}"] = go(f"first-{stage}", zero, *first, faulty([5, 6, 7]))
        found[f"without the first {stage}"] = go(f"without-first-{stage}", zero, "guard.exclude=[1, 2, 3, 4, 5, 6, 7]")
    found["for good"] = go("good", faulty(list(range(6, 20))), "guard.max_rollbacks=1")
    batch = next(iter(open_training(configured(data), dist.get_rank(), 10)))
    found["batch of step 11"] = batch.sample_ids.tolist()
    found["no checkpoint"] = go("none", faulty(ROW), "checkpoint.every=null")
    found["at once"] = go("once", faulty(ROW), "guard.max_rollbacks=0")
    pieces = (faulty([3], SPIKES, ".inf"), *SKIPPING)
    go("pieces", *pieces, "train.steps=8")
    found["pieces"] = go("pieces", *pieces)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from symile_dist.data.manifest import index_directory

    folder = tmp_path_factory.mktemp("guard")
    index_directory(write_shards(folder / "train", [24, 24, 24]))
    return run_distributed(every_run, 2, str(folder), timeout=280.0)


def assert_same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, moments and random states at the last step."""
    assert one["stopped"] is None and other["stopped"] is None
    first, second = one["states"][14], other["states"][14]
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_all_skip_what_is_bad_on_one_rank_and_nothing_else(runs: list[Any], stage: int) -> None:
    for found in (rank[f"faults {stage}"] for rank in runs):
        assert found["counts"]["skipped_steps_total nonfinite_grad"] == 1
        assert found["counts"]["skipped_steps_total grad_spike"] == 2
        state = found["train_states"][14]
        assert state["skipped_steps"] == 3 and state["samples_seen"] == 14 * 12
        window = state["guard"]["losses"] + state["guard"]["grad_norms"]
        assert len(window) == 12 and all(0 < value < 1e3 for value in window)
    found = runs[0][f"faults {stage}"]
    assert [step for step, message in found["events"] if "skipped" in message] == [3, *SPIKES]
    assert not same(found["states"][4], found["states"][6]), "nothing was trained"
    # The skipped steps have left no trace: the run ends like one that leaves them out.
    without = runs[0][f"without them {stage}"]
    assert_same_end(found, without)
    assert without["counts"]["skipped_steps_total excluded"] == 3
    assert [step for step in range(1, 15) if step not in without["steps"]] == [3, *SPIKES]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_back_and_ends_as_if_it_had_never_seen_the_row(runs: list[Any], stage: int) -> None:
    for rank in runs:
        found = rank[f"row {stage}"]
        assert_same_end(found, rank[f"without it {stage}"])
        assert found["counts"]["rollbacks_total"] == 1
        assert found["counts"]["skipped_steps_total excluded"] == 4
        guard = found["train_states"][14]["guard"]
        assert guard["excluded"] == [[5, 8]] and guard["rollbacks"] == 1 and guard["consecutive_skips"] == 0
    found = runs[0][f"row {stage}"]
    assert found["steps"] == [1, 2, 3, 4, 9, 10, 11, 12, 13, 14] and found["saved"] == [2, 4, 6, 8, 10, 12, 14]
    assert (4, "back to step 4; steps 5 to 8 are left out") in found["events"]
    # The checkpoint of step 6, made in the midst of the row, is gone: that of now holds the weights of step 4.
    assert same(found["states"][4], found["states"][6])


@pytest.mark.parametrize("case", ["two passes", "fp16"])
def test_a_run_in_two_passes_or_in_fp16_goes_back_too(runs: list[Any], case: str) -> None:
    """In fp16 rank 0, whose own loss is finite, might take the row for gradients beyond the range."""
    assert_same_end(runs[0][f"row, {case}"], runs[0][f"without it, {case}"])
    assert runs[0][f"row, {case}"]["counts"]["rollbacks_total"] == 1


def test_a_row_of_spikes_goes_back_where_spikes_are_skipped(runs: list[Any]) -> None:
    assert_same_end(runs[0]["row of spikes"], runs[0]["without it 1"])  # stage 1 is the default
    assert runs[0]["row of spikes"]["train_states"][14]["guard"]["rollbacks"] == 1


def test_by_default_a_spike_is_told_and_taken(runs: list[Any]) -> None:
    found = runs[0]["told"]
    assert found["steps"] == list(range(1, 15)) and found["train_states"][14]["skipped_steps"] == 0
    assert [step for step, message in found["events"] if "is a spike" in message][:1] == SPIKES[:1]


@pytest.mark.parametrize("stage", [0, 1])
def test_going_back_to_before_the_first_step_that_was_taken(runs: list[Any], stage: int) -> None:
    """The checkpoint holds no moments yet, while the engine that loads it does."""
    assert runs[0][f"first steps {stage}"]["train_states"][14]["guard"]["excluded"] == [[3, 7]]
    assert_same_end(runs[0][f"first steps {stage}"], runs[0][f"without the first {stage}"])


def test_a_run_that_goes_wrong_for_good_stops_and_names_its_samples(runs: list[Any]) -> None:
    shard = {number: f"shard-{number // 24:05d}.tar, sample {number % 24}" for number in range(72)}
    expected = [shard[number] for rank in runs for number in rank["batch of step 11"]]
    for rank in runs:
        found = rank["for good"]
        assert "step 11: " in found["stopped"] and "3 steps in a row (guard.patience)" in found["stopped"]
        assert ", ".join(expected[:5]) + " and 7 more (in history.jsonl)" in found["stopped"]
        assert "gone back to a checkpoint 1 times (guard.max_rollbacks)" in found["stopped"]
        assert found["samples"][-1] == expected and found["counts"]["rollbacks_total"] == 1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no checkpoint", "There is no checkpoint from before step 5 (guard.margin) to go back to"),
        ("at once", "gone back to a checkpoint 0 times (guard.max_rollbacks)"),
    ],
)
def test_a_run_that_cannot_go_back_stops(runs: list[Any], case: str, words: str) -> None:
    for rank in runs:
        assert "step 8: " in rank[case]["stopped"] and words in rank[case]["stopped"]


def test_a_resumed_run_decides_the_same(runs: list[Any]) -> None:
    assert_same_end(runs[0]["pieces"], runs[0]["faults 1"])
    assert runs[0]["pieces"]["train_states"][14] == runs[0]["faults 1"]["train_states"][14]
