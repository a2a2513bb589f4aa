"""ConFu and Gated Symile against what their papers write, computed one score at a time."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from symile_dist.objectives import (
    ConFuLoss,
    ConFuObjective,
    GatedSymileObjective,
    GramObjective,
    PairwiseClipObjective,
    SymileObjective,
    TriangleObjective,
)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_confu_compares_vectors_of_another_precision_than_its_fusions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    objective = ConFuObjective(NAMES, DIMENSION)
    image, audio, text = vectors(3)
    similarity = towards(objective.similarity, "audio", ["image", "text"])
    scores = similarity(audio.to(dtype), [image.to(dtype), text.to(dtype)])
    torch.testing.assert_close(
        scores.float(), similarity(audio.float(), [image.float(), text.float()]), rtol=0, atol=0.03
    )


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


def test_gates_may_begin_at_a_whole_number() -> None:
    """As `null_init: -2` in a config is one."""
    null = GatedSymileObjective(0, NAMES, DIMENSION, null_init=-2).gate.null
    assert null.dtype == torch.float32 and null.requires_grad and bool((null == -2).all())


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float32", "halves"])
def test_gated_losses_of_halves_are_those_of_the_same_numbers_in_float32(dtype: torch.dtype, weights: str) -> None:
    torch.manual_seed(0)
    names, rows = ["a", "b", "c", "d", "e"], 8
    objective = GatedSymileObjective(5, names, 64, hidden=8).to(dtype)
    objective = objective.float() if weights == "float32" else objective
    shared = torch.randn(rows, 64)
    halves = [(shared + 2 * torch.randn(rows, 64)).to(dtype) for _ in names]
    scale = torch.tensor(20.0)
    assert scale * objective.factor > torch.finfo(torch.float16).max
    batch = Batch(
        {}, torch.ones(rows, len(names), dtype=torch.bool), torch.ones(rows, dtype=torch.bool), torch.arange(rows)
    )
    found = []
    for kind, autocast in ((dtype, False), (dtype, True), (torch.float32, False)):
        if kind == torch.float32:
            objective = objective.float()
        given = [half.to(kind).requires_grad_() for half in halves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective(Outputs(dict(zip(names, given, strict=True)), scale), batch, 3).loss
        gradients = torch.cat(torch.autograd.grad(loss, given))
        assert loss.dtype == torch.float32 and gradients.dtype == kind
        found.append((loss.detach(), gradients.float()))
    loss, gradients = found.pop()
    assert loss > 0.1 and gradients.any()
    for of_halves, slope in found:
        torch.testing.assert_close(of_halves, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(slope, gradients, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_scores_of_halves_are_those_of_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    objective = GatedSymileObjective(0, NAMES, DIMENSION, hidden=4).to(dtype)
    image, audio, text = (vector.to(dtype) for vector in vectors(3))
    got = towards(objective.similarity, "audio", ["image", "text"])(audio, [image, text])
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = towards(objective.similarity, "audio", ["image", "text"])(audio, [image, text])
    objective = objective.float()
    want = towards(objective.similarity, "audio", ["image", "text"])(audio.float(), [image.float(), text.float()])
    for scores in (got, under_autocast):
        torch.testing.assert_close(scores, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("objective", "normalizes"),
    [
        (SymileObjective(seed=0), False),
        (SymileObjective(seed=0, normalize=True), True),
        (PairwiseClipObjective(normalize=True), True),
        (GramObjective(NAMES), True),
        (TriangleObjective(NAMES), True),
        (ConFuObjective(NAMES, DIMENSION), True),
        (GatedSymileObjective(0, NAMES, DIMENSION), True),
    ],
)
def test_similarities_that_no_length_changes_say_so(objective: torch.nn.Module, normalizes: bool) -> None:
    """Zero-shot classification then takes the means of normalised prompts."""
    image, audio, text = (vector.float() for vector in vectors(3))
    score = towards(objective.similarity, "audio", ["image", "text"])  # type: ignore[arg-type]
    plain, scaled = score(audio, [image, text]), score(5 * audio, [image, 3 * text])
    assert torch.allclose(plain, scaled, rtol=1e-4, atol=1e-5) is normalizes
    assert getattr(objective.similarity, "normalize", False) is normalizes
