"""Imports run downwards only, and what a laptop needs imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom up. Names are those after `symile_dist.`; a package
# stands for all of its modules, which may import each other. Names on one line do not.
LAYERS: list[set[str]] = [
    {"errors", "registry", "seeding", "configs", "environment", "failpoints", "signals", "spans", "devices"},
    {"config", "types", "similarity", "positions"},
    {"distributed", "storage", "hub"},
    {"masking"},
    {"metrics"},
    {"data", "encoders", "objectives", "evaluation", "checkpoint", "health"},
    {"model", "run_directory"},
    {"optim", "inner", "preflight"},
    {"engine"},
    {"gradcache"},
    {"validate", "flops"},
    {"step", "exported", "vitals"},
    {"train"},
    {"rank"},
    {"view"},
    {"monitor", "cluster"},
    {"worker"},
    {"board"},
    {"group"},
    {"driver"},
    {"launch", "tools"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# A heavy package -> the only modules that may import it, lazily or not.
ONLY_IN = {
    "deepspeed": ("engine",),
    "ray": ("worker", "cluster", "board", "group", "launch", "tools.features", "tools.doctor"),
    "webdataset": ("data", "tools"),
}


def modules() -> dict[str, Path]:
    """Name after `symile_dist.` -> file; launch and tools from where they stand."""
    found = {}
    for path in sorted((ROOT / "symile_dist").rglob("*.py")):
        parts = path.relative_to(ROOT / "symile_dist").with_suffix("").parts
        if parts[0] not in ("launch", "tools", "configs") and parts != ("__init__",):
            found[".".join(parts).removesuffix(".__init__")] = path
    for folder in ("launch", "tools", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import in a file, wherever it stands in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write symile_dist...."
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def own(name: str) -> str | None:
    """Name after `symile_dist.` of the module that an import leads to; None for others and for the package itself."""
    head, _, rest = name.partition(".")
    if head != "symile_dist" or not rest:
        return None
    while rest and rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest or None


def test_the_reader_of_imports_reads() -> None:
    assert {"config", "data.order", "objectives.symile", "tools.evaluate", "cli"} <= set(MODULES)
    found = {own(name) for _, name in imports(MODULES["objectives.symile"])}
    assert {"distributed", "objectives.negatives", "similarity"} <= found
    assert "registry" in {own(name) for _, name in imports(MODULES["encoders"])}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    top = module.partition(".")[0]
    assert top in LEVEL, f"symile_dist.{module} stands in no layer: give it a place in LAYERS"
    for line, name in imports(MODULES[module]):
        target = own(name)
        if target is None or target.partition(".")[0] == top:
            continue
        other = target.partition(".")[0]
        relation = "a sibling" if LEVEL[other] == LEVEL[top] else "above it"
        assert LEVEL[other] < LEVEL[top], (
            f"{MODULES[module].relative_to(ROOT)}:{line}: {top} imports {target}, which is {relation}"
        )


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_in_their_rooms(package: str) -> None:
    allowed = ONLY_IN[package]
    for module, path in MODULES.items():
        if not any(module == name or module.startswith(name + ".") for name in allowed):
            for line, name in imports(path):
                assert name.partition(".")[0] != package, (
                    f"{path.relative_to(ROOT)}:{line}: {package} may be imported in {', '.join(allowed)} only"
                )


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import symile_dist", "torch ray deepspeed numpy"),
        ("import symile_dist.config, symile_dist.registry, symile_dist.errors", "torch ray deepspeed numpy"),
        ("import symile_dist.cli; symile_dist.cli.build_parser()", "torch ray deepspeed numpy"),
        ("import symile_dist.launch, symile_dist.run_directory, symile_dist.tools.progress", "torch ray deepspeed"),
        ("import symile_dist.data.manifest, symile_dist.data.order", "torch ray deepspeed webdataset"),
        ("import symile_dist.objectives.reference", "ray deepspeed pydantic transformers triton"),
        ("import symile_dist.board", "torch deepspeed numpy pydantic"),
        ("import symile_dist.worker", "deepspeed mlflow transformers triton"),
        ("import symile_dist.hub as hub; hub.import_transformers().ViTModel", "scipy.optimize"),
        ("from symile_dist import load_encoders; import symile_dist.exported", "ray deepspeed webdataset transformers"),
        ("import symile_dist.tools.checkpoints", "torch ray deepspeed numpy"),
        ("import symile_dist.metrics.panels, symile_dist.tools.monitoring.command", "torch ray deepspeed numpy"),
        ("from symile_dist import SymileLoss, PairwiseClipLoss, MIPSimilarity", "ray deepspeed pydantic"),
    ],
)
def test_imports_without(statement: str, forbidden: str) -> None:
    code = f"import sys\n{statement}\nsys.exit(' '.join(sorted(set({forbidden!r}.split()) & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"`{statement}` imports {done.stderr}"


def test_public_names() -> None:
    import symile_dist

    for name in symile_dist.__all__:
        assert getattr(symile_dist, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SymileLos'"):
        _ = symile_dist.SymileLos
