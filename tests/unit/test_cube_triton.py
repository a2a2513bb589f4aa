"""The fused kernels equal the cube written out in float64 (in Triton's interpreter, on a CPU), and compile for Hopper.

Triton decides at import whether it interprets: hence one other process for each of the two, which prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from symile_dist.objectives import cube_triton

ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(not cube_triton.available(), reason="Triton is not installed")


class Case(NamedTuple):
    dtype: str = "float32"
    bounded: bool = True
    n: int = 5
    size: int = 13
    depth: int = 24
    offset: int = 6
    scale: float = 1.0
    """Multiplier of the logits, whose standard deviation is 1 without it."""
    shift: float = 0.0
    """Added to all elements: the logits of all, by far, of one sign."""
    valid: str = "all"
    silent: bool = False
    """Some anchors have a gradient of 0, some a log-sum-exp of -inf."""
    workspace: int = 2**26
    group: int = 2**25


ODD = {"n": 20, "size": 33, "depth": 70, "offset": 13}
TILES = {"n": 20, "size": 21, "depth": 33, "offset": 1}
CASES = {
    "bounded": Case(),
    "online": Case(bounded=False),
    "bounded, odd": Case(**ODD),
    "online, odd": Case(bounded=False, scale=30.0, valid="some", **ODD),
    "whole batch": Case(n=16, size=16, depth=16, offset=0),
    "one row": Case(n=1, size=1, depth=3, offset=0),
    "one row, online": Case(n=1, size=1, depth=3, offset=0, bounded=False),
    "two rows": Case(n=1, size=2, depth=3, offset=1),
    "exp overflows": Case(bounded=False, scale=300.0),
    "all far below 0": Case(bounded=False, scale=-60.0, shift=1.0, valid="some"),
    "near the bound": Case(scale=14.0),
    "near the bound, below": Case(scale=-11.0, shift=1.0, valid="some"),
    "some invalid": Case(valid="some", **TILES),
    "some invalid, online": Case(valid="some", bounded=False, scale=300.0),
    "first valid only": Case(valid="first only", offset=0),
    "first valid only, online": Case(valid="first only", offset=0, bounded=False),
    "none valid": Case(valid="none"),
    "none valid, online": Case(valid="none", bounded=False),
    "silent anchors": Case(silent=True),
    "silent anchors, online": Case(silent=True, bounded=False, scale=300.0),
    "many launches": Case(workspace=8 * 100, group=18 * 33 * 4, **TILES),
    "many launches, online": Case(workspace=8 * 100, group=45 * 33 * 4, bounded=False, scale=100.0, **TILES),
    "bf16": Case("bfloat16", **TILES),
    "bf16, online": Case("bfloat16", bounded=False),
    "bf16, some invalid": Case("bfloat16", valid="some"),
    "bf16, far below 0, invalid": Case("bfloat16", scale=-5.0, shift=1.0, valid="some"),
    "fp16": Case("float16", **TILES),
    "fp16, online": Case("float16", bounded=False, scale=30.0),
    "fp16, far below 0, invalid": Case("float16", scale=-11.0, shift=1.0, valid="some"),
    "fp16, far below 0, invalid, online": Case("float16", bounded=False, scale=-60.0, shift=1.0, valid="some"),
}


def tolerance(case: Case) -> float:
    """What is added up, logits as gradients, is rounded to 24, 8 or 11 bits; an error of a logit is one of its exp.

    The interpreter cuts bits off where a GPU rounds to bf16: twice its error.
    """
    rounding = {"float32": 4e-7, "bfloat16": 4e-3, "float16": 5e-4}[case.dtype]
    return rounding * max(8.0, 4 * abs(case.scale))


def inputs(case: Case) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """own, others, scale, valid; invalid rows are zero."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(3, case.size, case.depth, generator=generator, dtype=torch.float64)
    tensors = ((drawn * (0.3 if case.shift else 1.0) + case.shift) / case.depth ** (1 / 6)).to(
        getattr(torch, case.dtype)
    )
    valid = torch.ones(case.size)
    if case.valid == "some":
        valid[case.offset :: 3] = 0
        valid[1::4] = 0
    elif case.valid != "all":
        valid[:] = 0
        valid[0] = float(case.valid == "first only")
    tensors = tensors * valid[:, None].to(tensors.dtype)
    own = tensors[0, case.offset : case.offset + case.n].contiguous()
    return own, [tensors[1], tensors[2]], torch.tensor(case.scale), valid


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """The cube in float64 (n, N, N), and where it is a negative."""
    own, (second, third), scale, valid = inputs(case)
    cube = scale.double() * torch.einsum("id,jd,kd->ijk", own.double(), second.double(), third.double())
    mask = valid[case.offset : case.offset + case.n, None, None] * valid[None, :, None] * valid[None, None, :] > 0
    anchors = torch.arange(case.n)
    mask[anchors, anchors + case.offset, anchors + case.offset] = False
    return cube, mask


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def run_case(case: Case) -> dict[str, Any]:
    """Errors by what they are of; of log-sum-exps absolute, thus relative of the sums; of gradients by the norm."""
    cube_triton.WORKSPACE_BYTES, cube_triton.GROUP_BYTES = case.workspace, case.group
    own, others, scale, valid = inputs(case)
    bounded = torch.tensor(case.bounded)
    given = None if case.valid == "all" else valid
    own_lse, others_lse = cube_triton.log_sum_exp(own, others, scale, given, case.offset, bounded)
    found: dict[str, Any] = {"types": [str(own_lse.dtype), str(others_lse.dtype)]}
    cube, mask = reference(case)
    masked = cube.masked_fill(~mask, -torch.inf)
    want_lse = [masked.logsumexp(dim) for dim in ((1, 2), (0, 2), (0, 1))]
    got_lse = [own_lse, others_lse[0], others_lse[1]]
    for name, got, want in zip("abc", got_lse, want_lse, strict=True):
        assert got.shape == want.shape
        finite = want > -torch.inf
        found[f"empty sums of {name}"] = bool((got[~finite] == -torch.inf).all())
        found[f"lse {name}"] = (got - want)[finite].abs().max().item() if finite.any() else 0.0

    # In the gradients the anchors of a have no log-sum-exps of their own here but what a training step would give.
    generator = torch.Generator().manual_seed(8)
    weights = []
    for lse in got_lse:
        grad = torch.rand(len(lse), generator=generator, dtype=torch.float64) / 3e6
        grad[lse == -torch.inf] = 0
        if case.silent:
            grad[::3] = 0
            lse = lse.clone()
            lse[1::3] = -torch.inf
        weights.append((grad, lse))
    got = cube_triton.gradients(own, others, scale, case.offset, bounded, weights)
    shapes = [(case.n, 1, 1), (1, case.size, 1), (1, 1, case.size)]
    exact = torch.zeros_like(cube)
    for (grad, lse), shape in zip(weights, shapes, strict=True):
        part = torch.where(lse > -torch.inf, grad, 0.0).reshape(shape)
        # The sums are ours, for those of rounded products differ: it is the gradients that are looked at.
        exact += part * torch.exp(masked - torch.where(lse > -torch.inf, lse, torch.inf).reshape(shape))
    exact = torch.where(mask, exact, 0.0)
    a, b, c = own.double(), others[0].double(), others[1].double()
    equations = ["ijk,jd,kd->id", "ijk,id,kd->jd", "ijk,id,jd->kd"]
    pairs = [(b, c), (a, c), (a, b)]
    keep = [valid[case.offset : case.offset + case.n] > 0, valid > 0, valid > 0]
    for name, gradient, equation, pair, rows in zip("abc", got, equations, pairs, keep, strict=True):
        want = torch.einsum(equation, exact, *pair)
        assert gradient.shape == want.shape
        found["types"].append(str(gradient.dtype))
        found[f"finite {name}"] = bool(gradient.isfinite().all())
        found[f"grad {name}"] = relative(gradient[rows].double(), want[rows])
    if case.size < 20:
        again = cube_triton.log_sum_exp(own, others, scale, given, case.offset, bounded)
        found["same bits"] = bool((again[0] == own_lse).all() and (again[1] == others_lse).all())
    return found


