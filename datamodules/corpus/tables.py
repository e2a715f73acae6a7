"""Tables of records: CSV, Parquet and JSON files, folders of them, and datasets of the Hugging Face hub.

A record maps columns to cells. What the cells hold is read elsewhere: annotated rows in `datamodules.corpus.columns`,
conversations in `datamodules.corpus.conversations`.
"""

import csv
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from datamodules.corpus.json_records import json_texts, parse_json, shown
from datamodules.errors import UserError, did_you_mean
from datamodules.escaping import error_text, shortened
from datamodules.files.hub import check_hub_connection
from datamodules.files.reading import MAX_RECORDS_BYTES, MAX_TEXT_BYTES, file_digest, open_file, text_lines

PAGE = "docs/how-to/own-data.md"
BATCH = 1000  # rows of a Parquet file or a dataset that are converted at once
SEPARATORS = ",;\t"  # of the cells of CSV: the one that the first line has most of
SPLITS = {"train": "train", "validation": "train", "valid": "train", "val": "train", "dev": "train", "test": "test"}
_SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?![A-Za-z0-9])")
_HUB_NAME = re.compile(
    r"(?P<repository>(?P<owner>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*)"
    r"(:(?P<configuration>[\w.-]+))?(@(?P<revision>[\w./-]+))?(#(?P<splits>[\w.,-]+))?",
    re.ASCII,
)
Cells = Iterator[tuple[str, Mapping[str, Any]]]  # of each row: its place, for messages, and its cells


@dataclass(frozen=True)
class Table:
    """A table, opened.

    Attributes:
        where: The file or the dataset, for messages.
        names: Names of its columns; of a JSON file the fields of its first record.
        records: Yields the place and the cells of each row, of at least the given columns.
    """

    where: str
    names: Sequence[str]
    records: Callable[[Sequence[str]], Cells]

    def unread(self, columns: Collection[str]) -> str:
        """Return the names of the columns that are not among the given ones, for messages; empty for none."""
        return shortened(", ".join(name or '""' for name in self.names if name not in columns), 200)

    def without(self, column: str) -> str:
        """Return the message that a column is missing, with a suggestion."""
        has = shortened(", ".join(self.names), 300) or "none"
        meant = did_you_mean(column, self.names)
        return f"{self.where} has no column {shortened(column, 80)}; its columns: {has}{meant}"


@dataclass(frozen=True)
class Tables:
    """The tables of a file, a folder or a dataset.

    Attributes:
        name: What they were opened by.
        splits: The tables by their split, one of `SPLITS`.
        files: The files.
        revision: The revision of a dataset of the hub, and after a # the splits that are read if they were named.
    """

    name: str
    splits: Mapping[str, Sequence[Table]]
    files: Sequence[Path] = ()
    revision: str | None = None

    def of(self, kind: str) -> list[Table]:
        """Return the tables of a kind, train or test. Those of validation train."""
        return [table for split, tables in self.splits.items() if SPLITS[split] == kind for table in tables]

    @property
    def origin(self) -> list[str]:
        """The revision of a dataset of the hub, in a sentence; empty for files."""
        return [] if self.revision is None else [f"{self.name}: revision {self.revision}"]

    def reading_notes(self, columns: Collection[str], what: str) -> list[str]:
        """Return what of the tables that train is read and what is not, in sentences.

        Args:
            columns: The columns that are read.
            what: What the records hold, in the plural.
        """
        unread = {table.where: table.unread(columns) for table in self.of("train")}
        notes = [*self.origin, *(f"{where}: columns not read: {names}" for where, names in unread.items() if names)]
        return notes + [f"{table.where}: not read, because {what} only train" for table in self.of("test")]

    @cached_property
    def digests(self) -> list[str]:
        """The digest of each file, or the revision."""
        return [*map(file_digest, self.files)] if self.revision is None else [self.revision]


def open_tables(source: str, option: str, limit: int | None = MAX_RECORDS_BYTES) -> Tables:
    """Open the tables of a source. Only the name of a dataset of the hub needs a network, or the cache.

    Args:
        source: A CSV, Parquet or JSON file, which trains; a folder of such files; or the name of a dataset of the hub,
            see `is_hub_name`.
        option: The option that names the source, for messages.
        limit: Maximum number of bytes of a CSV or JSON file; None for no limit.

    Raises:
        UserError: The source is something else, or cannot be read.
    """
    path = Path(source)
    if not path.is_dir() and not is_table(path) and is_hub_name(source):
        return _hub_tables(source, option)
    files = _table_files(path, option)
    opened = {
        split: [_OPENERS[file.suffix.lower()](file, option, limit) for file in some] for split, some in files.items()
    }
    return Tables(source, opened, [file for some in files.values() for file in some])


