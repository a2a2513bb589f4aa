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
RETRIEVAL_SPLITS = ("val_retrieval", "test")
"""Splits of which each row is a candidate of a query."""


def mimic_source(data_npy: str | Path, split: str, dtype: str = "float32") -> ArraySource:
    """`<data_npy>/<split>/<name>_<split>.npy` -> members `cxr.npy`, `ecg.npy`, `labs.npy` and `json`.

    `labs.npy` is (100,): 50 percentiles, then 50 flags of which **1 means observed**, as published. The class of a
    sample is its admission (hadm_id).

    Each row of `val_retrieval` and `test` is a candidate: `label_hadm_id` says of which query, `label` whether it is
    the query's own (1) or not (0). Both are required there.

    Raises ValueError for files that are missing, of a wrong shape or unequally long, for flags and labels other than 0
    and 1, and for ids that are NaN.
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
    named = {stem: find_array(folders, stem, split, suffix) for stem in ("label_hadm_id", "label")}
    lacking = [stem for stem, path in named.items() if path is None]
    if lacking and split in RETRIEVAL_SPLITS:
        raise ValueError(
            f"{folder / split}: no {lacking[0]}_{split}.npy; each row of {split} is a candidate, and label_hadm_id and "
            "label name its query and whether it is the query's own: without them the split cannot be evaluated"
        )
    source = ArraySource(
        layout="symile-mimic",
        members=(
            ArrayMember("cxr.npy", (cxr,), dtype),
            ArrayMember("ecg.npy", (ecg,), dtype),
            ArrayMember("labs.npy", (percentiles, observed), "float32"),
        ),
        facts=(
            ("class", admission),
            ("hadm_id", admission),
            *((stem, path) for stem, path in named.items() if path is not None),
        ),
    )
    if (label := named["label"]) is not None:
        values = open_array(label)
        odd = np.flatnonzero(~np.isin(values, (0, 1)))
        if len(odd):
            raise ValueError(
                f"{label}: row {odd[0]} of {split}: label is {values[odd[0]]}; should be 1 for the query's own "
                "admission and 0 for another"
            )
    return source
