"""Columns of tables, and the conversion of their cells to annotated rows.

Cells have few, fixed forms, which docs/how-to/own-data.md lists. Every other cell is refused with its file, its row and
its column.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from datamodules.corpus.json_records import parse_json, shown, validate
from datamodules.corpus.records import AnnotatedRow, Event, Proposal, Text
from datamodules.corpus.tables import PAGE, Table
from datamodules.errors import UserError

JSON_HINT = f"Write it as json.dumps does in Python, or save the table as Parquet or JSONL; {PAGE} shows the forms."
MAX_ANNOTATORS = 1000  # of one row
OTHER_RECORDS = (  # fields of other files: what they hold, and the options that take them
    ({"conversations"}, "conversations", "--task agent --data.conversations"),
    ({"messages"}, "conversations", "--task agent --data.conversations"),
    ({"chosen", "rejected"}, "preferences", "--task preference --data.preferences"),
)
_TRUTHS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_VERDICTS = {**_TRUTHS, "accepted": True, "rejected": False}
_MISSING = ("none", "nan", "na", "n/a")  # no text of an offer, and no clear null


@dataclass(frozen=True)
class Columns:
    """Columns of a table. An optional column that is not given is read if it has the name of its field.

    Args:
        history: Column of the events so far: a list, or the same as JSON text.
        proposal: Column of the proposal, which may be null.
        accepted: Column of the judgment.
        annotators: Column of the judgments of the single annotators, or of their counts; optional.
        help_needed: Column that says whether the user needed help; optional.
        scene: Column that names the session of a row; optional. Without it, rows whose histories begin with the same
            event are one scene.
    """

    history: str = "history"
    proposal: str = "proposal"
    accepted: str = "accepted"
    annotators: str | None = None
    help_needed: str | None = None
    scene: str | None = None

    @property
    def by_field(self) -> dict[str, str]:
        """The column of each field."""
        return {field: column or field for field, column in asdict(self).items()}

    @property
    def needed(self) -> dict[str, str]:
        """The columns that a table must have, by field."""
        return {field: column for field, column in asdict(self).items() if column is not None}


def table_rows(table: Table, columns: Columns) -> Iterator[AnnotatedRow]:
    """Yield the rows of a table.

    Raises:
        UserError: A column is missing, or a cell has another form; the message names file, row and column.
    """
    _refuse_missing_columns(table, columns)
    cells: dict[str, Any] = {
        field: (kind, Field(default=default, validation_alias=columns.by_field[field]))
        for field, (kind, default) in _CELLS.items()
    }
    record = create_model("TableRow", __base__=_TableRow, **cells)
    for where, content in table.records(list(columns.by_field.values())):
        found = validate(content, record, where)
        row = {name: getattr(found, field) for field, name in _ROW_FIELDS.items()}
        yield validate(row, AnnotatedRow, where)  # whether the fields agree


def _refuse_missing_columns(table: Table, columns: Columns) -> None:
    missing = {field: column for field, column in columns.needed.items() if column not in table.names}
    for names, what, options in OTHER_RECORDS:
        if missing and names <= set(table.names):
            raise UserError(
                f"data.root: {table.where} holds {what}, not annotated rows", f"Give the file with {options}."
            )
    for field, column in missing.items():
        hint = f"Say which column holds the {_MEANING[field]}: --data.columns.{field} COLUMN; {PAGE} shows how."
        raise UserError(f"data.root: {table.without(column)}", hint)


def _events(value: Any) -> Any:
    """Convert a history: a list of events or texts, or the same as JSON text."""
    if isinstance(value, str):
        return _events_of_text(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError('expected a list of events {"time", "event"} or texts, or the same as JSON text')
    return tuple(event_fields(index, item) for index, item in enumerate(value))


@lru_cache(maxsize=1024)  # rows after the same history have the same text
def _events_of_text(text: str) -> tuple[Event, ...]:
    return tuple(map(_validated, _events(_json(text, "a list of events"))))


def _validated(item: Any) -> Any:
    """Return an event, so that rows share it; or what is not one, which the row's record refuses with its place."""
    try:
        return Event.model_validate(item)
    except ValidationError:
        return item


