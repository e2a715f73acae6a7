"""An evaluation of an agent, from its answers to the folder that shows them.

Answers and verdicts are logged as they come, so a killed evaluation goes on in its folder.
"""

import collections
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from callbacks.evaluation_record import (
    JudgedEvent,
    acceptance,
    evaluation_record,
    figures,
    figures_csv,
    gated,
    judge_events,
    judged_files,
    notes,
)
from callbacks.evaluation_report import evaluation_report
from callbacks.files import METRICS_FILE, REPORT_FILE, write_atomically
from datamodules.records import AnnotatedRow, TraceSplit
from datamodules.traces import Answers, Offer, Trace, traces_digest
from models.agents import Agent, AlwaysPropose, EndpointAgent, LocalAgent, NeverPropose
from models.endpoint import AnswerLog, Counter
from models.gate import gate_threshold
from models.judges import EndpointJudge, Judge, RewardJudge

ANSWERS_FILE = "answers.jsonl"
VERDICTS_FILE = "verdicts.jsonl"
FIGURES_FILE = "figures.csv"
JUDGED = "judged"


@dataclass(frozen=True)
class Evaluation:
    """Everything that an evaluation needs, checked, before anything is asked or written."""

    traces: list[Trace]
    splits: dict[str, TraceSplit]
    agent: Agent
    judge: Judge
    gate: RewardJudge | None
    cost_ratio: float
    stamps: dict[str, Any]
    people: list[AnnotatedRow] | None  # annotated rows of the traces' scenes; of all scenes where they have none

    @property
    def suffix(self) -> str:
        """What marks the files whose layout has no room for a stamp."""
        marks = {
            "trained_on": "-contaminated",
            "validated_on": "-validated-on",
            "validation_unknown": "-validation-unknown",
        }
        found = [
            mark
            for stamp, mark in marks.items()
            if any(self.stamps[f"{who}_{stamp}"] for who in ("agent", "judge", "gate"))
        ]
        return "".join([*found, *["-gate-is-judge"] * self.stamps["gate_is_judge"]])


def carry_out(evaluation: Evaluation, folder: Path, count: Counter) -> dict[str, Any]:
    """Ask, judge, and write the folder.

    Args:
        evaluation: What `prepare` made.
        folder: Where to; what a former call asked is taken from there.
        count: Shows progress.

    Returns:
        The record, as in the folder's metrics.json.
    """
    traces, agent, judge, gate = evaluation.traces, evaluation.agent, evaluation.judge, evaluation.gate
    with contextlib.ExitStack() as stack:
        logs = []
        for name, part in ((ANSWERS_FILE, agent), (VERDICTS_FILE, judge)):
            logs.append(AnswerLog(folder / name, {**part.settings, "traces": traces_digest(traces)}))
            stack.callback(logs[-1].close)
        answers = agent.answer(traces, logs[0], count)
        baselines: dict[str, Answers] = {}
        if isinstance(judge, RewardJudge):  # which says what it thinks of any offer, for nothing
            others: tuple[Agent, ...] = (AlwaysPropose(answers), NeverPropose())
            baselines = {one.settings["agent"]: one.answer(traces, logs[0], count) for one in others}
        made, offers = _offers([answers]), _offers([answers, *baselines.values()])
        if gate:
            offers |= dict.fromkeys(offer._replace(proposal=None) for offer in offers)
        verdicts = judge.judge(list(offers), logs[1], count)
        gate_says = (
            gate.judge([offer for offer in made if offer.proposal is not None], logs[1], count) if gate else None
        )

    threshold = gate_threshold(evaluation.cost_ratio)
    events = judge_events(traces, answers, verdicts, gate_says, threshold)
    record = {
        **evaluation_record(events, evaluation.splits),
        **evaluation.stamps,
        "acceptance": acceptance(verdicts, evaluation.people),
        "agent": _shown(agent),
        "judge": _shown(judge),
        "unfinished": {
            who: collections.Counter(log.unfinished.values()) for who, log in zip(("agent", "judge"), logs, strict=True)
        },
        "baselines": {name: figures(judge_events(traces, one, verdicts)) for name, one in baselines.items()},
        "gate": None,
    }
    if gate and gate_says is not None:
        ungated = judge_events(traces, answers, verdicts, gate_says, 0.0)
        record["gate"] = {
            **_shown(gate),
            "cost_ratio": evaluation.cost_ratio,
            "threshold": threshold,
            "held_back": sum(bool(judgment.held_back) for event in events for judgment in event.judgments),
            "without_gate": figures(ungated),
            "curve": gated(ungated, verdicts).curve(),
        }
    record["notes"] = notes(record)
    _write(folder, evaluation.suffix, record, events)
    return record


def _offers(several: Sequence[Answers]) -> dict[Offer, None]:
    """Every offer that is made, once each, in the order of traces and events."""
    return {
        Offer(name, step, candidate.proposal): None
        for answers in several
        for name, steps in answers.items()
        for step, candidates in enumerate(steps)
        for candidate in candidates
    }


def _shown(part: Agent | Judge) -> dict[str, Any]:
    """The settings for a person: with addresses, and files in place of digests."""
    shown = dict(part.settings)
    if isinstance(part, (EndpointAgent, EndpointJudge)):
        shown["url"] = part.endpoint.url
    if isinstance(part, LocalAgent):
        shown["weights"] = {name: one.source for name, one in part.assigned.items()}
    if isinstance(part, RewardJudge):
        shown["weights"] = {name: one.source for name, one in part.assigned.items()}
        shown["calibration"] = {
            one.source: None if one.model.calibration is None else asdict(one.model.calibration)
            for one in part.assigned.values()
        }
        shown["truncated_rows"] = part.truncated
    return shown


def _write(folder: Path, suffix: str, record: Mapping[str, Any], events: Sequence[JudgedEvent]) -> None:
    for name, steps in judged_files(events).items():
        write_atomically(folder / f"{JUDGED}{suffix}" / name, json.dumps(steps, indent=1) + "\n")
    figures_file = Path(FIGURES_FILE)
    write_atomically(folder / f"{figures_file.stem}{suffix}{figures_file.suffix}", figures_csv(record))
    write_atomically(folder / REPORT_FILE, evaluation_report(record, events))
    write_atomically(folder / METRICS_FILE, json.dumps(record, indent=2) + "\n")
