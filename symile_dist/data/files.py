"""Files that stay open, as many as the process may have."""

from __future__ import annotations

import errno
import os
import resource

from symile_dist.data.recent import Recent
from symile_dist.errors import RunFailed


class OpenFile:
    """A descriptor, closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, length: int, offset: int) -> bytes:
        data = os.pread(self.descriptor, length, offset)
        if len(data) == length or not data:
            return data
        # One call reads at most 2 GiB; what is short for another reason ends at the next one.
        return data + self.read(length - len(data), offset + len(data))


class OpenFiles:
    """By path, those that were read last; none of them travels to another process.

    A descriptor costs little, opening a file for every sample would cost as much as reading it: at most 512 stay open,
    and a quarter of what the system lets the process have.
    """

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._files: Recent[str, OpenFile] = Recent(512 if soft < 0 else max(8, min(512, soft // 4)))
        self._path = ""
        self._file: OpenFile | None = None
        self.opened = 0
        """How often one was opened."""

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return (OpenFiles, ())

    def open(self, path: str) -> OpenFile:
        """Raises OSError when it cannot be opened, RunFailed when that is for want of descriptors."""
        return self._files.get(path, lambda: self._make(path))

    def read(self, path: str, length: int, offset: int) -> bytes:
        """As `OpenFile.read`, with what `open` raises."""
        if self._file is None or path != self._path:
            self._path, self._file = path, self.open(path)
        return self._file.read(length, offset)

    def whole(self, path: str) -> bytes:
        """All of a small file, which does not stay open."""
        file = self._opened(path)
        return file.read(os.fstat(file.descriptor).st_size, 0)

    def clear(self) -> None:
        self._files.clear()
        self._path, self._file = "", None

    def _make(self, path: str) -> OpenFile:
        self.opened += 1
        return self._opened(path)

    def _opened(self, path: str) -> OpenFile:
        for last in (False, True):
            try:
                return OpenFile(path)
            except OSError as error:
                # Nothing is wrong with the shard: it must not come into quarantine.
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if last:
                    raise RunFailed(f"{path}: {error.strerror}: raise the limit of open files (ulimit -n)") from None
                self.clear()
        raise AssertionError
