"""A client for chat endpoints: it sends requests concurrently, logs each reply, and sends no request twice."""

import asyncio
import hashlib
import json
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Self, TypeVar

from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import Messages, Schema
from models.judging.answer_log import AnswerLog
from models.judging.budget import Budget, Usage
from models.judging.chat_connection import ChatConnection
from models.judging.endpoint import Endpoint

Result = TypeVar("Result")


class ChatClient:
    """Sends requests to an endpoint concurrently, and each request once.

    Use it within `async with client`, which opens its connections.

    Args:
        endpoint: The endpoint.
        log: Keeps the replies.
        budget: Limits the tokens and the cost of several clients together.
        role: Distinguishes clients that share a log.
    """

    def __init__(
        self, endpoint: Endpoint, log: AnswerLog | None = None, budget: Budget | None = None, role: str = ""
    ) -> None:
        self.endpoint = endpoint
        self.log = AnswerLog() if log is None else log
        self.budget = Budget() if budget is None else budget
        self.role = role
        self._connection = ChatConnection(endpoint)

    async def __aenter__(self) -> Self:
        await self._connection.__aenter__()
        self._semaphore = asyncio.Semaphore(self.endpoint.options.concurrency)
        self._locks: dict[str, asyncio.Lock] = {}  # of requests in progress, by key
        self.budget.add(self.log.used.get(self.role, Usage()), self.endpoint.price)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.__aexit__(*error)

    async def gather(self, tasks: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
        """Run tasks concurrently, and return their results in order.

        Raises:
            UserError: The endpoint refused, or failed after all retries, or the time limit is over.
        """
        try:
            async with asyncio.timeout_at(self.endpoint.deadline), asyncio.TaskGroup() as group:
                running = [group.create_task(task) for task in tasks]
        except TimeoutError:
            raise UserError(
                f"the time limit of {self.endpoint.options.time_limit} seconds is over", "Answers so far are kept."
            ) from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the other tasks were cancelled
        return [task.result() for task in running]

    async def ask(
        self,
        messages: Messages,
        where: str,
        attempt: int = 0,
        temperature: float | None = None,
        schema: Schema | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Return the model's text, from the log if it contains the same request; None if the reply is incomplete.

        Args:
            messages: The chat.
            where: A description of the request for messages and for the log.
            attempt: Added to the seed, to distinguish requests that are otherwise equal.
            temperature: Sampling temperature; that of the endpoint if None.
            schema: The JSON schema that the text should match, if the endpoint is asked for structured output.
            notes: Further fields of the line in the log.

        Raises:
            UserError: The endpoint refuses, or fails after all retries, or a limit of tokens or cost is reached.
        """
        if not self._connection.is_open:
            raise RuntimeError("ask within `async with client`")
        if not self.endpoint.structured:
            schema = None
        question = [messages, attempt, temperature, *([schema.name] if schema else [])]
        question += [self.role] if self.role else []
        key = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]
        async with self._locks.setdefault(key, asyncio.Lock()):  # concurrent equal requests are sent once
            if key not in self.log.texts:
                async with self._semaphore:
                    self.budget.refuse_more()
                    begin = time.monotonic()
                    reply = await self._connection.send(self._body(messages, attempt, temperature, schema), where)
                seconds = round(time.monotonic() - begin, 3)
                self.budget.add(reply.usage, self.endpoint.price)
                self.log.add(key, reply.text, where, reply.finish_reason, reply.usage, seconds, notes)
            self._locks.pop(key, None)  # from now on the log has the reply
        return self.log.final(key)

    def _body(
        self, messages: Messages, attempt: int, temperature: float | None, schema: Schema | None
    ) -> dict[str, Any]:
        endpoint = self.endpoint
        body = {
            "model": endpoint.model,
            "messages": messages,
            "temperature": endpoint.temperature if temperature is None else temperature,
            "seed": endpoint.seed + attempt,
            "response_format": schema and schema.response_format,
            **endpoint.extra,
        }
        return {name: value for name, value in body.items() if value is not None}
