"""An agent's report: everything is on it, as text, and nothing is loaded or obeyed."""

from collections.abc import Sequence
from typing import Any

import pytest

from datamodules.corpus.records import Category, Event, TraceSplit
from datamodules.corpus.sources import PUBLISHED_TRACES_DIGESTS, load_corpus
from datamodules.corpus.traces import Candidate, ProposalKey, Trace, read_recorded, root_traces, traces_digest
from models.judging.judges import Verdict
from proactive.evaluation.evaluation_notes import notes
from proactive.evaluation.evaluation_report import evaluation_report
from proactive.evaluation.judged_events import (
    JudgedEvent,
    acceptance,
    evaluation_record,
    gated,
    judge_events,
    metrics_of,
)
from tests.helpers import PROACTIVEBENCH, needs_proactivebench
from tests.models.reporting.test_run_page import HOSTILE, Page, a_row

NAME = "$x_{1}$ <b>.json"  # neither a formula of the plot's nor a tag


def judged(candidates: Sequence[Sequence[Candidate]], gate: float | None = None) -> list[JudgedEvent]:
    """One trace; text is accepted if it is short, silence always; the gate says 0.4 of everything."""
    trace = Trace(NAME, tuple(Event(time="1", event=f"{HOSTILE} {n}") for n in range(len(candidates))), (False,) * 9)
    offers = {ProposalKey(NAME, step, c.proposal) for step, several in enumerate(candidates) for c in several}
    verdicts = {
        offer: Verdict(None if offer.proposal == "?" else len(offer.proposal or "") < 9, 0.25, HOSTILE)
        for offer in offers | {ProposalKey(NAME, step, None) for step in range(len(candidates))}
    }
    says = None if gate is None else dict.fromkeys(offers, Verdict(True, 0.4))
    return judge_events([trace], {NAME: candidates}, verdicts, says, gate or 0.0)


def record_of(events: list[JudgedEvent], **changes: Any) -> dict[str, Any]:
    record = evaluation_record(events, {"all": TraceSplit(files=(NAME,))})
    record |= {"agent": {"agent": "recorded", "source": HOSTILE}, "judge": {"judge": "endpoint", "model": HOSTILE}}
    record |= {"gate_is_judge": False, "baselines": {}, "gate": None, "traces_left_out": []}
    tokens = {"prompt_tokens": 1200, "completion_tokens": 34}
    record["usage"] = {"agent": {"requests": 3, "unreported": 1, **tokens, "cost": 0.5}}
    record["unfinished"] = {"agent": {"length": 2, "content_filter": 1}, "judge": {}}
    stamps = ("trained_on", "validated_on", "validation_unknown")
    record |= {f"{who}_{stamp}": [] for who in ("agent", "judge", "gate") for stamp in stamps}
    offers = {
        ProposalKey(event.trace.name, event.step, j.candidate.proposal): j.verdict
        for event in events
        for j in event.candidates
    }
    record |= {"acceptance": acceptance(offers, None)} | changes
    return record | {"notes": notes(record)}


TEXT, NULL, UNREAD = Candidate("Help.", "Help.", {"Thoughts": HOSTILE}), Candidate(None), Candidate(None, parsed=False)
LONG, UNJUDGED = Candidate(f"{HOSTILE} too long", None), Candidate("?", "?")


def test_the_notes_state_tokens_and_cost() -> None:
    said = record_of(judged([[TEXT]]))["notes"]
    assert "agent: 3 requests, 1,200 tokens in, 34 out, cost 0.5; 1 requests without reported tokens" in said


def test_the_report_shows_each_event_as_text() -> None:
    events = judged([[TEXT], [LONG], [NULL], [UNREAD], [UNJUDGED]])
    assert [event.outcome for event in events] == ["tp", "fp", "tn", "tn", "undecided"]
    record = record_of(events)
    page = Page(evaluation_report(record, events))
    assert page.tags.count("script") == 1  # the page's own
    assert not page.handlers
    assert all(loaded.startswith(("data:image/svg+xml;base64,", "#")) for loaded in page.loaded)
    for text in (HOSTILE, NAME, "Help.", "an answer that could not be parsed", "no verdict", "P 0.250"):
        assert text in page.text, text
    assert page.text.count(f"{HOSTILE} too long") == 1
    unfinished = "incomplete replies of the agent, which were not parsed: 2 length, 1 content_filter"
    for note in ("1 answers could not be parsed and count as null", "1 events have no verdict", unfinished):
        assert any(note in one for one in record["notes"])


