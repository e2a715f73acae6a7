"""Clients that ask a chat server, for tests."""

import asyncio
from collections.abc import Callable
from typing import Any

from models.judging.answer_log import AnswerLog
from models.judging.chat_client import ChatClient
from models.judging.endpoint import Endpoint, EndpointOptions
from tests.chat_server import ChatServer, Reply
from tests.patience import HOUR

QUICK: dict[str, Any] = {"first_delay": 0.01, "longest_delay": 0.02, "timeout": HOUR}


SETTINGS = {"model": "m"}


def asked_of(endpoint: Endpoint, log: AnswerLog, *tasks: Callable[[ChatClient], Any]) -> list[str | None]:
    """What comes of some tasks, carried out side by side."""

    async def carry_out() -> list[str | None]:
        async with ChatClient(endpoint, log) as client:
            return await client.gather(task(client) for task in tasks)

    return asyncio.run(carry_out())


def ask(
    chat: ChatServer, log: AnswerLog, questions: list[str], key_variable: str | None = None, **options: Any
) -> list[str | None]:
    """The answers to some questions, asked side by side."""

    def task(question: str) -> Callable[[ChatClient], Any]:
        return lambda client: client.ask([{"role": "user", "content": question}], f"about {question}")

    endpoint = Endpoint(chat.url, "m", key_variable, options=EndpointOptions(**{**QUICK, **options}))
    return asked_of(endpoint, log, *map(task, questions))


def echo(body: dict[str, Any], before: int) -> Reply:
    return Reply(f"answer to {body['messages'][-1]['content']}")
