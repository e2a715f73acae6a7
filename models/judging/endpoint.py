"""A chat model behind an OpenAI-compatible address, and how requests to it are sent."""

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from annotated_types import Ge, Le

from datamodules.errors import UserError
from datamodules.escaping import shortened
from datamodules.ranges import FINITE, Count, NonNegativeFloat, Positive, Tries, check_ranges
from models.judging.api_keys import read_key, without_key
from models.judging.budget import Price

ADDRESS_HINT = "Give one such as http://localhost:8000/v1."
SECRET_NAMES = re.compile("key|token|secret|sig|auth|pass|pw|cred|code|jwt", re.IGNORECASE)
LONGEST_SAID = 200  # characters of a foreign text in a message


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
    first_delay: NonNegativeFloat = 1.0
    longest_delay: NonNegativeFloat = 60.0
    longest_wait: NonNegativeFloat = 600.0
    time_limit: Positive | None = None
    token_limit: Count | None = None
    cost_limit: Positive | None = None

    def __post_init__(self) -> None:
        check_ranges(type(self), asdict(self), "endpoint")


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
        if self.key_variable:
            read_key(self.key_variable)

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
        return read_key(self.key_variable) if self.key_variable else None

    def headers(self) -> dict[str, str]:
        """The headers with the key; Azure expects another header name."""
        key = self._key
        if key is None:
            return {}
        of_azure = str(urlsplit(self.url).hostname).endswith(".azure.com")
        return {"api-key": key} if of_azure else {"Authorization": f"Bearer {key}"}

    def without_key(self, text: str) -> str:
        """Remove the key from a server's text, in any escaping."""
        key = self._key
        return without_key(text, key) if key else text
