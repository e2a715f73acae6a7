"""The scripted writer, which makes a scene for scripted roles from a seed task.

If the name of a kind of work begins with the name of a domain of the embedded simulator, it selects this domain.
Otherwise the domain is drawn at random.
"""

import re
from collections.abc import Sequence
from typing import Any

from datamodules.corpus.simulator import DOMAINS, Domain, Topic
from datamodules.escaping import shortened
from proactive.simulation.questions import InvalidAnswer, Question, Role
from proactive.simulation.scene_writing import SceneDraft
from proactive.simulation.scenes import EMBEDDED_OPERATIONS
from proactive.simulation.scripted_roles import Facts, logged_answer
from proactive.simulation.simulation_log import SimulationLog

LONGEST_NAME = 60  # characters of a task as an entity
FILE_WORDS = 3  # of a task in the name of a file


class ScriptedWriter(Role[SceneDraft]):
    """Writes scenes without a model."""

    def __init__(self, log: SimulationLog) -> None:
        self.log = log

    def describe(self) -> dict[str, Any]:
        return {"role": "scripted"}

    async def reply(self, question: Question[Any], item: SceneDraft, invalid: Sequence[InvalidAnswer]) -> str:
        return logged_answer(self.log, question, item, invalid, lambda: _scene(item, question.facts["sample_events"]))


def _scene(draft: SceneDraft, sample_events: Sequence[str]) -> Facts:
    random = draft.random("scene")
    themes = [theme for theme in DOMAINS if draft.kind.casefold().startswith(theme)] or list(DOMAINS)
    theme = random.choice(themes)
    thing, place = _topic(draft.task, DOMAINS[theme])
    apps = random.sample(DOMAINS[theme].apps, 2)
    return {
        "environment": {
            "description": f"The user works on {thing} in {place}, with {apps[0]} and {apps[1]}.",
            "entities": [thing, place, *apps],
            "agent_ops": list(EMBEDDED_OPERATIONS),
            "events_example": list(sample_events),
            "theme": theme,
        },
        "user": {"description": "A person at a computer.", "goal": draft.task},
    }


def _topic(task: str, domain: Domain) -> Topic:
    """Return the simulator's topic that a task names, or else the task itself and a file named after it."""
    for thing, place in domain.topics:
        if thing in task:
            return thing, place
    words = re.findall(r"\w+", task.casefold())[:FILE_WORDS]
    return f"the task “{shortened(task.rstrip('.'), LONGEST_NAME)}”", f"{'_'.join(words) or 'task'}.txt"
