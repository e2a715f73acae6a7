"""A client for OpenAI-compatible chat endpoints that retries failures and asks no question twice."""

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

from annotated_types import Ge, Le
from pydantic import ValidationError

from datamodules.errors import UserError
from datamodules.escaping import printable, shortened
from datamodules.files.reading import MOST_AT_ONCE
from datamodules.prompting.chat_prompts import Messages, Schema
from datamodules.ranges import FINITE, Count, NotNegative, Positive, Tries, refuse_unsound
from models.judging.answer_log import AnswerLog
from models.judging.budget import Budget, Price, Usage
from models.judging.completions import (
    Received,
    Reply,
    duration,
    error_of,
    is_refusal,
    json_of,
    retry_after,
    streams,
    unsupported_field,
)

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from tenacity import RetryCallState

Result = TypeVar("Result")
RESPONSE_FORMAT = "response_format"
RENAMED = {"max_tokens": "max_completion_tokens"}  # fields that newer servers expect under another name
ADDRESS_HINT = "Give one such as http://localhost:8000/v1."
TOLD_FROM = 5.0  # seconds: shorter waits that a server asks for are not logged
SHORTEST_SECRET = 6  # characters: a shorter key, such as "EMPTY", is a placeholder that may occur as a word
SECRET_NAMES = re.compile("key|token|secret|sig|auth|pass|pw|cred|code|jwt", re.IGNORECASE)
LONGEST_SAID = 200  # characters of a server's text in a message
log = logging.getLogger("proactive")


@dataclass(frozen=True)
class EndpointOptions:
    """How requests are sent. No option changes an answer.

    Args:
        concurrency: Maximum number of concurrent requests.
        timeout: Seconds per request, from connecting to the last byte.
        retries: Maximum number of retries of a request if the server is busy, fails, or times out.
        first_delay: Maximum seconds before the first retry. The delay doubles with each retry, with random jitter.
        longest_delay: Maximum seconds between retries, unless the server names a time.
        longest_wait: Maximum seconds that a server may ask to wait. A longer wait ends the evaluation.
        time_limit: Seconds after which the evaluation stops. Answers are kept, and the same command continues.
        token_limit: Tokens in and out, as the servers report them, after which no more requests are sent.
        cost_limit: The same as cost, in the currency of --agent.price and --judge.price.
    """

    concurrency: Tries = 8
    timeout: Positive = 120.0
    retries: Annotated[int, Ge(0), Le(1000), FINITE] = 6
    first_delay: NotNegative = 1.0
    longest_delay: NotNegative = 60.0
    longest_wait: NotNegative = 600.0
    time_limit: Positive | None = None
    token_limit: Count | None = None
    cost_limit: Positive | None = None

    def __post_init__(self) -> None:
        refuse_unsound(type(self), asdict(self), "endpoint")


@dataclass(frozen=True)
class Endpoint:
    """One model behind an address.

    Attributes:
        url: The base address of /chat/completions, for example http://localhost:8000/v1. A query such as
            ?api-version=... is kept.
        model: The name of the model on the server.
        key_variable: The environment variable with the API key, if the server needs one. The key is only sent to the
            server; it appears in no file, message or log.
        temperature: Sampling temperature.
        seed: Sent with each request, for servers that support reproducible sampling.
        extra: More fields of the request body. A null value removes the field.
        structured: Whether requests ask for JSON by `response_format`. If the server refuses it, the prompt alone asks.
        price: The price of its tokens.
        options: How requests are sent.
        deadline: When to stop, in the time of `time.monotonic`; never if None.
    """

    url: str
    model: str
    key_variable: str | None = None
    temperature: float = 0.0
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    structured: bool = True
    price: Price = field(default_factory=Price)
    options: EndpointOptions = field(default_factory=EndpointOptions)
    deadline: float | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise UserError(f"{shortened(self.url, LONGEST_SAID)} is not an address", ADDRESS_HINT)
        secrets = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if SECRET_NAMES.search(name)]
        if parts.username or parts.password or parts.fragment or secrets:
            raise UserError(
                "the endpoint's address contains more than a host, a path and a plain query",
                "Give the plain address, and name the environment variable of the key.",
            )
        if self.extra.get("stream"):
            raise UserError("extra: stream: streamed answers are not supported", "Remove stream.")
        if self.key_variable and not self._key:
            raise UserError(
                f"the environment variable {self.key_variable} is not set", "Set it to the endpoint's API key."
            )
        if self._key and not re.fullmatch(r"[!#-&(-\[\]-~]+", self._key):  # visible ASCII but quotes and backslashes
            raise UserError(
                f"the environment variable {self.key_variable} is not a key: it contains blanks, quotes, "
                "control characters or letters outside ASCII",
                "Set it to the key only, without Bearer and quotes.",
            )

    @property
    def address(self) -> str:
        """The address of requests."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/") + "/chat/completions"
        return parts._replace(path=path).geturl()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything except the messages that determines an answer. Not the address, because a server may move."""
        names = ("model", "temperature", "seed", "extra", "structured")
        return {name: getattr(self, name) for name in names}

    @property
    def _key(self) -> str | None:
        return os.environ.get(self.key_variable, "").strip() or None if self.key_variable else None

    def headers(self) -> dict[str, str]:
        """The headers with the key; Azure expects another header name."""
        if not self._key:
            return {}
        of_azure = str(urlsplit(self.url).hostname).endswith(".azure.com")
        return {"api-key": self._key} if of_azure else {"Authorization": f"Bearer {self._key}"}

    def without_key(self, text: str) -> str:
        """Remove the key from a server's text, in any escaping."""
        key = self._key
        return _in_any_escaping(key).sub("[key]", text) if key and len(key) >= SHORTEST_SECRET else text


