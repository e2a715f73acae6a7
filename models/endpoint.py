"""A client for chat endpoints in OpenAI's manner that gives nothing up and asks nothing twice.

`AnswerLog` keeps every answer the moment it is there; `Endpoint` asks for those that are missing, a few at a time, and
tries again where a server is busy, broken or silent.
"""

import asyncio
import email.utils
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from datamodules.chat import Messages
from datamodules.errors import UserError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from httpx2 import AsyncClient, Response
    from tenacity import RetryCallState

Result = TypeVar("Result")
Counter = Callable[[str, int], AbstractContextManager[Callable[[], None]]]  # label, total -> what counts one more
ADDRESS_HINT = "Give one such as http://localhost:8000/v1."
TRY_AGAIN = (408, 409, 425, 429)  # and all from 500


@dataclass(frozen=True)
class EndpointOptions:
    """How endpoints are asked; nothing here changes an answer.

    Args:
        concurrency: Requests under way at once, at most.
        timeout: Seconds that one request may take, from connecting to the last byte.
        retries: How often a request is tried again where the server is busy, broken, or does not answer in time.
        first_delay: Seconds before the first retry, at most; they double with each, and chance shortens them.
        longest_delay: Seconds between retries, at most; a server that names a time is given that time.
        time_limit: Seconds after which the evaluation stops; what it has is kept, and the same command goes on.
    """

    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    first_delay: float = 1.0
    longest_delay: float = 60.0
    time_limit: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0), ("first_delay", 0), ("longest_delay", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"endpoint.{name}: expected {least} or more, got {value}", "Give a greater one.")
        for name in ("timeout", "time_limit"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"endpoint.{name}: expected more than 0 seconds, got {value}", "Give a greater one.")


class AnswerLog:
    """Texts by key, in a file that grows line by line and outlives a kill.

    The first line says with which settings the texts came about. A last line that was cut short is dropped.

    Raises:
        UserError: The file was written with other settings, is no such log, or another process writes it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(
                f"{path} is being written by another evaluation", "Wait for it, or give another --output."
            ) from error
        try:
            self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def add(self, key: str, text: str, where: str) -> None:
        """Keep a text; when this returns, the disk has it."""
        self.texts[key] = text
        self._append({"key": key, "where": where, "text": text})

    def close(self) -> None:
        self._file.close()

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            self._file.truncate(0)
            fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            self._append({"fingerprint": fingerprint, "settings": settings})
            return
        try:
            before = json.loads(lines[0])["settings"]
            for line in lines[1:]:
                entry = json.loads(line)
                self.texts[entry["key"]] = entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no log of an evaluation", "Give another --output.") from error
        for name in sorted(set(before) | set(settings)):
            if (then := before.get(name)) != (now := settings.get(name)):
                raise UserError(
                    f"{self.path} was begun with {name} {_shorten(then)}, and this is {_shorten(now)}",
                    "Go on with the same options, or give another --output.",
                )
        self._file.truncate(len(whole))

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class Endpoint:
    """One model behind an address.

    Attributes:
        url: The address that /chat/completions is under, for example http://localhost:8000/v1.
        model: The model's name there.
        key_variable: The environment variable that holds the key, if the server wants one. The key is sent to the
            server and stands in no file, message or log.
        temperature: Of sampling.
        seed: Sent with each request, so that a server which honours it repeats itself.
        extra: More fields of the request's body; one that is null is left out of it.
        options: How to ask.
        deadline: When to stop, as `time.monotonic` counts; never if None.
    """

    url: str
    model: str
    key_variable: str | None = None
    temperature: float = 0.0
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    options: EndpointOptions = field(default_factory=EndpointOptions)
    deadline: float | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{_shorten(self.url)} is no address", ADDRESS_HINT)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                "the endpoint's address holds more than a host and a path",
                "Give the plain address, and the key by the name of an environment variable.",
            )
        if self.key_variable and not self._key:
            raise UserError(f"the environment variable {self.key_variable} is not set", "Put the endpoint's key there.")

    @property
    def settings(self) -> dict[str, Any]:
        """What determines an answer, beside the messages. Not the address: a server may come back under another."""
        names = ("model", "temperature", "seed", "extra")
        return {name: getattr(self, name) for name in names}

    def run(
        self,
        log: AnswerLog,
        tasks: Iterable[Callable[["Session"], Awaitable[Result]]],
        label: str,
        count: Counter,
    ) -> list[Result]:
        """Carry out tasks that ask, side by side, and return their results in order.

        Raises:
            UserError: The endpoint refused, kept failing, or the time is over; what was answered is in the log.
        """
        return asyncio.run(self._run(log, list(tasks), label, count))

    async def _run(
        self, log: AnswerLog, tasks: list[Callable[["Session"], Awaitable[Result]]], label: str, count: Counter
    ) -> list[Result]:
        with count(label, len(tasks)) as advance:

            async def one(task: Callable[[Session], Awaitable[Result]]) -> Result:
                result = await task(session)
                advance()
                return result

            try:
                async with (
                    self._session(log) as session,
                    asyncio.timeout_at(self.deadline),
                    asyncio.TaskGroup() as group,
                ):
                    running = [group.create_task(one(task)) for task in tasks]
            except TimeoutError:
                raise UserError(
                    f"the time limit of {self.options.time_limit} seconds is over", "What was answered is kept."
                ) from None
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the others were under way, and stopped with it
        return [task.result() for task in running]

    @asynccontextmanager
    async def _session(self, log: AnswerLog) -> "AsyncIterator[Session]":
        from httpx2 import AsyncClient, Limits

        limits = Limits(max_connections=self.options.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        async with AsyncClient(headers=headers, limits=limits, timeout=self.options.timeout) as client:
            yield Session(self, log, client)

    @property
    def _key(self) -> str | None:
        return os.environ.get(self.key_variable) if self.key_variable else None

    def without_key(self, text: str) -> str:
        """A server's text, in which it may have sent the key back."""
        return text.replace(self._key, "[key]") if self._key else text