def event_fields(index: int, value: Any) -> Any:
    """Return the fields of an event that is text, or whose time is a number or a date; other values as they are.

    Args:
        index: Index of the event in its history. Texts get times one second apart.
        value: The event. A date without time zone is taken as UTC.
    """
    if isinstance(value, str):
        return {"time": str(index), "event": value}
    if not isinstance(value, Mapping):
        return value
    time = value.get("time")
    if isinstance(time, datetime):
        time = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    is_number = isinstance(time, int | float) and not isinstance(time, bool) and math.isfinite(time)
    return {**value, "time": str(_whole(time))} if is_number else dict(value)


def _whole(value: Any) -> Any:
    """Return a whole number as an integer: a column of integers with an empty cell is often stored as 1.0 and 0.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _json(text: str, expected: str) -> Any:
    """Parse a cell of JSON text."""
    try:
        found, why = parse_json(text, "it"), ""
    except UserError as error:
        found, why = text, error.what.removeprefix("it: expected JSON")
    if isinstance(found, str):
        raise PydanticCustomError(
            "json_text",
            "expected {expected} as JSON text{why}, got {got}",
            {"expected": expected, "why": why, "got": shown(text), "hint": JSON_HINT},
        )
    return found


def _yes_or_no(known: Mapping[str, bool], value: Any) -> Any:
    text = str(value) if isinstance(value, (str, int, float)) else ""  # booleans are integers
    found = text.strip().lower().removesuffix(".0")
    if found not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {shown(value)}")
    return known[found]


def _offer(value: Any) -> Any:
    if isinstance(value, str) and value.strip().lower() in _MISSING:
        raise ValueError(f"expected the text of an offer, or null or an empty cell of CSV for none, got {shown(value)}")
    return value


def _verdict(value: Any) -> Any:
    return _yes_or_no(_VERDICTS, value)


def _annotators(value: Any) -> Any:
    """Convert the judgments of single annotators: a list, or their counts, or the same as JSON text; null for none."""
    if isinstance(value, str):
        value = _json(value, "a list of judgments")
    if value is None:
        return ()
    if isinstance(value, dict):
        counts = [value.get(name) for name in ("accepted", "rejected")]
        if len(value) != len(counts) or not all(type(n) is int and 0 <= n <= MAX_ANNOTATORS for n in counts):
            raise ValueError(
                f'expected counts of at most {MAX_ANNOTATORS} as {{"accepted": 2, "rejected": 1}}, got {shown(value)}'
            )
        return (True,) * value["accepted"] + (False,) * value["rejected"]
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f'expected a list of judgments, or counts of both as {{"accepted": 2, "rejected": 1}}, got {shown(value)}'
        )
    return tuple(map(_verdict, value))


def _scene(value: Any) -> Any:
    number = _whole(value)
    return str(number) if isinstance(number, int) and not isinstance(number, bool) else value


def _help_needed(value: Any) -> Any:
    return None if value is None else _yes_or_no(_TRUTHS, value)


HistoryCell = Annotated[tuple[Event, ...], FailFast(), BeforeValidator(_events)]
JudgmentCell = Annotated[bool, BeforeValidator(_verdict)]


class _TableRow(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    hint: ClassVar[str] = f"Mend that cell; {PAGE} shows what each column may hold."


_CELLS: dict[str, tuple[Any, Any]] = {  # the type and the default of each field
    "history": (HistoryCell, ...),
    "proposal": (Annotated[Proposal, BeforeValidator(_offer)], ...),
    "accepted": (JudgmentCell, ...),
    "annotators": (Annotated[tuple[bool, ...], BeforeValidator(_annotators)], ()),
    "help_needed": (Annotated[bool | None, BeforeValidator(_help_needed)], None),
    "scene": (Annotated[Text | None, BeforeValidator(_scene)], None),
}
_ROW_FIELDS = {  # the name of each field in the published layout
    "history": "obs",
    "proposal": "pred_task",
    "accepted": "valid",
    "annotators": "annotation",
    "help_needed": "help_needed",
    "scene": "scene",
}
_MEANING = {
    "history": "events so far",
    "proposal": "proposal",
    "accepted": "judgment",
    "annotators": "judgments of the annotators",
    "help_needed": "need for help",
    "scene": "name of the session",
}
