"""What a simulation starts from: descriptions of scenes, and trials of each."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from datamodules.corpus.json_records import validate
from datamodules.corpus.records import Text, json_object
from datamodules.corpus.simulator import DOMAINS
from datamodules.errors import UserError
from datamodules.files.reading import MOST_AT_ONCE, read_text
from datamodules.files.safe_yaml import NotYamlError, parse_yaml

SCENES_FILE = "scenes.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = "docs/how-to/simulate.md"


class EnvironmentDescription(_Part):
    """Where a user works. An operation of the assistant is text, or a mapping of its parts."""

    description: Text
    entities: list[Text] = Field(min_length=1)
    agent_ops: list[Text | Annotated[dict[str, Any], BeforeValidator(json_object)]] = []
    events_example: list[Text] = []
    theme: Text = "any"


class UserDescription(_Part):
    """Who works there, and what for."""

    description: Text
    goal: Text


class SceneDescription(_Part):
    """One scene of scenes.yaml."""

    environment: EnvironmentDescription
    user: UserDescription

    def without_examples(self, events: Collection[str]) -> "SceneDescription":
        """The scene without the example events that are among `events`."""
        kept = [event for event in self.environment.events_example if event not in events]
        return self.model_copy(update={"environment": self.environment.model_copy(update={"events_example": kept})})


@dataclass(frozen=True)
class Trial:
    """One session to simulate.

    Attributes:
        name: The name of its trace, without the ending .json.
        scene: What it starts from.
        seed: Hexadecimal digest of the simulation's seed, the name and the scene: the same in any order of trials.
    """

    name: str
    scene: SceneDescription
    seed: str

    def random(self, *purpose: Any) -> Random:
        """The random numbers for one purpose, whatever else was drawn."""
        return Random(json.dumps([self.seed, *purpose]))


def trials_of(scenes: Sequence[SceneDescription], trials: int, seed: int) -> list[Trial]:
    """All trials of all scenes."""
    return [
        Trial(name, scene, _digest([seed, name, scene.model_dump()]))
        for number, scene in enumerate(scenes, 1)
        for trial in range(1, trials + 1)
        for name in [f"scene_{number:03}_trial_{trial}"]
    ]


def scenes_digest(scenes: Sequence[SceneDescription]) -> str:
    """A digest of scenes, 16 hexadecimal digits."""
    return _digest([scene.model_dump() for scene in scenes])[:16]


def read_scenes(path: Path) -> list[SceneDescription]:
    """Read a file of scenes, or scenes.yaml of a folder.

    Raises:
        UserError: It cannot be read, is no YAML list, or a scene does not fit.
    """
    file = path / SCENES_FILE if path.is_dir() else path
    hint = f"{SceneDescription.page} shows the format."
    try:
        content = parse_yaml(read_text(file, option="--scenes"), MOST_AT_ONCE)
    except NotYamlError as error:
        raise UserError(f"--scenes: {file} is not YAML: {error}", hint) from error
    if not isinstance(content, list) or not content:
        raise UserError(f"--scenes: {file}: expected a list of scenes", hint)
    return [validate(item, SceneDescription, f"{file}, scene {number}") for number, item in enumerate(content, 1)]


def scenes_text(scenes: Sequence[SceneDescription]) -> str:
    """Scenes as YAML, as `read_scenes` reads it."""
    return yaml.safe_dump([scene.model_dump() for scene in scenes], sort_keys=False, allow_unicode=True, width=120)


def embedded_scenes() -> list[SceneDescription]:
    """A scene for each topic of the embedded simulator."""
    return [
        SceneDescription(
            environment=EnvironmentDescription(
                description=f"The user works on {thing}, which lies in {place}.",
                entities=[thing, place, *domain.apps],
                agent_ops=["read(place)", "write(place, text)", "search(words)"],
                theme=theme,
            ),
            user=UserDescription(description="A person at a computer.", goal=f"Finish {thing}."),
        )
        for theme, domain in DOMAINS.items()
        for thing, place in domain.topics
    ]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