@lru_cache(maxsize=4)
def _in_any_escaping(key: str) -> re.Pattern[str]:
    """A pattern for a key, plain or escaped (also repeatedly) as in JSON, repr, URLs, HTML, base64 or hexadecimal."""

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
    for offset in range(3):  # of the key in a group of three bytes; letters that encode other bytes too are cut off
        letters = base64.b64encode(b"\0" * offset + key.encode()).decode().rstrip("=")
        whole = letters[(0, 2, 3)[offset] : (offset + len(key)) * 8 // 6]
        encoded |= {re.escape(whole), re.escape(whole.translate(str.maketrans("+/", "-_")))}
    plain_hex = rf"(?i:{key.encode().hex()})"
    return re.compile("|".join(["".join(written), plain_hex, *sorted(encoded, key=len, reverse=True)]))


class ChatClient:
    """Sends requests to an endpoint concurrently, and each request once.

    Use it within `async with client`, which opens its connections.

    Args:
        endpoint: The endpoint.
        log: Keeps the replies.
        budget: Limits the tokens and the cost of several clients together.
        role: Tells clients with one log apart.
    """

    def __init__(
        self, endpoint: Endpoint, log: AnswerLog | None = None, budget: Budget | None = None, role: str = ""
    ) -> None:
        self.endpoint = endpoint
        self.role = role
        self.budget = Budget() if budget is None else budget
        self._unsupported: set[str] = set()  # fields of requests that the server has refused
        self._told_reasoning = False
        self.log = AnswerLog() if log is None else log
        self._told_until = 0.0  # end of the last wait that was logged
        self._http: AsyncClient | None = None

    async def __aenter__(self) -> Self:
        from httpx2 import AsyncClient, Limits

        endpoint = self.endpoint
        limits = Limits(max_connections=endpoint.options.concurrency)
        headers = {"Accept-Encoding": "gzip", **endpoint.headers()}  # `_received` decodes it
        self._http = AsyncClient(headers=headers, limits=limits, timeout=endpoint.options.timeout)
        self._room = asyncio.Semaphore(endpoint.options.concurrency)
        self._asked: dict[str, asyncio.Lock] = {}
        self.budget.add(self.log.used.get(self.role, Usage()), endpoint.price)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

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
            notes: More entries for the log.

        Raises:
            UserError: The endpoint refuses, or fails after all retries, or a limit of tokens or cost is reached.
        """
        if self._http is None:
            raise RuntimeError("ask within `async with client`")
        if not self.endpoint.structured:
            schema = None
        question = [messages, attempt, temperature, *([schema.name] if schema else [])]
        question += [self.role] if self.role else []
        key = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]
        async with self._asked.setdefault(key, asyncio.Lock()):  # concurrent equal requests are sent once
            if key not in self.log.texts:
                async with self._room:
                    self.budget.refuse_more()
                    begin = time.monotonic()
                    reply = await self._with_retries(self._body(messages, attempt, temperature, schema), where)
                seconds = round(time.monotonic() - begin, 3)
                self.budget.add(reply.usage, self.endpoint.price)
                self.log.add(key, reply.text, where, reply.finish_reason, reply.usage, seconds, notes)
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

    def _supported(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's body without fields that the server has refused before."""
        kept = {name: value for name, value in body.items() if name not in self._unsupported}
        return kept | {RENAMED[name]: body[name] for name in self._unsupported & body.keys() & RENAMED.keys()}

    def _learns(self, response: Received, content: Any, sent: dict[str, Any]) -> bool:
        """Whether a refusal names a field that the client can do without; it then leaves it out from now on."""
        known = [name for name in (RESPONSE_FORMAT, *RENAMED) if name in sent]
        name = unsupported_field(content, response.text, known) if response.status_code in (400, 422) else None
        if name is None or (name == RESPONSE_FORMAT and RESPONSE_FORMAT in self.endpoint.extra):
            return False
        if name not in self._unsupported:  # concurrent requests are refused together
            self._unsupported.add(name)
            instead = f"it is sent as {RENAMED[name]}" if name in RENAMED else "the prompt alone asks for JSON"
            log.info(f"{self.endpoint.url} refuses {name}: {instead}")
        return True

    async def _with_retries(self, body: dict[str, Any], where: str) -> Reply:
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
                f"{where}: {self.endpoint.url} failed {options.retries + 1} times, the last time with: {failure}",
                "Answers so far are kept. See --endpoint.retries and --endpoint.timeout.",
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

    async def _request(self, body: dict[str, Any], where: str) -> Reply:
        """Send one request, and once more without a field that the server refuses."""
        from httpx2 import HTTPError, InvalidURL

        address, sent = self.endpoint.address, self._supported(body)
        try:
            async with asyncio.timeout(self.endpoint.options.timeout):  # the timeout of httpx2 restarts with each byte
                response = await self._received(sent, where)
        except TimeoutError:
            raise _Failed(f"no answer within {self.endpoint.options.timeout} seconds") from None
        except HTTPError as error:
            raise _Failed(self._printable(f"{type(error).__name__}: {error}")) from error
        except InvalidURL as error:
            raise UserError(f"{address} is not an address: {error}", ADDRESS_HINT) from error
        except zlib.error as error:
            raise _Failed(f"a body that is not gzip: {error}") from error
        content = json_of(response.content)
        status = f"{response.status_code} {response.reason_phrase}"
        said = self._printable(f"{status}: {error_of(content) or response.text}")
        if is_refusal(response, content):
            if self._learns(response, content, sent):
                return await self._request(body, where)
            raise UserError(f"{where}: {address} refuses: {said}", self._hint(response.status_code, content, body))
        if response.status_code != 200:
            wait = retry_after(response.headers.get("retry-after"))
            self._refuse_long_wait(wait, said, where)
            raise _Failed(said, wait)
        if error_of(content):
            raise _Failed(f"an error instead of an answer: {said}")
        if streams(response):
            raise UserError(
                f"{where}: {address}: the server sent a stream instead of one JSON object: {said}",
                "Turn streaming off, for example with stream: false in --agent.extra or --judge.extra.",
            )
        try:
            reply = Reply.of(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "top level"
            raise _Failed(self._printable(f"not a chat completion: {place}: {first['msg']}: {response.text}")) from None
        if reply.only_reasoning and not self._told_reasoning:
            self._told_reasoning = True
            log.info(f"{self.endpoint.url} sends thoughts without an answer; a greater max_tokens may help")
        reason = reply.finish_reason and self._printable(reply.finish_reason)
        return replace(reply, text=self.endpoint.without_key(reply.text), finish_reason=reason)

    async def _received(self, body: dict[str, Any], where: str) -> Received:
        """Receive and decode a response of at most `MOST_AT_ONCE` bytes; stop at the limit."""
        assert self._http is not None
        async with self._http.stream("POST", self.endpoint.address, json=body) as response:
            coding = response.headers.get("content-encoding", "identity").strip().lower()
            if coding not in ("identity", "gzip", ""):
                raise _Failed(self._printable(f"a body in {coding}, but only gzip is supported"))
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
                "Answers so far are kept: continue later, or give a greater --endpoint.longest_wait.",
            )
        if endpoint.deadline is not None and time.monotonic() + wait > endpoint.deadline:
            raise UserError(
                f"{where}: {endpoint.url} asks to wait {duration(wait)}, longer than the remaining time: {said}",
                "Answers so far are kept: continue later, or give a greater --endpoint.time_limit.",
            )

    def _hint(self, status: int, content: Any, body: dict[str, Any]) -> str:
        error = content.get("error") if isinstance(content, dict) else None
        parameter = error.get("param") if isinstance(error, dict) else None
        if parameter in ("temperature", "seed") and parameter in body:
            what = f"Remove it with {parameter}: null in --agent.extra or --judge.extra"
        elif status in (401, 403):
            variable = self.endpoint.key_variable
            what = (
                f"Check the key in {variable}" if variable else "Name the variable of a key with --agent.key_variable"
            )
        elif status == 404:
            what = "Check the address, which often ends in /v1, and the model's name"
        else:
            what = "Correct the options"
        return f"{what}; answers so far are kept."

    def _printable(self, text: str) -> str:
        return shortened(printable(self.endpoint.without_key(" ".join(text.split()))), LONGEST_SAID)


class _Failed(Exception):  # noqa: N818 - not an error until the retries are used up
    """A request that may succeed when retried, after `retry_after` seconds if given."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after
