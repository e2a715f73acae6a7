"""The connections to a chat endpoint.

They retry failed requests, leave out fields that a server refuses, and limit the size of responses.
"""

import asyncio
import logging
import time
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError

from datamodules.errors import UserError
from datamodules.escaping import printable, shortened
from datamodules.files.reading import MAX_TEXT_BYTES
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
from models.judging.endpoint import ADDRESS_HINT, LONGEST_SAID, Endpoint

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from tenacity import RetryCallState

RESPONSE_FORMAT = "response_format"
JSON_SCHEMA = "json_schema"  # type of a response format
RENAMED = {"max_tokens": "max_completion_tokens"}  # fields that newer servers expect under another name
# By status, the fields that an error with it may refuse; llama-cpp-python refuses a response format with 500.
REFUSED_FIELDS = {400: (RESPONSE_FORMAT, *RENAMED), 422: (RESPONSE_FORMAT, *RENAMED), 500: (RESPONSE_FORMAT,)}
MIN_LOGGED_WAIT = 5.0  # seconds; shorter waits that a server asks for are not logged
log = logging.getLogger("proactive")


class RequestFailed(Exception):  # noqa: N818 - not an error until the retries are used up
    """A request that may succeed when retried, after `retry_after` seconds if given."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class ChatConnection:
    """Sends single requests to an endpoint, within `async with connection`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._http: AsyncClient | None = None
        # Fields of requests that the server has refused, and JSON_SCHEMA if it has refused this response format.
        self._unsupported: set[str] = set()
        self._reasoning_logged = False
        self._logged_until = 0.0  # end of the last wait that was logged

    async def __aenter__(self) -> Self:
        from httpx2 import AsyncClient, Limits

        options = self.endpoint.options
        headers = {"Accept-Encoding": "gzip", **self.endpoint.headers()}  # `_received` decodes it
        limits = Limits(max_connections=options.concurrency)
        self._http = AsyncClient(headers=headers, limits=limits, timeout=options.timeout)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return self._http is not None

    async def send(self, body: dict[str, Any], where: str) -> Reply:
        """Send a request, with retries.

        Args:
            body: The body; fields that the server has refused before are left out or renamed.
            where: A description of the request for messages.

        Raises:
            UserError: The endpoint refuses, or fails after all retries.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        options = self.endpoint.options
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(RequestFailed),
            stop=stop_after_attempt(options.retries + 1),
            wait=self._delay,
            reraise=True,
        )
        try:
            return await retrying(self._request, body, where)
        except RequestFailed as failure:
            raise UserError(
                f"{where}: {self.endpoint.url} failed {options.retries + 1} times, the last time with: {failure}",
                "Answers so far are kept. See --endpoint.retries and --endpoint.timeout.",
            ) from failure

    def _delay(self, state: "RetryCallState") -> float:
        from tenacity import wait_random_exponential

        failure = state.outcome.exception() if state.outcome else None
        if isinstance(failure, RequestFailed) and failure.retry_after is not None:
            until = time.monotonic() + failure.retry_after
            if failure.retry_after >= MIN_LOGGED_WAIT and until > self._logged_until + MIN_LOGGED_WAIT:
                self._logged_until = until
                log.info(f"{self.endpoint.url} asks to wait {duration(failure.retry_after)}: {failure}")
            return failure.retry_after
        options = self.endpoint.options
        return wait_random_exponential(multiplier=options.first_delay, max=options.longest_delay)(state)

    async def _request(self, body: dict[str, Any], where: str) -> Reply:
        """Send one request, and once more without a field that the server refuses."""
        sent = self._without_unsupported(body)
        response = await self._response(sent, where)
        content = json_of(response.content)
        if self._note_unsupported(response, content, sent):
            return await self._request(body, where)
        if not is_refusal(response, content):
            return self._reply(response, content, where)
        hint = _refusal_hint(response.status_code, content, body, self.endpoint.key_variable)
        raise UserError(f"{where}: {self.endpoint.address} refuses: {self._said(response, content)}", hint)

    async def _response(self, body: dict[str, Any], where: str) -> Received:
        """Send a request once, and receive the response within the timeout."""
        from httpx2 import HTTPError, InvalidURL

        try:
            async with asyncio.timeout(self.endpoint.options.timeout):  # the timeout of httpx2 restarts with each byte
                return await self._received(body, where)
        except TimeoutError:
            raise RequestFailed(f"no answer within {self.endpoint.options.timeout} seconds") from None
        except HTTPError as error:
            raise RequestFailed(self._printable(f"{type(error).__name__}: {error}")) from error
        except InvalidURL as error:
            raise UserError(f"{self.endpoint.address} is not an address: {error}", ADDRESS_HINT) from error
        except zlib.error as error:
            raise RequestFailed(f"a body that is not gzip: {error}") from error

    def _reply(self, response: Received, content: Any, where: str) -> Reply:
        """Parse a response that is not a refusal."""
        if response.status_code != 200:
            wait, said = retry_after(response.headers.get("retry-after")), self._said(response, content)
            self._refuse_long_wait(wait, said, where)
            raise RequestFailed(said, wait)
        if error_of(content):
            raise RequestFailed(f"an error instead of an answer: {self._said(response, content)}")
        if streams(response):
            raise UserError(
                f"{where}: {self.endpoint.address}: the server sent a stream instead of one JSON object: "
                f"{self._said(response, content)}",
                "Turn streaming off, for example with stream: false in --agent.extra or --judge.extra.",
            )
        try:
            reply = Reply.of(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"])) or "top level"
            what = self._printable(f"not a chat completion: {field}: {first['msg']}: {response.text}")
            raise RequestFailed(what) from None
        if reply.only_reasoning and not self._reasoning_logged:
            self._reasoning_logged = True
            log.info(f"{self.endpoint.url} sends reasoning without an answer; a greater max_tokens may help")
        reason = reply.finish_reason and self._printable(reply.finish_reason)
        return replace(reply, text=self.endpoint.without_key(reply.text), finish_reason=reason)

    async def _received(self, body: dict[str, Any], where: str) -> Received:
        """Receive and decode a response of at most `MAX_TEXT_BYTES` bytes; stop at the limit."""
        assert self._http is not None
        async with self._http.stream("POST", self.endpoint.address, json=body) as response:
            coding = response.headers.get("content-encoding", "identity").strip().lower()
            if coding not in ("identity", "gzip", ""):
                raise RequestFailed(self._printable(f"a body in {coding}, but only gzip is supported"))
            decoder = zlib.decompressobj(16 + zlib.MAX_WBITS) if coding == "gzip" else None
            content = bytearray()
            sent = 0
            async for chunk in response.aiter_raw():
                sent += len(chunk)
                room = MAX_TEXT_BYTES + 1 - len(content)
                content += decoder.decompress(chunk, room) if decoder else chunk[:room]
                if max(sent, len(content)) > MAX_TEXT_BYTES:
                    raise UserError(
                        f"{where}: {self.endpoint.address}: the response is longer than the limit of "
                        f"{MAX_TEXT_BYTES:,} bytes",
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

    def _without_unsupported(self, body: dict[str, Any]) -> dict[str, Any]:
        """Remove or rename the fields of a body that the server has refused before."""
        kept = {name: value for name, value in body.items() if name not in self._unsupported}
        if JSON_SCHEMA in self._unsupported and _has_schema(kept):
            schema = kept[RESPONSE_FORMAT][JSON_SCHEMA]["schema"]
            kept[RESPONSE_FORMAT] = {"type": "json_object", "schema": schema}  # the form of older servers
        return kept | {RENAMED[name]: body[name] for name in self._unsupported & body.keys() & RENAMED.keys()}

    def _note_unsupported(self, response: Received, content: Any, sent: dict[str, Any]) -> bool:
        """Note the field that a refusal names, for `_without_unsupported`; return False if it names none of them."""
        known = [name for name in REFUSED_FIELDS.get(response.status_code, ()) if name in sent]
        name = unsupported_field(content, response.text, known)
        if name is None or (name == RESPONSE_FORMAT and RESPONSE_FORMAT in self.endpoint.extra):
            return False
        if name == RESPONSE_FORMAT and _has_schema(sent):
            name, instead = JSON_SCHEMA, "the type json_object asks for JSON"
        else:
            instead = f"it is sent as {RENAMED[name]}" if name in RENAMED else "the prompt alone asks for JSON"
        if name not in self._unsupported:  # concurrent requests are refused together
            self._unsupported.add(name)
            log.info(f"{self.endpoint.url} refuses {name}: {instead}")
        return True

    def _said(self, response: Received, content: Any) -> str:
        """The status and the error message of a response, for messages."""
        status = f"{response.status_code} {response.reason_phrase}"
        return self._printable(f"{status}: {error_of(content) or response.text}")

    def _printable(self, text: str) -> str:
        return shortened(printable(self.endpoint.without_key(" ".join(text.split()))), LONGEST_SAID)


def _has_schema(body: dict[str, Any]) -> bool:
    """Whether a request asks for JSON by a schema in OpenAI's form."""
    return JSON_SCHEMA in (body.get(RESPONSE_FORMAT) or {})


def _refusal_hint(status: int, content: Any, body: dict[str, Any], key_variable: str | None) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    parameter = error.get("param") if isinstance(error, dict) else None
    if parameter in ("temperature", "seed") and parameter in body:
        what = f"Remove it with {parameter}: null in --agent.extra or --judge.extra"
    elif status in (401, 403) and key_variable:
        what = f"Check the key in {key_variable}"
    elif status in (401, 403):
        what = "Name the variable of a key with --agent.key_variable"
    elif status == 404:
        what = "Check the address, which often ends in /v1, and the model's name"
    else:
        what = "Correct the options"
    return f"{what}; answers so far are kept."