def open_training_tables(source: str, option: str, limit: int | None = MAX_RECORDS_BYTES) -> Tables:
    """Open a source as `open_tables` does, of which at least one table must train.

    Raises:
        UserError: It is no such source, or none of its tables trains.
    """
    tables = open_tables(source, option, limit)
    if not tables.of("train"):
        raise UserError(f"{option}: {source} has no table that trains", TRAIN_HINT)
    return tables


def is_table(path: Path) -> bool:
    """Return whether a path has the name of a table."""
    return path.suffix.lower() in _OPENERS


def is_hub_name(source: str) -> bool:
    """Return whether a source names a dataset of the hub. A path below a folder that exists does not.

    Such names are org/name, org/name:CONFIGURATION, org/name@REVISION and org/name#SPLIT.
    """
    found = _HUB_NAME.fullmatch(source)
    return found is not None and not Path(found["owner"]).exists()


def _table_files(path: Path, option: str) -> dict[str, list[Path]]:
    """Return the files of a source by the kind of their split.

    Those of a folder are in the folder or in its folder data/. Their names begin with the split, such as train.csv or
    train-00000-of-00002.parquet.
    """
    if is_table(path) and not path.is_dir():
        return {"train": [path]}
    if not path.is_dir():
        what, to_do = "no such file or folder", "Check the path"
        if path.exists():
            what, to_do = f"expected a folder, or a name that ends in {ENDINGS}", "Unpack, convert or rename it"
        raise UserError(f"{option}: {path}: {what}", f"{to_do}; {PAGE} shows what can be read.")
    found: dict[str, list[Path]] = {}
    for file in sorted(file for place in (path, path / "data") for file in place.glob("*") if is_table(file)):
        split = _SPLIT.match(file.name)
        if split is not None:
            found.setdefault(split[1], []).append(file)
        elif file.suffix != ".json":  # datasets keep notes about themselves in JSON files
            raise UserError(
                f"{option}: {file} says no split in its name",
                f"Rename it to train{file.suffix} or test{file.suffix}, or give the file instead of the folder.",
            )
    for split_name, files in found.items():
        if len({file.suffix for file in files}) > 1:
            raise UserError(
                f"{option}: {path} has {split_name} in different formats: {', '.join(file.name for file in files)}",
                "Keep one of them.",
            )
    return {name: found[name] for name in SPLITS if name in found}


def _open_csv(path: Path, option: str, limit: int | None) -> Table:
    """Open a CSV file as in RFC 4180: double quotes, a header. An empty cell is null."""
    with open_file(path, limit, option) as file:
        first = next((line for _, line in text_lines(file, path)), "")
    separator = max(SEPARATORS, key=first.count)

    def lines(file: IO[bytes]) -> Iterator[str]:
        return (line for _, line in text_lines(file, path, keep_ends=True))

    def parsed(file: IO[bytes]) -> Iterator[tuple[str, list[str]]]:
        csv.field_size_limit(MAX_TEXT_BYTES)  # of the process; by default 128 KiB, less than a long history
        reader = csv.reader(lines(file), strict=True, delimiter=separator)
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{where}: expected CSV: {error}",
                    "Quote cells that hold separators, quotes or line breaks; end lines with line feeds.",
                ) from error
            if cells is None:
                return
            if cells:  # not a blank line
                yield where, cells

    with open_file(path, limit, option) as file:
        header = [name.strip() for name in next((cells for _, cells in parsed(file)), [])]
    _refuse_unclear(header, path, option)

    def records(wanted: Sequence[str]) -> Cells:
        with open_file(path, limit, option) as file:
            rows = parsed(file)
            next(rows, None)
            for where, cells in rows:
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: expected {len(header)} cells as in the first line, got {len(cells)}",
                        "Quote cells that hold separators, quotes or line breaks.",
                    )
                named = zip(header, cells, strict=True)
                yield where, {name: cell or None for name, cell in named if name in wanted}

    return Table(str(path), header, records)


def _open_json(path: Path, option: str, limit: int | None) -> Table:
    """Open a file of one JSON object per line, or of a JSON list of objects."""

    def records(wanted: Sequence[str]) -> Cells:
        with open_file(path, limit, option) as file:
            for where, text in json_texts(file, path):
                content = parse_json(text, where)
                if not isinstance(content, dict):
                    raise UserError(
                        f"{where}: expected a JSON object, got {shown(content)}", "Write each record as an object."
                    )
                yield where, content

    return Table(str(path), next((list(content) for _, content in records(())), []), records)


def _open_parquet(path: Path, option: str, limit: int | None) -> Table:
    import pyarrow
    from pyarrow import parquet

    def opened() -> Any:
        with open_file(path, None, option):  # only regular files
            pass
        try:
            return parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{option}: {path}: expected a Parquet file: {error_text(error, 200)}", "Write it again."
            ) from error

    with opened() as file:
        names = list(file.schema_arrow.names)
    _refuse_unclear(names, path, option)

    def records(wanted: Sequence[str]) -> Cells:
        with opened() as file:
            chosen = [name for name in names if name in wanted]
            yield from _numbered(file.iter_batches(BATCH, columns=chosen), str(path))

    return Table(str(path), names, records)


