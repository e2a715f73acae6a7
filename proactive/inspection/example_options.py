"""Options of the examples that `proactive.inspect` shows; without torch, so that the command starts quickly."""

from dataclasses import dataclass
from typing import Any, Literal

from datamodules.errors import UserError
from datamodules.ranges import NonNegativeInt

Task = Literal["reward", "agent", "preference"]
FILES = {"conversations": "agent", "preferences": "preference"}  # the task that learns from them


@dataclass(frozen=True)
class ExampleOptions:
    """Which training rows are shown, as the network reads them.

    Args:
        examples: Number of rows, or of pairs for task preference; 0 for none. They are training rows of split by_scene,
            fold 0, if the data can be divided.
        task: Task of the examples.
        prompt: Prompt file of the examples; by default that of the task.
        annotated: For tasks agent and preference: whether annotated rows are among the examples.
        conversations: For task agent: tables of conversations, as in data.conversations.
        preferences: For task preference: tables of preferences, as in data.preferences.
    """

    examples: NonNegativeInt = 3
    task: Task = "reward"
    prompt: str | None = None
    annotated: bool = True
    conversations: list[str] | None = None
    preferences: list[str] | None = None

    def of_data(self) -> dict[str, Any]:
        """The options of the task's data module.

        Raises:
            UserError: There are files of another task.
        """
        for name, task in FILES.items():
            if getattr(self, name) and self.task != task:
                raise UserError(f"{name}: task {self.task} does not learn from them", f"Give --task {task}.")
        files = {name: getattr(self, name) for name, task in FILES.items() if self.task == task}
        return {"prompt": self.prompt, **files, **({} if self.task == "reward" else {"annotated": self.annotated})}
