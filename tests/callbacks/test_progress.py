"""What is printed while a run goes on, where there is no terminal, and where there is one."""

import io
import re
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from callbacks.progress import PlainProgress, counted, progress_callback
from tests.models.small import fit, small_classifier, small_data


def test_a_terminal_gets_a_bar_a_file_gets_lines_and_quiet_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert type(progress_callback(quiet=False)) is PlainProgress
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(progress_callback(quiet=False), RichProgressBar)
    assert progress_callback(quiet=True) is None


def printed(root: Path, capsys: pytest.CaptureFixture[str], interval: float) -> list[str]:
    data = small_data(root)
    classifier = small_classifier()
    trainer = fit(classifier, data, PlainProgress(interval), max_epochs=2)
    trainer.test(classifier, data, verbose=False)
    return capsys.readouterr().out.splitlines()


def test_one_line_for_each_epoch_and_each_test(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(root, capsys, interval=1e9)
    figures = r"train/loss \d\.\d{4}, validation/loss \d\.\d{4}, .*validation/auroc \d\.\d{4}"
    assert re.fullmatch(rf"epoch 1/2, step 6: {figures}", lines[0])
    assert re.fullmatch(rf"epoch 2/2, step 12: {figures}", lines[1])
    assert re.fullmatch(r"testing on \d+ batches", lines[2])
    assert len(lines) == 3
    assert not any("\x1b" in line or "\r" in line for line in lines), "no terminal codes in a log file"


def test_lines_in_between_say_how_far_the_epoch_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(root, capsys, interval=0)
    found = [re.fullmatch(r"epoch 1/2, step (\d+): (\d+) of 6 steps", line) for line in lines]
    assert [tuple(map(int, match.groups())) for match in found if match] == [(step, step) for step in range(1, 7)]


def test_a_count_on_a_terminal_shows_its_label_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's name may look like markup."""
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", shown)
    with counted("asking [bold]x[/bold]", 3) as advance:
        for _ in range(3):
            advance()
    assert "asking [bold]x[/bold]" in shown.getvalue()
    assert "3/3" in shown.getvalue()


def test_a_count_elsewhere_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("asking m", 3, interval=0) as advance:
        for _ in range(3):
            advance()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"asking m: {done} of 3" for done in (1, 2, 3)]
    for options in ({"quiet": True, "total": 2}, {"total": 0}):
        with counted("asking m", **options) as advance:
            advance()
    assert capsys.readouterr().out == ""