def small_blocks() -> None:
    """The interpreter takes its time per tile, not per element: but tiles must be many to test what joins them.

    Two processors: with those of a GPU, no program would have more than one slab.
    """
    small = cube_triton.Blocks(rows=16, columns=32, depth=32, slabs=8, warps=1, stages=1)
    cube_triton.HALF_BLOCKS = cube_triton.FLOAT_BLOCKS = small
    cube_triton._processors = lambda device: 2


def compile_kernels() -> dict[str, Any]:
    """Compiles for an H100 (compute capability 9.0), which needs none; per kernel its shared memory and its PTX's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile = {"D": 100, "INTERPRET": False}
    kernels = {
        cube_triton._forward_kernel: [{**tile, "FLOOR": cube_triton.FLOOR, "BOUNDED": bounded} for bounded in (0, 1)],
        cube_triton._cube_gradient_kernel: [{**tile, "LIMIT": cube_triton.GRADIENT_LIMIT}],
        cube_triton._reduce_kernel: [
            {"D": 100, "ROWS": cube_triton.REDUCE_ROWS, "COLUMNS": cube_triton.REDUCE_COLUMNS}
        ],
    }
    found = {}
    for kind, blocks in (("bf16", cube_triton.HALF_BLOCKS), ("fp32", cube_triton.FLOAT_BLOCKS)):
        pointers = dict.fromkeys(("own", "second", "third", "gradient"), f"*{kind}")
        floats = "valid scale row_parts slab_parts column_parts weights shifts product own_gradient second_parts"
        pointers |= dict.fromkeys(floats.split(), "*fp32") | {"bounded": "*i32"}
        sizes = {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "DEPTH": blocks.depth, "SLABS": blocks.slabs}
        for kernel, variants in kernels.items():
            for number, constants in enumerate(variants):
                given = {name: size for name, size in sizes.items() if name in kernel.arg_names} | constants
                signature = {
                    name: "constexpr" if name in given else pointers.get(name, "i32") for name in kernel.arg_names
                }
                # As at run time: torch's tensors begin at multiples of 16 bytes.
                aligned = {
                    (place,): [["tt.divisibility", 16]]
                    for place, name in enumerate(kernel.arg_names)
                    if name in pointers
                }
                compiled = triton.compile(
                    ASTSource(kernel, signature, given, aligned),
                    target=GPUTarget("cuda", 90, 32),
                    options={"num_warps": blocks.warps, "num_stages": blocks.stages},
                )
                found[f"{kernel.__name__} {number} {kind}"] = {
                    "shared": compiled.metadata.shared,
                    "wgmma": "wgmma" in compiled.asm["ptx"],
                    "tf32": "tf32" in compiled.asm["ptx"],
                }
    return found


def main() -> None:
    torch.set_num_threads(1)
    if cube_triton.INTERPRETED:
        small_blocks()
        found = {name: run_case(case) for name, case in CASES.items()}
    else:
        found = compile_kernels()
    print(json.dumps(found))


def in_another_process(folder: Path, interpret: bool) -> dict[str, dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "tests.unit.test_cube_triton"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return in_another_process(tmp_path_factory.mktemp("triton"), interpret=True)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_equals_the_cube_written_out(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    found, allowed = interpreted[name], tolerance(CASES[name])
    assert found["types"] == ["torch.float64"] * 2 + ["torch.float32"] * 3
    for what, value in found.items():
        if isinstance(value, bool):
            assert value, what
        elif isinstance(value, float):
            assert value <= allowed, f"{what}: {value:.2e} > {allowed:.2e}"


@needs_triton
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Triton's compiler refuses much that its interpreter takes."""
    found = in_another_process(tmp_path, interpret=False)
    assert len(found) == 8
    for name, kernel in found.items():
        assert kernel["shared"] <= 227 * 2**10, name
        assert not kernel["tf32"], name
        if name.endswith("bf16") and "reduce" not in name:
            assert kernel["wgmma"], f"{name}: not on Hopper's matrix units"


