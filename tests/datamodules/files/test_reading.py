"""Reading foreign files: regular ones, of a bounded size and depth, in bounded memory, without waiting for ever."""

import io
import json
import os
import socket
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus import json_records
from datamodules.corpus.json_records import read_json_list, read_json_mapping, read_jsonl
from datamodules.corpus.records import AnnotatedRow, TestStep, TraceSplit
from datamodules.corpus.traces import read_recorded
from datamodules.errors import UserError
from datamodules.files import reading
from datamodules.files.reading import MAX_TEXT_BYTES, is_deep, open_file, read_text, require_regular_files, text_lines
from datamodules.prompting.chat_prompts import ChatPrompt
from datamodules.prompting.templates import RewardTemplate
from tests.datamodules.conftest import few_examples
from tests.helpers import conversations_of, no_more_memory_than

READERS: dict[str, Callable[[Path], Any]] = {
    "rows": lambda path: read_jsonl(path, AnnotatedRow),
    "a trace": lambda path: read_json_list(path, TestStep),
    "splits": lambda path: read_json_mapping(path, TraceSplit),
    "conversations": lambda path: list(conversations_of(path)),
    "a prompt": RewardTemplate.read,
    "an agent's prompt": lambda path: ChatPrompt.read(path, with_proposal=False),
    "a judge's prompt": lambda path: ChatPrompt.read(path, with_proposal=True),
}


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


IRREGULAR: dict[str, Callable[[Path], Any]] = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": bound_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize(
    ("reader", "kind"),
    [pair for pair in product(READERS, IRREGULAR) if pair != ("conversations", "a folder")],  # which may hold tables
)
def test_a_file_that_is_not_regular_is_refused_at_once(reader: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    IRREGULAR[kind](path)
    with pytest.raises(UserError, match=f"it.json: is {kind}, not a regular file"):
        READERS[reader](path)


@pytest.mark.parametrize("kind", ["a named pipe", "a device"])
def test_folders_of_models_and_traces_are_checked_for_special_files(kind: str, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "b.json").write_text("[]")
    require_regular_files(tmp_path)
    IRREGULAR[kind](tmp_path / "a.json")
    with pytest.raises(UserError, match=f"--option: .*a.json: is {kind}"):
        require_regular_files(tmp_path, "--option")
    with pytest.raises(UserError, match=f"a.json: is {kind}"):
        read_recorded(tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_too_long_is_refused_in_bounded_memory(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(b"[")
    os.truncate(path, 2**30)  # takes no room on the disk
    with no_more_memory_than(5 * MAX_TEXT_BYTES), pytest.raises(UserError, match=r"it.json.*limit is \d.* bytes"):
        READERS[reader](path)


def test_a_file_of_records_has_a_total_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    os.truncate(path, 2**32 + 1)
    with pytest.raises(UserError, match=r"rows.jsonl: holds 4,294,967,297 bytes, and the limit is 4,294,967,296 bytes"):
        read_jsonl(path, AnnotatedRow)


def test_the_limit_counts_the_bytes_read_not_the_reported_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system shows as files may give more than their size, which is 0."""
    monkeypatch.setattr(reading, "require_regular", lambda *args: 0)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 11)
    assert read_text(path, limit=11) == "x" * 11
    with pytest.raises(UserError, match="file: holds more, and the limit is 10 bytes"):
        read_text(path, limit=10)


@pytest.mark.parametrize("length", [9, 10, 11, 100])
def test_a_line_of_exactly_the_limit_is_read(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 10)
    content = b"short\n" + b"x" * (length - 1) + b"\n"
    lines = text_lines(io.BytesIO(content), Path("f"))
    assert next(lines) == ("f, line 1", "short")
    if length <= 10:
        assert next(lines) == ("f, line 2", "x" * (length - 1))
        return
    with pytest.raises(UserError, match="f, line 2: holds more, and the limit is 10 bytes"):
        next(lines)


@pytest.mark.parametrize("item", ['{"a": "%s"}', "[[[%s]]]", "%s", '"%s'])
def test_an_item_of_a_list_of_conversations_has_the_limit_of_a_line(
    item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (reading, json_records):
        monkeypatch.setattr(module, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / "list.json"
    sound = '{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    path.write_text(f"[{', '.join([sound] * 50)}, {item % ('1' * 2000)}]")
    found = conversations_of(path)
    assert sum(1 for _ in zip(range(50), found, strict=False)) == 50, "together they may have more"
    with pytest.raises(UserError, match=r"list.json, index 50: .*(the limit is 1,000 bytes|the file ends within)"):
        next(found)


def test_an_unterminated_string_is_scanned_once(tmp_path: Path) -> None:
    """Looking for an end from each of its quotes on would take hours."""
    path = tmp_path / "list.json"
    path.write_text('["' + '\\"' * 1_000_000)
    with pytest.raises(UserError, match="index 0: expected JSON: the file ends within the list"):
        list(conversations_of(path))


ANY_JSON = st.recursive(
    st.none() | st.text('ab"\\[]{}', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\[]{}', max_size=3), inner, max_size=3),
    max_leaves=30,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@few_examples
@given(ANY_JSON, st.integers(0, 6))
def test_brackets_within_strings_do_not_count_as_depth(value: Any, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_DEPTH", most)
        assert is_deep(json.dumps(value)) == (depth(value) > most)


@pytest.mark.parametrize("text", ["[", "{", '{"a":', '["', '["\\"', "]", '"', "\\", "a", "[]", '[["]",', "{}"])
def test_depth_is_computed_in_linear_time(text: str) -> None:
    nests = text in ("[", "{", '{"a":', '["', '[["]",')
    assert is_deep("[" * 101 + text * 300_000)
    assert is_deep(text * 300_000) == nests


@pytest.mark.parametrize("nested", ["[" * 1_000_000, "[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101])
@pytest.mark.parametrize("reader", ["rows", "a trace", "splits", "conversations"])
def test_deep_json_is_refused_with_its_location(reader: str, nested: str, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    path.write_text(nested if reader != "conversations" else f"[{nested}]")
    with pytest.raises(UserError, match=r"it\.json.*(at most 100 lists and objects within one another|ends within)"):
        READERS[reader](path)


def test_only_the_first_of_many_mistakes_in_a_record_is_reported(tmp_path: Path) -> None:
    """All of them would take a hundred times the memory of the text."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"obs": [' + ", ".join(["{}"] * 100_000) + '], "pred_task": null, "valid": true}')
    with no_more_memory_than(60 * path.stat().st_size), pytest.raises(UserError, match=r"line 1, field obs\[0\].time"):
        read_jsonl(path, AnnotatedRow)


def test_open_file_names_the_option_and_says_what_to_do(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path / "a\0b"):
        with pytest.raises(UserError, match=r"data.prompt: .*(No such file|null)") as caught:
            open_file(path, option="data.prompt", hint="Do this.")
        assert caught.value.hint == "Do this."
