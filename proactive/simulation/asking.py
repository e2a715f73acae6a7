"""Asking a role until its answer is valid."""

from collections.abc import Callable
from typing import Any

from datamodules.corpus.json_records import parse_json, validate
from datamodules.errors import UserError
from proactive.simulation.questions import Answer, InvalidAnswer, Item, Question, Role
from proactive.simulation.simulation_log import SimulationLog

TRIES = 3  # an invalid answer is sent back with its error twice


class NoValidAnswerError(Exception):
    """A role gave only invalid answers to a question.

    Attributes:
        cause: Role and kind of question.
    """

    def __init__(self, question: Question[Any], error: str) -> None:
        self.cause = f"{question.role}, {question.kind}"
        super().__init__(f"{self.cause}: {error}")


async def ask(
    role: Role[Item],
    question: Question[Answer],
    item: Item,
    log: SimulationLog,
    check: Callable[[Answer], Any] = lambda answer: None,
) -> Answer:
    """Return a role's first valid answer. It is on the disk before this returns.

    Args:
        role: The role to ask.
        question: The question.
        item: The work item that it belongs to.
        log: The log that the role adds its answers to.
        check: Raises a UserError if an answer that matches the schema is invalid for another reason.

    Raises:
        NoValidAnswerError: Three answers were invalid.
    """
    invalid: list[InvalidAnswer] = []
    while len(invalid) < TRIES:
        text = await role.reply(question, item, invalid)
        await log.synced()
        try:
            answer = validate(parse_json(text, "answer"), question.answer, "answer")
            check(answer)
        except UserError as error:
            invalid.append(InvalidAnswer(text, error.what))
        else:
            return answer
    raise NoValidAnswerError(question, invalid[-1].error)
