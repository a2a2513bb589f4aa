"""Where a dataset's bytes come from: files of this machine, or a node's cache of an object store.

Both give the same: the bytes of an index, and a `read(length, offset)` per shard. Nothing here knows of samples' order.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from functools import partial

from symile_dist.config import StorageConfig
from symile_dist.data.cache import Piece, Segment, ShardCache
from symile_dist.data.files import OpenFiles
from symile_dist.data.manifest import MANIFEST, Manifest, parse_manifest, read_manifest
from symile_dist.data.spans import Read
from symile_dist.storage import Folder


class LocalShards:
    """Shards on a disk (or a mounted file system)."""

    def __init__(self, manifest: Manifest, folder: Folder, files: OpenFiles) -> None:
        assert folder.path is not None
        self.manifest, self.files = manifest, files
        self._paths = [str(folder.path / shard.name) for shard in manifest.shards]

    def index(self, shard: int) -> bytes:
        return self.files.whole(f"{self._paths[shard]}.idx")

    def read(self, shard: int) -> Read:
        """Raises OSError when the shard cannot be opened."""
        self.files.open(self._paths[shard])
        return partial(self.files.read, self._paths[shard])


class CachedShards:
    """Shards in an object store, through the node's fetcher (see data/fetcher.py)."""

    def __init__(self, manifest: Manifest, folder: Folder, cache: ShardCache, files: OpenFiles) -> None:
        self.manifest, self.folder, self.cache, self.files = manifest, folder, cache, files
        self._segments: dict[int, list[Segment]] = {}

    def url(self, shard: int) -> str:
        return self.folder / self.manifest.shards[shard].name

    def index_piece(self, shard: int) -> Piece:
        return Piece(f"{self.url(shard)}.idx", 0, self.manifest.shards[shard].index_bytes)

    def index(self, shard: int) -> bytes:
        url = f"{self.url(shard)}.idx"
        held = self.cache.segments(url)
        return self.files.whole(held[0].path) if held else self.cache.read(url)

    def forget(self, shard: int) -> None:
        """Its bytes proved wrong: they are fetched again when they are held next."""
        self.held()
        self.cache.forget(self.url(shard))

    def held(self) -> None:
        """What is held has changed. An open descriptor would keep the disk space of a file that is evicted."""
        self._segments.clear()
        self.files.clear()

    def read(self, shard: int) -> Read:
        return partial(self._read, shard)

    def _read(self, shard: int, length: int, offset: int) -> bytes:
        # Looked up at every read: what is held may have been fetched again since.
        if shard not in self._segments:
            self._segments[shard] = self.cache.segments(self.url(shard))
        segments = self._segments[shard]
        # Ranges are cut between samples: what is read of one lies in one segment.
        number = bisect_right(segments, offset, key=lambda segment: segment.start) - 1
        if number < 0:
            raise FileNotFoundError(errno.ENOENT, "not in the node's cache", self.url(shard))
        return self.files.read(segments[number].path, length, offset - segments[number].start)


def open_folder(url: str, storage: StorageConfig, cache: ShardCache, files: OpenFiles) -> LocalShards | CachedShards:
    """The shards of a folder as its manifest lists them. Raises ShardError without a manifest."""
    folder = Folder(url, storage)
    if folder.path is not None:
        return LocalShards(read_manifest(url, storage, check=False), folder, files)
    try:
        # Fresh: shards may have been indexed again since another run read them.
        manifest = parse_manifest(cache.read(folder / MANIFEST, fresh=True), folder)
    except FileNotFoundError:
        return CachedShards(
            read_manifest(url, storage), folder, cache, files
        )  # raises, with what is there in its place
    return CachedShards(manifest, folder, cache, files)


__all__ = ["CachedShards", "LocalShards", "open_folder"]
