"""The chat format of annotated rows: the prompt as messages, written by the tokenizer's chat template.

The lines of the instructions are the system message, except the last one, which begins the user message. The events
follow, one on each line, then the proposal or the line that asks for the answer. Without a system role, all lines are
the user message. After it the template asks for the assistant's message. An agent writes its answer there, and a
classifier reads its verdict.

The template is rendered once, with placeholders. What it writes around them becomes part of the prompt template. So
rows of a trace share the tokens of their events, and a checkpoint can be used without running its chat template.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.prompting.segments import special_tokens
from datamodules.prompting.templates import AgentTemplate, Template, stripped_placeholders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Format = Literal["auto", "chat", "plain"]
AnyTemplate = TypeVar("AnyTemplate", bound=Template)
DAY = datetime.date(2024, 7, 26)  # "today" in every chat template, so that a run can be resumed on another day
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_ROW, _ANSWER = "ROW-OF-PROMPT", "ANSWER-OF-PROMPT"  # in place of events and proposal, and of the answer
_SAMPLE = '- The user\'s file "a.py" has {2} <b> errors, é.\nNow?'  # text as rows have it, which must stay as it is


class ChatTemplateError(Exception):
    """A chat template cannot write some messages; the text says why, as the end of a sentence about the template."""


@dataclass(frozen=True)
class Chat:
    """What a prompt in chat format consists of.

    Attributes:
        system: The system message; empty if there is none.
        user: How the user message begins, before the first event.
        after: What the template writes between the user message and the answer or the verdict.
        end_token: The token that ends an answer; None for a classifier.
        lead: White space that an answer begins with.
    """

    system: str
    user: str
    after: str
    end_token: str | None = None
    lead: str = ""


def render_chat(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[dict[str, str]], *, generation_prompt: bool = False
) -> str:
    """Return messages as the tokenizer's chat template writes them. Today is `DAY`.

    Raises:
        ChatTemplateError: The template raises an error.
    """
    try:
        template = _NOW.sub(lambda found: json.dumps(DAY.strftime(found[2])), tokenizer.get_chat_template())
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except Exception as error:  # a template can raise anything
        raise ChatTemplateError(f"refuses {[turn['role'] for turn in messages]}: {error_text(error, 200)}") from error


def formatted(
    template: AnyTemplate, tokenizer: "PreTrainedTokenizerFast", choice: Format
) -> tuple[AnyTemplate, Chat | None, str | None]:
    """Bring a prompt template into a format.

    Args:
        template: The prompt template.
        tokenizer: The tokenizer, whose chat template is used.
        choice: chat, plain, or auto: chat if the tokenizer has a chat template that can write the prompt.

    Returns:
        The prompt template in that format; what it consists of in chat format; and what a user should know: that it is
        in chat format, or why "auto" is plain in spite of a chat template.

    Raises:
        UserError: The prompt cannot be written in the chosen format.
    """
    if choice == "plain" or (choice == "auto" and not tokenizer.chat_template):
        return template, None, None
    problem = _problem(template, tokenizer)
    if problem is None:
        try:
            return *_in_chat_format(template, tokenizer), "chat"
        except ChatTemplateError as error:
            problem = f"the chat template {error}"
    if choice == "chat":
        raise UserError(f"data.format: chat: {problem}", "Use --data.format plain, or another backbone or prompt.")
    return template, None, f"plain, because {problem}"


def saved_chat(state: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast") -> Chat | None:
    """Return what a prompt in the state of a data module consists of; None in plain format, as in older states.

    Raises:
        UserError: The tokenizer does not have the token that ends an answer.
    """
    chat = Chat(**state["chat"]) if state.get("chat") else None
    if chat and chat.end_token is not None and chat.end_token not in tokenizer.get_vocab():
        raise UserError(f"chat: the tokenizer has no token {chat.end_token}", "Give a checkpoint that is undamaged.")
    return chat


def _problem(template: Template, tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return why a prompt cannot be written in chat format, whatever the chat template says."""
    if not tokenizer.chat_template:
        return "the tokenizer has no chat template"
    parts = template.model_dump()
    for token in special_tokens(tokenizer):
        if part := next((name for name, text in parts.items() if token in text), None):
            return f"part {part} of the prompt contains {token}, so it has a format of its own"
    blank = next((name for name in template.last_parts if not parts[name].strip()), None)
    return f"part {blank} of the prompt is empty" if blank else None


def _in_chat_format(template: AnyTemplate, tokenizer: "PreTrainedTokenizerFast") -> tuple[AnyTemplate, Chat]:
    """Return a prompt template that writes rows in chat format. Raises a ChatTemplateError if that is not possible."""
    *first, last = template.instructions.strip().split("\n")
    choices = [("\n".join(first).strip(), last), ("", "\n".join((*first, last)))]
    problem: ChatTemplateError | None = None
    for system, begin in choices if first else choices[1:]:
        user = f"{begin}\n" if begin else ""
        try:
            before, chat = _written(tokenizer, system, user, with_answer=isinstance(template, AgentTemplate))
        except ChatTemplateError as error:
            problem = problem or error
            continue
        parts = {name: stripped_placeholders(text.strip()) for name, text in template.model_dump().items()}
        parts |= {name: parts[name] + chat.after for name in template.last_parts}
        parts |= {"instructions": before, "event": parts["event"] + "\n"}
        return type(template).parse(parts, "with the chat template"), chat
    assert problem is not None
    raise problem


def _written(tokenizer: "PreTrainedTokenizerFast", system: str, user: str, *, with_answer: bool) -> tuple[str, Chat]:
    """Return what the chat template writes before the first event, and the parts of the prompt."""

    def asked(row: str) -> list[dict[str, str]]:
        turns = [{"role": "system", "content": system}] if system else []
        return [*turns, {"role": "user", "content": user + row}]

    prompt = render_chat(tokenizer, asked(_ROW), generation_prompt=True)
    before, _, after = prompt.partition(_ROW)
    whole = render_chat(tokenizer, asked(_SAMPLE), generation_prompt=True)
    if system not in before or not before.endswith(user) or whole != f"{before}{_SAMPLE}{after}":
        raise ChatTemplateError("leaves messages out, or changes their text")
    if not with_answer:
        return before, Chat(system, user, after)
    answered = render_chat(tokenizer, [*asked(_ROW), {"role": "assistant", "content": _ANSWER}])
    begin, _, rest = answered.partition(_ANSWER)
    if not begin.startswith(prompt):
        raise ChatTemplateError("writes an answer otherwise than after its generation prompt")
    ends = [token for token in special_tokens(tokenizer) if rest.lstrip().startswith(token)]
    end_token = max(ends, key=len) if ends else tokenizer.eos_token
    if end_token is None:
        raise ChatTemplateError("ends an answer without a special token")
    lead = begin.removeprefix(prompt)
    if lead.strip():  # such as an empty <think> block: the agent is asked after it
        after, lead = after + lead, ""
    return before, Chat(system, user, after, str(end_token), lead)
