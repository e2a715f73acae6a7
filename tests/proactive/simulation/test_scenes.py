"""Scene descriptions: the published file, the embedded ones, and invalid files."""

from pathlib import Path

import pytest

from datamodules.errors import UserError
from proactive.simulation.contamination import without_test_events
from proactive.simulation.scenes import embedded_scenes, read_scenes, scenes_text
from tests.helpers import PROACTIVEBENCH, needs_proactivebench

SCENES = PROACTIVEBENCH / "scenes" / "scenes.yaml"


@needs_proactivebench
def test_all_published_scenes_load_and_82_operations_are_mappings(tmp_path: Path) -> None:
    scenes = read_scenes(SCENES)
    assert len(scenes) == 68
    operations = [operation for scene in scenes for operation in scene.environment.agent_ops]
    assert (len(operations), sum(isinstance(operation, dict) for operation in operations)) == (794, 82)
    (tmp_path / "scenes.yaml").write_text(scenes_text(scenes), encoding="utf-8")
    assert read_scenes(tmp_path) == scenes


@needs_proactivebench
def test_example_events_of_the_test_traces_are_removed_and_counted() -> None:
    given = read_scenes(SCENES)
    scenes, record = without_test_events(given, str(PROACTIVEBENCH), contaminated=False)
    counts = {"examples": 1500, "examples_of_test_traces": 2, "contaminated_scenes": 0}
    found = {"root": str(PROACTIVEBENCH), **counts}
    assert record == {**found, "contaminated": False}
    assert sum(len(scene.environment.events_example) for scene in scenes) == 1498
    assert without_test_events(given, str(PROACTIVEBENCH), contaminated=True) == (
        given,
        {**found, "contaminated": True},
    )


def test_embedded_scenes_are_read_as_they_are_written(tmp_path: Path) -> None:
    scenes = embedded_scenes()
    file = tmp_path / "mine.yaml"
    file.write_text(scenes_text(scenes), encoding="utf-8")
    assert read_scenes(file) == scenes
    assert len({scene.user.goal for scene in scenes}) == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1", "expected a list of scenes"),
        ("[]", "expected a list of scenes"),
        ("- [", "is not YAML"),
        ("- user: {description: A, goal: B}", "scene 1, field environment: Field required"),
        (
            "- {environment: {description: A, entities: []}, user: {description: A, goal: B}}",
            "scene 1, field environment.entities: List should have at least 1 item",
        ),
        (
            "- {environment: {description: A, entities: [B]}, user: {description: ' ', goal: B}}",
            "scene 1, field user.description: expected text, got a blank",
        ),
        (
            "- {environment: {description: A, entities: [B], agent_ops: [3]}, user: {description: A, goal: B}}",
            "scene 1, field environment.agent_ops[0]",
        ),
    ],
)
def test_an_invalid_scene_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "scenes.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"scenes\.yaml") as refused:
        read_scenes(file)
    assert said in refused.value.what
    assert "docs/how-to/simulate.md" in refused.value.hint
