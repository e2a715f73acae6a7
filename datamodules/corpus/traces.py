"""Traces of agents: reading recorded traces, and writing judged ones."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.corpus.answers import Answer
from datamodules.corpus.json_records import parse_json, read_json_list, read_json_mapping
from datamodules.corpus.records import Event, History, PublishedStep, TestStep, TraceSplit, running_digests, scene_of
from datamodules.corpus.sources import SPLITS_FILE, Corpus
from datamodules.errors import UserError
from datamodules.files.reading import read_text, require_regular

PUBLISHED_NOTES = {"Purpose": "purpose", "Thoughts": "thoughts", "Response": "response"}


@dataclass(frozen=True)
class Trace:
    """The events of one session, and for each whether the user had completed a task.

    `name` is the name of its file. Split files refer to it.
    """

    name: str
    events: tuple[Event, ...]
    task_status: tuple[bool, ...]

    def history(self, step: int, longest: int | None = None) -> tuple[Event, ...]:
        """Return the history at a trace step, counted from 0, with at most its last `longest` events."""
        return self.events[0 if longest is None else max(step + 1 - longest, 0) : step + 1]


@dataclass(frozen=True)
class Candidate:
    """One answer of an agent.

    Attributes:
        proposal: The proposal; None for null.
        written: The proposal as files write it; some recorded ones are operations with arguments.
        notes: Purpose, Thoughts, Response, and the other fields of a recorded step.
        parsed: Whether the agent's text could be read. If not, it counts as null.
    """

    proposal: str | None
    written: str | dict[str, Any] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    parsed: bool = True

    @classmethod
    def of(cls, answer: Answer | None) -> "Candidate":
        """Make a candidate of an agent's answer; None is an answer that could not be read."""
        if answer is None:
            return cls(None, parsed=False)
        notes = {name: getattr(answer, field) for name, field in PUBLISHED_NOTES.items() if getattr(answer, field)}
        return cls(answer.proposal, answer.proposal, notes)


Answers = Mapping[str, Sequence[Sequence[Candidate]]]  # by name of the trace: the candidates after each event


class Pair(NamedTuple):
    """A history and a proposal or None; `where` describes the pair in messages and logs."""

    history: History
    proposal: str | None
    where: str = ""


class ProposalKey(NamedTuple):
    """A proposal or None after the event `step` (from 0) of a trace."""

    trace: str
    step: int
    proposal: str | None


@dataclass(frozen=True)
class Recorded:
    """Traces with the answers of an agent, and with judgments if there are any."""

    traces: list[Trace]
    answers: dict[str, list[list[Candidate]]]
    judgments: dict[ProposalKey, bool]

    def add(self, name: str, steps: Sequence[PublishedStep]) -> None:
        """Add a trace. If a proposal has two judgments, the first counts."""
        self.traces.append(Trace(name, tuple(s.observation for s in steps), tuple(s.task_status for s in steps)))
        self.answers[name] = [_candidates(step) for step in steps]
        for number, step in enumerate(steps):
            # The published scoring ignores the judgment of a step without a response.
            judged = zip(self.answers[name][number], step.judgment, strict=False) if step.agent_response else ()
            for candidate, accepted in judged:
                self.judgments.setdefault(ProposalKey(name, number, candidate.proposal), accepted)


def root_traces(corpus: Corpus) -> list[Trace]:
    """Return the test traces of a root."""
    return [
        Trace(name, tuple(step.observation for step in steps), tuple(step.task_status for step in steps))
        for name, steps in corpus.traces.items()
    ]


def traces_digest(traces: Sequence[Trace]) -> str:
    """Return a digest of the names and events of traces, 16 hexadecimal digits."""
    content = [[trace.name, [event.model_dump() for event in trace.events]] for trace in traces]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_recorded(folder: Path) -> Recorded:
    """Read a folder of recorded or judged traces.

    Raises:
        UserError: The folder holds no trace, or a step does not fit; the message names file, place and field.
    """
    files = [path for path in sorted(folder.glob("*.json")) if path.name != Path(SPLITS_FILE).name]
    if not files:
        raise UserError(f"{folder} holds no recorded traces", "Give a folder of JSON files, one per trace.")
    recorded = Recorded([], {}, {})
    for path in files:
        recorded.add(path.name, read_json_list(path, PublishedStep))
    return recorded


