"""Finds example events that are in test traces, counts them, and removes them before a role sees them."""

from collections.abc import Sequence
from typing import Any

from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import root_traces
from proactive.simulation.scenes import SceneDescription


def events_of_test_traces(root: str) -> set[str]:
    """Return the texts of all events in the test traces of a data root."""
    return {event.event for trace in root_traces(load_corpus(root)) for event in trace.events}


def without_test_events(
    scenes: Sequence[SceneDescription], root: str, contaminated: bool
) -> tuple[list[SceneDescription], dict[str, Any]]:
    """Remove example events that are in the test traces of a data root.

    Args:
        scenes: The scenes.
        root: The data root.
        contaminated: Whether to keep these events, and mark the result if there are any.

    Returns:
        The scenes, and counts for the summary.
    """
    tested = events_of_test_traces(root)
    examples = [event for scene in scenes for event in scene.environment.events_example]
    found = sum(event in tested for event in examples)
    marked = sum(scene.contaminated for scene in scenes)
    record = {
        "root": root,
        "examples": len(examples),
        "examples_of_test_traces": found,
        "contaminated_scenes": marked,
        "contaminated": marked > 0 or (contaminated and found > 0),
    }
    return (list(scenes) if contaminated else [scene.without_examples(tested) for scene in scenes]), record
