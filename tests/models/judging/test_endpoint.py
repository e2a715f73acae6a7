"""Endpoint and its key: what is refused, and where the key appears."""

import base64
import html
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from datamodules.errors import UserError
from models.judging.answer_log import AnswerLog
from models.judging.endpoint import Endpoint, EndpointOptions
from tests.chat_server import Reply, chat_server
from tests.models.judging.chat_helpers import ask, echo

KEY = "sk-very-secret-123"


@pytest.mark.parametrize("case", ["answers", "refuses", "fails"])
def test_the_key_is_sent_and_appears_nowhere_even_if_the_server_returns_it(
    case: str, log: AnswerLog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    replies = {
        "answers": Reply(f"you said Bearer {KEY}"),
        "refuses": Reply(status=401, body=f"bad key {KEY}".encode()),
        "fails": Reply(status=500, body=f"bad key {KEY}".encode()),
    }
    said = ""
    with chat_server(lambda body, before: replies[case]) as chat:
        try:
            said = str(ask(chat, log, ["a"], "MY_KEY", retries=0)[0])
        except UserError as error:
            said = str(error)
    assert chat.keys == [f"Bearer {KEY}"]
    assert "[key]" in said
    assert KEY not in said + (tmp_path / "log.jsonl").read_text() + "".join(capfd.readouterr())
    assert KEY not in repr(Endpoint(chat.url, "m", "MY_KEY")) + json.dumps(Endpoint(chat.url, "m", "MY_KEY").settings)


def test_the_finish_reason_is_shortened_and_without_the_key(log: AnswerLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with chat_server(lambda body, before: Reply("hello", f"\x1b[2J{KEY}\n" + "x" * 10_000)) as chat:
        ask(chat, log, ["a"], "MY_KEY")
    (reason,) = log.unfinished.values()
    assert reason.startswith("\\x1b[2J[key] x")
    assert len(reason) == 200


ESCAPED = {
    "JSON": lambda key: json.dumps(key)[1:-1],
    "JSON in JSON": lambda key: json.dumps(json.dumps(key))[1:-1],
    "JSON of a careful server": lambda key: "".join(f"\\u{ord(character):04X}" for character in key),
    "JSON with slashes escaped": lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    "repr": lambda key: repr(f"Bearer {key}'\n"),
    "bytes": lambda key: repr(key.encode()),
    "bytes in hexadecimal": lambda key: "".join(f"\\x{ord(character):02x}" for character in key),
    "a URL": lambda key: quote(key, safe=""),
    "a form": quote_plus,
    "a URL in a URL": lambda key: quote(quote(key, safe=""), safe=""),
    "hexadecimal": lambda key: key.encode().hex().upper(),
    "HTML": html.escape,
    "HTML by number": lambda key: "".join(f"&#{ord(character)};" for character in key),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 of the header": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64 of a pair": lambda key: base64.urlsafe_b64encode(f"me:{key} ".encode()).decode(),
}


@pytest.mark.parametrize("escaping", ESCAPED)
@pytest.mark.parametrize("key", [KEY, "sk/very+secret=&<123>%"])
def test_a_key_is_removed_in_any_escaping(escaping: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    written = ESCAPED[escaping](key)
    said = Endpoint("http://x/v1", "m", "MY_KEY").without_key(f"<{written}> is a bad key")
    assert "[key]" in said
    assert said.endswith("> is a bad key")
    left = said.replace("[key]", "").removesuffix("> is a bad key")
    assert len(left) <= len("<QmVhcmVyIHw=="), "but for what stands around it, and the rest of base64"


@pytest.mark.parametrize("key", ["EMPTY", "x", "token"])
def test_a_placeholder_key_is_not_removed(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    assert Endpoint("http://x/v1", "m", "MY_KEY").without_key("EMPTY x token") == "EMPTY x token"


@pytest.mark.parametrize("around", [("", "\n"), (" ", "\r\n"), ("\t", " "), ("\n\n", "\n")])
def test_blanks_around_a_key_are_removed(
    around: tuple[str, str], log: AnswerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY.join(around))
    with chat_server(echo) as chat:
        ask(chat, log, ["a"], "MY_KEY")
    assert chat.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    "key",
    [f"Bearer {KEY}", f'"{KEY}"', f"{KEY}\n{KEY}", f"{KEY}\u200b", f"\ufeff{KEY}", f"{KEY}\x01", "ключ", f"{KEY}\\n"],
)
def test_text_that_cannot_be_a_key_is_refused_before_use(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="MY_KEY is not a key") as caught:
        Endpoint("http://x/v1", "m", "MY_KEY")
    assert KEY not in str(caught.value)
    monkeypatch.setenv("MY_KEY", " \n")
    with pytest.raises(UserError, match="MY_KEY is not set"):
        Endpoint("http://x/v1", "m", "MY_KEY")


def test_azure_gets_the_key_in_its_own_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    url = "https://mine.openai.azure.com/openai/deployments/m?api-version=2024-10-21"
    endpoint = Endpoint(url, "m", "MY_KEY")
    assert endpoint.headers() == {"api-key": KEY}
    assert endpoint.address == (
        "https://mine.openai.azure.com/openai/deployments/m/chat/completions?api-version=2024-10-21"
    )


SECRETS = ("key", "api_key", "subscription-key", "access_token", "sig", "code", "password", "client_secret")


@pytest.mark.parametrize(
    ("url", "key_variable", "message"),
    [
        ("localhost:8000", None, "is not an address"),
        ("ftp://x/v1", None, "is not an address"),
        ("http://user:pw@x/v1", None, "more than a host, a path"),
        *((f"http://x/v1?a=1&{name}=pw", None, "more than a host, a path") for name in SECRETS),
        ("http://x/v1#pw", None, "more than a host, a path"),
        ("http://x:pw/v1", None, "is not an address"),
        ("http://[x/v1", None, "is not an address"),
        ("http://x/v1", "NOT_SET_ANYWHERE", "environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_an_invalid_endpoint_is_refused(url: str, key_variable: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(url, "m", key_variable)
    assert "pw" not in str(caught.value) or "x:pw" in url


def test_streamed_answers_are_refused_as_an_option() -> None:
    with pytest.raises(UserError, match="extra: stream"):
        Endpoint("http://x/v1", "m", extra={"stream": True})


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"retries": -1}, {"first_delay": -1}, {"timeout": 0}, {"time_limit": -1}]
)
def test_impossible_endpoint_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"endpoint.{next(iter(options))}: expected"):
        EndpointOptions(**options)
