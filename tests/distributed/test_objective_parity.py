"""The losses over real ranks: equal to the single-process reference in value, and in gradients once averaged.

Each rank encodes its own rows with linear encoders that all ranks share. What a trainer does (DDP, ZeRO) is to average
the encoders' gradients over the ranks; the averages must be the gradients of the loss on the concatenated batch.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from symile_dist import distributed
from symile_dist.objectives import PairwiseClipLoss, SymileLoss
from symile_dist.objectives.negatives import GlobalBatch, draw_permutations
from symile_dist.objectives.reference import pairwise_clip_loss_reference, symile_loss_reference
from tests.processes import RankFailed, run_distributed

BATCH, INPUT, DIMENSION, SEED, STEP = 16, 5, 7, 3, 11
VALID = {
    "all": [True] * BATCH,
    "some": [number not in (1, 6, 7, 13) for number in range(BATCH)],
    # Ranks of 4 rows: one has none at all, another one row.
    "a rank without": [number not in (4, 5, 6, 7, 13, 14, 15) for number in range(BATCH)],
    "none": [False] * BATCH,
}
SAMPLING: dict[str, dict[str, Any]] = {
    "n": {"negative_sampling": "n"},
    "n_squared": {"negative_sampling": "n_squared"},
    "sheets": {"negative_sampling": "sheets", "sheets": 5},
    # Logits of some hundreds, where a plain sum of exponentials would overflow even in float64.
    "n_squared, large logits": {"negative_sampling": "n_squared"},
    "sheets, large logits": {"negative_sampling": "sheets", "sheets": 5},
}
LOG_SCALE = {name: 6.0 if "large" in name else 0.2 for name in [*SAMPLING, "clip"]}
CASES = [
    (loss, number, valid)
    for loss in (*SAMPLING, "clip")
    for number in (2, 3, 4)
    for valid in VALID
    if not ("sheets" in loss and number == 2)
]
Figures = dict[str, Any]


def inputs(number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The global batch's inputs and the shared encoders' weights, per modality."""
    generator = torch.Generator().manual_seed(number)
    data = torch.randn(number, BATCH, INPUT, generator=generator, dtype=torch.float64)
    weights = 0.5 * torch.randn(number, INPUT, DIMENSION, generator=generator, dtype=torch.float64)
    return list(data), [weight.clone().requires_grad_() for weight in weights]


def one_case(loss: str, number: int, valid: str, group: dist.ProcessGroup | None = None) -> Figures:
    """Loss and averaged gradients of one case, on this rank's rows."""
    world, rank = distributed.world_size(group), distributed.rank(group)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    data, weights = inputs(number)
    log_scale = torch.tensor(LOG_SCALE[loss], dtype=torch.float64, requires_grad=True)
    local = [x[rows] @ weight for x, weight in zip(data, weights, strict=True)]
    function: Any = PairwiseClipLoss(group)
    if loss != "clip":
        function = SymileLoss(group=group, seed=SEED, **SAMPLING[loss])
    value = function(local, log_scale.exp(), step=STEP, valid=torch.tensor(VALID[valid])[rows])
    gradients = torch.autograd.grad(value, [log_scale, *weights])
    averaged = [distributed.all_reduce_sum(gradient, group) / world for gradient in gradients]
    return {"loss": float(value.detach()), "gradients": [gradient.numpy() for gradient in averaged]}


