"""FactorCL (NeurIPS 2023, arXiv 2306.05268): what modalities share about a task, and what each alone knows of it.

    I(X1, X2; Y) = S + U1 + U2
    S   = I(X1; X2) - I(X1; X2 | Y)
    U_i = I(X_i; Y) - I(X1; X2) + I(X1; X2 | Y)

What is to grow is bounded from below by NCE, what is to shrink from above by NCE-CLUB (`factorcl_critics`), each with
heads and a critic of its own. Terms that U1 and U2 have in common count once: six for a pair of modalities,

    -loss = NCE(X1; X2) - CLUB(X1; X2 | Y)                                      (S)
          + NCE(X1; Y) + NCE(X2; Y) - CLUB(X1; X2) + NCE(X1; X2 | Y)            (U1 + U2)

Y is a label, or what augmented views of the modalities, X_i', have in common with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from symile_dist.distributed import (
    all_gather,
    all_gather_with_gradient,
    all_reduce_sum,
    check_agreement,
    rank,
    world_size,
)
from symile_dist.objectives.factorcl_critics import PairCritic, Pairs
from symile_dist.objectives.negatives import describe, find_problem
from symile_dist.registry import suggestion
from symile_dist.types import Batch, Outputs, Representation, StepReport

Side = tuple[str, ...]
"""X1 or X2: a modality, or several as one."""


class Term(NamedTuple):
    """One bound of one piece of information."""

    bound: Literal["nce", "club"]
    x: Side
    y: Side
    """X2; the label or the views where the term has one modality alone."""
    given: bool
    """Whether it is conditional."""
    part: Literal["shared", "unique"]
    """Which of S and U it belongs to."""

    @property
    def name(self) -> str:
        """Such as `club-x1-x2-given`."""
        return "-".join([self.bound, key(self.x), key(self.y), *["given"] * self.given])


def key(side: Side) -> str:
    return "+".join(side)


class Head(nn.Sequential):
    """A projection head, as wide as the embedding, with some hidden ReLU layers."""

    def __init__(self, inputs: int, width: int, layers: int) -> None:
        sizes = [inputs, *[width] * layers]
        hidden = [part for size in sizes[:-1] for part in (nn.Linear(size, width), nn.ReLU())]
        super().__init__(*hidden, nn.Linear(sizes[-1], width))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, inputs) -> (n, width)"""
        outputs: Tensor = super().forward(inputs.to(next(self.parameters()).dtype))
        return outputs


