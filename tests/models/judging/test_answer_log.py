"""The log of answers against whatever a kill, another setting or another process leaves behind."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.files.append_log import OtherSettingsError
from models.judging.answer_log import AnswerLog
from tests.datamodules.conftest import few_examples
from tests.helpers import full_disk

SETTINGS = {"model": "m"}


def kept(path: Path, settings: dict[str, Any] | None = None) -> dict[str, str]:
    """What a log has after it was opened on a file."""
    log = AnswerLog()
    with log.opened(path, SETTINGS if settings is None else settings):
        return log.texts


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_log_path_that_is_not_a_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(UserError, match=r"log.jsonl: is a .*, not a regular file"):
        kept(path)


ENTRIES = st.lists(st.tuples(st.text(max_size=4), st.text(max_size=8)), max_size=6)


@few_examples
@given(ENTRIES, st.data())
def test_a_truncated_log_keeps_complete_entries_and_continues(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    with AnswerLog().opened(path, SETTINGS) as log:
        sizes = [(path.stat().st_size, {})]
        for key, text in entries:
            log.add(key, text, "here")
            sizes.append((path.stat().st_size, dict(log.texts)))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = [texts for size, texts in sizes if size <= cut]
    with AnswerLog().opened(path, SETTINGS) as log:
        assert log.texts == (whole[-1] if whole else {})
        log.add("new", "one", "here")
    assert kept(path) == (whole[-1] if whole else {}) | {"new": "one"}


def test_a_log_with_other_settings_is_refused_and_names_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept(path, {"model": "m", "temperature": 0.0})
    kept(path, {"temperature": 0.0, "model": "m"})  # the same in another order
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"log.jsonl was started with temperature 0.0, and now it is 0.7"):
        kept(path, {"model": "m", "temperature": 0.7})
    with pytest.raises(UserError, match=r"was started with seed null, and now it is 1"):
        kept(path, {"model": "m", "temperature": 0.0, "seed": 1})
    assert path.read_bytes() == before


def test_other_settings_are_named_also_if_entries_are_impossible_under_them(tmp_path: Path) -> None:
    class OneModel(AnswerLog):
        def take(self, entry: dict[str, object]) -> None:
            raise ValueError("a decision that this model does not make")

    path = tmp_path / "log.jsonl"
    with AnswerLog().opened(path, {"model": "m"}) as log:
        log.add("a", "text", "here")
    with pytest.raises(OtherSettingsError, match="was started with model m, and now it is n"):
        OneModel().opened(path, {"model": "n"}).__enter__()
    with pytest.raises(UserError, match="or an older version wrote it"):
        OneModel().opened(path, {"model": "m"}).__enter__()


DEEP = b'{"settings": {"model": ' + b"[" * 101 + b"]" * 101 + b"}}\n"
NO_ENTRY = b'{"settings": {"model": "m"}}\n{"no": 1}\n'
EARLIER = b'{"settings": {"model": "m"}}\n{"key": "a", "where": "b", "text": "c"}\n'  # without why it ended


@pytest.mark.parametrize("content", [b"hello\n", b"[]\n", NO_ENTRY, b"5\n", EARLIER, DEEP])
def test_a_file_that_is_not_a_log_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="is not the log of an evaluation"):
        kept(tmp_path / "log.jsonl", SETTINGS)
    assert (tmp_path / "log.jsonl").read_bytes() == content


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_a_full_disk_gives_an_error_that_names_the_log_and_keeps_the_log_whole(taken: int, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AnswerLog().opened(path, SETTINGS) as log:
        log.add("before", "text", "here")
        with full_disk(path.stat().st_size + taken), pytest.raises(UserError, match=r"cannot write .*log\.jsonl: File"):
            log.add("lost", "text", "here")
        log.add("after", "text", "here")
    assert kept(path) == {"before": "text", "after": "text"}


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AnswerLog().opened(path, SETTINGS), pytest.raises(UserError, match="being written by another process"):
        kept(path)
    assert kept(path) == {}


def test_without_a_file_texts_are_kept_as_long_as_the_log(tmp_path: Path) -> None:
    log = AnswerLog()
    log.add("key", "text", "here", "length")
    assert log.final("key") is None
    with log.opened(tmp_path / "log.jsonl", SETTINGS):
        log.add("other", "text", "here", "stop")
    assert log.final("other") == "text"
    assert kept(tmp_path / "log.jsonl") == {"other": "text"}


def test_the_finish_reason_is_kept(tmp_path: Path) -> None:
    first, again = AnswerLog(), AnswerLog()
    with first.opened(tmp_path / "log.jsonl", SETTINGS):
        for key, reason in (("a", "length"), ("b", "stop"), ("c", None)):
            first.add(key, "text", "here", reason)
    with again.opened(tmp_path / "log.jsonl", SETTINGS):
        assert (again.texts, again.unfinished) == (first.texts, {"a": "length"})
