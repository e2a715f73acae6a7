"""Judged proposals and their pairs, from annotated rows and from files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.preferences import (
    FIELDS,
    JudgedProposal,
    PreferenceRecord,
    judged_rows,
    open_preferences,
    preferences_of,
    read_preferences,
)
from datamodules.corpus.records import Event
from datamodules.corpus.sources import load_corpus
from datamodules.errors import UserError
from tests.datamodules.corpus.test_tables import WRITERS
from tests.helpers import PROACTIVEBENCH, needs_proactivebench

HISTORY = [{"time": "1.0", "event": "The user opens a file."}]


def judged(proposal: str | None, accepted: bool, event: str = "The user opens a file.", weight: float = 1) -> Any:
    return JudgedProposal((Event(time="1.0", event=event),), proposal, accepted, weight)


def test_each_accepted_proposal_is_paired_with_each_rejected_one_of_its_history() -> None:
    proposals = [judged("a", True), judged(None, True), judged("b", False, weight=2), judged("c", False, "other")]
    pairs = [(pair.chosen.proposal, pair.rejected.proposal, pair.weight) for pair in preferences_of(proposals)]
    assert pairs == [("a", "b", 2), (None, "b", 2)]


def test_two_accepted_proposals_and_contradictions_make_no_pair() -> None:
    assert preferences_of([judged("a", True), judged(None, True)]) == []
    assert preferences_of([judged("a", True), judged("a", False)]) == []


@needs_proactivebench
def test_pairs_of_the_published_rows() -> None:
    rows = judged_rows(load_corpus(str(PROACTIVEBENCH)).rows)
    pairs = preferences_of(rows)
    kinds = Counter((pair.chosen.proposal is None, pair.rejected.proposal is None) for pair in pairs)
    assert kinds == {(False, False): 1054, (False, True): 309, (True, False): 644}
    assert len({pair.chosen.history_digest for pair in pairs}) == 302
    assert Counter(row.accepted for row in rows) == {True: 683, False: 1066}


def records(source: Path) -> list[PreferenceRecord]:
    return read_preferences(open_preferences(str(source)))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_file_has_pairs_and_judgments(tmp_path: Path) -> None:
    path = write(
        tmp_path / "preferences.jsonl",
        {"history": HISTORY, "chosen": None, "rejected": "b", "source": "simulation", "weight": 0.5},
        {"history": HISTORY, "proposal": "c", "accepted": False},
    )
    pair, single = records(path)
    assert [(one.proposal, one.accepted, one.weight) for one in pair.judged] == [(None, True, 0.5), ("b", False, 0.5)]
    assert [(one.proposal, one.accepted, one.weight) for one in single.judged] == [("c", False, 1.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"history": HISTORY, "chosen": "a"}, "expected either chosen and rejected, or proposal and accepted"),
        ({"history": HISTORY, "chosen": "a", "rejected": "b", "accepted": True}, "expected either chosen and"),
        ({"history": HISTORY, "proposal": "a", "accepted": None}, "expected either chosen and rejected"),
        ({"history": HISTORY, "chosen": "a", "rejected": "a"}, "expected two different proposals"),
        ({"history": HISTORY, "chosen": None, "rejected": "null"}, "expected two different proposals"),
        ({"history": [], "chosen": "a", "rejected": "b"}, "field history: expected at least one event"),
        ({"history": HISTORY, "chosen": "a", "rejected": "b", "weight": 0}, "field weight"),
        ({"history": HISTORY, "chosen": " ", "rejected": "b"}, "field chosen: expected text, got a blank"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "field history"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_with_its_number(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"history": HISTORY, "proposal": "c", "accepted": False}, line)
    with pytest.raises(UserError, match="line 2") as error:
        records(path)
    assert message in error.value.what


RECORDS: list[dict[str, Any]] = [
    {"history": HISTORY, "chosen": None, "rejected": "b", "weight": 0.5},
    {"history": HISTORY, "chosen": "a", "rejected": "b, c"},
    {"history": HISTORY, "proposal": "c", "accepted": False, "source": "people"},
    {"history": HISTORY, "proposal": None, "accepted": True},
]


@pytest.mark.parametrize("name", ["p.csv", "p.parquet", "p.jsonl", "p.json", "folder/train.parquet"])
def test_tables_give_the_records_of_json_lines(name: str, tmp_path: Path) -> None:
    """All rows of a table have the same columns, so those of the other kind are empty."""
    expected = records(write(tmp_path / "expected.jsonl", *RECORDS))
    whole = [{field: record.get(field) for field in FIELDS} for record in RECORDS]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(whole))
    else:
        WRITERS[path.suffix[1:]](path, whole)
    found = records(path.parent if path.parent != tmp_path else path)
    assert found == expected
    assert [one.judged for one in found] == [one.judged for one in expected]


def test_what_is_not_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("history,chosen,rejected\n")
    pair = [{"history": HISTORY, "chosen": "a", "rejected": "b", "number": 7}]
    WRITERS["parquet"](tmp_path / "train.parquet", pair)
    tables = open_preferences(str(tmp_path))
    assert len(read_preferences(tables)) == 1
    assert tables.reading_notes(FIELDS, "preferences") == [
        f"{tmp_path / 'train.parquet'}: columns not read: number",
        f"{tmp_path / 'test.csv'}: not read, because preferences only train",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('history,chosen,rejected,weight\n"[]",a,b,much\n', 'line 2, field weight: expected a number, got "much"'),
        ('history,chosen\n"[""The user opens a file.""]",a\n', "expected either chosen and rejected"),
        ("prompt,chosen,rejected\nx,a,b\n", "p.csv has no column history; its columns: prompt, chosen, rejected"),
    ],
)
def test_a_cell_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError) as error:
        records(tmp_path / "p.csv")
    assert message in error.value.what


def test_a_source_without_a_table_that_trains_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("history,chosen,rejected\n")
    with pytest.raises(UserError, match=r"data\.preferences: .* has no table that trains"):
        open_preferences(str(tmp_path))
