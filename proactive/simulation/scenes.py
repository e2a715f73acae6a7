"""Scene descriptions, which simulations start from, and the sessions to simulate."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from datamodules.corpus.json_records import validate
from datamodules.corpus.records import Text, json_object
from datamodules.corpus.simulator import DOMAINS
from datamodules.errors import UserError
from datamodules.files.reading import MAX_TEXT_BYTES, read_text
from datamodules.files.safe_yaml import NotYamlError, parse_yaml
from proactive.simulation.work_items import RoleName, WorkItem, digest

SCENES_FILE = "scenes.yaml"
EMBEDDED_OPERATIONS = ("read(place)", "write(place, text)", "search(words)")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = "docs/how-to/simulate.md"


class EnvironmentDescription(_Part):
    """A user's surroundings. An operation of the assistant (`agent_ops`) is text or a mapping."""

    description: Text
    entities: list[Text] = Field(min_length=1)
    agent_ops: list[Text | Annotated[dict[str, Any], BeforeValidator(json_object)]] = []
    events_example: list[Text] = []
    theme: Text = "any"


class UserDescription(_Part):
    """A user: who they are, and their goal."""

    description: Text
    goal: Text


class SceneDescription(_Part):
    """One scene of scenes.yaml.

    Attributes:
        environment: The environment.
        user: The user.
        contaminated: Whether the scene was written from events of test traces. Dumps do not contain it.
    """

    environment: EnvironmentDescription
    user: UserDescription
    contaminated: bool = Field(default=False, exclude=True)

    def without_examples(self, events: Collection[str]) -> "SceneDescription":
        """Return the scene without the example events that `events` contains."""
        kept = [event for event in self.environment.events_example if event not in events]
        return self.model_copy(update={"environment": self.environment.model_copy(update={"events_example": kept})})


@dataclass(frozen=True)
class SimulatedSession(WorkItem):
    """One session to simulate. Its name is that of its trace file, without .json.

    Attributes:
        scene: The scene that it starts from.
    """

    scene: SceneDescription

    def facts_for(self, role: RoleName) -> dict[str, Any]:
        scene = self.scene.model_dump()
        person = {"user": scene["user"], "surroundings": scene["environment"]["description"]}
        return {
            "environment": scene,
            "user": person,
            "assistant": {"operations": scene["environment"]["agent_ops"]},
            "judge": person,
        }[role]


def sessions_of(scenes: Sequence[SceneDescription], trials: int, seed: int) -> list[SimulatedSession]:
    """Return the sessions of all scenes, `trials` of each."""
    return [
        SimulatedSession(name, digest([seed, name, scene.model_dump()]), scene)
        for number, scene in enumerate(scenes, 1)
        for trial in range(1, trials + 1)
        for name in [f"scene_{number:03}_trial_{trial}"]
    ]


def scenes_digest(scenes: Sequence[SceneDescription]) -> str:
    """Return a digest of scenes, 16 hexadecimal digits."""
    return digest([scene.model_dump() for scene in scenes])[:16]


def read_scenes(path: Path) -> list[SceneDescription]:
    """Read a file of scenes, or the scenes.yaml of a folder.

    Raises:
        UserError: It cannot be read, is not a YAML list, or a scene is invalid.
    """
    file = path / SCENES_FILE if path.is_dir() else path
    hint = f"{SceneDescription.page} shows the format."
    try:
        content = parse_yaml(read_text(file, option="--scenes"), MAX_TEXT_BYTES)
    except NotYamlError as error:
        raise UserError(f"--scenes: {file} is not YAML: {error}", hint) from error
    if not isinstance(content, list) or not content:
        raise UserError(f"--scenes: {file}: expected a list of scenes", hint)
    return [validate(item, SceneDescription, f"{file}, scene {number}") for number, item in enumerate(content, 1)]


def scenes_text(scenes: Sequence[SceneDescription]) -> str:
    """Return scenes as YAML in the format that `read_scenes` reads."""
    marked = [scene.model_dump() | ({"contaminated": True} if scene.contaminated else {}) for scene in scenes]
    return yaml.safe_dump(marked, sort_keys=False, allow_unicode=True, width=120)


def embedded_scenes() -> list[SceneDescription]:
    """Return a scene for each topic of the embedded simulator."""
    return [
        SceneDescription(
            environment=EnvironmentDescription(
                description=f"The user works on {thing}, which lies in {place}.",
                entities=[thing, place, *domain.apps],
                agent_ops=list(EMBEDDED_OPERATIONS),
                theme=theme,
            ),
            user=UserDescription(description="A person at a computer.", goal=f"Finish {thing}."),
        )
        for theme, domain in DOMAINS.items()
        for thing, place in domain.topics
    ]