def without_gather_gradient(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """What open_clip does by default: of the gathered rows only the rank's own carry a gradient."""
    parts = list(distributed.all_gather(tensor.detach(), group).chunk(distributed.world_size(group)))
    parts[distributed.rank(group)] = tensor
    return torch.cat(parts)


def without_world_size(self: GlobalBatch, values: Tensor, weights: Tensor | None) -> Tensor:
    """The rank's share as it is: the averaging then divides by world_size once more."""
    whole = mean(self, values, weights)
    return whole / self.world_size + (whole * (1 - 1 / self.world_size)).detach()


mean = GlobalBatch.mean


def every_case() -> Figures:
    """What one rank finds, in one start of the processes."""
    figures: Figures = {str(case): one_case(*case) for case in CASES}
    with patch("symile_dist.objectives.negatives.all_gather_with_gradient", without_gather_gradient):
        figures["no gather gradient"] = one_case("n", 3, "some")
    with patch.object(GlobalBatch, "mean", without_world_size):
        figures["no world size"] = one_case("n", 3, "some")
    figures["permutations"] = draw_permutations(3, BATCH, SEED, STEP, torch.tensor(VALID["some"])).tolist()
    world, rank = distributed.world_size(), distributed.rank()
    if world == 4:  # two groups, each a global batch of its own
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        figures["group"] = one_case("n", 3, "some", groups[rank // 2])
    # gather and its adjoint, by the definition: <gather(x), y> summed over ranks = <x, adjoint(y)>.
    x = torch.arange(6.0).reshape(3, 2) + 10 * rank
    x.requires_grad_()
    gathered = distributed.all_gather_with_gradient(x)
    gathered.backward(torch.full_like(gathered, 1.0 + rank))
    assert x.grad is not None
    figures["gathered"], figures["gather gradient"] = gathered.tolist(), x.grad.tolist()
    return figures


def reference(loss: str, number: int, valid: str) -> Figures:
    """The same case in this process, on the whole batch, as the papers write it."""
    data, weights = inputs(number)
    log_scale = torch.tensor(LOG_SCALE[loss], dtype=torch.float64, requires_grad=True)
    encoded = [x @ weight for x, weight in zip(data, weights, strict=True)]
    flags = torch.tensor(VALID[valid])
    if loss != "clip":
        value = symile_loss_reference(encoded, log_scale.exp(), SEED, STEP, flags, **SAMPLING[loss])
    else:
        value = pairwise_clip_loss_reference(encoded, log_scale.exp(), flags)
    if not flags.any():  # the mean over nothing: what the fast path promises is zero
        value = 0.0 * sum(tensor.sum() for tensor in [log_scale, *encoded])  # type: ignore[assignment]
    gradients = torch.autograd.grad(value, [log_scale, *weights])
    return {"loss": float(value.detach()), "gradients": [gradient.numpy() for gradient in gradients]}


def check(got: Figures, want: Figures) -> None:
    """Fails unless loss and gradients agree to 1e-12: a ratio of 1, for features and logit scale alike."""
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-12, abs=1e-14)
    names = ["logit_scale", *(f"encoder {m}" for m in range(len(want["gradients"]) - 1))]
    for name, g, w in zip(names, got["gradients"], want["gradients"], strict=True):
        ratio = float((g * w).sum() / (w * w).sum()) if (w * w).sum() else 1.0
        difference = float(abs(g - w).max())
        assert difference <= 1e-12 * max(1.0, float(abs(w).max())), (
            f"gradient of {name}: ratio to the single-process one {ratio:.6f}, largest difference {difference:.2e}"
        )


@pytest.fixture(scope="module", params=[2, 4, 8], ids=["world2", "world4", "world8"])
def ranks(request: pytest.FixtureRequest) -> list[Figures]:
    """What every rank found."""
    return run_distributed(every_case, request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_averaged_gradients_are_the_single_process_ones(
    ranks: list[Figures], case: tuple[str, int, str]
) -> None:
    want = reference(*case)
    for rank, figures in enumerate(ranks):
        try:
            check(figures[str(case)], want)
        except AssertionError as error:
            raise AssertionError(f"rank {rank} of {len(ranks)}: {error}") from None
    assert len({figures[str(case)]["loss"] for figures in ranks}) == 1, "the ranks disagree on the loss"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rank_gives_the_same_as_many(ranks: list[Figures], case: tuple[str, int, str]) -> None:
    check(ranks[0][str(case)], one_case(*case))


@pytest.mark.parametrize("scheme", ["no gather gradient", "no world size"])
def test_naive_schemes_fail_the_same_check(ranks: list[Figures], scheme: str) -> None:
    want = reference("n", 3, "some")
    got = ranks[0][scheme]
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-10), "the loss itself does not give a naive scheme away"
    with pytest.raises(AssertionError, match="ratio to the single-process one"):
        check(got, want)
    if scheme == "no world size":
        for g, w in zip(got["gradients"], want["gradients"], strict=True):
            assert abs(g * len(ranks) - w).max() < 1e-10


def test_every_rank_draws_the_same_permutations(ranks: list[Figures]) -> None:
    expected = draw_permutations(3, BATCH, SEED, STEP, torch.tensor(VALID["some"])).tolist()
    assert [figures["permutations"] for figures in ranks] == [expected] * len(ranks)


def test_a_group_of_ranks_is_a_global_batch_of_its_own(ranks: list[Figures]) -> None:
    for figures in ranks:
        if "group" in figures:
            check(figures["group"], reference("n", 3, "some"))
    assert ("group" in ranks[0]) == (len(ranks) == 4)


def test_gather_with_gradient_sums_over_the_ranks(ranks: list[Figures]) -> None:
    world = len(ranks)
    rows = [[2.0 * i + 10 * r, 2.0 * i + 1 + 10 * r] for r in range(world) for i in range(3)]
    for figures in ranks:
        assert figures["gathered"] == rows
        assert figures["gather gradient"] == [[world * (world + 1) / 2] * 2] * 3


# -- the helper itself -----------------------------------------------------------------------------------------------


def fail_on_rank_1() -> None:
    if distributed.rank() == 1:
        raise KeyError("lost on rank 1")
    dist.barrier()  # would wait for ever


def test_a_failure_on_one_rank_is_told_with_its_traceback_and_ends_the_others() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed:.*Traceback.*KeyError: 'lost on rank 1'"):
        run_distributed(fail_on_rank_1, 2)
