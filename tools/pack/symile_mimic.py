"""Symile-MIMIC as published: chest X-rays, electrocardiograms and laboratory values of admissions, as .npy arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from symile_dist.tools.pack.arrays import (
    ArrayMember,
    ArraySource,
    find_array,
    open_array,
    require_array,
    require_shape,
)

SPLITS = ("train", "val", "val_retrieval", "test")


def mimic_source(data_npy: str | Path, split: str, dtype: str = "float32") -> ArraySource:
    """`<data_npy>/<split>/<name>_<split>.npy` -> members `cxr.npy`, `ecg.npy`, `labs.npy` and `json`.

    `labs.npy` is (100,): 50 percentiles, then 50 flags of which **1 means observed**, as published. The class of a
    sample is its admission (hadm_id).

    Raises ValueError for files that are missing, of a wrong shape or unequally long, and for flags other than 0 and 1.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not '{split}'")
    folder = Path(data_npy)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    folders, suffix = (folder / split,), (".npy",)
    cxr, ecg, percentiles, observed, admission = (
        require_array(folders, stem, split, suffix)
        for stem in ("cxr", "ecg", "labs_percentiles", "labs_missingness", "hadm_id")
    )
    require_shape(cxr, (None, 3, None, None), "the shape of X-rays")
    require_shape(ecg, (None, 1, None, None), "the shape of electrocardiograms")
    require_shape(percentiles, (None, None), "the shape of laboratory values")
    require_shape(observed, (None, int(open_array(percentiles).shape[1])), "the shape of their flags")
    flags = open_array(observed)
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(f"{observed}: flags other than 0 and 1; 1 means that the value was observed")
    optional = [(stem, find_array(folders, stem, split, suffix)) for stem in ("label_hadm_id", "label")]
    return ArraySource(
        layout="symile-mimic",
        members=(
            ArrayMember("cxr.npy", (cxr,), dtype),
            ArrayMember("ecg.npy", (ecg,), dtype),
            ArrayMember("labs.npy", (percentiles, observed), "float32"),
        ),
        facts=(
            ("class", admission),
            ("hadm_id", admission),
            *((name, path) for name, path in optional if path is not None),
        ),
    )
