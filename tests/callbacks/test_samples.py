"""Sampled answers: each is known by its history; what a resumed run wrote again counts once."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.samples import COLUMNS, SampledAnswers, read_samples
from datamodules.errors import UserError
from models.learning.proactive_agent import ProactiveAgent
from tests.helpers import full_disk


def sample(history: str, answer: str) -> dict[str, Any]:
    return {"history": history, "event": "The user scrolls.", "help_needed": True, "answer": answer, "valid": True}


def test_samples_with_equal_last_events_are_all_kept(tmp_path: Path) -> None:
    writer, model = SampledAnswers(tmp_path), ProactiveAgent()

    def validated(step: int, *samples: dict[str, Any]) -> None:
        trainer: Any = SimpleNamespace(sanity_checking=False, is_global_zero=True, current_epoch=0, global_step=step)
        model.samples = list(samples)
        writer.on_validation_end(trainer, model)

    validated(5, sample("a", "first"), sample("b", "second"))
    validated(10, sample("a", "lost"), sample("b", "lost"))
    validated(10, sample("a", "third"), sample("b", "fourth"))  # once more, after a resume
    with writer.path.open("a") as file:
        file.write("0,15,a,The")  # cut short by a kill
    found = read_samples(tmp_path)
    assert [(row["step"], row["history"], row["answer"]) for row in found] == [
        ("5", "a", "first"),
        ("5", "b", "second"),
        ("10", "a", "third"),
        ("10", "b", "fourth"),
    ]
    assert tuple(found[0]) == COLUMNS


def test_answers_are_never_formulas_and_are_read_back_unchanged(tmp_path: Path) -> None:
    writer, model = SampledAnswers(tmp_path), ProactiveAgent()
    model.samples = [sample("a", text) for text in ("=1+1", "@SUM(A1)", "'=1", "plain")]
    trainer: Any = SimpleNamespace(sanity_checking=False, is_global_zero=True, current_epoch=0, global_step=5)
    for number, one in enumerate(model.samples):
        one["history"] = str(number)
    writer.on_validation_end(trainer, model)
    with writer.path.open(newline="") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == ["'=1+1", "'@SUM(A1)", "''=1", "plain"]
    assert [row["answer"] for row in read_samples(tmp_path)] == ["=1+1", "@SUM(A1)", "'=1", "plain"]


def test_a_full_disk_gives_an_error_that_names_the_file(tmp_path: Path) -> None:
    writer, model = SampledAnswers(tmp_path), ProactiveAgent()
    model.samples = [sample("a", "first")]
    trainer: Any = SimpleNamespace(sanity_checking=False, is_global_zero=True, current_epoch=0, global_step=5)
    with full_disk(10), pytest.raises(UserError, match=r"cannot write .*answers\.csv: File too large"):
        writer.on_validation_end(trainer, model)
