"""Chats with models behind endpoints: the prompts of agent and judge, and reading the judge's verdict."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from datamodules.answers import json_objects
from datamodules.errors import UserError
from datamodules.records import Event

AGENT_PROMPT = Path(__file__).with_name("agent_endpoint_prompt.yaml")
JUDGE_PROMPT = Path(__file__).with_name("judge_prompt.yaml")
Messages = list[dict[str, str]]  # as chat endpoints take them: role and content
VERDICT_FIELDS = ("judgment", "judgement", "verdict", "accepted")
_PLACEHOLDER = re.compile(r"\{(events|proposal)\}")
_VERDICTS = {"accepted": True, "accept": True, "true": True, "rejected": False, "reject": False, "false": False}
_BARE_VERDICT = re.compile(r"\W*(?:(?:judge?ment|verdict)\W+)?(accepted|rejected)\W*", re.IGNORECASE)


class ChatPrompt(BaseModel):
    """What an endpoint's model is told; the shipped files explain the parts."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    system: str
    user: str

    @classmethod
    def read(cls, path: Path, *, with_proposal: bool) -> "ChatPrompt":
        """Read a prompt from a YAML file.

        Args:
            path: The file.
            with_proposal: Whether it must say where the proposal stands, as a judge's must; an agent's must not.

        Raises:
            UserError: The file cannot be read, lacks a part, has an unknown one, or does not say where the data stands.
        """
        hint = f"Start from {JUDGE_PROMPT if with_proposal else AGENT_PROMPT}."
        try:
            prompt = cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}", "Give the path of a prompt file.") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            part = ".".join(map(str, first["loc"])) or "top level"
            raise UserError(f"{path}, part {part}: {first['msg']}", hint) from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", hint) from error
        found, needed = set(_PLACEHOLDER.findall(prompt.user)), {"events", "proposal"} if with_proposal else {"events"}
        if found != needed:
            wanted = " and ".join(f"{{{name}}}" for name in sorted(needed))
            raise UserError(f"{path}, part user: expected the placeholders {wanted} and no other", hint)
        return prompt

    def messages(self, history: Sequence[Event], proposal: str | None = None) -> Messages:
        """The chat about a history, and for a judge about a proposal; data stands in it as JSON, so as data."""
        values = {
            "events": json.dumps([event.model_dump() for event in history], ensure_ascii=False, indent=1),
            "proposal": json.dumps(proposal, ensure_ascii=False),
        }
        user = _PLACEHOLDER.sub(lambda found: values[found[1]], self.user)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


def read_verdict(text: str) -> bool | None:
    """Whether a judge's text says accepted; None if it says nothing clear. Raises nothing, whatever the text.

    Read is what stands behind a model's thoughts, if it marks them: the first JSON object with a verdict; else a text
    that is, or whose last line is, one of the words accepted and rejected alone.
    """
    text = text.rpartition("</think>")[2]
    for content in json_objects(text):
        if (verdict := _verdict(content)) is not None:
            return verdict
    last_line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    bare = _BARE_VERDICT.fullmatch(last_line)
    return _VERDICTS[bare[1].lower()] if bare else None


def read_thought(text: str) -> str:
    """A judge's reason, where its JSON gives one."""
    for content in json_objects(text):
        if isinstance(thought := content.get("thought"), str):
            return thought
    return ""


def _verdict(content: dict[str, Any]) -> bool | None:
    for name, value in content.items():
        if name.strip().lower() in VERDICT_FIELDS:
            return value if isinstance(value, bool) else _VERDICTS.get(str(value).strip().lower())
    return None
