"""summary.json: counts, tokens, cost and contamination of a simulation."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from datamodules.corpus.records import PUBLISHED_CATEGORIES, Category
from datamodules.corpus.sources import TRAIN_FILE
from datamodules.errors import UserError
from models.judging.answer_log import is_final
from models.judging.budget import Price, Usage
from proactive.simulation.scenes import SceneDescription
from proactive.simulation.simulated_traces import Step
from proactive.simulation.simulation_log import LOG_FILE, OUTCOME, entries
from proactive.simulation.training_data import CONVERSATIONS_FILE, PREFERENCES_FILE, Records

SUMMARY_FILE = "summary.json"
SOURCES = ("url", "checkpoint", "baseline")  # options that name what implements a role
ESTIMATED = ("answers", "prompt_tokens", "completion_tokens", "cost")


@dataclass(frozen=True)
class PlayedBy:
    """What implemented a role.

    Attributes:
        source: The address of an endpoint, the path of a checkpoint, the name of a baseline, or "scripted".
        price: The price of an endpoint's tokens.
    """

    source: str
    price: Price

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "PlayedBy":
        """Return what implements the role that a group of options describes."""
        given = (options[name] for name in SOURCES if options.get(name))
        return cls(str(next(given, "scripted")), Price(**options["price"]))


def summary(
    folder: Path,
    settings: dict[str, Any],
    scenes: Sequence[SceneDescription],
    traces: dict[str, list[Step]],
    files: dict[str, Records],
    tested: Collection[str],
    played_by: Mapping[str, PlayedBy],
) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        folder: The folder of the simulation, which contains its log.
        settings: The settings in the first line of the log.
        scenes: The scenes as the roles saw them.
        traces: The finished traces by name.
        files: The training data.
        tested: The texts of all events of the data root's test traces.
        played_by: What implemented each role.
    """
    steps = [step for trace in traces.values() for step in trace]
    log = list(entries(folder / LOG_FILE))
    attempts = [attempt for step in steps for attempt in step.attempts]
    gaps = [float(b.event.time) - float(a.event.time) for trace in traces.values() for a, b in pairwise(trace)]
    categories = Counter(PUBLISHED_CATEGORIES[row["category"]] for row in files[TRAIN_FILE])
    return {
        "settings": settings,
        "sessions": _ends(json.loads(entry["text"]) for entry in log if entry["kind"] == OUTCOME),
        "events": dict(Counter(step.source for step in steps)),
        "proposals": {
            "offers": dict(Counter(one.judgment for one in attempts if one.proposal is not None)),
            "silence": dict(Counter(one.judgment for one in attempts if one.proposal is None)),
        },
        "rows": {category.value: categories[category] for category in Category},
        "conversations": len(files[CONVERSATIONS_FILE]),
        "preferences": len(files[PREFERENCES_FILE]),
        "roles": {
            role: {"source": one.source, **_role([entry for entry in log if entry.get("role") == role], one.price)}
            for role, one in played_by.items()
        },
        "near_duplicates": {
            "scenes": len(near_duplicates(map(_text, scenes))),
            "events": len(near_duplicates(step.event.event for step in steps)),
        },
        "burstiness": burstiness(gaps),
        "contamination": {
            **settings["examples"],
            "events": len(steps),
            "events_of_test_traces": sum(step.event.event in tested for step in steps),
        },
    }


def scenes_summary(
    folder: Path,
    settings: dict[str, Any],
    outcomes: Sequence[dict[str, Any]],
    scenes: Mapping[str, SceneDescription],
    tested: Collection[str],
    price: Price,
) -> dict[str, Any]:
    """Return the content of the summary.json of written scenes.

    Args:
        folder: The folder, which contains the log.
        settings: The settings of the log.
        outcomes: The outcomes of all scenes that have ended.
        scenes: The written scenes by name.
        tested: The texts of all events of the data root's test traces.
        price: The price of the writer's tokens.
    """
    examples = [event for scene in scenes.values() for event in scene.environment.events_example]
    names = list(scenes)
    return {
        "settings": settings,
        "scenes": _ends(outcomes),
        "roles": {"writer": _role([one for one in entries(folder / LOG_FILE) if one.get("role") == "writer"], price)},
        "near_duplicates": {
            names[later]: names[earlier] for later, earlier in near_duplicates(map(_text, scenes.values())).items()
        },
        "contamination": {
            **settings["samples"],
            "examples": len(examples),
            "examples_of_test_traces": sum(event in tested for event in examples),
        },
    }


def estimate(record: Mapping[str, Any], events: int) -> dict[str, dict[str, float]]:
    """Return the estimated answers, tokens and cost of a number of events, by role and in total.

    They are in proportion to the events of this simulation.

    Raises:
        UserError: There is no event yet, or no server has reported tokens.
    """
    simulated = sum(record["events"].values())
    if not simulated or not any(found["prompt_tokens"] for found in record["roles"].values()):
        raise UserError("--estimate: the log holds no event, or no tokens", "Simulate a few scenes by endpoints first.")
    factor = events / simulated
    roles = {role: {name: found[name] * factor for name in ESTIMATED} for role, found in record["roles"].items()}
    return {**roles, "total": {name: sum(found[name] for found in roles.values()) for name in ESTIMATED}}


def near_duplicates(texts: Iterable[str]) -> dict[int, int]:
    """Find texts with the same words as an earlier text. Order, numbers and punctuation do not count.

    Returns:
        The index of each such text, with the index of the first text that has its words.
    """
    first: dict[frozenset[str], int] = {}
    words = [frozenset(re.findall(r"[^\W\d_]+", text.casefold())) for text in texts]
    return {place: first[one] for place, one in enumerate(words) if first.setdefault(one, place) != place}


def _text(scene: SceneDescription) -> str:
    return f"{scene.environment.description} {scene.user.goal}"


def burstiness(gaps: Sequence[float]) -> float | None:
    """Return (s - m) / (s + m) of the gaps' mean m and standard deviation s (Goh and Barabasi, 2008).

    It is -1 for equal gaps, 0 for a Poisson process, and at most 1. None for fewer than two gaps.
    """
    if len(gaps) < 2:
        return None
    mean, deviation = statistics.fmean(gaps), statistics.pstdev(gaps)
    return (deviation - mean) / (deviation + mean)


def _ends(outcomes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found = sorted(outcomes, key=lambda outcome: outcome["name"])
    failures = [outcome for outcome in found if outcome["end"] == "failed"]
    return {
        "ends": dict(sorted(Counter(outcome["end"] for outcome in found).items())),
        "failures": dict(sorted(Counter(outcome["cause"] for outcome in failures).items())),
        "failed": {outcome["name"]: outcome["reason"] for outcome in failures},
    }


def _role(answers: Sequence[dict[str, Any]], price: Price) -> dict[str, Any]:
    """Return the number of answers, tokens, cost and seconds of one role."""
    used = sum((Usage.of(entry["usage"]) for entry in answers if "usage" in entry), Usage())
    return {
        "answers": len(answers),
        "asked_again": sum(entry["attempt"] > 0 for entry in answers),
        "cut_off": sum(not is_final(entry["finish_reason"]) for entry in answers),
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "without_usage": used.unreported,
        "cost": price.cost(used),
        "seconds": round(sum(entry.get("seconds") or 0.0 for entry in answers), 3),
    }
