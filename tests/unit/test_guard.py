"""The guard's decisions: what is a spike, when a row of skips is too long, from where on a rollback leaves out."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from symile_dist.checkpoint.manager import CheckpointManager
from symile_dist.checkpoint.manifest import FileEntry, Manifest, complete_checkpoints, folder_name
from symile_dist.config import Config, ConfigError, GuardConfig, InnerOptimizerConfig, parse_config
from symile_dist.health.guard import Guard, GuardState, RollBack, gone_back, is_spike
from symile_dist.inner import InnerOptimizer
from symile_dist.train import TrainState
from tests.shards import config_text


def guard_of(state: GuardState | None = None, **options: object) -> Guard:
    return Guard(GuardConfig(**options), state or GuardState())


def filled(count: int, **options: object) -> Guard:
    """Losses about 3, gradient norms about 1, as noisy as those of a run."""
    generator = torch.Generator().manual_seed(0)
    guard = guard_of(**options)
    for noise in (0.1 * torch.randn(count, 2, generator=generator)).tolist():
        guard.took(3 + noise[0], math.exp(2 * noise[1]))
    return guard


@pytest.mark.parametrize(
    ("loss", "grad_norm", "expected"),
    [
        (3.0, 1.0, None),
        (3.3, 2.0, None),
        (3.0, 50.0, "grad_spike"),
        (9.0, 1.0, "loss_spike"),
        (9.0, 50.0, "grad_spike"),
        (0.01, 1e-6, None),  # better or smaller is no spike
        (3.0, 0.0, None),
    ],
)
def test_a_spike_lies_far_above_the_steps_before(loss: float, grad_norm: float, expected: str | None) -> None:
    assert filled(128).spike(loss, grad_norm) == expected


def test_spikes_in_the_window_hide_no_other_spike() -> None:
    guard = filled(128)
    for _ in range(20):
        guard.took(1e6, 1e6)
    assert guard.spike(3.0, 50.0) == "grad_spike"
    # With mean and standard deviation of the same window nothing short of 1e5 would be one.
    logs = torch.tensor(guard.state.grad_norms).log()
    assert math.log(50.0) < logs.mean() + 6 * logs.std()


def test_judging_begins_when_the_window_is_half_full() -> None:
    assert filled(63).spike(3.0, 1e9) is None
    assert filled(64).spike(3.0, 1e9) == "grad_spike"


def test_where_values_hardly_differ_a_little_more_is_no_spike() -> None:
    guard = guard_of(window=8)
    for _ in range(8):
        guard.took(-2.0, 1.0)
    assert guard.spike(-1.9, 1.1) is None
    assert guard.spike(-2.0, 2.0) == "grad_spike" and guard.spike(-0.5, 1.0) == "loss_spike"
    assert is_spike(1.5, [1.0, 1.0, 1.0], 6.0, 0.05) and not is_spike(1.2, [1.0, 1.0, 1.0], 6.0, 0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_enters_the_window(value: float) -> None:
    guard = filled(16, window=16)
    before = asdict(guard.state)
    guard.took(value, 1.0)
    guard.took(3.0, value)
    assert asdict(guard.state) == before
    assert guard.spike(3.0, 1.0) is None and guard.spike(3.0, 1e3) == "grad_spike"


def test_the_window_moves_so_another_level_is_no_spike_for_long() -> None:
    guard = filled(16, window=16)
    spikes = []
    for _ in range(16):
        spikes.append(guard.spike(3.0, 50.0))
        guard.took(3.0, 50.0)
    assert spikes[:5] == ["grad_spike"] * 5 and spikes[-4:] == [None] * 4
    assert len(guard.state.losses) == len(guard.state.grad_norms) == 16


def test_switched_off_it_sees_and_keeps_nothing() -> None:
    guard = filled(128, action="off")
    assert not guard.state.losses and guard.spike(1e9, 1e9) is None


def test_admits_says_what_it_found() -> None:
    guard = filled(128, action="skip")
    assert not guard.admits(torch.tensor(3.0), 1e9) and guard.found == "grad_spike"
    assert guard.admits(torch.tensor(3.0), 1.0) and guard.found is None


def test_patience_counts_skips_in_a_row_only() -> None:
    guard = guard_of(patience=3)
    assert [guard.skipped(4), guard.skipped(5)] == [False, False]
    guard.went_well()
    assert [guard.skipped(step) for step in (8, 9, 11)] == [False, False, True]
    assert guard.state.first_skipped == 8


@pytest.mark.parametrize(
    ("first_skipped", "margin", "excluded", "expected"),
    [
        (30, 0, [], 30),
        (30, 20, [], 10),
        (30, 20, [[11, 20]], 1),  # steps that were left out were not taken: the margin reaches beyond them
        (30, 5, [[11, 29]], 6),
        (3, 20, [], 1),
        (1, 20, [], 1),
    ],
)
def test_the_margin_counts_steps_that_were_taken(
    first_skipped: int, margin: int, excluded: list[list[int]], expected: int
) -> None:
    guard = guard_of(GuardState(excluded=excluded), margin=margin)
    guard.skipped(first_skipped)
    assert guard.distrusted_from() == expected


def test_going_back_keeps_what_is_left_out_and_the_checkpoint_s_window() -> None:
    saved = GuardState(losses=[1.0], grad_norms=[2.0], excluded=[[3, 4]], rollbacks=1)
    now = GuardState(
        losses=[9.0], grad_norms=[9.0], consecutive_skips=3, first_skipped=20, excluded=[[3, 4], [7, 8]], rollbacks=2
    )
    state = gone_back(saved, now, RollBack(15, 22, "reason"))
    assert state == GuardState([1.0], [2.0], excluded=[[3, 4], [7, 8], [15, 22]], rollbacks=3)
    guard = guard_of(state, max_rollbacks=3, exclude=[30])
    excluded = [step for step in range(1, 40) if guard.excludes(step)]
    assert excluded == [3, 4, 7, 8, *range(15, 23), 30]
    assert not guard.may_roll_back and guard_of(state, max_rollbacks=4).may_roll_back


def test_a_state_read_from_a_manifest_decides_the_same() -> None:
    guard = filled(20, window=32)
    guard.skipped(21)
    guard.state.excluded.append([5, 6])
    state = TrainState(step=21, best_value=0.1, guard=guard.state)
    saved = json.loads(json.dumps(asdict(state)))
    manifest = Manifest(21, 1, 1, "fp32", "", "", 0, saved, {}, ())
    again = TrainState.from_manifest(manifest)
    assert again == state and "guard" not in state.summary() and state.summary()["step"] == 21
    other = guard_of(again.guard, window=32)
    for loss in range(20):
        for norm in (0.5, 1.5, 2.0, 2.5, 3.0, 5.0):
            assert other.spike(loss / 2, norm) == guard.spike(loss / 2, norm)


def test_checkpoints_that_a_run_goes_back_from_are_removed(tmp_path: Path) -> None:
    manager = CheckpointManager(config_of(f"run.directory={tmp_path}"))
    for step in (2, 4, 6, 8):
        folder = manager.directory / folder_name(step)
        folder.mkdir(parents=True)
        Manifest(step, 1, 1, "fp32", "", "", 0, {}, {}, (FileEntry("rank-0", 0, hashlib.sha256().hexdigest()),)).write(
            folder
        )
        (folder / "rank-0").touch()
    manager.give_up_after(4)
    assert [step for step, _ in complete_checkpoints(manager.directory)] == [2, 4]
    assert sorted(path.name for path in manager.directory.iterdir()) == [folder_name(2), folder_name(4)]
    for before, expected in ((5, 4), (4, 2), (2, None)):
        found = manager.find(before)
        assert (found.step if found else None) == expected, f"before step {before}"


def test_the_inner_optimizer_forgets_what_a_checkpoint_does_not_hold() -> None:
    module = nn.Linear(2, 1)
    inner = InnerOptimizer({"critic": module}, InnerOptimizerConfig())
    assert inner.step(module(torch.ones(1, 2)).sum()) and inner.tensors()
    inner.load_tensors({})
    assert not inner.tensors()


def config_of(*overrides: str) -> Config:
    return parse_config(config_text("none"), "guard.yaml", overrides).config


def test_the_defaults_skip_no_spikes() -> None:
    guard = config_of().guard
    assert (guard.action, guard.patience, guard.max_rollbacks) == ("warn", 10, 2)


@pytest.mark.parametrize(
    "override",
    ["guard.action=stop", "guard.window=1", "guard.threshold=0", "guard.patience=0", "guard.exclude=[0]"],
)
def test_mistakes_in_the_config_are_told(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        config_of(override)


def test_the_gradient_norm_cannot_be_switched_off() -> None:
    with pytest.raises(ConfigError, match=r"compute_grad_norm: the gradient norm is needed"):
        config_of("deepspeed.zero_optimization.compute_grad_norm=false")
