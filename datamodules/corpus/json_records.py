"""Records in JSON files: bounded parsing, and validation with errors that name file, location and field."""

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from datamodules.errors import UserError
from datamodules.escaping import shortened
from datamodules.files.reading import (
    BYTE_ORDER_MARK,
    MAX_DEPTH,
    MAX_RECORDS_BYTES,
    MAX_TEXT_BYTES,
    is_deep,
    not_utf8,
    open_file,
    read_text,
    refuse_long,
    text_lines,
)

# Where JSON values begin and end. A string with all its contents is one match.
_JSON_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_NOT_BLANK = re.compile(rb"\S")


@dataclass(frozen=True)
class Refused:
    """Replaces a value that JSON does not have. Every field refuses it, so the error names the field."""

    why: str

    def __str__(self) -> str:
        return self.why


def is_unicode(text: str) -> bool:
    """Check that UTF-8 can write a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


RecordType = TypeVar("RecordType", bound=BaseModel)


def read_jsonl(path: Path, record: type[RecordType]) -> list[RecordType]:
    """Read one record per line.

    Raises:
        UserError: The file cannot be read, or a line is not such a record.
    """
    records: list[RecordType] = []
    blank = ""  # location of a blank line; only the last line may be blank
    with open_file(path, MAX_RECORDS_BYTES) as file:
        for where, line in text_lines(file, path):
            if blank:
                parse_json("", blank)
            if line.strip():
                records.append(validate(parse_json(line, where), record, where))
            else:
                blank = where
    return records


def json_texts(file: IO[bytes], path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each record of a JSON list, or else of each line that is not blank.

    Only one is in memory at a time.

    Raises:
        UserError: A record is too long or not UTF-8, or the list does not end.
    """
    start = file.read(4096)
    file.seek(0)
    if start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        yield from _items_of_list(path, file)
    else:
        yield from ((where, line) for where, line in text_lines(file, path) if line.strip())


def _items_of_list(path: Path, file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the location and the text of each item. The file is mapped into memory, not read."""
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    depth = index = start = place = 0
    while True:
        where, limit = f"{path}, index {index}", start + MAX_TEXT_BYTES + 1
        mark = _JSON_MARKS.search(content, place, limit)
        place = mark.end() if mark else min(limit, len(content))
        refuse_long(where, place - start)
        if mark is None:
            raise UserError(
                f"{where}: expected JSON: the file ends within the list", "Mend that text, or end the list."
            )
        sign = mark[0]
        if sign in (b"[", b"{"):
            depth += 1
        elif sign in (b"]", b"}"):
            depth -= 1
        if depth == 1 and sign == b"[" and not start:
            start = mark.end()
        elif depth == 0 or (depth == 1 and sign == b","):
            text = content[start : mark.start()]
            if depth or index or text.strip():  # the list is not empty
                yield where, _item(text, where)
            index, start = index + 1, mark.end()
        if depth == 0:
            break
    if _NOT_BLANK.search(content, start):
        raise UserError(f"{path}: expected JSON: more follows the list", "Leave one list, or one record a line.")


def _item(text: bytes, where: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where) from error


def read_json(path: Path, record: type[RecordType], limit: int = MAX_TEXT_BYTES) -> tuple[RecordType, Any]:
    """Read a file of one JSON object with at most `limit` bytes; return the record and the parsed JSON.

    Raises:
        UserError: The file cannot be read, is not JSON, or is not such a record.
    """
    content = parse_json(read_text(path, limit), str(path))
    return validate(content, record, str(path)), content


def read_json_list(path: Path, record: type[RecordType]) -> list[RecordType]:
    """Read a file of one JSON list of records.

    Raises:
        UserError: The file cannot be read, is not a JSON list, or an item is not such a record.
    """
    items = parse_json(read_text(path), str(path))
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a JSON list, got {shown(items)}", "Wrap the records in [ ].")
    return [validate(item, record, f"{path}, index {index}") for index, item in enumerate(items)]


def read_json_mapping(path: Path, record: type[RecordType]) -> dict[str, RecordType]:
    """Read a file of one JSON object of records by name.

    Raises:
        UserError: The file cannot be read, is not a JSON object, or a value is not such a record.
    """
    items = parse_json(read_text(path), str(path))
    if not isinstance(items, dict):
        raise UserError(f"{path}: expected a JSON object, got {shown(items)}", "Name each record in { }.")
    if unsound := [name for name in items if not is_unicode(name)]:
        raise UserError(f"{path}: {shown(unsound[0])} holds half a surrogate pair", "Give it another name.")
    return {name: validate(item, record, f"{path}, {shortened(name, 80)}") for name, item in items.items()}


def validate(item: Any, record: type[RecordType], where: str) -> RecordType:
    """Make a record of a parsed JSON value.

    Raises:
        UserError: The value does not fit; the message names `where`, the field and what was expected. What to do is the
            `hint` of the error's context, else to look at the `page` of the record's class.
    """
    try:
        return record.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        expected = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            expected = "expected no such field"
        got = "" if first["type"] == "missing" or "got" in expected else f", got {shown(first['input'])}"
        raise UserError(
            f"{where}{f', field {shortened(field, 200)}' if field else ''}: {expected}{got}",
            first.get("ctx", {}).get("hint") or _hint(record),
        ) from error


def _hint(record: type[BaseModel]) -> str:
    return getattr(record, "hint", None) or f"Mend that record; {record.page} shows every field."  # type: ignore[attr-defined]


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. Duplicate fields, NaN and infinity become values that every record refuses.

    Raises:
        UserError: The text is not JSON, or nested too deeply; the message names `where`.
    """
    if is_deep(text):
        raise UserError(
            f"{where}: expected JSON of at most {MAX_DEPTH} lists and objects within one another", "Mend that text."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Refused:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            return Refused(f"an object with twice the field {next(n for n in names if names.count(n) > 1)}")
        return record

    def refuse(constant: str) -> Refused:
        return Refused(f"{constant}, which is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            why = f"{error.msg} ({line}character {error.colno})"
        raise UserError(
            f"{where}: expected JSON: {why}", "Mend that text; in a file of lines, each line is one JSON object."
        ) from error


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as JSON for messages, at most `limit` characters."""
    try:
        text = str(value) if isinstance(value, Refused) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # names that are not text, or a cycle
        text = f"a {type(value).__name__}"
    return shortened(text, limit)
