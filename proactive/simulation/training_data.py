"""Makes training data from simulated traces: annotated rows, conversations and preferences."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.corpus.answers import AGENT_PROMPT, Answer, write_answer
from datamodules.corpus.records import AnnotatedRow, Event
from datamodules.corpus.sources import TRAIN_FILE
from datamodules.files.writing import write_atomically
from datamodules.prompting.chat_prompts import ChatPrompt
from proactive.simulation.simulated_traces import Step

PROVENANCE_FILE = "provenance.jsonl"
CONVERSATIONS_FILE = "conversations.jsonl"
PREFERENCES_FILE = "preferences.jsonl"
Records = list[dict[str, Any]]


def training_data(traces: dict[str, list[Step]], judge: str) -> dict[str, Records]:
    """Return the records of each file.

    Args:
        traces: The traces by name.
        judge: The description of the judge, for the field annotator of the rows' provenance.
    """
    rows: Records = []
    provenance: Records = []
    preferences: Records = []
    conversations: Records = []
    for name, steps in traces.items():
        for number, step in enumerate(steps):
            history = tuple(one.event for one in steps[: number + 1])
            made = list(_rows(history, step))
            rows += made
            provenance += [{"trace": name, "step": number, "annotator": judge}] * len(made)
            preferences += _preferences(history, step)
        conversations += _conversation(steps)
    return {
        TRAIN_FILE: rows,
        PROVENANCE_FILE: provenance,
        PREFERENCES_FILE: preferences,
        CONVERSATIONS_FILE: conversations,
    }


def write_training_data(folder: Path, files: dict[str, Records]) -> None:
    """Write each file, one record per line."""
    for name, records in files.items():
        write_atomically(folder / name, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))


def _rows(history: tuple[Event, ...], step: Step) -> Iterator[dict[str, Any]]:
    """Yield a row for each proposal that was accepted or rejected. The first judgment on a proposal counts."""
    judged: dict[str | None, bool] = {}
    for attempt in step.attempts:
        if attempt.accepted is not None:
            judged.setdefault(attempt.proposal, attempt.accepted)
    help_needed = not judged[None] if None in judged else None
    for proposal, accepted in judged.items():
        record = {"obs": history, "pred_task": proposal, "valid": accepted, "help_needed": help_needed}
        yield AnnotatedRow.model_validate({**record, "annotation": (accepted,)}).published()


def _preferences(history: Sequence[Event], step: Step) -> Records:
    """Return all pairs of an accepted and a rejected proposal after the same history."""
    accepted = [attempt.proposal for attempt in step.attempts if attempt.judgment == "accepted"]
    rejected = [attempt.proposal for attempt in step.attempts if attempt.judgment == "rejected"]
    events = [event.model_dump() for event in history]
    return [
        {"history": events, "chosen": chosen, "rejected": other, "source": "simulation", "weight": 1.0}
        for chosen in accepted
        for other in rejected
        if chosen != other
    ]


def _conversation(steps: Sequence[Step]) -> Records:
    """Return a session as a conversation with an agent: events, and the accepted answers.

    A user's turn holds all events since the last answer, one JSON object per line. A session without accepted answers
    gives no record.
    """
    turns = [{"role": "system", "content": ChatPrompt.read(AGENT_PROMPT, with_proposal=False).system}]
    events: list[str] = []
    for step in steps:
        events.append(json.dumps(step.event.model_dump(), ensure_ascii=False))
        accepted = next((attempt for attempt in step.attempts if attempt.judgment == "accepted"), None)
        if accepted is not None:
            answer = Answer(**accepted.model_dump(include={"purpose", "thoughts", "proposal", "response"}))
            turns.append({"role": "user", "content": "\n".join(events)})
            turns.append({"role": "assistant", "content": write_answer(answer)})
            events = []
    return [{"conversations": turns}] if len(turns) > 1 else []
