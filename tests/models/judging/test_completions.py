"""What a chat endpoint's response says."""

import time
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.judging.completions import duration, error_of, retry_after
from tests.datamodules.conftest import few_examples


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after(formatdate(0, usegmt=True)) == 0
    assert 50 < (retry_after(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
    assert [retry_after(value) for value in (None, "", "soon", "-1", "1.5")] == [None] * 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"error": {"message": "busy", "code": 502}}, "busy (502)"),
        ({"error": "busy"}, "busy"),
        ({"error": {"error": {"message": "busy"}}}, "busy"),
        ({"error": {"reason": "busy"}}, '{"reason": "busy"}'),
        ({"errors": [{"detail": "busy"}]}, "busy"),
        ({"object": "error", "message": "busy", "code": 400}, "busy"),
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "field required"),
        ([{"error": {"message": "busy"}}], "busy"),
        ({"choices": [{"error": {"message": "busy"}}]}, "busy"),
        ({"choices": [{"message": {}}], "error": None, "message": "fine"}, None),
        ({"choices": [{"message": {}}], "error": {"message": "busy"}}, "busy"),
        ({"result": "text"}, None),
        (None, None),
        (5, None),
    ],
)
def test_an_error_message_is_found_in_any_field(content: Any, sentence: str | None) -> None:
    assert error_of(content) == sentence


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "errors", "message", "choices", "code"]), inner, max_size=3)
    ),
)


@few_examples
@given(JSON)
def test_the_search_for_an_error_message_never_raises(content: Any) -> None:
    assert isinstance(error_of(content), str | None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 seconds"), (90, "90 seconds"), (120, "2 minutes"), (600, "10 minutes"), (86400, "24 hours"), (1e9, "days")],
)
def test_durations_are_shown_in_a_readable_unit(seconds: float, text: str) -> None:
    assert duration(seconds).endswith(text)
