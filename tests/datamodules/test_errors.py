"""A mistake takes two lines that a terminal shows and does not obey, whatever was given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.errors import MAX_MESSAGE, UserError, did_you_mean
from datamodules.escaping import error_text, printable
from tests.datamodules.conftest import few_examples

ANY_TEXT = st.text(st.characters(codec=None), max_size=20)


@few_examples
@given(ANY_TEXT, ANY_TEXT)
def test_a_user_error_is_two_printable_lines(what: str, hint: str) -> None:
    error = UserError(what, hint)
    assert len(str(error).split("\n")) == 2
    assert error.what.isprintable()
    assert error.hint.isprintable()
    str(error).encode()  # half a surrogate pair would break the print


@few_examples
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" "), max_size=20))
def test_ordinary_text_is_not_escaped(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202eevil", "\\u202eevil"),
        ("\udcff", "\\udcff"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_control_sequences_of_terminals_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_message_with_a_long_name_is_shortened() -> None:
    error = UserError("x" * 1_000_000, "a command " * 1000)
    assert len(error.what) == MAX_MESSAGE
    assert error.what.endswith("…")
    assert error.hint == "a command " * 1000, "which must be whole to be of use"


def test_an_exceptions_message_becomes_one_short_line() -> None:
    error = ValueError("no such file:\n  config.json\n\n  is missing")
    assert error_text(error, 100) == "no such file: config.json is missing"
    assert error_text(error, 10) == "no such f…"


def test_the_most_similar_name_is_suggested() -> None:
    assert did_you_mean("epoch", ["epochs", "epoc", "depth"]) == "; did you mean epochs?"
    assert did_you_mean("epoch", []) == did_you_mean("", ["epochs"]) == ""