@pytest.mark.parametrize(
    ("candidates", "flags"),
    [
        ([[TEXT], [LONG], [NULL], [UNREAD]], ["ALL SILENCES ARE ACCEPTED: 2 were judged"]),
        ([[TEXT], [TEXT]], ["ALL OFFERS ARE ACCEPTED: 2 were judged"]),
        (
            [[LONG], [LONG, NULL]],
            ["ALL OFFERS ARE REJECTED: 2 were judged", "ALL SILENCES ARE ACCEPTED: 1 were judged"],
        ),
        ([[TEXT], [LONG]], []),
    ],
)
def test_constant_decisions_of_a_judge_are_flagged(candidates: list[list[Candidate]], flags: list[str]) -> None:
    events = judged(candidates)
    record = record_of(events)
    found = [note for note in record["notes"] if note.startswith("ALL ")]
    assert [note.split(",")[0] for note in found] == flags
    page = Page(evaluation_report(record, events))
    assert all(flag in page.text for flag in flags)


def test_the_acceptance_rates_of_judge_and_people_are_shown() -> None:
    people = [a_row(0, Category.FALSE_ALARM), a_row(1, Category.CORRECT_DETECTION), a_row(2, Category.NON_RESPONSE)]
    verdicts = {ProposalKey(NAME, step, "a"): Verdict(step < 3) for step in range(4)} | {
        ProposalKey(NAME, 0, None): Verdict(None)
    }
    found = acceptance(verdicts, people)
    assert found["judge"] == {"offers": {"judged": 4, "accepted": 3}, "silences": {"judged": 0, "accepted": 0}}
    assert found["people"] == {"offers": {"judged": 2, "accepted": 1}, "silences": {"judged": 1, "accepted": 1}}
    said = record_of(judged([[TEXT]]), acceptance=found)["notes"]
    assert (
        "acceptance: the judge 75% of 4 offers and 0% of 0 silences; people 50% of 2 offers and 100% of 1 silences"
        in said
    )


def test_published_metrics_appear_only_with_the_published_traces() -> None:
    assert record_of(judged([[TEXT]]))["published"] == {}


@needs_proactivebench
@pytest.mark.parametrize("recorded", [False, True])
def test_the_published_traces_are_recognized_in_both_excerpts(recorded: bool) -> None:
    cuts = read_recorded(PROACTIVEBENCH / "traces" / "gpt-4o").traces if recorded else None
    traces = cuts or root_traces(load_corpus(str(PROACTIVEBENCH)))
    assert traces_digest(traces) in PUBLISHED_TRACES_DIGESTS
    assert traces_digest(traces[1:]) not in PUBLISHED_TRACES_DIGESTS


def test_all_candidates_are_shown_and_one_counts() -> None:
    events = judged([[LONG, TEXT], [NULL], [LONG, LONG]])
    assert [(event.outcome, event.deciding) for event in events] == [("tp", 1), ("tn", 0), ("fp", 0)]
    page = evaluation_report(record_of(events), events)
    assert page.count('class="candidate other"') == 2
    assert "By number of candidates" in page


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.5])
def test_the_report_of_a_gate_has_its_curve_and_the_held_back_proposals(threshold: float) -> None:
    candidates = [[TEXT], [LONG], [NULL]]
    events = judged(candidates, threshold)
    held = [bool(event.candidates[0].held_back) for event in events]
    assert held == [threshold > 0.4] * 2 + [False]
    assert [event.outcome for event in events] == (["tn"] * 3 if threshold > 0.4 else ["tp", "fp", "tn"])
    ungated = judged(candidates, 0.0)
    null = {ProposalKey(NAME, step, None): Verdict(True) for step in range(3)}
    curve = gated(ungated, null).curve()
    assert [point["tp"] + point["fp"] for point in curve] == [2, 0]
    gate = {"cost_ratio": 1.0, "threshold": threshold, "held_back": sum(held), "curve": curve}
    record = record_of(events, gate=gate | {"without_gate": metrics_of(ungated)}, gate_is_judge=True)
    page = Page(evaluation_report(record, events))
    assert "Trade-off of the gate" in page.text
    assert page.text.count("held back; silence") == sum(held)
    assert "THE GATE IS THE JUDGE" in page.text
