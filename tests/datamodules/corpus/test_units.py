"""Units of annotation, and both rules that make rows of answers, one of them against the published rows."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from datamodules.corpus.records import AnnotatedRow, Category, Event, history_digest
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.units import (
    Unit,
    UnitLabel,
    decide,
    majority_rows,
    published_rows,
    read_units,
    units_of_rows,
)
from datamodules.errors import UserError
from tests.helpers import PROACTIVEBENCH, needs_proactivebench

UNIT = Unit("a.json", (Event(time="1", event="The user reads."),), {"Sum up.": ("x",), "Translate.": ("y",)})


def said(text: str, *needs: bool) -> list[UnitLabel]:
    """Answers of annotators, a word each with a letter for each proposal: + accepts, - rejects."""
    words = text.split()
    return [
        UnitLabel(tuple(letter == "+" for letter in word), need)
        for word, need in zip(words, needs or [None] * len(words), strict=True)
    ]


def shown(rows: list[AnnotatedRow]) -> list[tuple]:
    return [(row.proposal, row.accepted, row.help_needed, row.annotation) for row in rows]


def test_the_majority_decides_each_proposal_and_silence() -> None:
    rows = majority_rows(UNIT, said("+- +- -+", True, True, False))
    assert shown(rows) == [
        (None, False, True, (False, False, True)),
        ("Sum up.", True, True, (True, True, False)),
        ("Translate.", False, True, (False, False, True)),
    ]
    assert [row.category for row in rows] == [
        Category.MISSED_NEED,
        Category.CORRECT_DETECTION,
        Category.FALSE_ALARM,
    ]


def test_unanimous_silence_yields_a_row_as_well() -> None:
    rows = majority_rows(UNIT, said("-- -- --", False, False, False))
    assert shown(rows)[0] == (None, True, False, (True, True, True))
    assert shown(published_rows(UNIT, said("-- -- --")))[0][0] is not None
    assert majority_rows(Unit("a", UNIT.history, {}), [UnitLabel((), need) for need in (False, True, False)])[
        0
    ].accepted


def test_the_need_for_help_follows_from_the_answers_about_it() -> None:
    """Everybody accepts a task, and most say that no help was needed: the published rule cannot tell that."""
    answers = said("+- -+ +-", False, False, True)
    assert majority_rows(UNIT, answers)[0].accepted
    assert {row.help_needed for row in majority_rows(UNIT, answers)} == {False}


def test_ties_have_no_row_until_somebody_adjudicates() -> None:
    answers = said("+- --", True, False)
    assert decide(answers) == [None, False, None]
    assert shown(majority_rows(UNIT, answers)) == [("Translate.", False, None, (False, False))]
    settled = majority_rows(UNIT, answers, UnitLabel((True, False), True))
    assert shown(settled) == [
        (None, False, True, (False, True)),
        ("Sum up.", True, True, (True, False)),
        ("Translate.", False, True, (False, False)),
    ]


def test_with_the_published_rule_four_annotators_can_give_two_rows_for_an_offer() -> None:
    rows = published_rows(UNIT, said("+- +- -- --"))
    assert shown(rows) == [
        (None, True, False, (False, False, True, True)),
        ("Sum up.", True, False, (True, True, False, False)),
        ("Sum up.", False, False, (True, True, False, False)),
        ("Translate.", False, False, (False, False, False, False)),
    ]


def recovered(unit: Unit, rows: list[AnnotatedRow]) -> tuple[Unit, list[UnitLabel]]:
    """The answers behind the published rows of a unit.

    Proposals on which two annotators split have no row. Where somebody who accepts something, as the row for silence
    says, accepts none of the others, there was such a one.
    """
    votes = {row.proposal: row.annotation for row in rows if row.proposal is not None}
    silent = next((row.annotation for row in rows if row.proposal is None), None)
    for number, none in enumerate(silent or ()):
        if not none and not any(said[number] for said in votes.values()):
            assert len(silent or ()) == 2
            votes[f"a proposal that annotator {number} accepted alone"] = (number == 0, number == 1)
    assert len({len(said) for said in votes.values()}) == 1
    return (
        Unit(unit.trace, unit.history, dict.fromkeys(votes, ())),
        [UnitLabel(accepted) for accepted in zip(*votes.values(), strict=True)],
    )


@needs_proactivebench
def test_the_published_rule_reproduces_exactly_the_published_rows() -> None:
    """Of 313 histories, all 1,749 rows, with annotations, need for help and categories."""
    corpus = load_corpus(str(PROACTIVEBENCH))
    by_history: dict[int, list[AnnotatedRow]] = defaultdict(list)
    for row in corpus.rows:
        by_history[row.history_digest].append(row)
    units = units_of_rows(corpus.rows)
    assert len(units) == 313
    made = []
    for unit in units:
        made += published_rows(*recovered(unit, by_history[history_digest(unit.history)]))
    assert sorted(json.dumps(row.published()) for row in made) == sorted(
        json.dumps(row.published()) for row in corpus.rows
    )


@needs_proactivebench
def test_rows_that_the_published_rule_omits_or_gets_wrong() -> None:
    corpus = load_corpus(str(PROACTIVEBENCH))
    by_history: dict[int, list[AnnotatedRow]] = defaultdict(list)
    for row in corpus.rows:
        by_history[row.history_digest].append(row)
    assert sum(all(row.proposal is not None for row in rows) for rows in by_history.values()) == 11
    needless = [row for row in corpus.train if row.proposal is None and row.accepted]
    assert (sum(not any(row.annotation) for row in needless), len(needless)) == (16, 149)


def trace(*steps: tuple[str, list | dict]) -> str:
    return json.dumps(
        [
            {"observation": {"time": str(n), "event": event}, "agent_response": response, "task_status": False}
            for n, (event, response) in enumerate(steps)
        ]
    )


def test_units_of_several_agents_are_merged_by_history(tmp_path: Path) -> None:
    for agent, first in (("one", "Sum up."), ("two", "Translate.")):
        folder = tmp_path / agent
        folder.mkdir()
        folder.joinpath("a.json").write_text(trace(("reads", [first, "Both."]), ("writes", [None])), encoding="utf-8")
        folder.joinpath("splits.json").write_text("{}", encoding="utf-8")
    first, second = read_units(tmp_path)
    assert first.offers == {"Sum up.": ("one",), "Both.": ("one", "two"), "Translate.": ("two",)}
    assert [event.event for event in second.history] == ["reads", "writes"]
    assert (second.trace, second.offers) == ("a.json", {})


def test_reference_proposals_of_the_test_set_are_candidates(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(trace(("reads", {"candidate_task": ["Sum up.", "Translate."]})), encoding="utf-8")
    (unit,) = read_units(file)
    assert list(unit.offers) == ["Sum up.", "Translate."]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("[", "a.json"),
        ("{}", "a.json: expected a JSON list"),
        (trace(("reads", [1])), "a.json, index 0, field agent_response: index 0"),
        (trace(("reads", {"candidate_task": [1]})), "a.json, index 0, field agent_response.candidate_task"),
    ],
)
def test_bad_traces_are_refused_by_file_and_field(tmp_path: Path, content: str, names: str) -> None:
    tmp_path.joinpath("a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=names.replace("[", r"\[")):
        read_units(tmp_path)


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no traces"):
        read_units(tmp_path)


@needs_proactivebench
def test_the_published_traces_are_units() -> None:
    recorded = read_units(PROACTIVEBENCH / "traces")
    assert (len(recorded), max(len(unit.offers) for unit in recorded)) == (227, 5)
    assert len(read_units(PROACTIVEBENCH / "test_data")) == 233
