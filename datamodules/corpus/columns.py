"""Columns of tables, and the conversion of their cells to annotated rows.

A table is a CSV, Parquet or JSONL file, or a dataset of the Hugging Face hub. Its cells have few, fixed forms, which
docs/how-to/own-data.md lists. Every other cell is refused with its file, its row and its column.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, create_model

from datamodules.corpus.json_records import parse_json, shown, validate
from datamodules.corpus.records import AnnotatedRow, Event, Proposal, Text
from datamodules.errors import UserError
from datamodules.escaping import shortened

PAGE = "docs/how-to/own-data.md"
MAX_ANNOTATORS = 1000  # of one row
OTHER_RECORDS = (  # fields of other files: what they hold, and the options that take them
    ({"conversations"}, "conversations", "--task agent --data.conversations"),
    ({"messages"}, "conversations", "--task agent --data.conversations"),
    ({"chosen", "rejected"}, "preferences", "--task preference --data.preferences"),
)
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}
_VERDICTS = {**_TRUTHS, "accepted": True, "rejected": False}


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


@dataclass(frozen=True)
class Table:
    """A table, opened to be read once.

    Attributes:
        where: The file or the dataset, for messages.
        names: Names of its columns; of a JSONL file the fields of its first record.
        records: Yields the place and the cells of each row, of at least the given columns.
    """

    where: str
    names: Sequence[str]
    records: Callable[[Sequence[str]], Iterator[tuple[str, Mapping[str, Any]]]]


def unread_columns(table: Table, columns: Columns) -> list[str]:
    """Return the columns of a table that are not read."""
    return [name for name in table.names if name not in columns.by_field.values()]


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
        has = shortened(", ".join(table.names), 300) or "none"
        raise UserError(
            f"data.root: {table.where} has no column {shortened(column, 80)}; its columns: {has}",
            f"Say which column holds the {_MEANING[field]}: --data.columns.{field} COLUMN; {PAGE} shows how.",
        )


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
    """Return the fields of an event that is given as text, or with a number as time; other values as they are.

    Args:
        index: Index of the event in its history. Texts get times one second apart.
        value: The event.
    """
    if isinstance(value, str):
        return {"time": str(index), "event": value}
    if not isinstance(value, Mapping):
        return value
    time = value.get("time")
    is_number = isinstance(time, int | float) and not isinstance(time, bool) and math.isfinite(time)
    return {**value, "time": str(time)} if is_number else dict(value)


def _json(text: str, expected: str) -> Any:
    """Parse a cell of JSON text."""
    try:
        found = parse_json(text, "JSON text")
    except UserError as error:
        raise ValueError(f"expected {expected} as JSON text: {error.what}, got {shown(text)}") from None
    if isinstance(found, str):
        raise ValueError(f"expected {expected} as JSON text, got {shown(text)}")
    return found


def _yes_or_no(known: Mapping[str, bool], value: Any) -> Any:
    found = str(value).strip().lower() if isinstance(value, (str, int)) else ""  # booleans are integers
    if found not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {shown(value)}")
    return known[found]


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
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _help_needed(value: Any) -> Any:
    return None if value is None else _yes_or_no(_TRUTHS, value)


class _TableRow(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    hint: ClassVar[str] = f"Mend that cell; {PAGE} shows what each column may hold."


_CELLS: dict[str, tuple[Any, Any]] = {  # the type and the default of each field
    "history": (Annotated[tuple[Event, ...], FailFast(), BeforeValidator(_events)], ...),
    "proposal": (Proposal, ...),
    "accepted": (Annotated[bool, BeforeValidator(_verdict)], ...),
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
