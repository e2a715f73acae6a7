"""Structured output, tokens and cost of endpoints, on servers that support different fields."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import ANSWER_FORMAT, VERDICT_FORMAT
from models.judging.answer_log import AnswerLog
from models.judging.budget import Budget, Price, Usage
from models.judging.chat_client import ChatClient
from models.judging.endpoint import Endpoint, EndpointOptions
from tests.chat_server import Body, Reply, chat_server
from tests.models.judging.chat_helpers import QUICK, SETTINGS, asked_of

USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


def question(text: str, **options: Any) -> Any:
    return lambda client: client.ask([{"role": "user", "content": text}], text, **options)


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, "m", **{"options": EndpointOptions(**QUICK), **options})


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("proactive"), "propagate", True)
    caplog.set_level(logging.INFO, "proactive")
    return caplog


@pytest.mark.parametrize("schema", [ANSWER_FORMAT, VERDICT_FORMAT])
def test_a_request_asks_for_a_strict_schema(schema: Any) -> None:
    with chat_server(lambda body, before: Reply("{}")) as chat:
        asked_of(endpoint(chat.url), AnswerLog(), question("a", schema=schema), question("b"))
        asked_of(endpoint(chat.url, structured=False), AnswerLog(), question("a", schema=schema))
    formats = [body.get("response_format") for body in chat.bodies]
    found = next(one for one in formats if one)
    assert formats.count(None) == 2, "without a schema, and where structured output is off"
    content = found["json_schema"]["schema"]
    assert (found["type"], found["json_schema"]["strict"]) == ("json_schema", True)
    assert content["required"] == list(content["properties"])
    assert content["additionalProperties"] is False


REFUSALS = {
    "by param": {"error": {"message": "Unsupported", "param": "response_format.type"}},
    "by message": {"detail": [{"loc": ["body", "response_format"], "msg": "Extra inputs are not permitted"}]},
    "by schema": {"error": "json_schema is not available with this model"},
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_response_format_gets_only_the_prompt(
    case: str, status: int, messages: pytest.LogCaptureFixture
) -> None:
    def answer(body: Body, before: int) -> Reply:
        if "response_format" in body:
            return Reply(status=status, body=json.dumps(REFUSALS[case]).encode())
        return Reply("fine")

    with chat_server(answer) as chat:
        asked = [question(str(number), schema=ANSWER_FORMAT) for number in range(6)]
        options = EndpointOptions(**{**QUICK, "retries": 0, "concurrency": 3})
        assert asked_of(endpoint(chat.url, options=options), AnswerLog(), *asked) == ["fine"] * 6
    refused = [body for body in chat.bodies if "response_format" in body]
    assert 2 <= len(refused) <= 6, "those that were sent before the first refusal of each type"
    assert {body["response_format"]["type"] for body in refused} == {"json_schema", "json_object"}
    assert [text for text in messages.messages if "refuses" in text] == [
        f"{chat.url} refuses json_schema: the type json_object asks for JSON",
        f"{chat.url} refuses response_format: the prompt alone asks for JSON",
    ]


def test_a_server_that_only_takes_json_objects_gets_the_schema_in_their_form() -> None:
    said = "1 validation error: {'loc': ('body', 'response_format', 'type'), 'input': 'json_schema'}"
    refusal = {"error": {"message": said, "type": "internal_server_error", "param": None}}

    def answer(body: Body, before: int) -> Reply:
        if body["response_format"]["type"] == "json_schema":
            return Reply(status=500, body=json.dumps(refusal).encode())
        return Reply("fine")

    with chat_server(answer) as chat:
        options = EndpointOptions(**{**QUICK, "retries": 0})
        asked = [question(text, schema=VERDICT_FORMAT) for text in "ab"]
        assert asked_of(endpoint(chat.url, options=options), AnswerLog(), *asked) == ["fine"] * 2
    strict = VERDICT_FORMAT.response_format["json_schema"]["schema"]
    assert chat.bodies[-1]["response_format"] == {"type": "json_object", "schema": strict}


def test_an_internal_error_about_another_field_is_retried() -> None:
    def answer(body: Body, before: int) -> Reply:
        return Reply("fine") if before else Reply(status=500, body=b'{"error": "max_tokens: out of memory"}')

    with chat_server(answer) as chat:
        assert asked_of(endpoint(chat.url, extra={"max_tokens": 7}), AnswerLog(), question("a")) == ["fine"]
    assert [body["max_tokens"] for body in chat.bodies] == [7, 7]


def test_max_tokens_is_renamed_for_a_server_that_expects_another_name(messages: pytest.LogCaptureFixture) -> None:
    refusal = {"error": {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}}

    def answer(body: Body, before: int) -> Reply:
        return Reply(status=400, body=json.dumps(refusal).encode()) if "max_tokens" in body else Reply("fine")

    with chat_server(answer) as chat:
        asked_of(endpoint(chat.url, extra={"max_tokens": 7}), AnswerLog(), question("a"))
    assert chat.bodies[-1]["max_completion_tokens"] == 7
    assert f"{chat.url} refuses max_tokens: it is sent as max_completion_tokens" in messages.messages


def test_a_response_format_of_the_user_is_never_dropped() -> None:
    refusal = Reply(status=400, body=json.dumps(REFUSALS["by param"]).encode())
    with chat_server(lambda body, before: refusal) as chat, pytest.raises(UserError, match="refuses: 400"):
        asked_of(endpoint(chat.url, extra={"response_format": {"type": "json_object"}}), AnswerLog(), question("a"))
    assert len(chat.bodies) == 1


def test_reasoning_without_an_answer_is_logged_once(messages: pytest.LogCaptureFixture) -> None:
    with chat_server(lambda body, before: Reply(None, thoughts="Let me think")) as chat:
        assert asked_of(endpoint(chat.url), AnswerLog(), question("a"), question("b")) == ["", ""]
    assert sum("sends reasoning without an answer" in text for text in messages.messages) == 1


def test_tokens_are_counted_kept_and_counted_again_after_a_restart(tmp_path: Path) -> None:
    def answer(body: Body, before: int) -> Reply:
        return Reply("fine", usage=None if body["messages"][0]["content"] == "c" else USAGE)

    path, log = tmp_path / "log.jsonl", AnswerLog()
    with chat_server(answer) as chat, log.opened(path, SETTINGS):
        asked_of(endpoint(chat.url), log, *map(question, "abc"), question("a"))
    assert log.usage == Usage(3, 1, 200, 20)
    again = AnswerLog()
    with again.opened(path, SETTINGS):
        assert again.usage == log.usage
    entries = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert all(entry["seconds"] >= 0 for entry in entries)
    assert Price(2.0, 50.0).cost(log.usage) == pytest.approx((2 * 200 + 50 * 20) / 1e6)


@pytest.mark.parametrize("reported", [5, {}, {"prompt_tokens": 1}, {"prompt_tokens": -1, "completion_tokens": True}])
def test_invalid_usage_counts_as_unreported(reported: Any) -> None:
    assert Usage.of(reported) == Usage(1, 1)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"token_limit": 220}, "endpoint.token_limit is reached: 220 of 220 tokens"),
        ({"cost_limit": 0.002}, "endpoint.cost_limit is reached: 0.0022 of 0.002 cost"),
    ],
)
def test_a_limit_stops_requests_and_keeps_answers(limits: dict[str, Any], said: str) -> None:
    """Two clients share the budget; a continued run counts what was used before."""
    log, budget = AnswerLog(), Budget(**limits)
    price = Price(10.0, 10.0)
    with chat_server(lambda body, before: Reply("fine", usage=USAGE)) as chat:

        async def both(client: ChatClient) -> None:
            async with ChatClient(endpoint(chat.url, price=price), AnswerLog(), budget) as other:
                await other.ask([{"role": "user", "content": "z"}], "z")
            for text in "abc":
                await client.ask([{"role": "user", "content": text}], text)

        async def run(first: AnswerLog, spent: Budget) -> None:
            async with ChatClient(endpoint(chat.url, price=price), first, spent) as client:
                await both(client)

        with pytest.raises(UserError) as caught:
            asyncio.run(run(log, budget))
        assert said in caught.value.what
        assert len(log.texts) == 1
        with pytest.raises(UserError, match="is reached"):
            asyncio.run(run(log, Budget(**limits)))
