"""Records: what is tolerated, what is refused and in which words, and that the published files fit."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from datamodules.corpus.json_records import read_json_list, read_json_mapping, read_jsonl, validate
from datamodules.corpus.records import (
    AnnotatedRow,
    Category,
    Event,
    PublishedStep,
    TestStep,
    TraceSplit,
    history_digest,
    running_digests,
)
from datamodules.errors import UserError
from tests.datamodules.conftest import few_examples, row_of, says_something
from tests.helpers import PROACTIVEBENCH, ROOT, needs_proactivebench

EVENT = {"time": "1717377997.0", "event": "The user opens a file."}
ROW = {
    "obs": [EVENT],
    "pred_task": "Explain the error.",
    "valid": True,
    "help_needed": True,
    "annotation": [True, True, False],
    "category": "Correct-Detection (CD)",
}
STEP = {"observation": EVENT, "agent_response": {"candidate_task": ["Explain the error."]}, "task_status": True}
ANSWER = {"observation": EVENT, "agent_response": ["Explain the error."], "task_status": True}
LEFT_OUT = ...  # a field that is not there


def changed(record: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**record, **fields}.items() if value is not LEFT_OUT}


def row(**fields: Any) -> AnnotatedRow:
    return validate(changed(ROW, **fields), AnnotatedRow, "here")


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "records"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, record: type[BaseModel], read: Any = read_jsonl) -> str:
    """The first line of the error, which must be fit for a terminal."""
    with pytest.raises(UserError) as caught:
        read(path, record)
    return checked_what(caught.value)


def checked_what(error: UserError) -> str:
    str(error).encode()  # a lone surrogate would break the print of the message
    assert len(str(error).splitlines()) == 2, "one line what, one line what to do"
    return error.what


def records_or_refusal(path: Path, record: type[BaseModel]) -> list[BaseModel] | str:
    try:
        return list(read_jsonl(path, record))
    except UserError as error:
        return checked_what(error)


def test_a_hint_names_the_page_that_shows_the_fields() -> None:
    for record, item, page in ((AnnotatedRow, ROW, "own-data"), (TestStep, STEP, "own-data")):
        with pytest.raises(UserError) as caught:
            validate({**item, "more": 1}, record, "here")
        assert f"docs/how-to/{page}.md" in caught.value.hint
    with pytest.raises(UserError) as caught:
        validate({**ANSWER, "more": 1}, PublishedStep, "here")
    assert "docs/how-to/evaluate-an-endpoint.md" in caught.value.hint
    shown = (ROOT / "docs/how-to/own-data.md").read_text()
    for name in (*changed(ROW), *STEP):
        assert f"`{name}`" in shown


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00", "\udc00\ud83d"])
def test_half_a_surrogate_pair_is_refused_in_every_field(text: str, tmp_path: Path) -> None:
    bad = json.dumps(text)
    event = f'{{"time": "1", "event": {bad}}}'
    rows = written(tmp_path, json.dumps(ROW).replace(json.dumps(ROW["obs"]), f"[{event}]"))
    assert "line 1, field obs[0].event: expected text, got half a surrogate pair" in refusal(rows, AnnotatedRow)
    rows = written(tmp_path, json.dumps(ROW).replace('"Explain the error."', bad))
    assert "line 1, field pred_task: expected text, got half a surrogate pair" in refusal(rows, AnnotatedRow)
    steps = json.dumps([STEP]).replace(json.dumps(STEP["observation"]), event)
    said = refusal(written(tmp_path, steps), TestStep, read_json_list)
    assert "index 0, field observation.event: expected text, got half a surrogate pair" in said
    steps = json.dumps([{**STEP, "agent_response": {"candidate_task": ["Go.", text]}}])
    assert "index 1: expected text, got half" in refusal(written(tmp_path, steps), TestStep, read_json_list)
    splits = f'{{{bad}: {{"files": ["a"]}}}}'
    assert "holds half a surrogate pair" in refusal(written(tmp_path, splits), TraceSplit, read_json_mapping)


@pytest.mark.parametrize("blank", ["", " ", "\n", "\u200b", "\ufeff \u2060"])
def test_blank_and_invisible_text_is_refused(blank: str) -> None:
    with pytest.raises(UserError, match=r"field obs\[0\].event: expected text, got a blank"):
        row(obs=[{"time": "1", "event": blank}])
    with pytest.raises(UserError, match="field pred_task: expected text, got a blank"):
        row(pred_task=blank)


# What the published files contain


def test_reads_every_field_of_a_row(tmp_path: Path) -> None:
    (read,) = read_jsonl(written(tmp_path, json.dumps(ROW)), AnnotatedRow)
    assert read.history == (Event.model_validate(EVENT),)
    assert read.model_dump(exclude={"history"}) == {
        "proposal": "Explain the error.",
        "accepted": True,
        "help_needed": True,
        "annotation": (True, True, False),
        "stated_category": Category.CORRECT_DETECTION,
        "stated_scene": None,
    }


@pytest.mark.parametrize("spelling", ["valid", "judgment", "judgement"])
@pytest.mark.parametrize(
    ("judgment", "accepted"), [(True, True), (False, False), ("accepted", True), ("rejected", False)]
)
def test_tolerates_both_spellings_of_judgment(spelling: str, judgment: bool | str, accepted: bool) -> None:
    assert row(**{"valid": LEFT_OUT, "category": LEFT_OUT, spelling: judgment}).accepted is accepted
    assert validate({**STEP, spelling: judgment}, TestStep, "here").judgment is accepted
    assert validate({**ANSWER, spelling: judgment}, PublishedStep, "here").judgment == (accepted,)


@pytest.mark.parametrize("time", ["1717377997.0", "1717377997", "Day 1, 8:00 PM", "around noon"])
def test_tolerates_times_as_epoch_text_or_words(time: str) -> None:
    assert row(obs=[{"time": time, "event": "x"}]).history[0].time == time


@pytest.mark.parametrize("no_proposal", [None, "null"])
def test_tolerates_null_as_text(no_proposal: str | None) -> None:
    read = row(pred_task=no_proposal, help_needed=False, category=LEFT_OUT)
    assert read.proposal is None
    assert validate({**ANSWER, "agent_response": [no_proposal]}, PublishedStep, "here").agent_response == (None,)
    candidates = {"candidate_task": ["a", no_proposal, "b"]}
    assert validate({**STEP, "agent_response": candidates}, TestStep, "here").agent_response.candidate_task == (
        "a",
        "b",
    )


@pytest.mark.parametrize("spelling", ["other_infomation", "other_information"])
def test_tolerates_other_infomation(spelling: str) -> None:
    assert validate({**ANSWER, spelling: {"Purpose": "x"}}, PublishedStep, "here").other_information == {"Purpose": "x"}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["bare", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [b"", b"END", b"ENDEND", b"END  END", b"END\t"])
def test_tolerates_byte_order_mark_crlf_and_blank_last_line(
    tmp_path: Path, mark: bytes, end: bytes, last: bytes
) -> None:
    lines = end.join([json.dumps(ROW).encode(), json.dumps({**ROW, "pred_task": "b"}).encode()])
    rows = read_jsonl(written(tmp_path, mark + lines + last.replace(b"END", end)), AnnotatedRow)
    assert [row.proposal for row in rows] == ["Explain the error.", "b"]
    steps = json.dumps([STEP, STEP], indent=1).encode().replace(b"\n", end)
    assert len(read_json_list(written(tmp_path, mark + steps + last.replace(b"END", end)), TestStep)) == 2


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\u2029four"
    (read,) = read_jsonl(written(tmp_path, json.dumps({**ROW, "pred_task": text}, ensure_ascii=False)), AnnotatedRow)
    assert read.proposal == text


@pytest.mark.parametrize(
    ("proposal", "accepted", "category", "names"),
    [
        (None, False, "missed_need", ["Missed-Need (MN)"]),
        (None, True, "non_response", ["Correct-Rejection (CR)", "Non-Response (NR)"]),
        ("Help.", True, "correct_detection", ["Correct-Detection (CD)"]),
        ("Help.", False, "false_alarm", ["False-Alarm (FA)"]),
    ],
)
def test_category_follows_from_proposal_and_judgment(
    proposal: str | None, accepted: bool, category: str, names: list[str]
) -> None:
    settled = {"pred_task": proposal, "valid": accepted, "help_needed": LEFT_OUT}
    assert row(**settled, category=LEFT_OUT).category == category
    for name in [category, *names]:
        assert row(**settled, category=name).category == category


def test_different_histories_and_scenes_have_different_digests() -> None:
    first, longer, other = row_of(["a"]), row_of(["a", "b"]), row_of(["b"])
    assert first.history_digest == row_of(["a"], None).history_digest
    assert len({r.history_digest for r in (first, longer, other, row_of(["a b"]), row_of(["b", "a"]))}) == 5
    assert first.scene == longer.scene != other.scene
    moved = [row(obs=[{"time": time, "event": event}]) for time, event in (("1", "2 3"), ("1 2", "3"))]
    assert moved[0].history_digest != moved[1].history_digest
    assert all(-(2**63) <= r.history_digest < 2**63 for r in (first, longer, other))
    events = row_of(["a", "b\n", "ü", "a"]).history
    assert list(running_digests(events)) == [history_digest(events[:k]) for k in range(1, 5)]
    assert list(running_digests([])) == []


# What is refused


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ({"obs": LEFT_OUT}, "obs", "required"),
        ({"obs": None}, "obs", "list"),
        ({"obs": "text"}, "obs", "list"),
        ({"obs": [EVENT, 3]}, "obs[1]", "dictionary"),
        ({"obs": [EVENT, {"time": 1717377997, "event": "x"}]}, "obs[1].time", "string"),
        ({"obs": [{"time": " ", "event": "x"}]}, "obs[0].time", "text"),
        ({"obs": [{"time": "1", "event": ""}]}, "obs[0].event", "text"),
        ({"obs": [{"time": "1", "event": None}]}, "obs[0].event", "string"),
        ({"obs": [{"time": "1"}]}, "obs[0].event", "required"),
        ({"obs": [{**EVENT, "place": "x"}]}, "obs[0].place", "expected no such field"),
        ({"pred_task": LEFT_OUT}, "pred_task", "required"),
        ({"pred_task": 5}, "pred_task", "string"),
        ({"pred_task": ["x"]}, "pred_task", "string"),
        ({"pred_task": " \t"}, "pred_task", "text"),
        ({"valid": LEFT_OUT}, "valid", "required"),
        ({"valid": None}, "valid", "boolean"),
        ({"valid": 1}, "valid", "boolean"),
        ({"valid": "true"}, "valid", '"accepted" or "rejected"'),
        ({"valid": LEFT_OUT, "judgement": 0}, "judgement", "boolean"),
        ({"help_needed": "true"}, "help_needed", "boolean"),
        ({"help_needed": 1}, "help_needed", "boolean"),
        ({"pred_task": None, "category": LEFT_OUT, "help_needed": True}, "help_needed", "expected False"),
        (
            {"pred_task": "null", "valid": False, "category": LEFT_OUT, "help_needed": False},
            "help_needed",
            "expected True",
        ),
        ({"annotation": None}, "annotation", "list"),
        ({"annotation": "true"}, "annotation", "list"),
        ({"annotation": [True, 1]}, "annotation[1]", "boolean"),
        ({"category": None}, "category", "expected one of Missed-Need (MN)"),
        ({"category": "Correct-Detection"}, "category", "expected one of Missed-Need (MN)"),
        ({"category": ["False-Alarm (FA)"]}, "category", "expected one of Missed-Need (MN)"),
        ({"category": "False-Alarm (FA)"}, "category", "expected correct_detection"),
        ({"pred_task": None, "help_needed": False}, "category", "expected non_response"),
        ({"comment": "x"}, "comment", "expected no such field"),
        ({"accepted": True}, "accepted", "expected no such field"),
        ({"pred_task": LEFT_OUT, "proposal": "x"}, "pred_task", "required"),
    ],
    ids=str,
)
def test_refused_row_names_file_line_field_and_what_was_expected(
    tmp_path: Path, fields: dict[str, Any], field: str, expected: str
) -> None:
    path = written(tmp_path, json.dumps(ROW) + "\n" + json.dumps(changed(ROW, **fields)))
    what = refusal(path, AnnotatedRow)
    assert what.startswith(f"{path}, line 2")
    assert re.search(rf"field {re.escape(field)}(?![\w.\[])", what), what
    assert expected in what


def test_refuses_two_spellings_of_judgment_at_once(tmp_path: Path) -> None:
    what = refusal(written(tmp_path, json.dumps({**ROW, "judgment": True})), AnnotatedRow)
    assert re.search(r"line 1: expected one of .*, got valid, judgment$", what)


@pytest.mark.parametrize(
    ("record", "fields", "field", "expected"),
    [
        (TestStep, {"observation": LEFT_OUT}, "observation", "required"),
        (TestStep, {"observation": {"time": "1", "event": " "}}, "observation.event", "text"),
        (TestStep, {"agent_response": ["x"]}, "agent_response", "dictionary"),
        (TestStep, {"agent_response": {}}, "agent_response.candidate_task", "required"),
        (TestStep, {"agent_response": {"candidate_task": None}}, "agent_response.candidate_task", "list"),
        (TestStep, {"task_status": "true"}, "task_status", "boolean"),
        (TestStep, {"other_infomation": {}}, "other_infomation", "expected no such field"),
        (PublishedStep, {"agent_response": "x"}, "agent_response", "list"),
        (PublishedStep, {"agent_response": {"candidate_task": []}}, "agent_response", "list"),
        (PublishedStep, {"task_status": LEFT_OUT}, "task_status", "required"),
        (PublishedStep, {"judgement": "maybe"}, "judgement", '"accepted" or "rejected"'),
        (PublishedStep, {"judgement": [True, "maybe"]}, "judgement", '"accepted" or "rejected"'),
        (PublishedStep, {"other_infomation": "x"}, "other_infomation", "dictionary"),
    ],
    ids=str,
)
def test_refused_step_names_file_index_field_and_what_was_expected(
    tmp_path: Path, record: type[BaseModel], fields: dict[str, Any], field: str, expected: str
) -> None:
    good = STEP if record is TestStep else ANSWER
    path = written(tmp_path, json.dumps([good, changed(good, **fields)]))
    what = refusal(path, record, read_json_list)
    assert what.startswith(f"{path}, index 1, field {field}: ")
    assert expected in what


def test_more_judgments_than_proposals_are_refused() -> None:
    with pytest.raises(UserError, match="here: field judgement: expected one for each of 1 proposals, got 2"):
        validate({**ANSWER, "judgement": [True, False]}, PublishedStep, "here")
    assert validate({**ANSWER, "agent_response": [], "judgement": [True]}, PublishedStep, "here").judgment == (True,)


@pytest.mark.parametrize("bad", [5, " ", ["x"]])
def test_refused_answer_is_named_by_its_index_in_the_file(bad: Any) -> None:
    """Also behind a null, which may be left out of the record."""
    for record, response in ((TestStep, {"candidate_task": ["x", None, bad]}), (PublishedStep, ["x", "null", bad])):
        with pytest.raises(UserError) as caught:
            validate({**STEP, "agent_response": response}, record, "here")
        assert re.search(r"agent_response(\.candidate_task)?(\[2\]: |: .*index 2\b)", caught.value.what)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (json.dumps(ROW)[:-5].encode(), "JSON"),
        (json.dumps(ROW).encode() * 2, "JSON"),
        (b"[]", "dictionary"),
        (b"null", "dictionary"),
        (b'"text"', "dictionary"),
        (json.dumps({**ROW, "pred_task": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"), "UTF-8"),
        (json.dumps(ROW).encode("utf-16-le"), "JSON"),
        (json.dumps(ROW)[:-1].encode() + b', "pred_task": "b"}', "pred_task"),
        (json.dumps({**ROW, "help_needed": float("nan")}).encode(), "help_needed"),
        (json.dumps({**ROW, "annotation": [float("-inf")]}).encode(), "annotation"),
        (b'{"obs": ' + b"[" * 50 + b"]" * 50 + b"}", "field obs[0]"),
        (b'{"obs": ' + b"[" * 100 + b"]" * 100 + b"}", "at most 100 lists and objects"),
        (b'{"obs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
        (b'{"obs": ' + b"1" * 5_000 + b"}", "JSON"),
    ],
    ids=range(16),
)
def test_refused_text_names_file_and_line(tmp_path: Path, line: bytes, expected: str) -> None:
    good = json.dumps(ROW).encode()
    path = written(tmp_path, b"\n".join([good, line, good]))
    what = refusal(path, AnnotatedRow)
    assert what.startswith(f"{path}, line 2")
    assert expected in what


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "JSON"),
        ("{}", "expected a JSON list"),
        (json.dumps([STEP, STEP], indent=1)[:-9], r"line \d+"),
        (json.dumps([STEP, {**STEP, "task_status": float("nan")}]), r"index 1.*task_status"),
        (json.dumps([STEP, STEP])[:-2] + ', "task_status": true}]', r"index 1.*task_status"),
        ("[" * 100_000, "JSON"),
    ],
    ids=["empty", "no list", "cut off", "NaN", "twice the same field", "deeply nested"],
)
def test_refused_list_names_file_and_index(tmp_path: Path, content: str, expected: str) -> None:
    path = written(tmp_path, content)
    what = refusal(path, TestStep, read_json_list)
    assert what.startswith(str(path))
    assert re.search(expected, what), what


@pytest.mark.parametrize(
    "fields",
    [
        {"pred_task": "\ud800"},
        {"obs": [{"time": "1", "event": "x\udfff"}]},
        {"category": "\ud800"},
        {"two\nlines\u2028": 1},
        {"\ud800": 1},
        {"help_needed": "\x85\u2028\x1b[2J"},
    ],
    ids=ascii,
)
def test_text_that_utf8_cannot_write_is_refused_with_a_printable_message(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    """JSON can escape half a character, which neither a tokenizer nor a terminal takes."""
    assert "line 1" in refusal(written(tmp_path, json.dumps({**ROW, **fields})), AnnotatedRow)


@pytest.mark.parametrize("read", [read_jsonl, read_json_list])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, read: Any) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        assert str(path) in refusal(path, AnnotatedRow, read)


# Whatever the input

KEYS = sorted({*ROW, *STEP, *ANSWER, *EVENT, "judgment", "judgement", "candidate_task", "other_infomation"})
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=5)
    | st.sampled_from(["null", "accepted", "False-Alarm (FA)"])
    | st.just(EVENT),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@few_examples
@given(st.sampled_from([(ROW, AnnotatedRow), (STEP, TestStep), (ANSWER, PublishedStep)]), st.data())
def test_any_json_gives_a_record_or_a_user_error(
    session_file: Path, kind: tuple[dict[str, Any], type[BaseModel]], data: st.DataObject
) -> None:
    good, record = kind
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(good)) | st.sampled_from(KEYS), ANY_JSON, max_size=3))
    item = data.draw(ANY_JSON | st.just({**good, **fields}))
    session_file.write_text(json.dumps(item))
    result = records_or_refusal(session_file, record)
    if isinstance(result, str):
        assert result.startswith(f"{session_file}, line 1")
    else:
        assert len(result) == 1
        result[0].model_dump_json().encode()  # a record holds nothing that cannot be written


@few_examples
@given(st.integers(0, len(json.dumps(ROW))), st.integers(0, 6), st.binary(max_size=4))
def test_damaged_file_gives_records_or_a_user_error(session_file: Path, start: int, length: int, junk: bytes) -> None:
    content = json.dumps(ROW).encode()
    session_file.write_bytes(content[:start] + junk + content[start + length :])
    result = records_or_refusal(session_file, AnnotatedRow)
    assert isinstance(result, list) or result.startswith(f"{session_file}, line ")


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(says_something)
EVENTS = st.lists(st.fixed_dictionaries({"time": TEXT, "event": TEXT}), min_size=1, max_size=4)


@few_examples
@given(EVENTS, st.none() | TEXT, st.booleans(), st.lists(st.booleans(), max_size=3), st.booleans())
def test_rows_survive_writing_and_reading(
    session_file: Path,
    events: list[dict[str, str]],
    proposal: str | None,
    accepted: bool,
    annotation: list[bool],
    escaped: bool,
) -> None:
    made = validate(
        {"obs": events, "pred_task": proposal, "valid": accepted, "annotation": annotation}, AnnotatedRow, "here"
    )
    lines = json.dumps(made.published(), ensure_ascii=escaped) + "\n"
    session_file.write_bytes(lines.encode() * 2)
    read = read_jsonl(session_file, AnnotatedRow)
    assert [again.published() for again in read] == [made.published()] * 2
    assert {again.history_digest for again in read} == {made.history_digest}
    assert [event.model_dump() for event in read[0].history] == events


@pytest.fixture(scope="session")
def session_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that each example writes anew."""
    return tmp_path_factory.mktemp("records") / "records"