class Session:
    """An open connection to an endpoint, and the log of what it said."""

    def __init__(self, endpoint: Endpoint, log: AnswerLog, client: "AsyncClient") -> None:
        self.endpoint = endpoint
        self.log = log
        self.client = client
        self._room = asyncio.Semaphore(endpoint.options.concurrency)
        self._asked: dict[str, asyncio.Lock] = {}

    async def ask(self, messages: Messages, where: str, attempt: int = 0, temperature: float | None = None) -> str:
        """The model's text; from the log if it was asked the same before.

        Args:
            messages: The chat.
            where: What is asked about, in words, for error messages and for who reads the log.
            attempt: Sets apart, by the seed, requests that are otherwise the same.
            temperature: The endpoint's own if None.

        Raises:
            UserError: The endpoint refuses, or fails after all retries.
        """
        key = hashlib.sha256(json.dumps([messages, attempt, temperature]).encode()).hexdigest()[:32]
        async with self._asked.setdefault(key, asyncio.Lock()):  # the same question by two tasks is asked once
            if key not in self.log.texts:
                async with self._room:
                    text = await self._with_retries(self._body(messages, attempt, temperature), where)
                self.log.add(key, text, where)
        return self.log.texts[key]

    def _body(self, messages: Messages, attempt: int, temperature: float | None) -> dict[str, Any]:
        endpoint = self.endpoint
        body = {
            "model": endpoint.model,
            "messages": messages,
            "temperature": endpoint.temperature if temperature is None else temperature,
            "seed": endpoint.seed + attempt,
            **endpoint.extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    async def _with_retries(self, body: dict[str, Any], where: str) -> str:
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        options = self.endpoint.options
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Failed),
            stop=stop_after_attempt(options.retries + 1),
            wait=self._delay,
            reraise=True,
        )
        try:
            return await retrying(self._request, body, where)
        except _Failed as failure:
            raise UserError(
                f"{where}: {self.endpoint.url} failed {options.retries + 1} times, at last with: {failure}",
                "What was answered is kept. See --endpoint.retries and --endpoint.timeout.",
            ) from failure

    def _delay(self, state: "RetryCallState") -> float:
        from tenacity import wait_random_exponential

        failure = state.outcome.exception() if state.outcome else None
        if isinstance(failure, _Failed) and failure.retry_after is not None:
            return failure.retry_after
        options = self.endpoint.options
        return wait_random_exponential(multiplier=options.first_delay, max=options.longest_delay)(state)

    async def _request(self, body: dict[str, Any], where: str) -> str:
        from httpx2 import HTTPError, InvalidURL

        address = self.endpoint.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        try:
            async with asyncio.timeout(self.endpoint.options.timeout):  # httpx2 limits the wait for each byte alone
                response = await self.client.post(address, json=body)
        except TimeoutError:
            raise _Failed(f"no answer within {self.endpoint.options.timeout} seconds") from None
        except HTTPError as error:
            raise _Failed(self._printable(f"{type(error).__name__}: {error}")) from error
        except InvalidURL as error:
            raise UserError(
                f"{address} is no address: {error}", "Give one such as http://localhost:8000/v1."
            ) from error
        if response.status_code in TRY_AGAIN or response.status_code >= 500:
            raise _Failed(self._status(response), _retry_after(response.headers.get("retry-after")))
        if response.status_code != 200:
            raise UserError(
                f"{where}: {address} refuses: {self._status(response)}",
                "Mend the options; what was answered is kept.",
            )
        try:
            completion = _Completion.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "top level"
            raise _Failed(self._printable(f"no chat completion: {place}: {first['msg']}")) from None
        text = completion.choices[0].message.content or ""
        return self.endpoint.without_key(text.encode("utf-8", "replace").decode())

    def _status(self, response: "Response") -> str:
        return self._printable(f"{response.status_code} {response.reason_phrase} {response.text}")

    def _printable(self, text: str) -> str:
        return _shorten(self.endpoint.without_key(" ".join(text.split())))


class _Failed(Exception):  # noqa: N818 - not an error until the retries are used up
    """A request that may go well when it is tried again, at the earliest `retry_after` seconds from now."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    """The part of a server's answer that is read."""

    choices: Annotated[list[_Choice], Field(min_length=1)]


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which gives them or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _shorten(value: Any, limit: int = 200) -> str:
    """A value on one line that a terminal can show, and does not obey."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
