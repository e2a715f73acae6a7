"""`fit --folds`: a run for each fold, resumed after any end, and one comparison."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proactive import fit
from tests.helpers import SMALL_RUN, command, environment_of_commands
from tests.proactive.conftest import FinishedRun
from tests.proactive.fitting.test_resume import NO_CALLBACKS, assert_as_uninterrupted, progress, small_fit

LOCKING = """
import pathlib, sys
from datamodules.files.run_folders import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


def signal_parent_at(step: int, number: int) -> str:
    callback = {"class_path": "tests.helpers.SignalParentAtStep", "init_args": {"step": step, "number": number}}
    return f"--trainer.callbacks={json.dumps([callback])}"


def test_folds_resume_after_ctrl_c_and_after_a_kill_and_are_compared(
    finished_run: FinishedRun, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C in the first fold, then a kill in the second one; each time it resumes."""
    folder = tmp_path / "runs" / "reward" / "0"
    first, second = folder / "fold-0" / "0", folder / "fold-2" / "0"
    ended = command(
        "proactive.fit", *small_fit(finished_run), "--folds=0,2", signal_parent_at(8, signal.SIGINT), cwd=tmp_path
    )
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGINT, "")
    assert progress(first / "checkpoints" / "last.ckpt") == (1, 8)
    assert not second.exists()
    *_, told = ended.stdout.splitlines()
    said, resume = told.split("; resume with: ")
    assert said == "stopped in fold 0"
    assert shlex.split(resume) == ["python", "-m", "proactive.fit", "--ckpt_path", "runs/reward/0"]

    # 4 steps are left in the first fold, so the 5th step of a process is in the second one.
    ended = command("proactive.fit", "--ckpt_path=runs/reward/0", signal_parent_at(5, signal.SIGKILL), cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL
    assert "fold 0 (1 of 2): resumes" in ended.stdout
    assert_as_uninterrupted(first, finished_run)  # a fold is a run like any other
    assert "the process of all folds" in ended.stderr  # the process of the fold has followed it
    assert progress(second / "checkpoints" / "last.ckpt") == (0, 3)
    assert not (folder / "compare.json").exists()

    monkeypatch.setenv("PYTHONPATH", environment_of_commands()["PYTHONPATH"])  # for the processes of the folds
    done = call(fit.main, "--ckpt_path=last", NO_CALLBACKS)
    assert (done.code, done.err) == (0, "")
    assert "fold 0 (1 of 2): finished before" in done.out
    assert "fold 2 (2 of 2): resumes" in done.out
    assert done.out.splitlines()[-1] == "runs/reward/0"
    assert [path.name for path in folder.parent.iterdir()] == ["0"]

    setting = json.loads((folder / "compare.json").read_text())["kinds"]["reward"]["settings"]["A"]
    assert (setting["folds"], setting["seeds"]) == ([0, 2], [0])
    tested = [json.loads((run / "metrics.json").read_text())["test"]["raw"]["rows"] for run in (first, second)]
    assert setting["rows"] == sum(tested)
    page = (first / "report.html").read_text(encoding="utf-8")
    assert 'href="../../report.html"' in page
    assert "python -m proactive.compare runs/reward/*" in page
    assert (folder / "report.html").exists()


def test_a_mistake_in_the_first_fold_leaves_nothing_and_names_the_fold(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    options = ["--folds=1", "--model.backbone=agents/{fold}", f"--data.root={finished_run.root}", *SMALL_RUN[1:]]
    ended = command("proactive.fit", *options, "--quiet", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "agents/1" in ended.stderr.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds=7"], "--folds: there is no fold 7 of 3"),
        (["--folds=0,-1"], "--folds: expected all, or numbers such as 0,2,4, got 0,-1"),
        (["--folds=all", "--data.split=published"], "--folds: split published has no folds"),
        (
            ["--folds=all", "--trainer.num_nodes=2"],
            "--folds: torchrun, SLURM and several nodes start one run",
        ),
        (["--folds=all", "--ckpt_path=RUN/checkpoints/last.ckpt"], "RUN is a single run, and --folds trains several"),
        (["--folds=all", "--model.backbone=RUN/export"], "--folds: model.backbone RUN/export is of a single run"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_for_several_folds_is_refused(
    options: list[str], message: str, finished_run: FinishedRun, call: Callable[..., Any], tmp_path: Path
) -> None:
    run = str(finished_run.folder)
    ended = call(fit.main, *small_fit(finished_run), *(option.replace("RUN", run) for option in options))
    assert ended.code == 2
    what, hint = ended.err.splitlines()
    assert message.replace("RUN", run) in what
    assert hint.startswith("  help: ")
    assert list(tmp_path.iterdir()) == []


def test_a_job_of_several_processes_is_refused(
    finished_run: FinishedRun, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    ended = call(fit.main, *small_fit(finished_run), "--folds=all")
    assert (ended.code, "SLURM" in ended.err) == (2, True)


def begun_folds(finished_run: FinishedRun, place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a cross-validation that has not trained anything, and its options."""
    folder = place / "runs" / "reward" / "0"
    folder.mkdir(parents=True)
    options = yaml.safe_load((finished_run.folder / "config.yaml").read_text()) | {"folds": "all"}
    (folder / "folds.yaml").write_text(yaml.safe_dump(options))
    return folder, options


def test_a_resume_with_other_options_is_refused_and_changes_nothing(
    finished_run: FinishedRun, call: Callable[..., Any], tmp_path: Path
) -> None:
    folder, options = begun_folds(finished_run, tmp_path)
    ended = call(fit.main, "--ckpt_path=last", "--data.batch_size=16")
    assert ended.code == 2
    assert ended.err.startswith("error: data.batch_size: 16")
    assert yaml.safe_load((folder / "folds.yaml").read_text()) == options


def test_two_processes_do_not_train_the_same_folds(
    finished_run: FinishedRun, call: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = begun_folds(finished_run, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", LOCKING, folder],
        env=environment_of_commands(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        ended = call(fit.main, "--ckpt_path", folder)
        other.communicate()
    assert ended.code == 2
    assert "is in use: another process is training there" in ended.err


def test_the_folder_of_all_folds_is_not_taken_for_a_run(
    finished_run: FinishedRun, call: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "reward" / "0"
    folder.mkdir(parents=True)
    (folder / "folds.yaml").write_text("folds: all\n")
    config = f"--config={finished_run.folder / 'config.yaml'}"
    ended = call(fit.main, *small_fit(finished_run), config, "--ckpt_path=last")
    assert ended.code == 2
    assert "holds the runs of several folds" in ended.err
    assert [path.name for path in folder.iterdir()] == ["folds.yaml"]
