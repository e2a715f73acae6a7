"""A client for chat endpoints in OpenAI's manner: it retries what fails, and asks no question twice."""

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Coroutine, Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

from annotated_types import Ge, Le
from pydantic import ValidationError

from datamodules.errors import UserError
from datamodules.escaping import printable, shortened
from datamodules.files.reading import MOST_AT_ONCE
from datamodules.prompting.chat_prompts import Messages
from datamodules.ranges import FINITE, NotNegative, Positive, Tries, refuse_unsound
from models.judging.answer_log import AnswerLog
from models.judging.completions import (
    Completion,
    Received,
    duration,
    error_of,
    is_refusal,
    json_of,
    retry_after,
    streams,
    text_of,
)

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from tenacity import RetryCallState

Result = TypeVar("Result")
ADDRESS_HINT = "Give one such as http://localhost:8000/v1."
TOLD_FROM = 5.0  # seconds of a wait that a server asks for
SHORTEST_SECRET = 6  # characters of a key: what is shorter, such as "EMPTY", is a stand-in and may be any word
SECRET_NAMES = re.compile("key|token|secret|sig|auth|pass|pw|cred|code|jwt", re.IGNORECASE)
LONGEST_SAID = 200  # characters of a server's words in a message
log = logging.getLogger("proactive")


@dataclass(frozen=True)
class EndpointOptions:
    """How endpoints are asked; nothing here changes an answer.

    Args:
        concurrency: Requests under way at once, at most.
        timeout: Seconds that one request may take, from connecting to the last byte.
        retries: How often a request is tried again where the server is busy, broken, or does not answer in time.
        first_delay: Seconds before the first retry, at most; they double with each, and chance shortens them.
        longest_delay: Seconds between retries, at most; a server that names a time is given that time.
        longest_wait: Seconds that a server may name, at most; one that asks for more ends the evaluation.
        time_limit: Seconds after which the evaluation stops; what it has is kept, and the same command goes on.
    """

    concurrency: Tries = 8
    timeout: Positive = 120.0
    retries: Annotated[int, Ge(0), Le(1000), FINITE] = 6
    first_delay: NotNegative = 1.0
    longest_delay: NotNegative = 60.0
    longest_wait: NotNegative = 600.0
    time_limit: Positive | None = None

    def __post_init__(self) -> None:
        refuse_unsound(type(self), asdict(self), "endpoint")


@dataclass(frozen=True)
class Endpoint:
    """One model behind an address.

    Attributes:
        url: The address that /chat/completions is under, for example http://localhost:8000/v1; a query such as
            ?api-version=... is kept.
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
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise UserError(f"{shortened(self.url, LONGEST_SAID)} is no address", ADDRESS_HINT)
        secrets = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if SECRET_NAMES.search(name)]
        if parts.username or parts.password or parts.fragment or secrets:
            raise UserError(
                "the endpoint's address holds more than a host, a path and a plain query",
                "Give the plain address, and the key by the name of an environment variable.",
            )
        if self.extra.get("stream"):
            raise UserError("extra: stream: answers are read whole, not as a stream", "Leave stream out.")
        if self.key_variable and not self._key:
            raise UserError(f"the environment variable {self.key_variable} is not set", "Put the endpoint's key there.")
        if self._key and not re.fullmatch(r"[!#-&(-\[\]-~]+", self._key):  # visible ASCII but quotes and backslashes
            raise UserError(
                f"the environment variable {self.key_variable} holds something else than a key: blanks, quotes, "
                "control characters or letters outside ASCII",
                "Put the key alone there, without Bearer and quotes.",
            )

    @property
    def address(self) -> str:
        """Where requests go."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/") + "/chat/completions"
        return parts._replace(path=path).geturl()

    @property
    def settings(self) -> dict[str, Any]:
        """What determines an answer, beside the messages. Not the address: a server may come back under another."""
        names = ("model", "temperature", "seed", "extra")
        return {name: getattr(self, name) for name in names}

    @property
    def _key(self) -> str | None:
        return os.environ.get(self.key_variable, "").strip() or None if self.key_variable else None

    def headers(self) -> dict[str, str]:
        """Azure, which alone names a version in its addresses, takes a key under a name of its own."""
        if not self._key:
            return {}
        of_azure = str(urlsplit(self.url).hostname).endswith(".azure.com")
        return {"api-key": self._key} if of_azure else {"Authorization": f"Bearer {self._key}"}

    def without_key(self, text: str) -> str:
        """A server's text, in which it may have sent the key back, in whatever escaping."""
        key = self._key
        return _in_any_escaping(key).sub("[key]", text) if key and len(key) >= SHORTEST_SECRET else text


