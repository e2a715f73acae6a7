"""Prompts of agents and judges behind endpoints, and reading a judge's verdict."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from datamodules.corpus.answers import AGENT_PROMPT
from datamodules.corpus.records import Event, Unicode
from datamodules.corpus.replies import UNREADABLE, Found, final_answer, is_example, without_reasoning
from datamodules.errors import UserError
from datamodules.files.reading import read_text
from datamodules.files.safe_yaml import NotYamlError, parse_yaml
from datamodules.prompting.templates import MAX_PROMPT_BYTES, PROMPT_HINT

JUDGE_PROMPT = Path(__file__).with_name("judge_prompt.yaml")
Messages = list[dict[str, str]]  # as chat endpoints take them: role and content
VERDICT_FIELDS = ("judgment", "judgement", "verdict", "accepted")
_PLACEHOLDER = re.compile(r"\{(events|proposal)\}")
_VERDICTS = {"accepted": True, "accept": True, "true": True, "rejected": False, "reject": False, "false": False}
_BARE_VERDICT = re.compile(
    r"""(?:</?\w+>|[^\w{<])*(?:(?:my |the )?(?:final )?(?:judge?ment|verdict|answer)[^\w{]+)?"""
    r"""(accepted|rejected)(?:</?\w+>|[^\w{},<])*""",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Schema:
    """A JSON schema for structured output; all fields are required, as strict servers demand."""

    name: str
    properties: dict[str, Any]
    definitions: dict[str, Any] = field(default_factory=dict)  # what the properties refer to as #/$defs/NAME

    @property
    def response_format(self) -> dict[str, Any]:
        """The `response_format` of a chat request."""
        schema = {
            "type": "object",
            "properties": self.properties,
            "required": list(self.properties),
            "additionalProperties": False,
            **({"$defs": self.definitions} if self.definitions else {}),
        }
        return {"type": "json_schema", "json_schema": {"name": self.name, "strict": True, "schema": schema}}


_TEXT = {"type": "string"}
ANSWER_FORMAT = Schema(
    "answer",
    {"purpose": _TEXT, "thoughts": _TEXT, "proposal": {"anyOf": [_TEXT, {"type": "null"}]}, "response": _TEXT},
)
VERDICT_FORMAT = Schema("verdict", {"thought": _TEXT, "judgment": {"type": "string", "enum": ["accepted", "rejected"]}})


class ChatPrompt(BaseModel):
    """Prompt of a model behind an endpoint; the shipped files explain the parts."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    system: Unicode
    user: Unicode

    @classmethod
    def read(cls, path: Path, *, with_proposal: bool) -> "ChatPrompt":
        """Read a prompt from a YAML file.

        Args:
            path: The file.
            with_proposal: Whether it must have a placeholder for the proposal (judge) or must not (agent).

        Raises:
            UserError: The file cannot be read, lacks a part, has an unknown one, or does not say where the data stands.
        """
        hint = f"Start from {JUDGE_PROMPT if with_proposal else AGENT_PROMPT}."
        try:
            prompt = cls.model_validate(parse_yaml(read_text(path, MAX_PROMPT_BYTES, hint=PROMPT_HINT)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            part = ".".join(map(str, first["loc"])) or "top level"
            raise UserError(f"{path}, part {part}: {first['msg'].removeprefix('Value error, ')}", hint) from error
        except NotYamlError as error:
            raise UserError(f"{path} is not YAML: {error}", hint) from error
        found, needed = set(_PLACEHOLDER.findall(prompt.user)), {"events", "proposal"} if with_proposal else {"events"}
        if found != needed:
            wanted = " and ".join(f"{{{name}}}" for name in sorted(needed))
            raise UserError(f"{path}, part user: expected the placeholders {wanted} and no other", hint)
        return prompt

    @property
    def text(self) -> str:
        """The whole prompt, without data."""
        return f"{self.system}\n{self.user}"

    def messages(self, history: Sequence[Event], proposal: str | None = None) -> Messages:
        """Return the chat for a history, and for a judge also a proposal. Data is inserted as JSON."""
        values = {
            "events": json.dumps([event.model_dump() for event in history], ensure_ascii=False, indent=1),
            "proposal": json.dumps(proposal, ensure_ascii=False),
        }
        user = _PLACEHOLDER.sub(lambda found: values[found[1]], self.user)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


def read_verdict(text: str, prompt: str | None = None) -> bool | None:
    """Return whether a judge's reply accepts; None if it is unclear. Never raises.

    The verdict is in the final JSON object of the reply, see `final_answer`. If there is none, the last line may be the
    word accepted or rejected.

    Args:
        text: The reply.
        prompt: The prompt, whose examples are not verdicts; None for the shipped prompt.
    """
    return read_judgment(text, prompt)[0]


def read_judgment(text: str, prompt: str | None = None) -> tuple[bool | None, str]:
    """Return the same as `read_verdict`, and the judge's reason if its JSON gives one."""
    told = _shipped_prompt() if prompt is None else prompt
    if found := final_answer(text, lambda content: _judgment(content, told)):
        return (None, "") if found.decision is UNREADABLE else (found.decision, found.value or "")
    spoken = without_reasoning(text) or ""
    last_line = next((line for line in reversed(spoken.splitlines()) if line.strip()), "")
    bare = _BARE_VERDICT.fullmatch(last_line)
    return (_VERDICTS[bare[1].lower()] if bare else None), ""


def _judgment(content: dict[str, Any], prompt: str) -> Found[str] | None:
    fields = {name.strip().lower(): value for name, value in content.items()}
    verdicts = {_verdict(value) for name, value in fields.items() if name in VERDICT_FIELDS}
    texts = {name: value for name, value in fields.items() if name not in VERDICT_FIELDS and isinstance(value, str)}
    if not verdicts or is_example(texts, prompt):
        return None
    decision = verdicts.pop() if len(verdicts) == 1 else UNREADABLE
    return Found(decision, texts.get("thought", ""))


def _verdict(value: Any) -> Any:
    return value if isinstance(value, bool) else _VERDICTS.get(str(value).strip().lower(), UNREADABLE)


@cache
def _shipped_prompt() -> str:
    return JUDGE_PROMPT.read_text(encoding="utf-8")
