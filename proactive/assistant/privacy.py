"""Removes private content from what a source reads, before it reaches a file, a model or a message.

The patterns are simple. They find secrets in their usual forms, but not every secret.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from urllib.parse import unquote, urlsplit

from datamodules.errors import UserError
from datamodules.escaping import printable, shortened

MAX_LENGTH = 200  # characters of one title, name or address in an event
MAX_READ = 2000  # characters of a text that are searched for secrets; the rest is cut off
CACHED = 4096  # texts; a live source reads the latest texts again and again
CARD_DIGITS = range(13, 20)
CARD_STARTS = range(2, 7)  # first digits of payment cards
PRIVATE_APPS = (
    r"keepass|1password|bitwarden|lastpass|dashlane|enpass|nordpass|proton.?pass|roboform|\bkeeper\b|password.?safe",
    r"keychain|seahorse|kwallet|gnome-keyring|passwords?\b|authenticator|authy",
)
PRIVATE_TITLES = (
    r"\bin-?cognito\b|\bin-?private\b|private (brows|window|tab)|privater? (modus|fenster|tab)|navigation priv|"
    r"navegaci[oó]n privada|无痕|隐私(浏览|窗口)|プライベート|シークレット",
    r"(reset|change|forgot|enter|new|your|choose|create|set)\b.{0,12}\bpass(word|phrase|code)|"
    r"passwords? (reset|manager|generator|vault)|passwort (ändern|vergessen|zurücksetzen)|mot de passe|contraseña|"
    r"(重置|修改|更改|忘记|找回|设置)密码",
    r"\b(one.time|verification|security|recovery|backup) codes?\b|\b(two.factor|2fa|otp)\b|验证码|驗證碼",
    r"\bbank\b|banking\b|\bpaypal\b|网上银行",
)
_SECRETS = (
    (r"-----BEGIN [A-Z ]*PRIVATE KEY.*", "[key]"),
    (r"\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?", "[token]"),  # JSON web tokens
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", "[key]"),  # Amazon
    (r"\b(?:sk|pk|rk)[-_](?=[\w-]*\d)[\w-]{16,}", "[key]"),  # Anthropic, OpenAI, Stripe
    (r"\b(?:(?:gh[a-z]|github_pat|hf|npm)_|(?:glpat|pypi|xox[a-z]|shpat)[-_])(?=[\w-]*\d)[\w-]{10,}", "[token]"),
    (r"\bAIza[\w-]{30,}", "[key]"),  # Google
    (r"(?i)\bauthorization\s*[:=]\s*(?:[a-z]+\s+)?\S+|\bbearer\s+(?=\S*\d)\S{8,}", "[token]"),
    (
        r"(?i)\b[\w-]*(?:passw(?:or)?d|passwort|kennwort|pwd|passphrase|passcode|secret|token|api[-_ ]?key|"
        r"access[-_ ]?key|private[-_ ]?key|credentials?|密码)[\w-]*[\"']?\s*(?:[:=：]|\bis\b)\s*"
        r"(?:\"[^\"]*\"?|'[^']*'?|\S+)",
        "[secret]",
    ),
    (r"[\w.!#$%&'*+=?^`{|}~-]+@[\w-]+(?:\.[\w-]+)+", "[e-mail address]"),
    (r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b", "[account number]"),  # IBAN
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), instead) for pattern, instead in _SECRETS)
_NUMBERS = re.compile(r"\d+(?:[ .-]\d+)*")
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>]+")
_LONG = re.compile(r"[A-Za-z0-9_+=-]{20,}")


@dataclass(frozen=True)
class PrivacyOptions:
    """What is left out, besides password managers, private windows, and pages on passwords, codes and banking.

    Args:
        exclude_apps: Regular expressions. Windows of applications whose name matches one anywhere, in upper or lower
            case, are left out.
        exclude_titles: The same for titles of windows and pages, addresses, and names of files and projects.
    """

    exclude_apps: Sequence[str] = ()
    exclude_titles: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("exclude_apps", "exclude_titles"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(
                        f"privacy.{name}: {pattern} is not a regular expression: {error}", "Correct the pattern."
                    ) from None

    def describe(self) -> dict[str, list[str]]:
        """Return the options as JSON."""
        return {"exclude_apps": list(self.exclude_apps), "exclude_titles": list(self.exclude_titles)}

    def is_private(self, app: str, *texts: str) -> bool:
        """Check whether something is left out.

        Args:
            app: The name of the application; may be empty.
            texts: Titles, addresses and names, as they were recorded.
        """
        return _occurs(self._apps, app) or any(_occurs(self._titles, text) for text in (app, *texts))

    @cached_property
    def _apps(self) -> re.Pattern[str]:
        return _any_of((*PRIVATE_APPS, *self.exclude_apps))

    @cached_property
    def _titles(self) -> re.Pattern[str]:
        return _any_of((*PRIVATE_TITLES, *self.exclude_titles))


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)


@lru_cache(maxsize=CACHED)
def _occurs(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.search(text) is not None


@lru_cache(maxsize=CACHED)
def redacted(text: str) -> str:
    """Return a text on one line with secrets replaced.

    Replaced are keys and tokens in the usual forms, values after words such as password, e-mail addresses, account
    and card numbers, and long random strings. Addresses are cut to host and path. The result has at most
    `MAX_LENGTH` characters.
    """
    text = " ".join(text[:MAX_READ].split())
    text = _URL.sub(lambda found: address(found[0]) or "[address]", text)
    return shortened(printable(_without_secrets(text)), MAX_LENGTH)


@lru_cache(maxsize=CACHED)
def address(url: str) -> str | None:
    """Cut an address to host and path, with secrets in the path replaced; None if it is no web address."""
    try:
        parts = urlsplit(url[:MAX_READ])
        host = parts.hostname
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host:
        return None
    path = unquote(parts.path).partition(";")[0].rstrip("/")  # some servers put a session id after a semicolon
    return shortened(printable(_without_secrets(host + "".join(path.split()))), MAX_LENGTH)


def _without_secrets(text: str) -> str:
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    text = _NUMBERS.sub(lambda found: "[card number]" if _has_card(found[0]) else found[0], text)
    return _LONG.sub(lambda found: "[token]" if _is_random(found[0]) else found[0], text)


def _has_card(numbers: str) -> bool:
    """Whether some successive groups of digits are a card number, by first digit, length and check digit (Luhn)."""
    groups = re.split("[ .-]", numbers)
    for first in range(len(groups)):
        for last in range(first + 1, len(groups) + 1):
            digits = [int(digit) for digit in "".join(groups[first:last])]
            if len(digits) > CARD_DIGITS[-1]:
                break
            doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
            if len(digits) in CARD_DIGITS and digits[0] in CARD_STARTS and (sum(digits[::-2]) + sum(doubled)) % 10 == 0:
                return True
    return False


def _is_random(text: str) -> bool:
    """Whether a long string looks random: hexadecimal with digits, or letters and digits that alternate often."""
    if re.fullmatch(r"[0-9a-fA-F-]+", text):
        return sum(character.isdigit() for character in text) >= 4 and not text.replace("-", "").isdigit()
    changes = len(re.findall(r"(?<=[A-Za-z])\d|(?<=\d)[A-Za-z]", text))
    mixed = bool(re.search("[a-z]", text)) and bool(re.search("[A-Z]", text))
    return changes >= (4 if mixed else 8)
