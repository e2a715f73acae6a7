"""Timelines: sources side by side, where they differ, and the file that an evaluation keeps of them."""

from pathlib import Path

import pytest

from datamodules.corpus.json_records import read_json
from datamodules.corpus.records import Event
from datamodules.errors import UserError
from models.reporting.timeline import (
    TIMELINE_FILE,
    ShownOffer,
    ShownStep,
    ShownTrace,
    ShownTraces,
    outcome,
    outcomes_of,
    timelines,
)

EVENTS = tuple(Event(time=str(1_717_377_997 + 5 * n), event=f"The user does {n}.") for n in range(2))
OFFER, SILENCE = ShownOffer("Help.", verdict=True, probability=0.75), ShownOffer(None)


def trace(*outcomes: str, name: str = "a b.json", events: tuple[Event, ...] = EVENTS) -> ShownTrace:
    offers = {"tp": OFFER, "fp": OFFER, "undecided": SILENCE, "offered": OFFER}
    steps = [ShownStep((offers[one],), one if one != "offered" else "undecided") for one in outcomes]
    return ShownTrace(name, events, tuple(steps))


def test_traces_with_equal_names_and_events_share_a_timeline() -> None:
    one, other = timelines([[trace("tp", "tp")], [trace("tp", "fp"), trace("tp", name="c.json", events=EVENTS[:1])]])
    assert (one.name, one.anchor, [line.differs for line in one.lines]) == ("a b.json", "a_b.json", [False, True])
    assert [line.outcomes for line in one.lines] == [["tp"], ["tp", "fp"]]
    assert [line.moment.gap for line in one.lines] == ["", "+5 s"]
    assert other.lines[0].steps[0] is None
    assert not other.lines[0].differs
    assert list(outcomes_of([one])) == ["tp", "fp"]


def test_other_excerpts_of_a_session_have_their_own_timelines() -> None:
    whole, cut = timelines([[trace("tp", "tp")], [trace("tp", events=EVENTS[1:])]])
    assert len({whole.anchor, cut.anchor}) == 2
    assert (len(whole.lines), len(cut.lines)) == (2, 1)


def test_without_verdicts_sources_differ_if_only_one_makes_an_offer() -> None:
    (one,) = timelines([[trace("undecided", "offered")], [trace("undecided", "undecided")]])
    assert [line.differs for line in one.lines] == [False, True]


def test_outcomes_of_offers_and_of_silence() -> None:
    found = [outcome(proposed, accepted) for proposed in (True, False) for accepted in (True, False, None)]
    assert found == ["tp", "fp", "undecided", "tn", "fn", "undecided"]


def test_a_timeline_is_read_back_from_its_file(tmp_path: Path) -> None:
    offer = ShownOffer("Help.", True, False, 0.25, 0.5, True, "Not now.", {"Thoughts": "Perhaps."}, False)
    kept = ShownTraces(notes=("A NOTE",), traces=(ShownTrace("a.json", EVENTS[:1], (ShownStep((offer,), "fp"),)),))
    file = tmp_path / TIMELINE_FILE
    file.write_text(kept.model_dump_json(), encoding="utf-8")
    read, _ = read_json(file, ShownTraces)
    assert read == kept
    file.write_text('{"notes": [], "traces": [{"name": 1}]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"timeline\.json, field traces"):
        read_json(file, ShownTraces)
