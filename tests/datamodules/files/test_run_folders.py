"""Run folders are numbered without gaps or quarrels, and files are there whole or not at all."""

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.escaping import from_cell, to_cell
from datamodules.files.run_folders import (
    EmptyFolderGuard,
    latest_run_folder,
    missing_folders,
    new_run_folder,
    number,
    remove_empty,
)
from datamodules.files.writing import write_atomically
from tests.datamodules.conftest import few_examples


def make(root: Path) -> list[str]:
    return [new_run_folder(root, "reward").name for _ in range(5)]


def test_runs_are_numbered_from_zero_by_name(tmp_path: Path) -> None:
    made = [new_run_folder(tmp_path / "runs", name) for name in ("a", "a", "b", "a")]
    assert [str(folder.relative_to(tmp_path)) for folder in made] == ["runs/a/0", "runs/a/1", "runs/b/0", "runs/a/2"]
    assert all(folder.is_dir() for folder in made)


def test_a_new_run_gets_the_next_number_despite_other_files(tmp_path: Path) -> None:
    for name in ("2", "10", "notes", "-3", "3.5", "²"):
        (tmp_path / "a" / name).mkdir(parents=True)
    (tmp_path / "a" / "7.txt").touch()
    assert new_run_folder(tmp_path, "a").name == "11"
    assert latest_run_folder(tmp_path, "a").name == "11"


def test_runs_that_start_at_the_same_time_get_different_folders(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        names = [name for made in pool.map(make, [tmp_path] * 4, chunksize=1) for name in made]
    assert sorted(map(int, names)) == list(range(20))


def test_a_run_folder_that_cannot_be_made_gives_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=str(tmp_path / "file")) as error:
        new_run_folder(tmp_path / "file", "a")
    assert "--run.root" in error.value.hint


def test_a_resume_without_a_run_gives_a_user_error(tmp_path: Path) -> None:
    for name in ("absent", "empty", "other"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "other" / "notes").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=str(tmp_path / name)):
            latest_run_folder(tmp_path, name)


@pytest.mark.parametrize(("name", "expected"), [("0", 0), ("12", 12), ("x", -1), ("1a", -1), ("-1", -1), ("", -1)])
def test_a_run_folder_is_named_by_its_number(name: str, expected: int) -> None:
    assert number(Path("runs") / name) == expected


def test_a_file_is_written_in_utf8_with_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, "première\n")
    write_atomically(path, "zweite …\n")
    assert path.read_bytes() == "zweite …\n".encode()
    ordinary = tmp_path / "new" / "other.txt"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file.txt", "other.txt"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "former")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_an_incomplete_file(tmp_path: Path) -> None:
    """An open file keeps its old content: the new one took its name, not its place."""
    path = tmp_path / "file.txt"
    write_atomically(path, "former")
    with path.open() as file:
        before = os.fstat(file.fileno()).st_ino
        write_atomically(path, "later")
        assert file.read() == "former"
    assert path.stat().st_ino != before


@pytest.mark.parametrize("by", ["call", "guard"])
def test_new_empty_folders_are_removed(by: str, tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    around = missing_folders(root / "reward")
    assert around == [root / "reward", root, tmp_path / "a"]
    folder = new_run_folder(root, "reward")
    (tmp_path / "a" / "other").mkdir()
    remove_empty([folder, *around]) if by == "call" else EmptyFolderGuard([folder, *around]).end()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "other"]
    assert missing_folders(tmp_path) == []


def test_a_folder_with_contents_is_kept(tmp_path: Path) -> None:
    folder = new_run_folder(tmp_path / "runs", "reward")
    (folder / "config.yaml").touch()
    for remove in (remove_empty, lambda folders: EmptyFolderGuard(folders).end()):
        remove([folder, folder.parent])
        assert (folder / "config.yaml").exists()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "'=1"])
def test_a_cell_is_never_a_formula(text: str) -> None:
    assert to_cell(text) == f"'{text}"


@few_examples
@given(st.text("=+-@\t'a", max_size=6) | st.text(max_size=6))
def test_to_cell_and_from_cell_are_inverse(text: str) -> None:
    cell = to_cell(text)
    assert from_cell(cell) == text
    assert cell in (text, f"'{text}")
    assert cell[:1] not in set("=+-@\t\r\n")
