"""The Symile loss on the global batch (NeurIPS 2024, arXiv 2411.01053)."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn

from symile_dist.distributed import Group, all_gather, world_size
from symile_dist.objectives.clip import sum_over_pairs
from symile_dist.objectives.contrast import Negatives, as_scale, contrastive_losses, counted, make_cube, scale_problem
from symile_dist.objectives.cube import MAX_NEGATIVES, draw_sheets, sheets_problem
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.negatives import GlobalBatch, draw_permutations, is_list_of_tensors
from symile_dist.objectives.permuted import Permuted
from symile_dist.objectives.reference import symile_loss_reference
from symile_dist.registry import suggestion
from symile_dist.similarity import MIPSimilarity
from symile_dist.types import Batch, Outputs, StepReport

NEGATIVE_SAMPLING = ["n", "n_squared", "sheets"]
BACKENDS = ["auto", "reference", "chunks", "triton"]


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class SymileLoss:
    """Contrasts each anchor's multilinear inner product with those of other combinations of the global batch.

    The mean over the M anchors of the cross-entropy of `logit_scale * MIP` (arXiv 2411.01053, section 3). Works with
    any M >= 2; with two modalities, "n_squared" is the symmetric InfoNCE. The loss is the same for every number of
    ranks.

    Args:
        negative_sampling: the combinations that an anchor is contrasted with:
            "n": N, by permutations drawn from (seed, step); O(N^2 D) work (algorithm 1).
            "n_squared": all N^(M - 1); O(N^M D) work, by tiles (docs/objective.md).
            "sheets": `sheets` * N of them, so drawn that each anchor's sum of exponentials is unbiased
            (`objectives.cube.draw_sheets`).
        group: the ranks that form the global batch; None is all of them.
        seed: of what is drawn.
        sheets: how many of the N^(M - 2) sheets "sheets" takes, 2 or more.
        normalize: L2-normalise the representations first, as Symile's XOR experiments do; its M3 and MIMIC encoders
            end in LayerNorm instead.
        dimension_scaling: multiply logits with D^((M - 1) / 2), which keeps the MIPs of unit vectors of order 1 for
            any D (Gated Symile, arXiv 2604.05834).
        pairwise_weight: of an added `PairwiseClipLoss`, which keeps retrieval between two modalities (ConFu, arXiv
            2511.21331).
        backend: "chunks": tiles by torch's matrix products, on any device. "triton": fused CUDA kernels, for
            "n_squared" of three modalities. "reference": as the papers write it, all logits in memory. "auto": chunks.

    Raises ValueError for an option that does not exist.
    """

    def __init__(
        self,
        negative_sampling: str = "n",
        group: Group = None,
        seed: int = 0,
        *,
        sheets: int | None = None,
        normalize: bool = False,
        dimension_scaling: bool = False,
        pairwise_weight: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if negative_sampling not in NEGATIVE_SAMPLING:
            raise ValueError(
                f"unknown negative_sampling '{negative_sampling}'"
                f"{suggestion(str(negative_sampling), NEGATIVE_SAMPLING)}"
            )
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend '{backend}'{suggestion(str(backend), BACKENDS)}")
        if (negative_sampling == "sheets") != (sheets is not None):
            raise ValueError(
                "negative_sampling='sheets' needs sheets=, the number of sheets (2 or more; a sixteenth of the global "
                "batch is a good start)"
                if sheets is None
                else f"sheets = {sheets} goes with negative_sampling='sheets', not '{negative_sampling}'"
            )
        if sheets is not None and (not isinstance(sheets, int) or isinstance(sheets, bool) or sheets < 2):
            raise ValueError(f"sheets = {sheets!r} should be an integer of 2 or more")
        if backend == "triton" and negative_sampling != "n_squared":
            raise ValueError("backend 'triton' computes negative_sampling='n_squared' only; use backend='auto'")
        if not _is_integer(seed):
            raise ValueError(f"seed = {seed!r:.50} should be an integer")
        if not 0 <= pairwise_weight < float("inf"):
            raise ValueError(f"pairwise_weight = {pairwise_weight} should be 0 or more, and finite")
        self.negative_sampling, self.group, self.seed, self.sheets = negative_sampling, group, seed, sheets
        self.normalize, self.dimension_scaling = normalize, dimension_scaling
        self.pairwise_weight, self.backend = pairwise_weight, backend

    def __call__(
        self,
        representations: list[Tensor],
        logit_scale: Tensor | float,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """The global loss, the same on every rank; its gradient is exact once averaged over the ranks.

        bfloat16 representations are multiplied as they are on CUDA, halves else in float32; sums and gradients are
        float32 or more. NaN in gives NaN, on all ranks; so do logits that float32 cannot hold.

        Args:
            representations: M tensors (n, D), this rank's rows; the same n on every rank.
            logit_scale: scalar multiplier of the logits, already exp-ed.
            step: number of the step; with the seed it decides the negatives. "n_squared" draws nothing.
            valid: (n,) bool; rows that are neither anchor nor negative where False. The normaliser is the global
                number of valid rows.
            present: (n, M) bool; where False, the sample is no positive for that anchor (it lacks the modality and
                comes with a placeholder). It stays a negative. None: all are.

        Raises ValueError, on all ranks alike, for arguments that do not fit each other or those of other ranks.
        """
        batch = GlobalBatch(
            representations,
            valid,
            self.group,
            normalize=self.normalize,
            description=f"negative_sampling='{self.negative_sampling}', sheets={self.sheets}, seed={self.seed}, "
            f"step={step}, backend='{self.backend}' and options "
            f"{(self.normalize, self.dimension_scaling, self.pairwise_weight, present is not None)}"
            + ("" if isinstance(logit_scale, Tensor) else f", logit_scale={logit_scale}"),
            problem=self._problem(representations, logit_scale, step, present),
        )
        scale = as_scale(logit_scale, batch.own)
        number, dimension = len(representations), batch.own.shape[1]
        mip_scale = scale * dimension ** ((number - 1) / 2) if self.dimension_scaling else scale
        if self.backend == "reference":
            loss = self._reference(batch, mip_scale, step, present)
        else:
            negatives = self._negatives(batch, mip_scale, step)
            copies = negatives.copies() if isinstance(negatives, Permuted) else None
            losses = contrastive_losses(batch.own, batch.others, batch.rows, batch.group, negatives, mip_scale, copies)
            loss = batch.mean(losses, counted(batch.local_valid, present))
        if self.pairwise_weight:
            loss = loss + self.pairwise_weight * sum_over_pairs(batch, scale, present)
        return loss.to(scale.dtype)

    def _reference(self, batch: GlobalBatch, scale: Tensor, step: int | None, present: Tensor | None) -> Tensor:
        """Every rank computes the whole loss; the gathers' backward passes sum, and averaging divides again."""
        return symile_loss_reference(
            batch.gather_all(),
            scale,
            self.seed,
            step or 0,
            batch.valid,
            negative_sampling=self.negative_sampling,
            sheets=self.sheets,
            present=None if present is None else all_gather(present.byte(), batch.group).bool(),
        )

    def _negatives(self, batch: GlobalBatch, scale: Tensor, step: int | None) -> Negatives:
        representations = [batch.own.detach(), *(other.detach() for other in batch.others)]
        number = len(representations)
        if self.negative_sampling == "n":
            assert step is not None
            permutations = draw_permutations(number, batch.size, self.seed, step, batch.valid, batch.own.device)
            return Permuted(batch.offset, batch.valid, permutations)
        cube = make_cube(batch, representations, scale)
        if self.backend == "triton":
            from symile_dist.objectives import cube_triton  # imports Triton, which no other backend needs

            return cube_triton.TritonCube(cube.offset, cube.valid, cube.bounded)
        if self.negative_sampling == "sheets":
            assert step is not None and self.sheets is not None
            cube.drawn, cube.weight = draw_sheets(self.sheets, batch.size, number, self.seed, step)
        return cube

    def _problem(
        self, representations: list[Tensor], logit_scale: Tensor | float, step: int | None, present: Tensor | None
    ) -> str | None:
        """What is wrong with the arguments beside the shapes of representations and valid, or None."""
        if problem := scale_problem(logit_scale):
            return problem
        if not is_list_of_tensors(representations) or not representations[0].ndim:
            return None  # told by GlobalBatch
        if self.negative_sampling != "n_squared" and step is None:
            return f"negative_sampling='{self.negative_sampling}' draws its negatives from (seed, step): pass step="
        if step is not None and not _is_integer(step):
            return f"step should be an integer, is {step!r:.50}"
        number, n = len(representations), representations[0].shape[0]
        if present is not None and (
            not isinstance(present, Tensor) or present.shape != (n, number) or present.dtype != torch.bool
        ):
            kind = f"{present.dtype} {tuple(present.shape)}" if isinstance(present, Tensor) else repr(present)[:50]
            return f"present should be a bool tensor of shape ({n}, {number}), is {kind}"
        if present is not None and present.device != representations[0].device:
            return f"present is on {present.device}, the representations are on {representations[0].device}"
        if number >= 2 and n and (problem := self.size_problem(n * world_size(self.group), number)):
            return problem
        if self.backend != "triton":
            return None
        from symile_dist.objectives import cube_triton

        return cube_triton.why_not(representations[0])

    def size_problem(self, size: int, number: int) -> str | None:
        """Why the strategy cannot work with a global batch of `size` and `number` modalities, or None."""
        if self.negative_sampling == "sheets":
            assert self.sheets is not None
            return sheets_problem(self.sheets, size, number)
        if self.negative_sampling == "n_squared" and size ** (number - 1) > MAX_NEGATIVES:
            return (
                f"negative_sampling='n_squared' at a global batch of {size} and {number} modalities means "
                f"{size ** (number - 1):.1e} negatives per anchor, more than can be computed; use 'sheets' or 'n'"
            )
        if self.backend == "triton" and number != 3:
            return f"backend 'triton' is for three modalities, got {number}; use backend='auto'"
        return None


