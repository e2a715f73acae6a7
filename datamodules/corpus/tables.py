"""Tables of annotated rows: CSV, Parquet and JSONL files, folders of them, and datasets of the Hugging Face hub."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from datamodules.corpus.columns import Columns, Table, table_rows, unread_columns
from datamodules.corpus.json_records import parse_json, shown
from datamodules.corpus.records import AnnotatedRow
from datamodules.errors import UserError
from datamodules.escaping import error_text, shortened
from datamodules.files.reading import MAX_RECORDS_BYTES, MAX_TEXT_BYTES, open_file, text_lines

BATCH = 1000  # rows of a Parquet file or a dataset that are converted at once
SPLITS = {"train": "train", "validation": "train", "valid": "train", "val": "train", "dev": "train", "test": "test"}
_HUB_NAME = re.compile(
    r"(?P<repository>(?P<owner>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*)"
    r"(:(?P<configuration>[\w.-]+))?(@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
Cells = Iterator[tuple[str, Mapping[str, Any]]]  # of each row: its place, for messages, and its cells


def is_table(path: Path) -> bool:
    """Return whether a path has the name of a table."""
    return path.suffix in _OPENERS


def is_hub_name(root: str) -> bool:
    """Return whether a root names a dataset of the hub. A path below a folder that exists does not."""
    found = _HUB_NAME.fullmatch(root)
    return found is not None and not Path(found["owner"]).exists()


def table_files(folder: Path) -> dict[str, list[Path]]:
    """Return the tables of a folder, or of its folder data/, by the name of their split, such as train.

    The name of a table begins with its split, such as train.csv or train-00000-of-00002.parquet.

    Raises:
        UserError: A table has another name, or a split has files of different formats.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(path for place in (folder, folder / "data") for path in place.glob("*") if is_table(path)):
        split = re.match(rf"({'|'.join(SPLITS)})(?![A-Za-z0-9])", path.name)
        if split is None:
            raise UserError(
                f"data.root: {path} says no split in its name",
                f"Rename it to train{path.suffix} or test{path.suffix}, or give the file instead of the folder.",
            )
        found.setdefault(split[1], []).append(path)
    for split_name, paths in found.items():
        if len({path.suffix for path in paths}) > 1:
            raise UserError(
                f"data.root: {folder} has {split_name} in different formats: {', '.join(p.name for p in paths)}",
                "Keep one of them.",
            )
    return {name: found[name] for name in SPLITS if name in found}


def read_tables(
    tables: Mapping[str, Sequence[Table]], columns: Columns, where: str
) -> tuple[list[AnnotatedRow], list[AnnotatedRow], list[str]]:
    """Read tables by the name of their split.

    Args:
        tables: The tables of each split.
        columns: Which columns hold the fields of a row.
        where: The root, for messages.

    Returns:
        The training rows, the test rows, and what was read, in sentences.

    Raises:
        UserError: There is another split or no row, or a table does not fit.
    """
    if unknown := [name for name in tables if name not in SPLITS]:
        raise UserError(
            f"data.root: {where} has the splits {', '.join(tables)}; {unknown[0]} is not known",
            f"Use splits of these names: {', '.join(SPLITS)}.",
        )
    rows: dict[str, list[AnnotatedRow]] = {"train": [], "test": []}
    notes = []
    for split, parts in tables.items():
        for table in parts:
            read = list(table_rows(table, columns))
            rows[SPLITS[split]] += read
            how = "" if split in rows else f" ({split}), which train, because every run makes its own validation split"
            ignored = unread_columns(table, columns)
            left = f"; columns not read: {shortened(', '.join(ignored), 200)}" if ignored else ""
            notes.append(f"{table.where}: {len(read)} rows{how}{left}")
    if not rows["train"]:
        raise UserError(f"data.root: {where} holds no training row", "Give a table with rows, named train.")
    return rows["train"], rows["test"], [*notes, _scenes_note(rows["train"] + rows["test"], bool(rows["test"]))]


def _scenes_note(rows: Sequence[AnnotatedRow], has_test: bool) -> str:
    """Say which splits are possible."""
    scenes = len({row.scene for row in rows})
    told = (
        "rows whose histories begin with the same event are one scene"
        if rows[0].stated_scene is None
        else "named by the column of scenes"
    )
    by_scene = f"by_scene with 3 to {scenes} folds" if scenes >= 3 else "not by_scene, which needs 3 scenes"
    published = "published" if has_test else "not published, which needs test rows"
    return f"{scenes} scenes ({told}); possible splits: {by_scene}; {published}"


def open_table(path: Path) -> Table:
    """Open a CSV, Parquet or JSONL file.

    Raises:
        UserError: It cannot be read, or has no or unclear columns.
    """
    return _OPENERS[path.suffix](path)


