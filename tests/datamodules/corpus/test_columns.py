"""Cells of tables: the forms of each column, and the messages about all others."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from datamodules.corpus.columns import Columns, table_rows
from datamodules.corpus.records import AnnotatedRow, Event
from datamodules.corpus.tables import Table
from datamodules.errors import UserError

EVENTS = [{"time": "1", "event": "opens a file"}, {"time": "2", "event": "types"}]
CELLS: dict[str, Any] = {"history": EVENTS, "proposal": "Help.", "accepted": True}


def table(*rows: Mapping[str, Any]) -> Table:
    def records(wanted: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return ((f"here, row {number}", row) for number, row in enumerate(rows, 1))

    return Table("here", list(rows[0]), records)


def read(columns: Columns | None = None, **cells: Any) -> AnnotatedRow:
    [row] = table_rows(table(CELLS | cells), columns or Columns())
    return row


def refused(columns: Columns | None = None, **cells: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(columns, **cells)
    return caught.value


def test_a_row_is_that_of_the_published_layout() -> None:
    cells = {**CELLS, "annotators": [True, False], "help_needed": True}
    layout = {"obs": EVENTS, "pred_task": "Help.", "valid": True, "annotation": [True, False], "help_needed": True}
    assert read(**cells) == AnnotatedRow.model_validate(layout)


@pytest.mark.parametrize(
    "history",
    [
        EVENTS,
        tuple(EVENTS),
        json.dumps(EVENTS),
        [{**one, "time": int(one["time"])} for one in EVENTS],
        json.dumps([{**one, "time": int(one["time"])} for one in EVENTS]),
    ],
)
def test_forms_of_a_history(history: Any) -> None:
    assert read(history=history).history == tuple(map(Event.model_validate, EVENTS))


def test_events_of_text_get_times_one_second_apart() -> None:
    events = (Event(time="0", event="opens"), Event(time="1", event="types"))
    assert read(history=["opens", "types"]).history == read(history='["opens", "types"]').history == events
    assert read(history=["opens", {"time": 1, "event": "types"}]).history == events


@pytest.mark.parametrize(
    "time",
    [60, 60.0, datetime(1970, 1, 1, 0, 1), datetime(1970, 1, 1, 2, 1, tzinfo=timezone(timedelta(hours=2)))],
)
def test_forms_of_a_time(time: Any) -> None:
    """Dates come from Parquet. One without a time zone is that of UTC, as times are shown."""
    assert read(history=[{"time": time, "event": "types"}]).history == (Event(time="60", event="types"),)


def test_rows_share_the_events_of_equal_text() -> None:
    """So that a history that many rows repeat takes its memory once."""
    first, second = table_rows(table(*[{**CELLS, "history": json.dumps(EVENTS)}] * 2), Columns())
    assert all(a is b for a, b in zip(first.history, second.history, strict=True))


@pytest.mark.parametrize(
    ("history", "named"),
    [
        (None, "field history: expected a list of events"),
        ("opens\ntypes", 'a list of events as JSON text: Expecting value (character 1), got "opens\\ntypes"'),
        (str(EVENTS), "as JSON text: Expecting property name enclosed in double quotes (character 3), got"),
        ('"text"', "field history: expected a list of events as JSON text"),
        ('{"event": "x"}', "field history: expected a list of events"),
        ([3], "field history[0]"),
        ([*EVENTS, {"event": "no time"}], "field history[2].time"),
        (json.dumps([*EVENTS, {"event": "no time"}]), "field history[2].time"),
        ([{"time": float("nan"), "event": "x"}], "field history[0].time"),
        ([{"time": "1", "event": " "}], "field history[0].event: expected text, got a blank"),
        ([{"time": "1", "event": "x", "app": "y"}], 'field history[0].app: expected no such field, got "y"'),
        ("[" * 200, "at most 100 lists"),
    ],
)
def test_other_histories_are_refused_with_their_place(history: Any, named: str) -> None:
    error = refused(history=history)
    assert error.what.startswith("here, row 1, field history")
    assert named in error.what
    assert "docs/how-to/own-data.md" in error.hint


@pytest.mark.parametrize(
    ("cell", "accepted"),
    [
        *((True, True), ("TRUE", True), ("false", False), ("Yes", True), ("no", False)),
        *((0, False), (1, True), ("0", False), (1.0, True), (0.0, False), ("1.0", True), ("0.0", False)),
        *((" Accepted ", True), ("rejected", False)),
    ],
)
def test_forms_of_a_judgment(cell: Any, accepted: bool) -> None:
    assert read(accepted=cell).accepted is accepted
    assert read(annotators=[cell, True]).annotation == (accepted, True)


@pytest.mark.parametrize("cell", [None, 2, -1, 0.5, "maybe", "", "1.5", [True]])
def test_other_judgments_are_refused(cell: Any) -> None:
    assert refused(accepted=cell).what == (
        "here, row 1, field accepted: expected one of true, false, yes, no, 1, 0, accepted, rejected, "
        f"got {json.dumps(cell)}"
    )


@pytest.mark.parametrize(("cell", "proposal"), [(None, None), ("null", None), ("Help.", "Help.")])
def test_forms_of_a_proposal(cell: Any, proposal: str | None) -> None:
    assert read(proposal=cell).proposal == proposal


@pytest.mark.parametrize("cell", [3, "", "None", " nan", "N/A"])
def test_other_proposals_are_refused(cell: Any) -> None:
    """A program that writes None or NaN as text means no offer, and an offer of that text would be learned."""
    assert refused(proposal=cell).what.startswith("here, row 1, field proposal: ")


@pytest.mark.parametrize(
    ("cell", "annotation"),
    [
        (None, ()),
        ([], ()),
        ('[1, 0, "accepted"]', (True, False, True)),
        ({"accepted": 2, "rejected": 1}, (True, True, False)),
        ('{"accepted": 0, "rejected": 1}', (False,)),
    ],
)
def test_forms_of_annotators(cell: Any, annotation: tuple[bool, ...]) -> None:
    assert read(annotators=cell).annotation == annotation


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        (3, 'counts of both as {"accepted": 2, "rejected": 1}, got 3'),
        ("3", "counts of both"),
        ({"accepted": 2}, "expected counts"),
        ({"accepted": 2, "rejected": True}, "expected counts"),
        ({"accepted": 2, "rejected": 10**9}, "expected counts of at most 1000"),
        ([True, None], "expected one of"),
        ("two of three", "expected a list of judgments as JSON text"),
    ],
)
def test_other_annotators_are_refused(cell: Any, named: str) -> None:
    error = refused(annotators=cell)
    assert "field annotators" in error.what
    assert named in error.what


def test_fields_that_contradict_each_other_are_refused() -> None:
    assert "here, row 1: field help_needed: expected False" in refused(proposal=None, help_needed=True).what
    assert read(proposal=None, help_needed="false").help_needed is False


def test_rows_of_a_named_scene_belong_together() -> None:
    other = [{"time": "9", "event": "elsewhere"}]
    assert read(scene="a").scene == read(scene="a", history=other).scene != read(scene="b").scene
    assert read(scene=7).scene == read(scene=7.0).scene == read(scene="7").scene
    assert read(scene=None).scene == read().scene != read(history=other).scene
    assert read(scene="a").scenes == {read(scene="a").scene, read().scene}
    assert "field scene" in refused(scene=1.5).what


def test_columns_of_other_names() -> None:
    columns = Columns("events", "offer", "ok", annotators="votes")
    cells = {"events": EVENTS, "offer": "Help.", "ok": 1, "votes": [1], "user": "u", "history": "unused"}
    [row] = table_rows(table(cells), columns)
    assert row == read(annotators=[True])
    assert table(cells).unread(columns.by_field.values()) == "user, history"
    cells["events"] = [3]
    with pytest.raises(UserError, match=r"here, row 1, field events\[0\]"):
        list(table_rows(table(cells), columns))


@pytest.mark.parametrize(
    ("columns", "option"),
    [
        (Columns(history="stories"), "--data.columns.history COLUMN"),
        (Columns(annotators="votes"), "--data.columns.annotators COLUMN"),
        (Columns(scene="session"), "--data.columns.scene COLUMN"),
    ],
)
def test_a_missing_column_is_named_with_those_that_there_are(columns: Columns, option: str) -> None:
    error = refused(columns)
    assert error.what.startswith("data.root: here has no column ")
    assert error.what.endswith("; its columns: history, proposal, accepted")
    assert option in error.hint


def test_a_column_of_almost_that_name_is_suggested() -> None:
    assert refused(Columns(history="History")).what.endswith(
        "; its columns: history, proposal, accepted; did you mean history?"
    )


@pytest.mark.parametrize(
    ("record", "option"),
    [
        ({"conversations": []}, "--data.conversations"),
        ({"messages": [], "id": 1}, "--data.conversations"),
        ({"history": [], "chosen": "a", "rejected": "b"}, "--data.preferences"),
    ],
)
def test_records_of_another_kind_are_told_apart(record: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError) as caught:
        list(table_rows(table(record), Columns()))
    assert "not annotated rows" in caught.value.what
    assert option in caught.value.hint