class FactorCLObjective(nn.Module):
    """FactorCL as the trainer calls it. With `label` it is FactorCL-SUP, with `views` FactorCL-SSL.

    The critics of the CLUB terms are trained by a second optimizer on NCE (`inner_modules`): they have to be optimal
    under NCE for the bound to hold, while everything else is trained to make it small.

    Conditional terms have the condition at both inputs of the critic: f([x1; y], [x2; y]), or f([x1; x1'], [x2; x2'])
    with the views through the same heads.

    Args:
        modalities: names of all modalities, in order.
        embedding_dim: D.
        label: the modality that is Y (encoder `one_hot`, `identity` or any other).
        views: for every other modality the one that holds its augmented view X_i' (`encoder_of`).
        pairing: which X1, X2 there are with more than two modalities: "all" pairs, or each modality and the
            concatenation of the others, "one_vs_rest". Terms of one X_i alone count once.
        negatives: of conditional terms: "all" samples, as the paper's code has it, which measures I(X1, Y; X2, Y), what
            Y tells about itself included; or those with the "same_label", which is I(X1; X2 | Y).
        hidden: width of the critics.
        head_layers: hidden layers of the heads; the paper's code has 2 on its synthetic data, 1 on MultiBench.
        missing: a sample that lacks a modality is in no term which that modality has a part in ("exclude"); or it is a
            sample like any other, with what the encoder makes of the placeholder ("placeholder").

    Raises ValueError for modalities and options that do not fit each other.
    """

    similarity = None
    """Nothing is retrieved: representations of two modalities are compared by critics alone."""

    def __init__(
        self,
        modalities: list[str],
        embedding_dim: int,
        label: str | None = None,
        views: Mapping[str, str] | None = None,
        pairing: str = "all",
        negatives: str = "all",
        hidden: int = 512,
        head_layers: int = 2,
        missing: str = "exclude",
    ) -> None:
        super().__init__()
        if not isinstance(views, Mapping | None):
            raise ValueError(f"objective 'factorcl': views = {views!r} should be a map from modalities to their views")
        self.modalities, self.label, self.views = list(modalities), label, dict(views or {})
        self.same_label, self.exclude_missing = negatives == "same_label", missing == "exclude"
        for option, value, known in (
            ("pairing", pairing, ("all", "one_vs_rest")),
            ("negatives", negatives, ("all", "same_label")),
            ("missing", missing, ("exclude", "placeholder")),
        ):
            if value not in known:
                raise ValueError(f"objective 'factorcl': {option} = '{value}'{suggestion(str(value), list(known))}")
        if hidden < 1 or head_layers < 0:
            raise ValueError(
                f"objective 'factorcl': hidden = {hidden} should be 1 or more, head_layers = {head_layers} 0 or more"
            )
        sources = self._sources()
        if self.same_label and label is None:
            raise ValueError("objective 'factorcl': negatives = 'same_label' needs a label")
        self.terms = self._make_terms(sources, pairing)
        self.heads, self.critics = nn.ModuleDict(), nn.ModuleDict()
        # A plain dict: what is no submodule passes DeepSpeed by, its optimizer, its sharding and its casts.
        self._club_critics: dict[str, PairCritic] = {}
        for term in self.terms:
            sides = [term.x, term.y] if self._is_pair(term) else [term.x]
            self.heads[term.name] = nn.ModuleDict(
                {key(side): Head(len(side) * embedding_dim, embedding_dim, head_layers) for side in sides}
            )
            width = 2 * embedding_dim if term.given else embedding_dim
            critics = self.critics if term.bound == "nce" else self._club_critics
            critics[term.name] = PairCritic(width, width, hidden)

    def inner_modules(self) -> dict[str, nn.Module]:
        """The critics of the CLUB terms."""
        return dict(self._club_critics)

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        """The loss, each term's estimate in nats, and the loss of the CLUB critics.

        Raises ValueError, on all ranks alike, for representations that are not (n, D) vectors.
        """
        # A label is float32 where the others are halves, and critics are float32 in any case.
        whole = {name: r.to(_dtype(r)) if isinstance(r, Tensor) else r for name, r in outputs.representations.items()}
        problem = find_problem(list(whole.values()), batch.valid)
        check_agreement(f"FactorCL on {describe(list(whole.values()))}", problem)
        here = batch.valid[:, None] & (batch.present if self.exclude_missing else torch.ones_like(batch.present))
        # No value of a row that does not count, not even NaN, may reach the loss or a gradient.
        vectors = {name: torch.where(here[:, m, None], whole[name], 0.0) for m, name in enumerate(self.modalities)}
        dtype = next(iter(vectors.values())).dtype
        inputs = [self._inputs(term, vectors) for term in self.terms]
        # One collective for all: every rank has its own rows of X1, and all rows of X2.
        gathered = all_gather_with_gradient(torch.cat([right for _, right in inputs], dim=1))
        columns = gathered.split([right.shape[1] for _, right in inputs], dim=1)
        there = all_gather(here.to(torch.uint8)).bool()
        labels = None if self.label is None else _Labels(all_gather(vectors[self.label].detach()))
        shares, inner_shares = [], []
        for term, (left, _), column in zip(self.terms, inputs, columns, strict=True):
            counts = there[:, [self.modalities.index(name) for name in self._members(term)]].all(dim=1)
            column, pairs = self._pairs(term, column, counts, len(left), labels)
            if term.bound == "nce":
                shares.append(self.critics[term.name](left, column, pairs))
            else:
                share, inner = self._club_critics[term.name].upper_bound(left, column, pairs)
                shares.append(share)
                inner_shares.append(inner)
        totals = all_reduce_sum(torch.stack([share.detach() for share in [*shares, *inner_shares]]))
        loss = _global(shares, totals[: len(shares)]).to(dtype)
        inner_loss = _global(inner_shares, totals[len(shares) :]).to(dtype)
        metrics = {
            f"nats/{term.name}": total if term.bound == "club" else -total
            for term, total in zip(self.terms, totals.to(dtype), strict=False)
        }
        metrics["inner_loss"] = inner_loss.detach()
        return StepReport(loss, metrics, (lambda: inner_loss) if torch.is_grad_enabled() else None)

    def embeddings(self, representations: Mapping[str, Representation]) -> dict[str, Tensor]:
        """What downstream tasks use, (n, ...) each, for X = x1, say: `x1.encoder`, what its encoder emits;
        `x1.shared` and `x1.unique`, what the heads of the terms of S and of U make of that; `x1`, both of these."""
        found: dict[str, Tensor] = {}
        for side in dict.fromkeys(side for term in self.terms for side in (term.x, term.y) if self._is_pair(term)):
            vectors = torch.cat([representations[name] for name in side], dim=1)  # type: ignore[misc]
            parts = {
                part: torch.cat(
                    [
                        self.heads[term.name][key(side)](vectors)  # type: ignore[index]
                        for term in self.terms
                        if term.part == part and key(side) in self.heads[term.name]  # type: ignore[operator]
                    ],
                    dim=1,
                )
                for part in ("shared", "unique")
            }
            found |= {key(side): torch.cat(list(parts.values()), dim=1), f"{key(side)}.encoder": vectors}
            found |= {f"{key(side)}.{part}": vectors for part, vectors in parts.items()}
        return found

    # -- terms ---------------------------------------------------------------------------------------------------

    def _sources(self) -> list[str]:
        """The modalities that are X1, X2, ...; raises ValueError for what is no task."""
        if (self.label is None) == (not self.views):
            raise ValueError(
                "objective 'factorcl' needs a task: label=, the modality that holds it (FactorCL-SUP), or views=, for "
                "every modality the one that holds its augmented view (FactorCL-SSL)"
            )
        given = [("label", self.label)] if self.label else [("views", n) for pair in self.views.items() for n in pair]
        for option, name in given:
            if name not in self.modalities:
                raise ValueError(
                    f"objective 'factorcl': {option}: '{name}' is no modality{suggestion(str(name), self.modalities)}"
                )
        task = [self.label, *self.views.values()]
        sources = [name for name in self.modalities if name not in task]
        if self.views and (sorted(self.views) != sorted(sources) or len(set(self.views.values())) < len(self.views)):
            raise ValueError(
                f"objective 'factorcl': views = {self.views} should give each of {', '.join(sources)} a view of its own"
            )
        if len(sources) < 2:
            raise ValueError("objective 'factorcl' needs two or more modalities beside the label")
        return sources

    def _make_terms(self, sources: Sequence[str], pairing: str) -> list[Term]:
        pairs: list[tuple[Side, Side]] = [((one,), (other,)) for one, other in combinations(sources, 2)]
        if pairing == "one_vs_rest" and len(sources) > 2:
            pairs = [((one,), tuple(name for name in sources if name != one)) for one in sources]
        terms: list[Term] = []
        for x, y in pairs:
            terms += [Term("nce", x, y, False, "shared"), Term("club", x, y, True, "shared")]
            terms += [Term("nce", side, self._task(side), False, "unique") for side in (x, y)]
            terms += [Term("club", x, y, False, "unique"), Term("nce", x, y, True, "unique")]
        return list(dict.fromkeys(terms))  # those of one modality alone come with each of its pairs

    def _task(self, side: Side) -> Side:
        """What stands for Y: the label, or the views of a side."""
        return (self.label,) if self.label is not None else tuple(self.views[name] for name in side)

    def _is_pair(self, term: Term) -> bool:
        return term.y != self._task(term.x)

    def _members(self, term: Term) -> set[str]:
        """The modalities that have a part in a term."""
        task = (*self._task(term.x), *self._task(term.y)) if term.given else ()
        return {*term.x, *term.y, *task}

    # -- what a term sees ----------------------------------------------------------------------------------------

    def _inputs(self, term: Term, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Modality -> (n, D) to both inputs of the term's critic, (n, ...) each."""

        def projected(side: Side, names: Side) -> Tensor:
            """`names` through the head of `side`: its own modalities, or their views."""
            heads: nn.ModuleDict = self.heads[term.name]  # type: ignore[assignment]
            made: Tensor = heads[key(side)](torch.cat([vectors[name] for name in names], dim=1))
            return made.to(vectors[names[0]].dtype)

        left = [projected(term.x, term.x)]
        if self._is_pair(term):
            right = [projected(term.y, term.y)]
        else:
            right = [vectors[self.label] if self.label is not None else projected(term.x, term.y)]
        if term.given and self.label is not None:
            left, right = [*left, vectors[self.label]], [*right, vectors[self.label]]
        elif term.given:
            left.append(projected(term.x, self._task(term.x)))
            right.append(projected(term.y, self._task(term.y)))
        return torch.cat(left, dim=1), torch.cat(right, dim=1)

    def _pairs(
        self, term: Term, columns: Tensor, counts: Tensor, n: int, labels: _Labels | None
    ) -> tuple[Tensor, Pairs]:
        """(N, ...) columns and (N,) flags of the rows that count -> (K, ...) columns, and what is contrasted."""
        first = rank() * n
        positive = torch.arange(first, first + n, device=columns.device)
        weights = counts[positive].to(columns.dtype) / counts.sum().clamp(min=1)
        copies = counts.to(columns.dtype)[None]
        if labels is not None and not self._is_pair(term):
            # Samples of one label have one score with a row: the critic sees each label once.
            copies = copies.new_zeros(1, len(labels.first)).index_add_(1, labels.numbers, copies)
            return columns[labels.first], Pairs(labels.numbers[positive], weights, copies)
        if labels is not None and term.given and self.same_label:
            copies = copies * (labels.numbers[positive, None] == labels.numbers)
        return columns, Pairs(positive, weights, copies)


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Labels:
    """The different labels of the global batch."""

    def __init__(self, rows: Tensor) -> None:
        """(N, D): a label per sample."""
        different, self.numbers = torch.unique(rows, dim=0, return_inverse=True)
        """(N,): of each sample's label."""
        places = torch.arange(len(rows), device=rows.device)
        self.first = places.new_full((len(different),), len(rows)).scatter_reduce_(0, self.numbers, places, "amin")
        """(K,): the first sample that has it."""


def _global(shares: list[Tensor], totals: Tensor) -> Tensor:
    """This rank's shares of some terms and their sums over ranks -> the sum of all, with exact gradients.

    Trainers average gradients over the ranks, so each back-propagates world_size times its share.
    """
    scaled = torch.stack(shares).sum() * world_size()
    return totals.sum() + (scaled - scaled.detach())
