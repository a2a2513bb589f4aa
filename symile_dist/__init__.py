"""Distributed pretraining with objectives that see three or more modalities at once.

The public names are imported when first used, so that `import symile_dist` needs neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "SymileLoss": "symile_dist.objectives.symile",
    "PairwiseClipLoss": "symile_dist.objectives.clip",
    "PairwiseSigmoidLoss": "symile_dist.objectives.sigmoid",
    "GramLoss": "symile_dist.objectives.geometry",
    "TriangleLoss": "symile_dist.objectives.geometry",
    "ConFuLoss": "symile_dist.objectives.confu",
    "WPSELoss": "symile_dist.objectives.wpse",
    "MIPSimilarity": "symile_dist.similarity",
    "Batch": "symile_dist.types",
    "Outputs": "symile_dist.types",
    "Padded": "symile_dist.types",
    "PointSet": "symile_dist.types",
    "StepReport": "symile_dist.types",
    "load_config": "symile_dist.config",
    "load_embeddings": "symile_dist.evaluation.embeddings",
    "load_encoders": "symile_dist.exported",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'symile_dist' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