def trace_files(path: Path) -> list[Path]:
    """Return the files of a trace, of a folder of traces, or of a folder with one such folder per agent.

    Raises:
        UserError: There is no trace.
    """
    if not path.is_dir():
        require_regular(path)
        return [path]
    found = (file for pattern in ("*.json", "*/*.json") for file in path.glob(pattern))
    files = sorted(file for file in found if file.name != Path(SPLITS_FILE).name and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path} holds no traces", "Give a JSON file, or a folder of JSON files, one per trace.")
    return files


def read_traces(path: Path) -> dict[str, Recorded]:
    """Read traces of either layout: with an agent's answers, or with the reference proposals of a test set.

    Args:
        path: See `trace_files`.

    Returns:
        The traces by the name of their folder, which is the name of the agent if there are several.

    Raises:
        UserError: There is no trace, or a step does not fit; the message names file, place and field.
    """
    found: dict[str, Recorded] = {}
    for file in trace_files(path):
        recorded = found.setdefault(file.resolve().parent.name, Recorded([], {}, {}))
        items = parse_json(read_text(file), str(file))
        if isinstance(items, list) and any(isinstance(_response(item), dict) for item in items[:1]):
            steps = [
                PublishedStep.model_construct(
                    observation=step.observation,
                    agent_response=step.agent_response.candidate_task,
                    task_status=step.task_status,
                )
                for step in read_json_list(file, TestStep)
            ]
        else:
            steps = read_json_list(file, PublishedStep)
        recorded.add(file.name, steps)
    return found


def judged_steps(trace: Trace, decided: Sequence[tuple[Candidate, bool | None]]) -> list[dict[str, Any]]:
    """Return a trace in the published judged layout, with one proposal and its judgment per step.

    The published scoring counts each proposal of a step as an event, so only the deciding candidate is listed. A step
    without a verdict has no judgment, and that scoring does not count it.

    Args:
        trace: The trace.
        decided: For each event the deciding candidate and the verdict on it, None if there is none.
    """
    return [
        {
            "observation": event.model_dump(),
            "agent_response": [candidate.written],
            "task_status": done,
            "judgement": [] if accepted is None else [accepted],
            "other_infomation": dict(candidate.notes),
        }
        for event, done, (candidate, accepted) in zip(trace.events, trace.task_status, decided, strict=True)
    ]


def read_splits(path: Path | None, traces: Sequence[Trace]) -> dict[str, TraceSplit]:
    """Read the splits of traces; without a file, all traces are one split.

    Raises:
        UserError: The file does not fit; the message names it and the field.
    """
    if path is None:
        return {"all": TraceSplit(files=tuple(trace.name for trace in traces))}
    return read_json_mapping(path, TraceSplit)


def was_seen(
    trace: Trace, root_trace: Trace | None, scenes: Collection[str] | None, histories: Collection[int]
) -> bool:
    """Return whether a model that was trained on these scenes and histories has seen a trace.

    A recorded trace may be another excerpt of a test trace of the root: the same session and file name, with another
    first event. So the root's trace of that name counts too.

    Args:
        trace: The trace.
        root_trace: The root's trace of the same name, if there is one.
        scenes: The training scenes; None if an old checkpoint does not list them.
        histories: Digests of the training histories.
    """
    return any(
        (scenes is not None and scene_of(one.events) in scenes)
        or any(digest in histories for digest in running_digests(one.events))
        for one in (trace, root_trace)
        if one is not None
    )


def _response(step: Any) -> Any:
    return step.get("agent_response") if isinstance(step, dict) else None


def _candidates(step: PublishedStep) -> list[Candidate]:
    return [
        Candidate(_as_text(response), response, step.other_information) for response in step.agent_response or (None,)
    ]


def _as_text(response: str | dict[str, Any] | None) -> str | None:
    if response is None or isinstance(response, str):
        return response
    return json.dumps(response, ensure_ascii=False)
