"""A log in a file, and a clock that tests can advance."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models.judging.answer_log import AnswerLog
from tests.models.judging.chat_helpers import SETTINGS
from tests.patience import Clock, turnable_clock


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AnswerLog]:
    with AnswerLog().opened(tmp_path / "log.jsonl", SETTINGS) as log:
        yield log


@pytest.fixture
def clock() -> Iterator[Clock]:
    with turnable_clock() as clock:
        yield clock
