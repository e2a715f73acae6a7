"""Tables: real files of each format, folders of them, and what is wrong with others."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from datamodules.corpus.columns import Columns
from datamodules.corpus.sources import Corpus, load_corpus, rows_digest
from datamodules.corpus.tables import is_hub_name
from datamodules.errors import UserError
from tests.datamodules.conftest import few_examples

COLUMNS = Columns("events", "offer", "ok", "votes", scene="session")
ROW: dict[str, Any] = {
    "events": [{"time": "1", "event": "opens a file"}],
    "offer": "Help.",
    "ok": True,
    "votes": [True, False],
    "session": "s",
}
Rows = Sequence[dict[str, Any]]


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            cells = [row[name] for name in rows[0]]
            writer.writerow(json.dumps(cell) if isinstance(cell, list) else cell for cell in cells)


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: Rows) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}
each_format = pytest.mark.parametrize("suffix", WRITERS)


def written(folder: Path, suffix: str, rows: Rows, name: str = "rows") -> str:
    path = folder / f"{name}.{suffix}"
    WRITERS[suffix](path, rows)
    return str(path)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip).map(lambda text: f"a{text}")
EVENT = st.fixed_dictionaries({"time": st.one_of(TEXT, st.integers(0, 2**40).map(str)), "event": TEXT})
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "events": st.lists(EVENT, min_size=1, max_size=3),
            "offer": st.none() | TEXT,
            "ok": st.booleans(),
            "votes": st.lists(st.booleans(), max_size=3),
            "session": TEXT,
        }
    ),
    min_size=1,
    max_size=5,
)


@few_examples
@given(rows=ROWS)
def test_the_same_rows_in_each_format_give_the_same_records(
    rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    found = [load_corpus(written(folder, suffix, rows), columns=COLUMNS) for suffix in WRITERS]
    assert [row.proposal for row in found[0].train] == [row["offer"] for row in rows]
    assert found[0].train == found[1].train == found[2].train
    assert len({rows_digest(corpus.train) for corpus in found}) == 1


def test_what_was_read_is_told(tmp_path: Path) -> None:
    root = written(tmp_path, "csv", [{**ROW, "user": "u", "id": 1, "session": name, "": 7} for name in "abc"])
    assert load_corpus(root, columns=COLUMNS).notes == (
        f'{root}: 3 rows; columns not read: user, id, ""',
        "2 training rows repeat history, proposal and judgment of another one",
        "3 scenes (named by the column of scenes); possible splits: by_scene with 3 to 3 folds; "
        "not published, which needs test rows",
    )
    corpus = load_corpus(root, columns=Columns("events", "offer", "ok", "votes"))
    assert corpus.notes[-1].startswith(
        "1 scenes (rows whose histories begin with the same event are one scene); possible splits: not by_scene"
    )


def test_files_of_json_are_lists_or_lines(tmp_path: Path) -> None:
    rows = [{**ROW, "offer": offer} for offer in ("a", None)]
    expected = load_corpus(written(tmp_path, "jsonl", rows), columns=COLUMNS).train
    for name, text in {"a.json": json.dumps(rows, indent=1), "a.ndjson": "\n\n".join(map(json.dumps, rows))}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_corpus(str(tmp_path / name), columns=COLUMNS).train == expected


@pytest.mark.parametrize("separator", ",;\t")
@pytest.mark.parametrize(("name", "line_end", "encoding"), [("a.CSV", "\r\n", "utf-8-sig"), ("a.tsv", "\n", "utf-8")])
def test_dialects_of_csv(tmp_path: Path, separator: str, name: str, line_end: str, encoding: str) -> None:
    """As spreadsheets write them: with a byte order mark, with semicolons, with columns that have no name."""
    path = tmp_path / name
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=separator, lineterminator=line_end)
        writer.writerow([" events", "offer ", "ok", "votes", "session", "", ""])
        writer.writerow([json.dumps(ROW["events"]), "Help; or, wait.", "TRUE", "[1, 0]", "s", "", ""])
        writer.writerow([])
        writer.writerow([json.dumps(ROW["events"]), "", "FALSE", "", "", "", ""])
    first, second = load_corpus(str(path), columns=COLUMNS).train
    assert (first.proposal, first.accepted, first.annotation) == ("Help; or, wait.", True, (True, False))
    assert (second.proposal, second.accepted, second.annotation, second.stated_scene) == (None, False, (), None)


def test_integers_that_pandas_made_floats_are_read(tmp_path: Path) -> None:
    """A column of integers with an empty cell is a column of floats."""
    rows = [{**ROW, "ok": 1.0, "session": 7.0, "help_needed": 1.0}, {**ROW, "ok": 0.0, "session": None}]
    first, second = load_corpus(written(tmp_path, "parquet", rows), columns=COLUMNS).train
    assert (first.accepted, first.stated_scene, first.help_needed) == (True, "7", True)
    assert (second.accepted, second.stated_scene, second.help_needed) == (False, None, None)


def test_fields_that_arrow_adds_to_structs_are_left_out(tmp_path: Path) -> None:
    """Arrow gives all structs of a column the fields of all, so a note of one event is a null of the others."""
    events = [{**event, "app": None} for event in ROW["events"]]
    [row] = load_corpus(written(tmp_path, "parquet", [{**ROW, "events": events}]), columns=COLUMNS).train
    assert row == load_corpus(written(tmp_path, "jsonl", [ROW]), columns=COLUMNS).train[0]


def test_values_that_arrow_keeps_as_json_are_read(tmp_path: Path) -> None:
    """So `datasets` writes a column whose cells are of several types."""
    offers = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['"Help."', "null", None]))
    other = {name: [cell] * 3 for name, cell in ROW.items() if name != "offer"}
    parquet.write_table(pyarrow.table({**other, "offer": offers}), tmp_path / "rows.parquet")
    found = load_corpus(str(tmp_path / "rows.parquet"), columns=COLUMNS)
    assert [row.proposal for row in found.train] == ["Help.", None, None]


@each_format
def test_a_folder_of_train_and_test(tmp_path: Path, suffix: str) -> None:
    for name, offers in {"train": "ab", "validation": "c", "test": "d"}.items():
        written(tmp_path, suffix, [{**ROW, "offer": offer} for offer in offers], name)
    corpus = load_corpus(str(tmp_path), columns=COLUMNS)
    assert [row.proposal for row in corpus.train] == ["a", "b", "c"]
    assert [row.proposal for row in corpus.test] == ["d"]
    assert "validation), which train, because every run makes its own validation split" in " ".join(corpus.notes)


def test_parts_of_a_split_in_a_folder_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, offer in enumerate("ab"):
        written(tmp_path / "data", "parquet", [{**ROW, "offer": offer}], f"train-0000{number}-of-00002")
    assert [row.proposal for row in load_corpus(str(tmp_path), columns=COLUMNS).train] == ["a", "b"]


def refused(root: Path | str, columns: Columns = COLUMNS) -> UserError:
    with pytest.raises(UserError) as caught:
        load_corpus(str(root), columns=columns)
    return caught.value


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "has no reward_data/train_data.jsonl, and no table that trains" in refused(tmp_path).what
    first = written(tmp_path, "csv", [ROW], "mine")
    error = refused(tmp_path)
    assert error.what == f"data.root: {first} says no split in its name"
    assert "train.csv" in error.hint
    os.rename(first, tmp_path / "trainees.csv")  # begins with a split, and is none
    assert "says no split" in refused(tmp_path).what
    os.rename(tmp_path / "trainees.csv", tmp_path / "train.csv")
    written(tmp_path, "jsonl", [ROW], "train")
    assert "has train in different formats: train.csv, train.jsonl" in refused(tmp_path).what
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.csv").rename(tmp_path / "test.csv")
    assert "no table that trains" in refused(tmp_path).what


@each_format
def test_the_place_of_a_bad_cell_is_named(tmp_path: Path, suffix: str) -> None:
    rows = [{**ROW, "offer": "over\ntwo lines", "ok": 1}, {**ROW, "ok": 2}]
    root = written(tmp_path, suffix, rows)
    place = {"csv": "line 4", "jsonl": "line 2", "parquet": "row 2"}[suffix]
    assert refused(root).what.startswith(f"{root}, {place}, field ok: expected one of true, false, yes, no, 1, 0")


@each_format
def test_a_missing_file_column_or_row_is_named(tmp_path: Path, suffix: str) -> None:
    assert f"{tmp_path}/gone.{suffix}: No such file" in refused(tmp_path / f"gone.{suffix}").what
    root = written(tmp_path, suffix, [ROW])
    error = refused(root, Columns("events", "offers", "judgment"))
    assert error.what == f"data.root: {root} has no column offers; its columns: {', '.join(ROW)}; did you mean offer?"
    error = refused(root, Columns("events", "offer", "judgment"))
    assert error.what == f"data.root: {root} has no column judgment; its columns: {', '.join(ROW)}"
    assert "--data.columns.accepted" in error.hint


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.csv", b"", "has no column events; its columns: none"),
        ("a.csv", b"events,offer,ok,votes,session\n", "holds no training row"),
        ("a.csv", b"events,offer,ok,ok\n", "has two columns ok"),
        ("a.csv", b"events,offer,ok,votes,session\n[],x\n", "line 2: expected 5 cells as in the first line, got 2"),
        ("a.csv", b'events,offer,ok,votes,session\n[],"x\n', "line 2: expected CSV"),
        ("a.csv", b'events,offer,ok,votes,session\n[],"x"y,1,,\n', "line 2: expected CSV"),
        ("a.csv", b"events,offer,ok,votes,session\n[],\xff,1,,\n", "line 2: is not UTF-8"),
        ("a.jsonl", b"", "has no column events; its columns: none"),
        ("a.csv", "events,offer,ok,votes,session\n[],ä,1,,\n".encode("utf-16"), "line 1: is not UTF-8"),
        ("a.csv", b"events,offer,ok,votes,session\r[],x,1,,\r", "line 1: expected CSV: new-line character"),
        ("a.jsonl", b"[1]\n", "index 0: expected a JSON object, got 1"),
        ("a.jsonl", b"1\n", "line 1: expected a JSON object, got 1"),
        ("a.jsonl", b'{"events": \n', "line 1: expected JSON: Expecting value (character 12)"),
        ("a.jsonl", json.dumps(ROW).encode() + b'\n{"events": [1, ', "line 2: expected JSON"),
        ("a.json", json.dumps(ROW, indent=1).encode(), "line 1: expected JSON"),
        ("a.jsonl", json.dumps(ROW).encode() + b'\n{"events": []}\n', "line 2, field offer: Field required"),
        ("a.parquet", b"PAR1 no", "expected a Parquet file"),
        ("a.txt", b"text", "expected a folder, or a name that ends in .csv, .tsv, .parquet, .json, .jsonl or .ndjson"),
        ("a.jsonl.gz", b"\x1f\x8b", "expected a folder, or a name that ends in"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert named in error.what
    assert name in error.what


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = Path(written(tmp_path, "parquet", [{**ROW, "offer": f"offer {n}"} for n in range(500)]))
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)
    assert str(path) in refused(path).what


def test_a_long_cell_of_csv_is_read(tmp_path: Path) -> None:
    events = [{"time": "1", "event": "x" * 300_000}]
    [row] = load_corpus(written(tmp_path, "csv", [{**ROW, "events": events}]), columns=COLUMNS).train
    assert len(row.history[0].event) == 300_000


def test_columns_are_for_tables_only(root: Path) -> None:
    for other in ("embedded", str(root)):
        assert refused(other).what.startswith(f"data.columns: {other} is no table")
    assert isinstance(load_corpus(str(root)), Corpus)


def test_names_of_the_hub_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert all(
        map(
            is_hub_name,
            ("org/name", "org/name@main", "org/name:a-b", "o-1/n.a_m-e:c@refs/pr/1", "org/name#a,b-c", "o/n:c@r#s"),
        )
    )
    assert not any(map(is_hub_name, ("name", "./name", "/org/name", "../name", "a/b/c", "data/name", "org/na me")))
    assert refused("data/name").what == "data.root: data/name: no such file or folder"
