"""Seed tasks, from which scene descriptions are written. They have nothing to do with seeds of random numbers."""

from collections.abc import Collection, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from datamodules.corpus.json_records import validate
from datamodules.corpus.simulator import DOMAINS
from datamodules.errors import UserError
from datamodules.files.reading import MAX_TEXT_BYTES, read_text
from datamodules.files.safe_yaml import NotYamlError, parse_yaml
from proactive.simulation.questions import Short


class SeedTasks(BaseModel):
    """The seed tasks of one kind of work, and events that occur in it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = "docs/how-to/simulate.md"

    tasks: list[Short] = Field(min_length=1)
    sample_events: list[Short] = []


Seeds = Mapping[str, SeedTasks]  # by kind of work


def read_seeds(path: Path) -> Seeds:
    """Read a file of seed tasks.

    Raises:
        UserError: It cannot be read, is not a YAML mapping, or a kind is invalid.
    """
    hint = f"{SeedTasks.page} shows the format."
    try:
        content = parse_yaml(read_text(path, option="--seeds"), MAX_TEXT_BYTES)
    except NotYamlError as error:
        raise UserError(f"--seeds: {path} is not YAML: {error}", hint) from error
    if isinstance(content, list):
        hint = f"Give a list of scenes to `simulate traces --scenes`. {hint}"
    if not isinstance(content, dict) or not content:
        raise UserError(f"--seeds: {path}: expected a mapping of kinds to tasks", hint)
    return {str(kind): validate(item, SeedTasks, f"{path}, kind {kind}") for kind, item in content.items()}


def embedded_seeds() -> Seeds:
    """Return a task for each topic of the embedded simulator, and sample events of its domain."""
    return {
        kind: SeedTasks(
            tasks=[f"Finish {thing}." for thing, _ in domain.topics],
            sample_events=[
                template.format(thing=thing, place=place)
                for thing, place in domain.topics
                for templates in domain.events.values()
                for template in templates
            ],
        )
        for kind, domain in DOMAINS.items()
    }


def tasks_in_turn(seeds: Seeds) -> Iterator[tuple[str, str]]:
    """Yield each kind with one of its tasks: the first task of each kind, then the second of each, and so on."""
    for round_of_tasks in zip_longest(*(seed.tasks for seed in seeds.values())):
        yield from ((kind, task) for kind, task in zip(seeds, round_of_tasks, strict=True) if task is not None)


def without_test_samples(seeds: Seeds, tested: Collection[str], contaminated: bool) -> tuple[Seeds, dict[str, Any]]:
    """Remove sample events that are in test traces.

    Args:
        seeds: The seed tasks.
        tested: The texts of all events in the test traces.
        contaminated: Whether to keep these events, and mark the result if there are any.

    Returns:
        The seed tasks, and counts for the summary.
    """
    found = {kind: sum(event in tested for event in seed.sample_events) for kind, seed in seeds.items()}
    record = {
        "sample_events": {kind: len(seed.sample_events) for kind, seed in seeds.items()},
        "sample_events_of_test_traces": found,
        "contaminated": contaminated and any(found.values()),
    }
    if contaminated:
        return seeds, record
    return {
        kind: SeedTasks(tasks=seed.tasks, sample_events=[one for one in seed.sample_events if one not in tested])
        for kind, seed in seeds.items()
    }, record
