"""Symile-M3 as published: a CSV file that names images and clips, or tensors of features."""

from __future__ import annotations

from pathlib import Path

from symile_dist.tools.pack.arrays import (
    ArrayMember,
    ArraySource,
    find_array,
    open_array,
    require_array,
    require_shape,
)
from symile_dist.tools.pack.files import FileColumn, TableSource
from symile_dist.tools.pack.table import Table

FEATURE_DTYPES = ("float16", "float32")


def csv_source(csv: str | Path, images: str | Path, audio: str | Path, on_missing: str = "error") -> TableSource:
    """The CSV layout: each sample gets the image's and the clip's bytes as they are, `txt` and `json`.

    Args:
        images, audio: folders that `image_path` and `audio_path` are relative to.

    Raises ValueError for a file, folder or column that is not there.
    """
    table = Table(Path(csv))
    columns = table.columns()
    table.require("lang", "audio_path", "image_path", "text")
    if "cls" not in columns and "cls_id" not in columns:
        raise ValueError(f"{csv}: neither a column cls_id nor cls tells the class; it has {', '.join(columns)}")
    classes = tuple(name for name in ("cls_id", "cls") if name in columns)
    kept = [name for name in (*classes, "target_text", "audio_path", "image_path") if name in columns]
    return TableSource(
        layout="symile-m3 csv",
        table=table,
        files=(FileColumn("image_path", Path(images), ""), FileColumn("audio_path", Path(audio), "")),
        texts=(("txt", "text"),),
        metadata=(("class", classes), ("language", ("lang",)), *((name, (name,)) for name in kept)),
        on_missing=on_missing,
    )


def tensors_source(tensors: str | Path, split: str, dtype: str = "float16") -> ArraySource:
    """The layout of precomputed features: `<name>_<split>.pt` or .npy in the folder or in its folder <split>.

    Args:
        dtype: of image and audio features; token ids are written as int32, the mask as uint8.

    Raises ValueError for files that are missing, of a wrong shape or unequally long.
    """
    folder = Path(tensors)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if dtype not in FEATURE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(FEATURE_DTYPES)}, not '{dtype}'")
    folders = (folder / split, folder)
    arrays, text = (".pt", ".npy"), (".txt",)
    image, audio, ids, mask = (
        require_array(folders, stem, split, arrays)
        for stem in ("image", "audio", "text_input_ids", "text_attention_mask")
    )
    for path, meaning in ((image, "image features"), (audio, "audio features"), (ids, "token ids")):
        require_shape(path, (None, None), f"the shape of {meaning}")
    require_shape(mask, (None, int(open_array(ids).shape[1])), "the shape of a mask of these token ids")
    facts = [
        ("class", require_array(folders, "cls_id", split, arrays)),
        ("language", require_array(folders, "lang", split, text)),
        ("cls", find_array(folders, "cls", split, text)),
        ("idx", find_array(folders, "idx", split, arrays)),
    ]
    return ArraySource(
        layout="symile-m3 tensors",
        members=(
            ArrayMember("image.npy", (image,), dtype),
            ArrayMember("audio.npy", (audio,), dtype),
            ArrayMember("input_ids.npy", (ids,), "int32"),
            ArrayMember("attention_mask.npy", (mask,), "uint8"),
        ),
        facts=tuple((name, path) for name, path in facts if path is not None),
    )