def test_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    own, others, flag = torch.ones(2, 4), [torch.ones(4, 4)] * 2, torch.tensor(True)

    def refused(own: Tensor, others: list[Tensor]) -> str:
        with pytest.raises(ValueError) as info:
            cube_triton.log_sum_exp(own, others, torch.tensor(1.0), None, 0, flag)
        with pytest.raises(ValueError):
            cube_triton.gradients(own, others, torch.tensor(1.0), 0, flag, [])
        return str(info.value)

    monkeypatch.setattr(cube_triton, "INTERPRETED", False)
    monkeypatch.setattr(cube_triton, "triton", "installed")
    assert "CUDA" in refused(own, others)
    monkeypatch.setattr(cube_triton, "INTERPRETED", True)
    assert "3 modalities, not 2" in refused(own, others[:1])
    assert "float64" in refused(own.double(), [other.double() for other in others])
    assert "should be the same" in refused(own, [others[0], others[1].half()])
    assert "n <= N" in refused(torch.ones(5, 4), others)
    assert "n <= N" in refused(own, [others[0], torch.ones(4, 5)])
    assert "n and D 1 or more" in refused(torch.ones(0, 4), others)
    monkeypatch.setattr(cube_triton, "triton", None)
    assert not cube_triton.available()
    assert "not installed" in refused(own, others)


def test_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from symile_dist.objectives import cube_triton; "
        "assert not cube_triton.available()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
