"""Asks a role until its answer is valid."""

from collections.abc import Callable
from typing import Any

from datamodules.corpus.json_records import parse_json, validate
from datamodules.errors import UserError
from proactive.simulation.questions import Answer, InvalidAnswer, Item, Question, Role
from proactive.simulation.simulation_log import SimulationLog

TRIES = 3  # answers to one question; an invalid answer is sent back with its error


class NoValidAnswerError(Exception):
    """A role gave only invalid answers to a question.

    Attributes:
        cause: The role and the kind of question, such as "user, act".
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
    """Return a role's first valid answer. It is in the log, on disk, before this returns.

    Args:
        role: The role to ask.
        question: The question.
        item: The work item that it belongs to.
        log: The log that the role adds its answers to.
        check: Checks an answer beyond its schema. Raises a UserError if it is invalid.

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