class SymileObjective(nn.Module):
    """`SymileLoss` as the trainer calls it. Options as there, and

    Args:
        missing: what a sample does that lacks a modality (its input is a placeholder): "placeholder" keeps it in the
            batch like any other, as Symile's experiments with missing data do; "exclude" keeps it as a negative, but
            not as a positive for the anchors that it lacks.
    """

    bounds_total_correlation = True
    """log N - loss bounds the total correlation (arXiv 2411.01053, section 3)."""

    def __init__(
        self,
        seed: int,
        modalities: list[str] | None = None,
        global_batch_size: int | None = None,
        negative_sampling: str = "n",
        sheets: int | None = None,
        normalize: bool = False,
        dimension_scaling: bool = False,
        pairwise_weight: float = 0.0,
        backend: str = "auto",
        missing: str = "placeholder",
    ) -> None:
        super().__init__()
        if missing not in ("placeholder", "exclude"):
            raise ValueError(f"missing = '{missing}' should be 'placeholder' or 'exclude'")
        self.exclude_missing = missing == "exclude"
        self.similarity = MIPSimilarity(normalize)
        self.loss = SymileLoss(
            negative_sampling,
            seed=seed,
            sheets=sheets,
            normalize=normalize,
            dimension_scaling=dimension_scaling,
            pairwise_weight=pairwise_weight,
            backend=backend,
        )
        if modalities and global_batch_size and (problem := self.loss.size_problem(global_batch_size, len(modalities))):
            raise ValueError(f"objective 'symile': {problem}")  # before any work starts

    def candidates(self, global_batch_size: int, modalities: int) -> int:
        """Of every anchor: its positive and its negatives. With pairs beside them the loss is no estimate by these."""
        if self.loss.pairwise_weight:
            return global_batch_size
        if self.loss.negative_sampling == "n_squared":
            return int(global_batch_size ** (modalities - 1))
        return global_batch_size * (self.loss.sheets or 1)

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        representations = list(outputs.representations.values())
        present = batch.present if self.exclude_missing else None
        loss = self.loss(representations, outputs.logit_scale, step=step, valid=batch.valid, present=present)
        return StepReport(loss, contrastive_health(representations, batch.valid))
