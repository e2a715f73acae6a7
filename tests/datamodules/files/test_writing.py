"""Writing: whole or not there, nowhere else than meant, and nothing left behind by whom a kill stopped."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones, save

from datamodules.errors import UserError
from datamodules.files.writing import Unfinished, disk_full, remove_leftovers
from tests.helpers import ROOT, full_disk
from tests.patience import HANG

KILLED = """
import os, signal, sys
from pathlib import Path
from datamodules.files.writing import Unfinished
unfinished = Unfinished(Path(sys.argv[1]), folder=sys.argv[2] == "folder")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_removes_the_temporary_file_of_a_killed_one(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, target, kind], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=HANG
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1, "something is left behind"
    with Unfinished(target) as unfinished:
        assert list(tmp_path.iterdir()) == [unfinished.path]
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_file_of_a_running_process_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    with Unfinished(target) as one, Unfinished(target, folder=True) as other:
        remove_leftovers(tmp_path)
        assert one.path.is_file()
        assert other.path.is_dir()
        assert one.path != other.path


def test_temporary_files_for_other_names_are_kept(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".best.ckpt.a.unfinished", "last.ckpt.a.unfinished", ".last.ckpt.a")]
    for path in kept:
        path.touch()
    Unfinished(tmp_path / "last.ckpt").end()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_link_at_the_final_path_is_replaced_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody knew the name and was there first."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".last.ckpt.known.unfinished").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: iter(["known", "free"]))
    with Unfinished(tmp_path / "last.ckpt") as unfinished:
        unfinished.path.write_text("theirs")
        unfinished.path.replace(tmp_path / "last.ckpt")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "last.ckpt").read_text() == "theirs"


@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_a_link_named_like_a_leftover_is_not_followed(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    link = tmp_path / ".last.ckpt.a.unfinished"
    link.symlink_to(tmp_path / target)
    remove_leftovers(tmp_path)
    assert link.is_symlink()
    assert (tmp_path / "folder" / "mine").exists()


def test_a_pipe_named_like_a_leftover_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".last.ckpt.a.unfinished")
    remove_leftovers(tmp_path)


WRITES = {
    "text": lambda path: path.write_text("a" * 100_000),
    "torch": lambda path: save({"weight": ones(100_000)}, path),
    "safetensors": lambda path: save_file({"weight": ones(100_000)}, path),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_gives_an_error_that_names_the_file_and_keeps_the_old_one(what: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("before")
    with full_disk(20_000), pytest.raises(UserError) as raised, Unfinished(target) as unfinished:
        WRITES[what](unfinished.path)
    assert str(target) in raised.value.what
    assert "room" in raised.value.hint
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ours"), Unfinished(tmp_path / "out"):
        raise RuntimeError("ours")
    assert disk_full(FileNotFoundError(2, "No such file")) is None
    assert list(tmp_path.iterdir()) == []


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with Unfinished(tmp_path / "file") as file, Unfinished(tmp_path / "folder", folder=True) as folder:
            assert [path.stat().st_mode & 0o777 for path in (file.path, folder.path)] == [0o640, 0o750]
    finally:
        os.umask(before)
