"""Hugging Face's hub: one file of it, and what is told when it, or what should stand in its place, cannot be had;
whether trained weights are to be read at all; and the import of the library that builds its models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest.mock import patch

_weights_follow = ContextVar("weights_follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Inside, encoders are built without the trained weights that they would begin with: all weights are copied into
    them afterwards, so that the files need not be there."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def reads_weights() -> bool:
    """What an encoder that begins with trained weights asks in its constructor; False within `weights_follow`."""
    return not _weights_follow.get()


def import_transformers() -> Any:
    """transformers, for its models.

    While they are imported it is told that there is no scipy: the losses of its detection models, which nothing here
    computes, would import all of scipy's optimizers (0.6 s of every start).
    """
    import transformers

    with patch.object(transformers.utils, "is_scipy_available", lambda: False):
        import transformers.modeling_utils
    return transformers


def unavailable(name: str, what: str, error: Exception) -> ValueError:
    """The error to raise where `what` (a model's weights, a tokenizer) of that name cannot be loaded.

    It names the cause, and what a machine needs that cannot reach the hub.
    """
    words = f"{name}: {what}: {type(error).__name__}: {' '.join(str(error).split())}"
    if _is_local(name):
        return ValueError(words if Path(name).is_dir() else f"{name}: {what}: no such folder")
    return ValueError(
        f"{words.rstrip('.')}. Needed is huggingface.co/{name}. Where this machine cannot reach it: "
        f"`hf download {name} --local-dir FOLDER` on one that can, copy FOLDER to where every rank sees it, and name "
        f"FOLDER in place of {name}; or let HF_HOME name a cache that holds it"
    )


def weights_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a .safetensors file holds, by its header. Raises ValueError for a file that is none, or
    damaged: that it is as long as its header says is looked at as well."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # whatever a damaged file makes safetensors raise
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None


def fetch_file(name: str, file: str, revision: str) -> Path:
    """The local path of one file of a repository on the hub. Raises ValueError when it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except Exception as error:  # of the client's many kinds
        raise unavailable(name, f"its {file} cannot be had", error) from error


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).is_dir()
