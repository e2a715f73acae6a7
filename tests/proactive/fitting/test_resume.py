"""Killed, stopped, damaged: a run goes on bit for bit, or says what is wrong and what is still good."""

import csv
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer

from datamodules.batching.rows import RowsDataModule
from models.learning.training import BackboneModule
from models.reporting.run_page import read_curves
from proactive import evaluate, fit
from proactive.fitting.resume import TRAINER_MAY_CHANGE
from proactive.tasks import TASKS
from tests.helpers import SMALL_RUN, command
from tests.proactive.conftest import FinishedRun

# SMALL_RUN, with dropout, on the small root: 45 rows in steps of 8, so 6 steps an epoch, and there are two epochs;
# last.ckpt every 3 steps.
NO_CALLBACKS = "--trainer.callbacks=null"  # a resumed run takes up the configuration, its own end included


def kill_at(step: int) -> str:
    callback = {"class_path": "tests.helpers.KillAtStep", "init_args": {"step": step}}
    return f"--trainer.callbacks={json.dumps([callback])}"


def signal_at(step: int, number: int) -> str:
    callback = {"class_path": "tests.helpers.SignalAtStep", "init_args": {"step": step, "number": number}}
    return f"--trainer.callbacks={json.dumps([callback])}"


def small_fit(run: FinishedRun) -> list[str]:
    return [*SMALL_RUN, f"--data.root={run.root}"]


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_tensors(found: Any, expected: Any, where: str) -> None:
    """Compare nested states bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same_tensors(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_tensors(one, other, f"{where}[{place}]")
    else:
        assert found == expected, where


def assert_as_uninterrupted(folder: Path, run: FinishedRun) -> None:
    """Weights, optimizer and schedule are bit-identical, and so are the best weights and the figures."""
    found, expected = load(last(folder)), load(last(run.folder))
    assert expected["state_dict"]
    for part in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "calibration"):
        assert_same_tensors(found[part], expected[part], part)
    best = [load(at / "checkpoints" / "best.ckpt") for at in (folder, run.folder)]
    assert_same_tensors(best[0]["state_dict"], best[1]["state_dict"], "best")
    figures = [json.loads((at / "metrics.json").read_text(encoding="utf-8")) for at in (folder, run.folder)]
    assert figures[0]["test"] == figures[1]["test"]


def progress(path: Path) -> tuple[int, int]:
    """Epoch and optimizer step of a checkpoint."""
    checkpoint = load(path)
    return checkpoint["epoch"], checkpoint["global_step"]


def test_a_run_killed_three_times_resumes_bit_identically(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Each time in the middle of a step: of the first one, of the first epoch, of the second epoch."""
    folder = tmp_path / "runs" / "reward" / "0"
    ended = command("proactive.fit", *small_fit(finished_run), kill_at(1), cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL
    assert not last(folder).exists()

    ended = command("proactive.fit", "--ckpt_path=last", kill_at(5), cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL
    assert "stopped before its first checkpoint, so it starts" in ended.stdout
    assert progress(last(folder)) == (0, 3)  # step 4 and half of step 5 are lost

    ended = command("proactive.fit", "--ckpt_path", "last", kill_at(7), cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL
    assert progress(last(folder)) == (1, 9)  # it did steps 4 to 9 and half of step 10

    ended = command("proactive.fit", f"--ckpt_path={last(folder)}", NO_CALLBACKS, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == str(folder)  # the same folder, not a new one
    assert [path.name for path in folder.parent.iterdir()] == ["0"]
    assert_as_uninterrupted(folder, finished_run)


def test_a_run_killed_after_an_epoch_keeps_its_best_weights(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Those of the first epoch, in this run; the checkpoint of its end knows of them."""
    assert progress(finished_run.folder / "checkpoints" / "best.ckpt") == (0, 6)
    folder = tmp_path / "runs" / "reward" / "0"
    assert command("proactive.fit", *small_fit(finished_run), kill_at(7), cwd=tmp_path).returncode == -signal.SIGKILL
    assert progress(last(folder)) == (0, 6)
    ended = command("proactive.fit", "--ckpt_path=last", NO_CALLBACKS, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_as_uninterrupted(folder, finished_run)
    ended = command("proactive.fit", "--ckpt_path=last", "--trainer.max_epochs=3", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert progress(last(folder)) == (2, 18)
    curves = read_curves(folder / "logs")
    assert sorted(curves["validation/loss"]) == [5, 11, 17]  # of the killed run, and of the two that went on


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_in_each_epoch_resumes_with_workers(
    workers: int, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """Batches that workers had prepared ahead are not taken for seen; the order is the epoch's."""
    folder = tmp_path / "runs" / "reward" / "0"
    options = [*small_fit(finished_run), f"--data.num_workers={workers}"]
    first, second = {0: (11, None), 2: (4, 8)}[workers]
    assert command("proactive.fit", *options, kill_at(first), cwd=tmp_path).returncode == -signal.SIGKILL
    if second:
        ended = command("proactive.fit", "--ckpt_path=last", kill_at(second), cwd=tmp_path)
        assert ended.returncode == -signal.SIGKILL
    assert progress(last(folder)) == (1, 9)
    ended = command("proactive.fit", "--ckpt_path=last", NO_CALLBACKS, "--quiet", cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "runs/reward/0\n", "")
    assert_as_uninterrupted(folder, finished_run)


def test_a_signal_saves_and_prints_how_to_resume(finished_run: FinishedRun, tmp_path: Path) -> None:
    """SIGTERM in the middle of a step, then Ctrl-C's SIGINT in the second epoch, each time resumed as was said."""

    def stopped(ended: Any, number: int, step: int) -> list[str]:
        assert (ended.returncode, ended.stderr) == (128 + number, "")
        line = next(line for line in ended.stdout.splitlines() if line.startswith("stopped at step"))
        said, told = line.split("; resume with: ")
        assert said == f"stopped at step {step}"
        python, dash, module, *arguments = shlex.split(told)
        assert (python, dash, module) == ("python", "-m", "proactive.fit")
        assert progress(Path(tmp_path, arguments[-1]))[1] == step
        return arguments

    ended = command("proactive.fit", *small_fit(finished_run), signal_at(2, signal.SIGTERM), cwd=tmp_path)
    resume = stopped(ended, signal.SIGTERM, 2)  # which is done to its end
    ended = command("proactive.fit", *resume, signal_at(6, signal.SIGINT), cwd=tmp_path)
    resume = stopped(ended, signal.SIGINT, 8)  # the second of epoch 2
    ended = command("proactive.fit", *resume, NO_CALLBACKS, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_as_uninterrupted(tmp_path / "runs" / "reward" / "0", finished_run)


@pytest.fixture
def copied_run(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A run folder to damage, in the place where a run named reward is looked for."""
    folder = tmp_path / "runs" / "reward" / "0"
    shutil.copytree(finished_run.folder, folder)
    return folder


def test_a_damaged_last_checkpoint_is_refused_and_a_good_one_is_offered(
    finished_run: FinishedRun, copied_run: Path, tmp_path: Path
) -> None:
    """Of the two good ones, the older one has the state of the optimizer."""
    older, best = copied_run / "checkpoints" / "older.ckpt", copied_run / "checkpoints" / "best.ckpt"
    content = last(copied_run).read_bytes()
    older.write_bytes(content)
    os.utime(older, (1_000, 1_000))
    last(copied_run).write_bytes(content[: len(content) // 2])
    ended = command("proactive.fit", "--ckpt_path=last", cwd=tmp_path)
    assert ended.returncode == 2
    what, hint = ended.stderr.splitlines()
    assert what.startswith("error: ")
    assert "runs/reward/0/checkpoints/last.ckpt" in what
    here = [path.relative_to(tmp_path) for path in (best, older)]
    offer = "The newest good one is {}, with weights alone: give it as --checkpoint; resume from {}."
    assert hint == f"  help: {offer.format(*here)}"
    (copied_run / "metrics.json").unlink()
    ended = command("proactive.fit", f"--ckpt_path={here[1]}", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    figures = [
        json.loads((at / "metrics.json").read_text(encoding="utf-8")) for at in (copied_run, finished_run.folder)
    ]
    assert figures[0]["test"] == figures[1]["test"]


def test_a_resume_from_weights_alone_is_refused_and_names_last(copied_run: Path, call: Callable) -> None:
    best = copied_run / "checkpoints" / "best.ckpt"
    assert not load(best).keys() & {"optimizer_states", "lr_schedulers", "callbacks"}
    ended = call(fit.main, f"--ckpt_path={best}")
    assert (ended.code, ended.err.splitlines()) == (
        2,
        [
            f"error: {best} contains weights alone, and a resume needs the optimizer's state",
            f"  help: Resume from {last(copied_run)}.",
        ],
    )


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def hints_of_refusals(checkpoint: Path, call: Callable) -> Iterator[str]:
    """Resume from a checkpoint, and evaluate it: each is refused in two lines that name it. Yields the hints."""
    for main, option in ((fit.main, ["--ckpt_path"]), (evaluate.main, ["reward", "--checkpoint"])):
        ended = call(main, *option, checkpoint)
        assert ended.code == 2
        what, hint = ended.err.splitlines()
        assert str(checkpoint) in what
        yield hint


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], flip_a_bit, lambda content: b"", lambda content: b"\0" * len(content)],
    ids=["last byte lost", "one bit wrong", "empty", "zeros"],
)
@pytest.mark.parametrize("newest", ["best.ckpt", "older.ckpt"])
def test_damaged_checkpoints_are_refused_and_the_newest_good_one_is_offered(
    damage: Callable[[bytes], bytes], newest: str, copied_run: Path, call: Callable
) -> None:
    best, older = copied_run / "checkpoints" / "best.ckpt", copied_run / "checkpoints" / "older.ckpt"
    shutil.copy(best, older)
    os.utime(best, (2_000, 2_000))
    os.utime(older, (3_000, 3_000) if newest == older.name else (1_000, 1_000))
    (copied_run / "checkpoints" / "bad.ckpt").write_bytes(best.read_bytes()[:-9])  # newer still, and no good
    last(copied_run).write_bytes(damage(last(copied_run).read_bytes()))
    for hint in hints_of_refusals(last(copied_run), call):
        assert str(copied_run / "checkpoints" / newest) in hint


class Payload:
    """Makes a file where it is unpickled: harmless, and it shows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["as torch saves", "as torch once saved"])
def test_a_checkpoint_with_code_in_it_is_refused(
    zipped: bool, copied_run: Path, call: Callable, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    content = load(last(copied_run)) | {"payload": Payload(mark)}
    torch.save(content, last(copied_run), _use_new_zipfile_serialization=zipped)
    for main, arguments in (
        (fit.main, ("--ckpt_path", "last")),
        (fit.main, ("--ckpt_path", last(copied_run))),
        (evaluate.main, ("reward", "--checkpoint", last(copied_run))),
    ):
        ended = call(main, *arguments)
        assert ended.code == 2
        what, hint = ended.err.splitlines()
        assert what.startswith("error: ")
        assert "last.ckpt" in what
        assert hint.startswith("  help: ")
        assert not mark.exists()
    torch.load(last(copied_run), weights_only=False)
    assert mark.exists()  # the payload would have worked


def test_best_weights_with_code_in_them_are_refused(copied_run: Path, call: Callable, tmp_path: Path) -> None:
    """A run folder is evaluated by its best weights."""
    best = copied_run / "checkpoints" / "best.ckpt"
    torch.save(load(best) | {"payload": Payload(tmp_path / "executed")}, best)
    ended = call(evaluate.main, "reward", "--checkpoint", copied_run)
    assert (ended.code, len(ended.err.splitlines())) == (2, 2)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "change",
    [
        "--seed_everything=1",
        "--data.fold=1",
        "--data.seed=1",
        "--data.validation_fraction=0.3",
        "--data.vocabulary_size=300",
        "--data.num_workers=2",
        "--data.batch_size=16",
        "--data.balance=category",
        '--model.scratch={"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}',
        "--model.dropout=0.2",
        "--model.category_weights={missed_need: 2.0}",
        "--model.dtype=bfloat16",
        "--trainer.limit_train_batches=3",
        "--trainer.val_check_interval=3",
        "--run.monitor=validation/f1",
        "--run.name=other",
        "--run.root=elsewhere",
    ],
)
def test_a_run_is_not_resumed_with_other_options(change: str, copied_run: Path, call: Callable) -> None:
    """In one line with both values, before anything in the run folder has changed."""
    before = {path: path.read_bytes() for path in copied_run.rglob("*") if path.is_file()}
    ended = call(fit.main, f"--ckpt_path={last(copied_run)}", change, "--trainer.max_epochs=3")
    assert ended.code == 2
    what, hint = ended.err.splitlines()
    option, value = change.removeprefix("--").split("=")
    assert what.startswith(f"error: {option}: {value[:1]}")
    assert ", but the checkpoint's run has " in what
    assert hint.startswith(f"  help: Resume with --{option} ")
    assert {path: path.read_bytes() for path in copied_run.rglob("*") if path.is_file()} == before


def test_a_run_is_not_resumed_with_other_rows(finished_run: FinishedRun, copied_run: Path, call: Callable) -> None:
    rows = (finished_run.root / "reward_data" / "train_data.jsonl").read_text().splitlines(keepends=True)
    other = copied_run.parent / "root" / "reward_data" / "train_data.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text("".join(rows[:-1]))
    ended = call(fit.main, f"--ckpt_path={last(copied_run)}", f"--data.root={other.parents[1]}")
    assert (ended.code, "the training rows differ" in ended.err) == (2, True)
    other.write_text("".join(rows[: len(rows) // 2]))  # its own tokenizer has fewer tokens, so no weight of them fits
    ended = call(fit.main, f"--ckpt_path={last(copied_run)}", f"--data.root={other.parents[1]}")
    assert (ended.code, "the training rows differ" in ended.err) == (2, True)


def test_a_run_folder_in_place_of_its_checkpoint_is_told_the_checkpoint(copied_run: Path, call: Callable) -> None:
    ended = call(fit.main, f"--ckpt_path={copied_run}")
    assert ended.err == f"error: --ckpt_path: there is no checkpoint {copied_run}\n  help: Give {last(copied_run)}.\n"


@pytest.mark.parametrize("task", TASKS)
def test_options_that_may_change_exist(task: str) -> None:
    model_class, data_class = TASKS[task].module, TASKS[task].data
    cli_options = {
        "model": {*signature(BackboneModule).parameters, *signature(model_class).parameters},
        "data": {*signature(RowsDataModule).parameters, *signature(data_class).parameters},
        "trainer": set(signature(Trainer).parameters),
    }
    may_change = {"model": model_class.may_change, "data": data_class.may_change, "trainer": TRAINER_MAY_CHANGE}
    for group, names in may_change.items():
        assert len(names) == len(set(names))
        assert set(names) <= cli_options[group]


def learning_rates(folder: Path) -> dict[int, float]:
    """As they were logged by the last call, by step."""
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/learning_rate")]
    return {int(row["step"]): float(row["train/learning_rate"]) for row in rows}


def test_new_optimizer_options_take_effect_on_a_resume(copied_run: Path, call: Callable) -> None:
    """The optimizer's and the schedule's own states, which a checkpoint has as well, do not overwrite them."""
    options = ["--model.learning_rate=1e-5", "--model.weight_decay=0.03", "--model.warmup_ratio=0.0"]
    more = ["--trainer.max_epochs=4", "--trainer.log_every_n_steps=1", "--quiet"]
    ended = call(fit.main, "--ckpt_path=last", *options, *more)
    assert (ended.code, ended.err) == (0, "")
    checkpoint = load(last(copied_run))
    assert checkpoint["global_step"] == 24
    decays = [group["weight_decay"] for group in checkpoint["optimizer_states"][0]["param_groups"]]
    assert decays == [0.03, 0.0]
    expected = {step: 1e-5 * (24 - step) / 24 for step in range(12, 24)}
    assert learning_rates(copied_run) == pytest.approx(expected)
    config = yaml.safe_load((copied_run / "config.yaml").read_text())
    for said in (config["model"], checkpoint["options"]["model"], checkpoint["hyper_parameters"]):
        assert (said["learning_rate"], said["weight_decay"], said["warmup_ratio"]) == (1e-5, 0.03, 0.0)


def test_a_run_that_max_steps_ended_resumes_with_a_greater_one(
    finished_run: FinishedRun, tmp_path: Path, call: Callable
) -> None:
    """From the middle of an epoch, whose rest comes first; where nothing is left, that is said."""
    folder = tmp_path / "runs" / "reward" / "0"
    assert call(fit.main, *small_fit(finished_run), "--trainer.max_steps=4", "--quiet").code == 0
    assert progress(last(folder)) == (0, 4)
    resume = ["--ckpt_path=last", "--trainer.log_every_n_steps=1"]
    ended = call(fit.main, *resume, "--trainer.max_steps=9", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert progress(last(folder)) == (1, 9)
    assert list(learning_rates(folder)) == [4, 5, 6, 7, 8]
    before = load(last(folder))["state_dict"]
    ended = call(fit.main, *resume, "--quiet")
    said = "nothing was left to train after step 9: trainer.max_epochs is 2, trainer.max_steps 9; increase"
    assert (ended.code, said in ended.err) == (0, True)
    assert_same_tensors(load(last(folder))["state_dict"], before, "weights")


def test_weights_of_another_program_are_refused_as_a_checkpoint(copied_run: Path, call: Callable) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}}, last(copied_run))
    for hint in hints_of_refusals(last(copied_run), call):
        assert hint.startswith("  help: ")