def _open_csv(path: Path) -> Table:
    """Open a CSV file as in RFC 4180: commas, double quotes, a header. An empty cell is null."""

    def lines(file: IO[bytes]) -> Iterator[str]:
        return (line for _, line in text_lines(file, path, keep_ends=True))

    def parsed(file: IO[bytes]) -> Iterator[tuple[str, list[str]]]:
        csv.field_size_limit(MAX_TEXT_BYTES)  # of the process; by default 128 KiB, less than a long history
        reader = csv.reader(lines(file), strict=True)
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{where}: expected CSV: {error}", "Quote cells that hold commas, quotes or line breaks."
                ) from error
            if cells is None:
                return
            if cells:  # not a blank line
                yield where, cells

    with open_file(path, MAX_RECORDS_BYTES, "data.root") as file:
        header = next((cells for _, cells in parsed(file)), [])
    _refuse_unclear(header, path)

    def records(wanted: Sequence[str]) -> Cells:
        with open_file(path, MAX_RECORDS_BYTES, "data.root") as file:
            rows = parsed(file)
            next(rows)
            for where, cells in rows:
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: expected {len(header)} cells as in the first line, got {len(cells)}",
                        "Quote cells that hold commas, quotes or line breaks.",
                    )
                named = zip(header, cells, strict=True)
                yield where, {name: cell or None for name, cell in named if name in wanted}

    return Table(str(path), header, records)


def _open_jsonl(path: Path) -> Table:
    def parsed(file: IO[bytes]) -> Cells:
        for where, line in text_lines(file, path):
            if line.strip():
                content = parse_json(line, where)
                if not isinstance(content, dict):
                    raise UserError(f"{where}: expected a JSON object, got {shown(content)}", "Write one row a line.")
                yield where, content

    def records(wanted: Sequence[str]) -> Cells:
        with open_file(path, MAX_RECORDS_BYTES, "data.root") as file:
            yield from parsed(file)

    with open_file(path, MAX_RECORDS_BYTES, "data.root") as file:
        first = next((list(content) for _, content in parsed(file)), [])
    return Table(str(path), first, records)


def _open_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    def opened() -> Any:
        with open_file(path, None, "data.root"):  # only regular files
            pass
        try:
            return parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"data.root: {path}: expected a Parquet file: {error_text(error, 200)}", "Write it again."
            ) from error

    with opened() as file:
        names = list(file.schema_arrow.names)
    _refuse_unclear(names, path)

    def records(wanted: Sequence[str]) -> Cells:
        with opened() as file:
            try:
                yield from _numbered(
                    file.iter_batches(BATCH, columns=[name for name in names if name in wanted]), str(path)
                )
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read: {error_text(error, 200)}", "Write it again.") from error

    return Table(str(path), names, records)


def hub_tables(name: str) -> tuple[dict[str, list[Table]], str]:
    """Load a dataset of the Hugging Face hub through the cache of `datasets`, which runs no code of a dataset.

    Args:
        name: Such as org/name, org/name:CONFIGURATION or org/name@REVISION; see `is_hub_name`.

    Returns:
        The tables by the name of their split, and the revision.

    Raises:
        UserError: It cannot be loaded, for example without a network.
    """
    import datasets
    from datasets.utils.logging import set_verbosity_error
    from huggingface_hub.utils import logging as hub_logging

    set_verbosity_error()
    hub_logging.set_verbosity_error()  # it tells of each retry
    found = _HUB_NAME.fullmatch(name)
    assert found is not None
    try:
        builder = datasets.load_dataset_builder(found["repository"], found["configuration"], revision=found["revision"])
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as error:  # `datasets` does not wrap the errors of its HTTP client, nor those of its readers
        said = error_text(error, 300) or type(error).__name__
        hint = "Check the name and the network, or give a folder, or a CSV, Parquet or JSONL file."
        if choices := re.search(r"available configs: (\[[^\]]*\])", said):
            said = f"it has several configurations: {choices[1]}"
            hint = f"Name one: {found['repository']}:CONFIGURATION."
        raise UserError(
            f"data.root: {name} is no folder, and it cannot be loaded as a dataset of the Hugging Face hub: {said}",
            hint,
        ) from error
    return {split: [_hub_table(name, split, part)] for split, part in splits.items()}, str(builder.hash)


def _hub_table(name: str, split: str, part: Any) -> Table:
    where = f"{name}, split {split}"

    def records(wanted: Sequence[str]) -> Cells:
        chosen = part.select_columns([column for column in part.column_names if column in wanted])
        return _numbered(chosen.with_format("arrow").iter(BATCH), where)

    return Table(where, part.column_names, records)


def _numbered(batches: Iterable[Any], where: str) -> Cells:
    """Yield the rows of batches of Arrow, counted from 1."""
    number = 0
    for batch in batches:
        for cells in batch.to_pylist():
            number += 1
            yield f"{where}, row {number}", cells


def _refuse_unclear(names: Sequence[str], path: Path) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"data.root: {path} has two columns {shortened(twice, 80)}", "Rename one of them.")


_OPENERS = {".csv": _open_csv, ".parquet": _open_parquet, ".jsonl": _open_jsonl}