# The published files


@needs_proactivebench
@pytest.mark.parametrize(
    ("name", "counts", "agreement"),
    [
        ("train", {"false_alarm": 913, "correct_detection": 474, "non_response": 149, "missed_need": 93}, 0.770),
        ("test", dict.fromkeys(("false_alarm", "correct_detection", "non_response", "missed_need"), 30), 0.917),
    ],
)
def test_published_rows_are_read_and_have_the_known_counts(name: str, counts: dict[str, int], agreement: float) -> None:
    rows = read_jsonl(PROACTIVEBENCH / "reward_data" / f"{name}_data.jsonl", AnnotatedRow)
    assert Counter(row.category for row in rows) == counts
    agreeing = [answer == row.accepted for row in rows for answer in row.annotation]
    assert round(sum(agreeing) / len(agreeing), 3) == agreement


@needs_proactivebench
def test_published_traces_are_read() -> None:
    files = [path for path in (PROACTIVEBENCH / "test_data").glob("*.json") if path.name != "splits.json"]
    assert len(files) == 12
    assert sum(len(read_json_list(path, TestStep)) for path in files) == 233


@needs_proactivebench
@pytest.mark.parametrize(
    ("model", "proposals"),
    [("activeqwen", 223), ("gpt-4o", 216), ("llama3.1-8b", 199), ("qwen2-72b-instruct", 155), ("qwen2-7b", 225)],
)
def test_published_answers_are_read(model: str, proposals: int) -> None:
    """activeqwen is Qwen2-7B-Proactive: TP 111 + FP 112 of its 227 events carry a proposal."""
    files = sorted((PROACTIVEBENCH / "traces" / model).glob("*.json"))
    steps = [step for path in files for step in read_json_list(path, PublishedStep)]
    assert (len(files), len(steps)) == (12, 227)
    assert sum(any(proposal is not None for proposal in step.agent_response) for step in steps) == proposals
