"""Carries out an evaluation of an agent: asks the agents, then the judges, computes metrics, and writes the folder.

Each answer and verdict is logged at once, so a killed evaluation can resume in its folder.
"""

import collections
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datamodules.corpus.traces import Answers, Pair, ProposalKey, Trace, traces_digest
from datamodules.files.run_folders import ANSWERS_FILE, METRICS_FILE, REPORT_FILE, VERDICTS_FILE
from datamodules.files.writing import write_atomically
from models.judging.agents import Agent, AlwaysPropose, NeverPropose
from models.judging.answer_log import AnswerLog
from models.judging.budget import Price
from models.judging.description import Advance, group_traces, joint_record, joint_settings
from models.judging.gate_curve import gate_threshold
from models.judging.judges import Judge, Verdict
from models.reporting.timeline import TIMELINE_FILE, ShownTraces
from proactive.evaluation.evaluation_notes import notes
from proactive.evaluation.evaluation_report import evaluation_report, shown_traces
from proactive.evaluation.judged_events import (
    JudgedEvent,
    Verdicts,
    acceptance,
    evaluation_record,
    gated,
    judge_events,
    metrics_of,
)
from proactive.evaluation.published_layouts import figures_csv, judged_files
from proactive.evaluation.specification import Evaluation

FIGURES_FILE = "figures.csv"
JUDGED = "judged"
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # from label and total; yields what counts an item


async def carry_out(evaluation: Evaluation, folder: Path, progress: Progress) -> dict[str, Any]:
    """Get answers and verdicts, and write the folder.

    Args:
        evaluation: The result of `prepare`.
        folder: Folder to write. Answers and verdicts that it already contains are used.
        progress: Shows progress.

    Returns:
        The content of metrics.json.
    """
    traces, gates = evaluation.traces, evaluation.gates
    async with contextlib.AsyncExitStack() as stack:
        for name, log, parts in (
            (ANSWERS_FILE, evaluation.answers, evaluation.agents),
            (VERDICTS_FILE, evaluation.verdicts, evaluation.judges),
        ):
            settings = {**joint_settings(parts), "traces": traces_digest(traces)}
            stack.enter_context(log.opened(folder / name, settings))
        for client in evaluation.clients:
            await stack.enter_async_context(client)
        answers = await _answers(evaluation.agents, traces, progress)
        baselines: dict[str, Answers] = {}
        # Local judges also judge the baselines, because that costs no requests.
        if all(judge.describe().weights for judge in evaluation.judges.values()):
            others: dict[str, Agent] = {"always-propose": AlwaysPropose(answers), "never-propose": NeverPropose()}
            baselines = {name: await other.answer(traces) for name, other in others.items()}
        agent_proposals, proposals = _proposals([answers]), _proposals([answers, *baselines.values()])
        if gates:
            proposals |= dict.fromkeys(key._replace(proposal=None) for key in proposals)
        verdicts = await _verdicts(evaluation.judges, traces, list(proposals), progress)
        offers = [key for key in agent_proposals if key.proposal is not None]
        gate_verdicts = await _verdicts(gates, traces, offers, progress) if gates else None

    threshold = gate_threshold(evaluation.cost_ratio)
    events = judge_events(traces, answers, verdicts, gate_verdicts, threshold)
    logs = {"agent": evaluation.answers, "judge": evaluation.verdicts}
    record = {
        **evaluation_record(events, evaluation.splits),
        **evaluation.stamps.record(),
        "acceptance": acceptance(verdicts, evaluation.people),
        "agent": joint_record(evaluation.agents),
        "judge": joint_record(evaluation.judges),
        "usage": {who: asdict(log.usage) | _cost(evaluation, log) for who, log in logs.items() if log.usage.requests},
        "unfinished": {who: collections.Counter(log.unfinished.values()) for who, log in logs.items()},
        "baselines": {name: metrics_of(judge_events(traces, one, verdicts)) for name, one in baselines.items()},
        "gate": None,
    }
    if gates and gate_verdicts is not None:
        ungated = judge_events(traces, answers, verdicts, gate_verdicts, 0.0)
        record["gate"] = {
            **joint_record(gates),
            "cost_ratio": evaluation.cost_ratio,
            "threshold": threshold,
            "held_back": sum(bool(candidate.held_back) for event in events for candidate in event.candidates),
            "without_gate": metrics_of(ungated),
            "curve": gated(ungated, verdicts).curve(),
        }
    record["notes"] = notes(record)
    _write(folder, evaluation.stamps.suffix, record, events)
    return record


def _cost(evaluation: Evaluation, log: AnswerLog) -> dict[str, float]:
    """The cost of a log's requests, if the endpoint has a price."""
    price = next(client.endpoint.price for client in evaluation.clients if client.log is log)
    return {"cost": price.cost(log.usage)} if price != Price() else {}


async def _answers(agents: Mapping[str, Agent], traces: Sequence[Trace], progress: Progress) -> Answers:
    """The answers of each trace by its agent, in the order of the traces."""
    described = agents[traces[0].name].describe()
    total = sum(len(trace.events) for trace in traces) * (described.settings.get("candidates") or 1)
    found: dict[str, Any] = {}
    with _counted(progress, described.progress_label, total) as advance:
        for agent, own in (agent_traces := group_traces(agents, traces)):
            found |= await agent.answer(own, advance)
            if len(agent_traces) > 1:
                agent.release()
    return {trace.name: found[trace.name] for trace in traces}


async def _verdicts(
    judges: Mapping[str, Judge], traces: Sequence[Trace], proposals: Sequence[ProposalKey], progress: Progress
) -> Verdicts:
    """The verdicts on all proposals, each by the judge of its trace."""
    found: dict[ProposalKey, Verdict] = {}
    with _counted(progress, judges[traces[0].name].describe().progress_label, len(proposals)) as advance:
        for judge, own in (judge_traces := group_traces(judges, traces)):
            by_name = {trace.name: trace for trace in own}
            mine = [key for key in proposals if key.trace in by_name]
            pairs = [
                Pair(by_name[name].history(step), proposal, f"{name}, event {step + 1}")
                for name, step, proposal in mine
            ]
            found |= zip(mine, await judge.judge(pairs, advance), strict=True)
            if len(judge_traces) > 1:
                judge.release()
    return found


@contextlib.contextmanager
def _counted(progress: Progress, progress_label: str | None, total: int) -> Iterator[Advance]:
    if progress_label is None:
        yield lambda: None
        return
    with progress(progress_label, total) as advance:
        yield advance


def _proposals(several: Sequence[Answers]) -> dict[ProposalKey, None]:
    """All distinct proposals, in the order of traces and events."""
    return {
        ProposalKey(name, step, candidate.proposal): None
        for answers in several
        for name, steps in answers.items()
        for step, candidates in enumerate(steps)
        for candidate in candidates
    }


def _write(folder: Path, suffix: str, record: Mapping[str, Any], events: Sequence[JudgedEvent]) -> None:
    for name, steps in judged_files(events).items():
        write_atomically(folder / f"{JUDGED}{suffix}" / name, json.dumps(steps, indent=1) + "\n")
    figures_file = Path(FIGURES_FILE)
    write_atomically(folder / f"{figures_file.stem}{suffix}{figures_file.suffix}", figures_csv(record))
    write_atomically(folder / REPORT_FILE, evaluation_report(record, events))
    shown = ShownTraces(notes=tuple(record["notes"]), traces=tuple(shown_traces(events)))
    write_atomically(folder / TIMELINE_FILE, shown.model_dump_json(indent=1) + "\n")
    write_atomically(folder / METRICS_FILE, json.dumps(record, indent=2) + "\n")
