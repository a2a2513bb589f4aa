"""ConFu and Gated Symile against what their papers write, computed one score at a time."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from symile_dist.objectives import ConFuLoss, ConFuObjective, GatedSymileObjective
from symile_dist.objectives.gated import Gate
from symile_dist.objectives.negatives import draw_permutations
from symile_dist.similarity import towards
from symile_dist.types import Batch, Outputs

NAMES = ["image", "audio", "text"]
ROWS, DIMENSION = 7, 6


def vectors(number: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, DIMENSION, generator=generator, dtype=torch.float64) for _ in range(number)]


def batch_of(valid: list[bool]) -> Batch:
    rows = len(valid)
    return Batch({}, torch.ones(rows, len(NAMES), dtype=torch.bool), torch.tensor(valid), torch.arange(rows))


def info_nce(left: Tensor, right: Tensor, scale: float) -> Tensor:
    logits = scale * F.normalize(left, dim=1) @ F.normalize(right, dim=1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_confu_is_the_weighted_mean_of_its_terms(weight: float) -> None:
    representations, fused = vectors(3), vectors(3, seed=1)
    pairs = sum(info_nce(representations[i], representations[j], 5.0) for i, j in combinations(range(3), 2))
    fusions = sum(info_nce(fused[k], representations[k], 5.0) for k in range(3))
    expected = (weight * fusions + (1 - weight) * pairs) / 6
    torch.testing.assert_close(ConFuLoss(fused_weight=weight)(representations, fused, 5.0), expected)


def test_confu_fuses_the_others_in_the_order_of_the_config() -> None:
    torch.manual_seed(0)
    objective = ConFuObjective(NAMES, DIMENSION).double()
    image, audio, text = (F.normalize(v, dim=1) for v in vectors(3))
    fused = F.normalize(objective.fusions["audio"](torch.cat([image, text], dim=1)), dim=1)
    scores = towards(objective.similarity, "audio", ["image", "text"])(audio, [3 * image, text])
    torch.testing.assert_close(scores, fused @ audio.T)
    torch.testing.assert_close(towards(objective.similarity, "audio", ["text"])(audio, [2 * text]), text @ audio.T)


def test_confu_refuses_what_it_cannot_fuse() -> None:
    with pytest.raises(ValueError, match="two modalities or more"):
        ConFuObjective(["image", "text"], DIMENSION)
    with pytest.raises(ValueError, match="as many fusions"):
        ConFuLoss()(vectors(3), vectors(2), 1.0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        ConFuLoss(fused_weight=1.5)
    with pytest.raises(ValueError, match="hidden = 0"):
        ConFuObjective(NAMES, DIMENSION, hidden=0)


def test_an_invalid_row_reaches_no_gradient_and_no_figure() -> None:
    torch.manual_seed(0)
    objective, valid = ConFuObjective(NAMES, DIMENSION), [True, False, True, True]
    rows = torch.tensor(valid)
    whole = [vector[:4].float() for vector in vectors(3)]
    want = objective(
        Outputs(dict(zip(NAMES, [w[rows] for w in whole], strict=True)), torch.ones(())), batch_of([True] * 3), 0
    )
    whole[0][1], whole[1][1] = torch.nan, torch.inf
    given = dict(zip(NAMES, [vector.requires_grad_() for vector in whole], strict=True))
    report = objective(Outputs(given, torch.ones(())), batch_of(valid), 0)
    report.loss.backward()
    torch.testing.assert_close(report.loss, want.loss)
    for tensor in (*given.values(), *objective.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    assert all(value.isfinite() for value in report.metrics.values()), report.metrics


def slow_score(gate: Gate, target: int, candidate: Tensor, others: dict[int, Tensor]) -> Tensor:
    """One score, as the formula has it: the candidate times every other modality, moved to neutral by its gate."""
    neutral, result = F.normalize(gate.neutral, dim=1), candidate
    for k in range(len(gate.keys)):
        if k == target:
            continue
        taken: Tensor | float = 0.0
        vector = torch.zeros_like(candidate)
        if k in others:
            vector = others[k]
            attention = (
                gate.queries[target](candidate) @ gate.keys[k](vector) / gate.queries[target].out_features ** 0.5
            )
            taken = torch.sigmoid(attention - gate.null[target, k])
        result = result * (taken * vector + (1 - taken) * neutral[k])
    return result.sum()


def random_gate(number: int) -> Gate:
    torch.manual_seed(1)
    gate = Gate(number, DIMENSION, 4, -1.0).double()
    torch.nn.init.normal_(gate.neutral)
    torch.nn.init.normal_(gate.null)
    return gate


@pytest.mark.parametrize("present", [[1, 2, 3], [1], [2, 3]])
def test_the_gated_score_is_that_of_the_formula(present: list[int]) -> None:
    gate = random_gate(4)
    units = [F.normalize(v, dim=1) for v in vectors(4)]
    others = {k: units[k][:5] for k in present}
    scores = gate(0, units[0], others)
    for i in range(ROWS):
        for j in range(5):
            expected = slow_score(gate, 0, units[0][i], {k: v[j] for k, v in others.items()})
            torch.testing.assert_close(scores[i, j], expected)
    rows = gate.of_rows(0, units[0][:5], others)
    torch.testing.assert_close(rows, scores.diagonal()[:5])


def test_the_gated_loss_contrasts_each_anchor_with_permuted_others() -> None:
    torch.manual_seed(2)
    valid = [True, True, False, True, True, True, True]
    objective = GatedSymileObjective(3, NAMES, DIMENSION, hidden=4).double()
    torch.nn.init.normal_(objective.gate.neutral)
    representations = vectors(3)
    representations[1][2] = torch.nan  # of the row that is not valid
    report = objective(
        Outputs(dict(zip(NAMES, representations, strict=True)), torch.tensor(1.5, dtype=torch.float64)),
        batch_of(valid),
        9,
    )
    units = [F.normalize(v, dim=1) for v in representations]
    permutations = draw_permutations(3, ROWS, 3, 9, torch.tensor(valid))
    losses = []
    for anchor in range(3):
        others = [k for k in range(3) if k != anchor]
        for i in (row for row in range(ROWS) if valid[row]):
            logits = []
            for j in (row for row in range(ROWS) if valid[row]):
                rows = {k: i if j == i else int(permutations[anchor, k][j]) for k in others}
                vector = slow_score(objective.gate, anchor, units[anchor][i], {k: units[k][rows[k]] for k in others})
                logits.append(1.5 * DIMENSION * vector)
            target = [row for row in range(ROWS) if valid[row]].index(i)
            losses.append(F.cross_entropy(torch.stack(logits), torch.tensor(target)))
    torch.testing.assert_close(report.loss, torch.stack(losses).mean())


def test_gated_symile_says_how_many_modalities_it_takes() -> None:
    with pytest.raises(ValueError, match="3 to 6 modalities"):
        GatedSymileObjective(0, ["a", "b"], DIMENSION)
    with pytest.raises(ValueError, match="hidden = 0"):
        GatedSymileObjective(0, NAMES, DIMENSION, hidden=0)


def test_a_gate_that_takes_nothing_ignores_a_bad_modality() -> None:
    gate = random_gate(3)
    with torch.no_grad():
        gate.null[0, 2] = 40.0
        units = [F.normalize(v, dim=1) for v in vectors(3)]
        scores = gate(0, units[0], {1: units[1], 2: units[2]})
        other = gate(0, units[0], {1: units[1], 2: F.normalize(torch.randn_like(units[2]), dim=1)})
    torch.testing.assert_close(scores, other)