def _refuse_unclear(names: Sequence[str], path: Path, option: str) -> None:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{option}: {path} has two columns {shortened(twice, 80)}", "Rename one of them.")


_OPENERS: Mapping[str, Callable[[Path, str, int | None], Table]] = {
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".parquet": _open_parquet,
    ".json": _open_json,
    ".jsonl": _open_json,
    ".ndjson": _open_json,
}
ENDINGS = f"{', '.join(list(_OPENERS)[:-1])} or {list(_OPENERS)[-1]}"
TRAIN_HINT = f"The name of such a file begins with train, and ends in {ENDINGS}; {PAGE} shows the layouts."


def _hub_tables(name: str, option: str) -> Tables:
    """Load a dataset of the Hugging Face hub through the cache of `datasets`, which runs no code of a dataset.

    Splits after a # are read alone. Those of them whose name says nothing train.

    Raises:
        UserError: It cannot be loaded, for example without a network, or has a split whose name says nothing and that
            was not asked for, or has not one that was.
    """
    import datasets
    from datasets.utils.logging import set_verbosity_error
    from huggingface_hub.utils import logging as hub_logging

    set_verbosity_error()
    hub_logging.set_verbosity_error()  # it tells of each retry
    found = _HUB_NAME.fullmatch(name)
    assert found is not None
    datasets.config.HF_HUB_OFFLINE = not check_hub_connection()
    try:
        builder = datasets.load_dataset_builder(found["repository"], found["configuration"], revision=found["revision"])
        builder.download_and_prepare()
        parts = builder.as_dataset()
    except Exception as error:  # `datasets` does not wrap the errors of its HTTP client, nor those of its readers
        said = error_text(error, 300) or type(error).__name__
        hint = "Check the name and the network, or give a folder, or a CSV, Parquet or JSON file."
        if choices := re.search(r"(?i)available(?: configs)?: (\[[^\]]*\])", said):
            said = f"it has the configurations {choices[1]}"
            hint = f"Name one: {found['repository']}:CONFIGURATION."
        raise UserError(
            f"{option}: {name} is no folder, and it cannot be loaded as a dataset of the Hugging Face hub: {said}", hint
        ) from error
    chosen = dict.fromkeys(found["splits"].split(",") if found["splits"] else parts)
    splits: dict[str, list[Table]] = {}
    for split in chosen:
        if split not in parts:
            raise UserError(
                f"{option}: {name} has no split {split or 'without a name'}", f"It has these: {', '.join(parts)}."
            )
        kind = _SPLIT.match(split)
        if kind is None and not found["splits"]:
            raise UserError(
                f"{option}: {name} has the splits {', '.join(parts)}; {split} is not known",
                f"A split's name begins with one of {', '.join(SPLITS)}. To read {split} alone, give {name}#{split}.",
            )
        table = _hub_table(f"{name.partition('#')[0]}, split {split}", parts[split])
        splits.setdefault(kind[1] if kind else "train", []).append(table)
    revision = f"{builder.hash}#{found['splits']}" if found["splits"] else str(builder.hash)
    return Tables(name, splits, revision=revision)


def _hub_table(where: str, part: Any) -> Table:
    def records(wanted: Sequence[str]) -> Cells:
        chosen = part.select_columns([column for column in part.column_names if column in wanted])
        return _numbered(chosen.with_format("arrow").iter(BATCH), where)

    return Table(where, part.column_names, records)


def _numbered(batches: Iterable[Any], where: str) -> Cells:
    """Yield the rows of batches of Arrow, counted from 1, with cells as JSON files hold them."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            readers = {field.name: _reader(field.type, where) for field in batch.schema}
            for cells in batch.to_pylist():
                number += 1
                yield f"{where}, row {number}", {name: readers[name](cell) for name, cell in cells.items()}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: cannot be read: {error_text(error, 200)}", "Write it again.") from error


def _reader(kind: Any, where: str) -> Callable[[Any], Any]:
    """Return what converts a cell of a type of Arrow.

    It leaves out fields of structs that are null, because Arrow adds them to structs that do not have them. It parses
    values that Arrow keeps as JSON, because they are of several types.
    """
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType) and kind.extension_name == "arrow.json":
        return lambda text: None if text is None else parse_json(text, where)
    if types.is_struct(kind):
        fields = {field.name: _reader(field.type, where) for field in kind}
        return lambda struct: (
            struct and {name: fields[name](value) for name, value in struct.items() if value is not None}
        )
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _reader(kind.value_type, where)
        return lambda items: items and [item(value) for value in items]
    return lambda value: value
