"""Files of equal content lie once on disk; every folder stays whole whatever happens to the others or to the store."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfkd.core import shared_files
from selfkd.core.shared_files import share


def file_in(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    return folder / "model.safetensors"


def test_equal_files_become_one_and_others_do_not(tmp_path: Path) -> None:
    files = [file_in(tmp_path / name, content) for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two"))]
    assert [share([path], tmp_path / "store") for path in files] == ["", "", ""]
    assert files[0].samefile(files[1]) and not files[0].samefile(files[2])
    assert [path.read_bytes() for path in files] == [b"one", b"one", b"two"]
    assert [path.stat().st_nlink for path in files] == [3, 3, 2]
    assert [sorted(path.parent.iterdir()) for path in files] == [[path] for path in files]
    assert not files[0].stat().st_mode & 0o222


def test_sharing_the_same_file_again_changes_nothing(tmp_path: Path) -> None:
    path = file_in(tmp_path / "a")
    assert [share([path], tmp_path / "store") for _ in range(2)] == ["", ""]
    assert path.stat().st_nlink == 2


def test_a_store_that_is_deleted_takes_nothing_with_it(tmp_path: Path) -> None:
    first, second = file_in(tmp_path / "a"), file_in(tmp_path / "b")
    share([first], tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    share([second], tmp_path / "store")
    assert first.read_bytes() == second.read_bytes() == b"weights"


def test_a_damaged_file_of_the_store_is_not_taken_and_is_replaced(tmp_path: Path) -> None:
    first, second, third = (file_in(tmp_path / name) for name in "abc")
    share([first], tmp_path / "store")
    [kept] = (tmp_path / "store").iterdir()
    kept.chmod(0o644)
    kept.write_bytes(b"wEights")  # as long as before: only its bytes tell
    share([second], tmp_path / "store")
    share([third], tmp_path / "store")
    assert second.read_bytes() == third.read_bytes() == b"weights" and second.samefile(third)


def test_what_no_folder_has_any_more_leaves_the_store(tmp_path: Path) -> None:
    share([file_in(tmp_path / "a", b"one")], tmp_path / "store")
    shutil.rmtree(tmp_path / "a")
    path = file_in(tmp_path / "b", b"two")
    share([path], tmp_path / "store")
    assert [entry.samefile(path) for entry in (tmp_path / "store").iterdir()] == [True]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_nothing_can_be_linked_a_file_stays_and_the_reason_is_said(tmp_path: Path, monkeypatch, code: int) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shared_files.os, "link", link)
    path = file_in(tmp_path / "a")
    assert os.strerror(code) in share([path], tmp_path / "store")
    assert path.read_bytes() == b"weights" and list((tmp_path / "store").iterdir()) == []


def test_a_store_that_cannot_be_made_is_said_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    path = file_in(tmp_path / "a")
    assert "store" in share([path], tmp_path / "store")
    assert path.read_bytes() == b"weights"


def test_many_at_once_end_with_one_file(tmp_path: Path) -> None:
    files = [file_in(tmp_path / str(number), b"x" * 100_000) for number in range(24)]
    with ThreadPoolExecutor(12) as threads:
        said = list(threads.map(lambda path: share([path], tmp_path / "store"), files))
    assert said == [""] * 24
    assert {path.stat().st_ino for path in files} == {files[0].stat().st_ino}
    assert all(len(list(path.parent.iterdir())) == 1 for path in files)
