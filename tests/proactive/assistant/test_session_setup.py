"""What a session is made of: which models are on this machine, and what is kept of their answers."""

import pytest

from proactive.assistant.session_checks import is_loopback
from proactive.assistant.session_setup import MAX_ANSWERS, LatestAnswers


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.5.5.5/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://192.168.0.2/v1", False),
        ("https://api.example.org/v1", False),
        ("http://[2001:db8::1]/v1", False),
    ],
)
def test_only_loopback_addresses_are_this_machine(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected


def test_only_the_latest_answers_are_kept() -> None:
    log = LatestAnswers()
    for number in range(3 * MAX_ANSWERS):
        log.add(str(number), "text", "here", "length" if number % 2 else "stop")
    assert list(log.texts) == [str(number) for number in range(2 * MAX_ANSWERS, 3 * MAX_ANSWERS)]
    assert len(log.unfinished) == MAX_ANSWERS // 2
