"""Roles that are models behind endpoints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from datamodules.corpus.records import Unicode
from datamodules.corpus.replies import Found, final_answer
from datamodules.errors import UserError
from datamodules.escaping import shortened
from datamodules.files.reading import read_text
from datamodules.files.safe_yaml import NotYamlError, parse_yaml
from datamodules.prompting.chat_prompts import Messages
from datamodules.ranges import Temperature
from models.judging.budget import Price
from models.judging.chat_client import ChatClient
from proactive.simulation.questions import MAX_LENGTH, InvalidAnswer, Question, Role
from proactive.simulation.work_items import RoleName, WorkItem

PROMPTS = Path(__file__).with_name("prompts")
KINDS: dict[RoleName, set[str]] = {
    "environment": {"setup", "tell", "events", "execute"},
    "user": {"ask", "act"},
    "assistant": {"propose"},
    "judge": {"judge"},
    "writer": {"scene"},
}


@dataclass(frozen=True)
class RoleOptions:
    """A role: a model behind an endpoint, or scripted.

    Args:
        url: The endpoint's address, for example http://localhost:8000/v1. Without it, the role is scripted.
        model: The model's name there.
        key_variable: The environment variable with the endpoint's key, if it has one.
        prompt: A prompt file. Start from one in proactive/simulation/prompts.
        temperature: Sampling temperature.
        extra: More fields of each request, such as {max_tokens: 512}.
        structured: Ask for JSON by response_format as well.
        price: The price of its tokens.
    """

    url: str | None = None
    model: str | None = None
    key_variable: str | None = None
    prompt: Path | None = None
    temperature: Temperature = 0.7
    extra: dict[str, Any] = field(default_factory=dict)
    structured: bool = True
    price: Price = field(default_factory=Price)


class RolePrompt(BaseModel):
    """The prompt of a role: a system message, and a text for each kind of question."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    system: Unicode
    questions: dict[str, Unicode]

    @classmethod
    def read(cls, role: RoleName, path: Path | None) -> "RolePrompt":
        """Read a prompt file: the default one if `path` is None.

        Raises:
            UserError: It cannot be read, or does not have exactly the fields of the default one.
        """
        default = PROMPTS / f"{role}.yaml"
        hint = f"Start from {default}."
        file = path or default
        try:
            prompt = cls.model_validate(parse_yaml(read_text(file, option=f"--{role}.prompt")))
        except (ValidationError, NotYamlError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UserError(f"--{role}.prompt: {file}: {first}", hint) from error
        if set(prompt.questions) != KINDS[role]:
            raise UserError(f"--{role}.prompt: {file}: expected the questions {', '.join(sorted(KINDS[role]))}", hint)
        return prompt


class EndpointRole(Role[WorkItem]):
    """A model behind an endpoint.

    Args:
        client: The client of the endpoint. It must write to the log of the simulation.
        prompt: The prompt of the role.
    """

    def __init__(self, client: ChatClient, prompt: RolePrompt) -> None:
        self.client = client
        self.prompt = prompt

    def describe(self) -> dict[str, Any]:
        return {"role": "endpoint", **self.client.endpoint.settings, "prompt": self.prompt.model_dump()}

    async def reply(self, question: Question[Any], item: WorkItem, invalid: Sequence[InvalidAnswer]) -> str:
        notes = {**question.record(), "attempt": len(invalid)}
        number = int(item.seed[:7], 16) + len(invalid)
        text = await self.client.ask(
            self._messages(question, item, invalid), item.name, number, schema=question.schema, notes=notes
        )
        fields = {*question.required}

        def read(content: dict[str, Any]) -> Found[dict[str, Any]] | None:
            return Found(json.dumps(content), content) if fields <= content.keys() else None

        found = final_answer(text or "", read)
        return json.dumps(found.value) if found and found.value is not None else text or ""

    def _messages(self, question: Question[Any], item: WorkItem, invalid: Sequence[InvalidAnswer]) -> Messages:
        facts = {**item.facts_for(question.role), **question.facts}
        asked = f"{self.prompt.questions[question.kind]}\n{json.dumps(facts, ensure_ascii=False)}"
        messages = [{"role": "system", "content": self.prompt.system}, {"role": "user", "content": asked}]
        for text, error in invalid:
            messages.append({"role": "assistant", "content": shortened(text, MAX_LENGTH) or "-"})
            messages.append({"role": "user", "content": f"This answer is invalid: {error}. Answer again."})
        return messages
