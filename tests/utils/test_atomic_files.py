"""Whole files or none, also of several that belong together."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ratioctl.errors import DiskError, OutputError
from ratioctl.utils import atomic_files as files


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskError), (errno.EDQUOT, DiskError), (errno.EROFS, OutputError)]
)
def test_without_room_for_one_of_them_all_stay(
    fails_at: int, number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "deep/c")]
    (tmp_path / "deep").mkdir()
    files.write_files(dict.fromkeys(paths, b"old"))
    assert [path.read_bytes() for path in paths] == [b"old"] * 3
    real, count = files.write_synced, 0

    def failing(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == fails_at:
            path.write_bytes(data[:1])  # half of it
            raise OSError(number, os.strerror(number), str(path))
        real(path, data)

    monkeypatch.setattr(files, "write_synced", failing)
    with pytest.raises(kind, match=f"{paths[fails_at - 1].name}: cannot be written"):
        files.write_files(dict.fromkeys(paths, b"new"))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(paths)
    assert [path.read_bytes() for path in paths] == [b"old"] * 3
    files.write_files(dict.fromkeys(paths, b"new"))
    assert [path.read_bytes() for path in paths] == [b"new"] * 3


def test_a_stale_network_folder_is_a_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*arguments: object, **options: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "share/out/a")

    def write() -> None:
        with monkeypatch.context() as patch, files.writing(Path("share/out/a")):
            patch.setattr(os, "stat", stale)
            stale()

    with pytest.raises(DiskError, match="disappeared") as caught:
        write()
    assert caught.value.exit_code == 6


def test_a_folder_that_is_gone_is_a_fault_of_the_disk_and_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(DiskError, match="disappeared while it was being written") as caught:
        files.write_file(gone / "below" / "a", b"new")
    assert caught.value.thing == str(gone)
    with pytest.raises(OutputError, match="no such folder"), files.streaming(gone / "rows.csv"):
        pass  # as it was typed: nothing vanished
    gone.mkdir()

    def rows() -> None:
        with files.streaming(gone / "rows.csv") as stream:
            stream.write(b"path\n")
            shutil.rmtree(gone)

    with pytest.raises(DiskError, match="disappeared") as caught:
        rows()
    assert caught.value.thing == str(gone)
    assert not gone.exists()