@lru_cache(maxsize=4)
def _in_any_escaping(key: str) -> re.Pattern[str]:
    """What finds a key as it is, and as JSON, repr, URLs, HTML, base64 or hexadecimal write it, also several times."""

    def forms(character: str) -> str:
        code, hexadecimal = ord(character), f"(?i:{ord(character):02x})"
        escaped = rf"\\*{re.escape(character)}|\\+(?:u00|x){hexadecimal}|%(?:25)*{hexadecimal}"
        return rf"(?:{escaped}|&(?:amp;)*\#(?:0*{code}|[xX]0*{hexadecimal});)"

    names = {"&": "amp", "<": "lt", ">": "gt"}
    written = [
        f"(?:{forms(character)}|&(?:amp;)*{names[character]};)" if character in names else forms(character)
        for character in key
    ]
    encoded: set[str] = set()
    for offset in range(3):  # of the key's first byte among three; what other bytes have a part in is cut off
        letters = base64.b64encode(b"\0" * offset + key.encode()).decode().rstrip("=")
        whole = letters[(0, 2, 3)[offset] : (offset + len(key)) * 8 // 6]
        encoded |= {re.escape(whole), re.escape(whole.translate(str.maketrans("+/", "-_")))}
    plain_hex = rf"(?i:{key.encode().hex()})"
    return re.compile("|".join(["".join(written), plain_hex, *sorted(encoded, key=len, reverse=True)]))


class ChatClient:
    """Asks an endpoint, a few questions at once, and each question once.

    Its connections are open within `async with client`.

    Args:
        endpoint: The model.
        log: Keeps its replies; within one that is opened on a file they outlive a kill.
    """

    def __init__(self, endpoint: Endpoint, log: AnswerLog | None = None) -> None:
        self.endpoint = endpoint
        self.log = AnswerLog() if log is None else log
        self._told_until = 0.0  # when a wait ends that was told
        self._http: AsyncClient | None = None

    async def __aenter__(self) -> Self:
        from httpx2 import AsyncClient, Limits

        endpoint = self.endpoint
        limits = Limits(max_connections=endpoint.options.concurrency)
        headers = {"Accept-Encoding": "gzip", **endpoint.headers()}  # which is what `_received` decodes
        self._http = AsyncClient(headers=headers, limits=limits, timeout=endpoint.options.timeout)
        self._room = asyncio.Semaphore(endpoint.options.concurrency)
        self._asked: dict[str, asyncio.Lock] = {}
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def gather(self, tasks: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
        """Carry out tasks that ask, side by side, and return their results in order.

        Raises:
            UserError: The endpoint refused, kept failing, or the time is over; what was answered is in the log.
        """
        try:
            async with asyncio.timeout_at(self.endpoint.deadline), asyncio.TaskGroup() as group:
                running = [group.create_task(task) for task in tasks]
        except TimeoutError:
            raise UserError(
                f"the time limit of {self.endpoint.options.time_limit} seconds is over", "What was answered is kept."
            ) from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others were under way, and stopped with it
        return [task.result() for task in running]

    async def ask(
        self, messages: Messages, where: str, attempt: int = 0, temperature: float | None = None
    ) -> str | None:
        """The model's text, from the log if it was asked the same before; None if it is no whole reply.

        Args:
            messages: The chat.
            where: What is asked about, in words, for error messages and for who reads the log.
            attempt: Sets apart, by the seed, requests that are otherwise the same.
            temperature: The endpoint's own if None.

        Raises:
            UserError: The endpoint refuses, or fails after all retries.
        """
        if self._http is None:
            raise RuntimeError("ask within `async with client`")
        key = hashlib.sha256(json.dumps([messages, attempt, temperature]).encode()).hexdigest()[:32]
        async with self._asked.setdefault(key, asyncio.Lock()):  # the same question by two tasks is asked once
            if key not in self.log.texts:
                async with self._room:
                    text, finish_reason = await self._with_retries(self._body(messages, attempt, temperature), where)
                self.log.add(key, text, where, finish_reason)
        return self.log.final(key)

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

    async def _with_retries(self, body: dict[str, Any], where: str) -> tuple[str, str | None]:
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
            until = time.monotonic() + failure.retry_after
            if failure.retry_after >= TOLD_FROM and until > self._told_until + TOLD_FROM:
                self._told_until = until
                log.info(f"{self.endpoint.url} asks to wait {duration(failure.retry_after)}: {failure}")
            return failure.retry_after
        options = self.endpoint.options
        return wait_random_exponential(multiplier=options.first_delay, max=options.longest_delay)(state)

    async def _request(self, body: dict[str, Any], where: str) -> tuple[str, str | None]:
        """The model's text, and why it ended if the server says so."""
        from httpx2 import HTTPError, InvalidURL

        address = self.endpoint.address
        try:
            async with asyncio.timeout(self.endpoint.options.timeout):  # httpx2 limits the wait for each byte alone
                response = await self._received(body, where)
        except TimeoutError:
            raise _Failed(f"no answer within {self.endpoint.options.timeout} seconds") from None
        except HTTPError as error:
            raise _Failed(self._printable(f"{type(error).__name__}: {error}")) from error
        except InvalidURL as error:
            raise UserError(f"{address} is no address: {error}", ADDRESS_HINT) from error
        except zlib.error as error:
            raise _Failed(f"a body that is no gzip: {error}") from error
        content = json_of(response.content)
        status = f"{response.status_code} {response.reason_phrase}"
        said = self._printable(f"{status}: {error_of(content) or response.text}")
        if is_refusal(response, content):
            raise UserError(f"{where}: {address} refuses: {said}", self._hint(response.status_code, content, body))
        if response.status_code != 200:
            wait = retry_after(response.headers.get("retry-after"))
            self._refuse_long_wait(wait, said, where)
            raise _Failed(said, wait)
        if error_of(content):
            raise _Failed(f"an error in place of an answer: {said}")
        if streams(response):
            raise UserError(
                f"{where}: {address}: the server streams, and one JSON object is expected: {said}",
                "Turn streaming off, for example with stream: false in --agent.extra or --judge.extra.",
            )
        try:
            choice = Completion.model_validate(content).choices[0]
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "top level"
            raise _Failed(self._printable(f"no chat completion: {place}: {first['msg']}: {response.text}")) from None
        text = text_of(choice.message.content).encode("utf-8", "replace").decode()
        return self.endpoint.without_key(text), choice.finish_reason and self._printable(choice.finish_reason)

    async def _received(self, body: dict[str, Any], where: str) -> Received:
        """A whole response, unless it has more than `MOST_AT_ONCE` bytes: then no more of it is read or decoded."""
        assert self._http is not None
        async with self._http.stream("POST", self.endpoint.address, json=body) as response:
            coding = response.headers.get("content-encoding", "identity").strip().lower()
            if coding not in ("identity", "gzip", ""):
                raise _Failed(self._printable(f"a body in {coding}, and gzip or none was asked for"))
            decoder = zlib.decompressobj(16 + zlib.MAX_WBITS) if coding == "gzip" else None
            content = bytearray()
            sent = 0
            async for chunk in response.aiter_raw():
                sent += len(chunk)
                room = MOST_AT_ONCE + 1 - len(content)
                content += decoder.decompress(chunk, room) if decoder else chunk[:room]
                if max(sent, len(content)) > MOST_AT_ONCE:
                    raise UserError(
                        f"{where}: {self.endpoint.address}: the response is longer than the limit of "
                        f"{MOST_AT_ONCE:,} bytes",
                        "Limit the model's answers, for example with max_tokens in --agent.extra or --judge.extra.",
                    )
                if decoder and decoder.eof:
                    break
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Received(response.status_code, response.reason_phrase, headers, bytes(content))

    def _refuse_long_wait(self, wait: float | None, said: str, where: str) -> None:
        if wait is None:
            return
        endpoint, longest = self.endpoint, self.endpoint.options.longest_wait
        if wait > longest:
            raise UserError(
                f"{where}: {endpoint.url} asks to wait {duration(wait)}, longer than endpoint.longest_wait "
                f"({duration(longest)}): {said}",
                "What was answered is kept: go on later, or give a greater --endpoint.longest_wait.",
            )
        if endpoint.deadline is not None and time.monotonic() + wait > endpoint.deadline:
            raise UserError(
                f"{where}: {endpoint.url} asks to wait {duration(wait)}, longer than the time limit leaves: {said}",
                "What was answered is kept: go on later, or give a greater --endpoint.time_limit.",
            )

    def _hint(self, status: int, content: Any, body: dict[str, Any]) -> str:
        error = content.get("error") if isinstance(content, dict) else None
        parameter = error.get("param") if isinstance(error, dict) else None
        if parameter in ("temperature", "seed") and parameter in body:
            what = f"Leave it out with {parameter}: null in --agent.extra or --judge.extra"
        elif status in (401, 403):
            variable = self.endpoint.key_variable
            what = f"Check the key in {variable}" if variable else "Name the variable of a key, --agent.key_variable"
        elif status == 404:
            what = "Check the address, which often ends in /v1, and the model's name"
        else:
            what = "Mend the options"
        return f"{what}; what was answered is kept."

    def _printable(self, text: str) -> str:
        return shortened(printable(self.endpoint.without_key(" ".join(text.split()))), LONGEST_SAID)


class _Failed(Exception):  # noqa: N818 - not an error until the retries are used up
    """A request that may go well when it is tried again, at the earliest `retry_after` seconds from now."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after
