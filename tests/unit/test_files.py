"""Files that stay open, as many as the process may have."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from symile_dist.data import files as module
from symile_dist.data.files import OpenFile, OpenFiles
from symile_dist.errors import RunFailed


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(b"%04d" % number)
    return [str(tmp_path / str(number)) for number in range(20)]


def test_the_ones_read_last_stay_open(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.resource, "getrlimit", lambda which: (40, 40))
    files = OpenFiles()  # ten of them
    for _ in range(3):
        for number, path in enumerate(paths[:10]):
            assert files.read(path, 3, 1) == f"{number:04d}"[1:].encode()
    assert files.opened == 10
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for path in paths:
        files.read(path, 4, 0)
    assert files.opened == 20
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1, "the one that is read stays, beside the ten"
    assert files.whole(paths[3]) == b"0003" and files.opened == 20
    assert pickle.loads(pickle.dumps(files)).opened == 0, "descriptors do not travel"


def test_running_out_of_descriptors_closes_others_first(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files, alive = OpenFiles(), 0
    for path in paths[:5]:
        files.open(path)
    alive = len(files._files._values)

    class Scarce(OpenFile):
        def __init__(self, path: str) -> None:
            if files._files._values:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
            super().__init__(path)

    monkeypatch.setattr(module, "OpenFile", Scarce)
    assert alive == 5 and files.read(paths[7], 4, 0) == b"0007"
    assert len(files._files._values) == 1


def test_no_descriptor_at_all_is_no_damage(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(path: str) -> OpenFile:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(module, "OpenFile", none)
    with pytest.raises(RunFailed, match=r"Too many open files: raise the limit of open files \(ulimit -n\)"):
        OpenFiles().open(paths[0])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for read in (OpenFiles().open, OpenFiles().whole):
        with pytest.raises(FileNotFoundError):
            read(str(tmp_path / "nowhere"))
