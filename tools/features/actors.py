"""Ray actors that each encode one shard after the other; a dead one is replaced, and its shard tried again."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from symile_dist.config import StorageConfig
from symile_dist.data.manifest import ShardEntry
from symile_dist.errors import RunFailed, StorageError
from symile_dist.storage import Folder
from symile_dist.tools.features.recipe import Recipe

ATTEMPTS = 3
"""How often a shard is begun whose actors die; and how many actors in a row may die before they are ready."""


class _Actor:
    """What runs in an actor's process. A known failure is returned, not raised: Ray would wrap it in a traceback."""

    def __init__(self, recipe: Recipe, url: str, storage: StorageConfig, out: str, folder: str) -> None:
        self.recipe, self.source, self.out = recipe, Folder(url, storage), Path(out)
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(folder)

    def prepare(self) -> dict[str, Any]:
        """Loads the encoders. Returns {"weights": digests}, or what went wrong."""
        return _outcome(self._prepare)

    def _prepare(self) -> dict[str, Any]:
        import torch

        from symile_dist.tools.features.encoders import FrozenEncoders

        torch.set_num_threads(self.recipe.threads)
        self.encoders = FrozenEncoders(self.recipe)
        return {"weights": self.encoders.digests()}

    def encode(self, entry: ShardEntry) -> dict[str, Any]:
        """Writes one shard of features. Returns {}, or what went wrong."""
        return _outcome(lambda: self._encode(entry))

    def _encode(self, entry: ShardEntry) -> dict[str, Any]:
        from symile_dist.tools.features.shard import encode_shard

        encode_shard(self.recipe, self.encoders, self.source, entry, self.out)
        return {}


def _outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except (RunFailed, StorageError) as error:
        return {"failed": str(error)}
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return {"failed": f"{place}{error.strerror or error}; the same command goes on from the whole shards"}
    except ValueError as error:
        return {"mistake": str(error)}


def encode_shards(
    recipe: Recipe,
    source: Folder,
    out: Path,
    entries: Sequence[ShardEntry],
    actors: int,
    gpus: float,
    begin: Callable[[dict[str, str]], None],
) -> Iterator[ShardEntry]:
    """Encodes shards, one at a time per actor, and yields each as it is whole.

    `begin` is called with the digests of the weights before anything is written; all actors must have the same.
    Raises ValueError for a user's mistake that only an actor could see, RunFailed where encoding cannot go on.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    todo, tries, dead = deque(entries), Counter[str](), 0
    weights: dict[str, str] | None = None
    running: dict[Any, tuple[Any, ShardEntry | None]] = {}
    kind = ray.remote(num_cpus=recipe.config.ray.cpus_per_worker, num_gpus=gpus or None)(_Actor)

    def start() -> None:
        actor = kind.remote(recipe, source.url, source.storage, str(out), os.getcwd())
        running[actor.prepare.remote()] = (actor, None)

    def give_work(actor: Any) -> None:
        if todo:
            entry = todo.popleft()
            tries[entry.name] += 1
            running[actor.encode.remote(entry)] = (actor, entry)
        else:
            ray.kill(actor)

    try:
        for _ in range(min(actors, len(todo))):
            start()
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, entry = running.pop(ready)
            try:
                outcome = ray.get(ready)
            except RayActorError:
                if entry is None:
                    dead += 1
                    if dead >= ATTEMPTS:
                        raise RunFailed(
                            f"{dead} actors died while they loaded the encoders: out of memory? fewer --actors need "
                            "less"
                        ) from None
                elif tries[entry.name] >= ATTEMPTS:
                    raise RunFailed(
                        f"{entry.name}: {ATTEMPTS} actors died over it: out of memory? fewer --actors or a smaller "
                        "--batch-size need less; the same command goes on from the whole shards"
                    ) from None
                else:
                    todo.appendleft(entry)
                if todo:
                    start()
                continue
            except RayTaskError as error:
                place = "loading the encoders" if entry is None else entry.name
                raise RunFailed(f"{place}: {error.cause!r}\n{error}") from None
            if "mistake" in outcome:
                raise ValueError(outcome["mistake"])
            if "failed" in outcome:
                raise RunFailed(outcome["failed"])
            if entry is not None:
                give_work(actor)
                yield entry
                continue
            dead = 0
            if weights is None:
                begin(outcome["weights"])
                weights = outcome["weights"]
            if outcome["weights"] != weights:
                raise RunFailed("two actors loaded different weights: was a model's folder changed just now?")
            give_work(actor)
        if todo:
            raise RunFailed(f"{len(todo)} shards are left, and no actor")
    finally:
        for actor, _ in running.values():
            with contextlib.suppress(Exception):  # gone already
                ray.kill(actor)


__all__ = ["ATTEMPTS", "encode_shards"]
