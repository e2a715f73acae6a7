"""What is printed while a run goes on, where there is no terminal, and where there is one."""

import io
import re
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from callbacks.progress import PlainProgress, TerminalProgress, counted, progress_callback
from tests.models.small import fit, small_classifier, small_data


def test_a_terminal_gets_a_bar_a_file_gets_lines_and_quiet_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert type(progress_callback(quiet=False)) is PlainProgress
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(progress_callback(quiet=False), RichProgressBar)
    assert progress_callback(quiet=True) is None


def printed(root: Path, capsys: pytest.CaptureFixture[str], interval: float, **options: Any) -> list[str]:
    data = small_data(root)
    classifier = small_classifier()
    trainer = fit(classifier, data, PlainProgress(interval), **options)
    trainer.test(classifier, data, verbose=False)
    return capsys.readouterr().out.splitlines()


PACE = r"\S+ steps a second, \d+:\d\d:\d\d left"


def test_one_line_for_each_epoch_and_each_test(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(root, capsys, interval=1e9, max_epochs=2)
    figures = r"train/loss \d\.\d{4}, validation/loss \d\.\d{4}, .*validation/auroc \d\.\d{4}"
    assert re.fullmatch(rf"epoch 1/2, step 6 of 12: {figures}, {PACE}", lines[0])
    assert re.fullmatch(rf"epoch 2/2, step 12 of 12: {figures}, {PACE}", lines[1])
    assert lines[1].endswith(", 0:00:00 left")
    assert re.fullmatch(r"testing on \d+ batches", lines[2])
    assert len(lines) == 3
    assert not any("\x1b" in line or "\r" in line for line in lines), "no terminal codes in a log file"


@pytest.mark.parametrize(
    ("limits", "total", "epochs"),
    [({"max_epochs": 2}, 12, 2), ({"max_steps": 3}, 3, 1), ({"max_steps": 8, "max_epochs": -1}, 8, 2)],
    ids=["epochs", "steps within an epoch", "steps alone"],
)
def test_progress_lines_show_steps_rate_and_remaining_time(
    limits: dict[str, int], total: int, epochs: int, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(root, capsys, interval=0, **{"max_epochs": 2, **limits})
    found = [re.fullmatch(rf"epoch (\d)/{epochs}, step (\d+) of {total}: .*{PACE}", line) for line in lines]
    assert dict.fromkeys(int(match[2]) for match in found if match) == dict.fromkeys(range(1, total + 1))
    assert {int(match[1]) for match in found if match} == set(range(1, epochs + 1))


def test_the_remaining_time_follows_from_the_rate_of_the_steps_so_far(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that shows 10 seconds more at each look; a resumed run counts its own steps alone."""
    clock = count(0, 10)
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: next(clock))
    progress = PlainProgress()
    trainer = SimpleNamespace(
        global_step=100,
        max_steps=150,
        max_epochs=5,
        num_training_batches=40,
        limit_train_batches=1.0,
        datamodule=SimpleNamespace(steps_per_epoch=40),
        current_epoch=2,
        is_global_zero=True,
        sanity_checking=False,
        callback_metrics={},
    )
    progress.on_train_start(trainer, None)  # at 10
    trainer.global_step = 105
    progress.on_validation_end(trainer, None)  # at 20, so 5 steps in 10 seconds, and 45 to go
    assert capsys.readouterr().out == "epoch 3/4, step 105 of 150: 0.5 steps a second, 0:01:30 left\n"


@pytest.mark.parametrize(
    ("max_steps", "step", "batch", "total"), [(-1, 50, 10, 40), (150, 90, 10, 40), (100, 90, 10, 20), (100, 99, 19, 20)]
)
def test_a_bar_ends_where_max_steps_ends_the_epoch(max_steps: int, step: int, batch: int, total: int) -> None:
    bar = TerminalProgress()
    epoch = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(completed=batch)))
    bar._trainer = SimpleNamespace(
        max_steps=max_steps,
        global_step=step,
        max_epochs=5,
        num_training_batches=40,
        fit_loop=SimpleNamespace(epoch_loop=epoch),
    )
    assert bar.total_train_batches == total


def test_a_count_on_a_terminal_shows_its_label_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's name may look like markup."""
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", shown)
    with counted("asking [bold]x[/bold]", 3) as advance:
        for _ in range(3):
            advance()
    assert "asking [bold]x[/bold]" in shown.getvalue()
    assert "3/3" in shown.getvalue()


def test_a_count_without_a_terminal_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("asking m", 3, interval=0) as advance:
        for _ in range(3):
            advance()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"asking m: {done} of 3" for done in (1, 2, 3)]
    for options in ({"quiet": True, "total": 2}, {"total": 0}):
        with counted("asking m", **options) as advance:
            advance()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("interval", "reads"), [(0.0, 6), (1e9, 1)])
def test_the_bar_reads_the_loss_at_most_every_few_seconds(root: Path, interval: float, reads: int) -> None:
    shown: list[float] = []

    class Watched(TerminalProgress):
        def get_metrics(self, *arguments: Any) -> dict[str, Any]:
            metrics = super().get_metrics(*arguments)
            if "train/loss" in metrics and metrics["train/loss"] not in shown:
                shown.append(metrics["train/loss"])
            return metrics

    fit(small_classifier(), small_data(root), Watched(interval=interval), enable_progress_bar=True, limit_val_batches=0)
    assert len(shown) == reads
