"""What no text holds after it passed: planted secrets of all stated kinds, in all places."""

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datamodules.errors import UserError
from proactive.assistant.privacy import MAX_LENGTH, PrivacyOptions, address, redacted

LETTERS = string.ascii_letters + string.digits


def random_text(least: int, most: int) -> st.SearchStrategy[str]:
    """Letters and digits, with a digit, as keys have them."""
    return st.text(LETTERS, min_size=least, max_size=most).map(lambda text: f"{text[:-1]}7")


@st.composite
def cards(draw: st.DrawFn) -> str:
    digits = draw(st.sampled_from("23456")) + draw(st.text(string.digits, min_size=14, max_size=14))
    doubled = [sum(divmod(2 * int(digit), 10)) if place % 2 == 0 else int(digit) for place, digit in enumerate(digits)]
    digits += str(-sum(doubled) % 10)
    return draw(st.sampled_from(["", " ", "-"])).join(digits[place : place + 4] for place in range(0, 16, 4))


SECRETS = {
    "openai": random_text(20, 40).map(lambda text: f"sk-{text}"),
    "github": random_text(20, 40).map(lambda text: f"ghp_{text}"),
    "slack": random_text(12, 40).map(lambda text: f"xoxb-{text}"),
    "google": random_text(35, 35).map(lambda text: f"AIza{text}"),
    "amazon": st.text(string.ascii_uppercase + string.digits, min_size=16, max_size=16).map(lambda text: f"AKIA{text}"),
    "json web token": st.tuples(random_text(10, 40), random_text(10, 40), random_text(10, 40)).map(
        lambda parts: f"eyJ{'.'.join(parts)}"
    ),
    "hexadecimal": st.text("0123456789abcdef", min_size=36, max_size=64).map(lambda text: f"1a2b3c4d{text}"),
    "mail": random_text(3, 12).map(lambda text: f"ada.{text}@mail.example.org"),
    "card": cards(),
}
AROUND = st.text(st.characters(exclude_categories=("Cs",)), max_size=40).map(lambda text: f"{text} ")


@given(st.sampled_from(sorted(SECRETS)).flatmap(lambda kind: SECRETS[kind]), AROUND, AROUND)
def test_no_planted_secret_is_left_in_a_text(secret: str, before: str, after: str) -> None:
    assume(secret not in before + after)
    found = redacted(f"{before}{secret} {after}")
    assert secret not in found
    assert len(found) <= MAX_LENGTH
    assert found.isprintable()


@given(
    st.sampled_from(["password", "API_KEY", "my-secret", "access token", "Passwort", "AWS_SECRET_ACCESS_KEY"]),
    st.sampled_from([": ", "=", " = ", '": "']),
    random_text(8, 30),
    AROUND,
)
def test_what_follows_a_word_for_a_secret_is_not_left(word: str, between: str, secret: str, before: str) -> None:
    assume(secret not in before)
    assert secret not in redacted(f"{before}{word}{between}{secret}")


@given(random_text(6, 30), random_text(6, 30), random_text(6, 30), random_text(6, 30))
def test_addresses_keep_host_and_path_only(user: str, password: str, value: str, fragment: str) -> None:
    url = f"https://{user}:{password}@docs.example.org:8443/Guide/page.html;jsessionid={value}?key={value}#{fragment}"
    assert address(url) == "docs.example.org/Guide/page.html"
    assert redacted(f"Open {url} now") == "Open docs.example.org/Guide/page.html now"


@pytest.mark.parametrize(
    "url",
    ["file:///home/ada/diary.txt", "about:blank", "chrome://settings", "data:text/plain,x", "https://", "http://[", ""],
)
def test_only_web_addresses_are_kept(url: str) -> None:
    assert address(url) is None


def test_secrets_in_paths_are_replaced() -> None:
    assert address("https://a.example/reset/9f8e7d6c5b4a39281706f5e4d3c2b1a0") == "a.example/reset/[token]"
    assert address("https://a.example/user/ada%40example.org") == "a.example/user/[e-mail address]"


@pytest.mark.parametrize(
    "text",
    [
        "test_activitywatch_and_timeline.py - proactive - Visual Studio Code",
        "How to capitalize person name in ruby? - Stack Overflow",
        "Visual Basic programming",
        "npm-check-updates and hf_transformers",
        "2024-05-06 12:30:45 report_final_version_2.docx",
        "Order 1234567890123456",
        "'Kimi.ai - 帮你看更大的世界'",
        "scikit-learn: sklearn.linear_model.LogisticRegression",
    ],
)
def test_usual_titles_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text


def test_password_managers_and_private_pages_are_left_out_and_patterns_can_be_added() -> None:
    options = PrivacyOptions(exclude_apps=["^signal$"], exclude_titles=[r"project \w+ merger"])
    private = [
        ("KeePassXC", "Vault"),
        ("1Password", ""),
        ("firefox", "Start — Mozilla Firefox Private Browsing"),
        ("msedge.exe", "Start - [InPrivate] - Microsoft Edge"),
        ("chrome", "New Tab - Google Chrome (Incognito)"),
        ("firefox", "Reset your password"),
        ("firefox", "Online-Banking"),
        ("Signal", "Chat"),
        ("Writer", "Project Falcon Merger.odt"),
    ]
    assert [pair for pair in private if not options.is_private(*pair)] == []
    assert not options.is_private("Signal Desktop", "Chat")
    assert not options.is_private("Code", "password_hashing.py - shop")
    assert not PrivacyOptions().is_private("Signal", "Chat")


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"privacy.exclude_apps: \( is not a regular expression"):
        PrivacyOptions(exclude_apps=["("])
