"""Tools that an agent may use after its offer was accepted. They are on an allow list, and arguments are validated.

The `response` of an agent's answer asks for a tool if it is a JSON object with `tool` and `arguments`. Any other
response is a draft, which is shown. To add a tool, write a record of its arguments and a function, and list both in
`TOOLS`.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.reading import is_deep
from datamodules.files.writing import write_atomically
from datamodules.ranges import reason

DRAFTS = "drafts"
MAX_DRAFT = 100_000  # characters
ToolName = Literal["save_draft"]
Outcome = Literal["done", "refused", "failed"]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ToolCall(_Record):
    """A tool that an agent asks for, with arguments that are not validated yet."""

    tool: str
    arguments: dict[str, Any]


class SaveDraft(_Record):
    """The name of a file without folder, and its text."""

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w -]{0,60}(\.\w{1,10})?$")]
    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_DRAFT)]


def _save_draft(arguments: SaveDraft, folder: Path) -> str:
    path = folder / DRAFTS / arguments.name
    if path.exists():
        raise UserError(f"{path} exists", "Remove or rename it.")
    write_atomically(path, arguments.text)
    return f"{path} is written"


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        arguments: The record of its arguments.
        run: Runs it with such a record and the session's folder, and returns what it did, for the log.
    """

    arguments: type[BaseModel]
    run: Callable[[Any, Path], str]


TOOLS: dict[str, Tool] = {"save_draft": Tool(SaveDraft, _save_draft)}


def call_of(response: str) -> ToolCall | None:
    """Return the tool that a response asks for; None if it is a draft."""
    if not response.lstrip().startswith("{") or is_deep(response):
        return None
    try:
        return ToolCall.model_validate(json.loads(response))
    except ValueError:  # not JSON, or another object
        return None


def act(call: ToolCall, allowed: Collection[str], folder: Path) -> tuple[Outcome, str]:
    """Run a tool whose offer was accepted.

    Args:
        call: The tool that the agent asks for.
        allowed: Names of the tools that may run.
        folder: The folder of the session.

    Returns:
        The outcome, and what was done or why not.
    """
    if call.tool not in TOOLS or call.tool not in allowed:
        return "refused", f"the tool {call.tool} is not allowed"
    tool = TOOLS[call.tool]
    try:
        return "done", tool.run(tool.arguments.model_validate(call.arguments), folder)
    except ValidationError as error:
        return "refused", f"the arguments of {call.tool}: {reason(error)}"
    except UserError as error:
        return "failed", error.what
    except OSError as error:
        return "failed", error_text(error, 300)
