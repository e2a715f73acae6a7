"""API keys of endpoints: read from the environment, and removed from a server's text in any escaping."""

import base64
import os
import re
from functools import lru_cache

from datamodules.errors import UserError

SHORTEST_SECRET = 6  # characters: a shorter key, such as "EMPTY", is a placeholder that may occur as a word


def read_key(variable: str) -> str:
    """Return the key in an environment variable, without blanks around it.

    Raises:
        UserError: The variable is not set, or contains something other than a key.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set", "Set it to the endpoint's API key.")
    if not re.fullmatch(r"[!#-&(-\[\]-~]+", key):  # visible ASCII without quotes and backslashes
        raise UserError(
            f"the environment variable {variable} is not a key: it contains blanks, quotes, "
            "control characters or letters outside ASCII",
            "Set it to the key only, without Bearer and quotes.",
        )
    return key


def without_key(text: str, key: str) -> str:
    """Remove a key from a text, in any escaping."""
    return _in_any_escaping(key).sub("[key]", text) if len(key) >= SHORTEST_SECRET else text


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
    # Base64 encodes groups of three bytes, and the key can start at any place in a group. Letters that also encode
    # bytes beside the key are cut off.
    for offset in range(3):
        letters = base64.b64encode(b"\0" * offset + key.encode()).decode().rstrip("=")
        whole = letters[(0, 2, 3)[offset] : (offset + len(key)) * 8 // 6]
        encoded |= {re.escape(whole), re.escape(whole.translate(str.maketrans("+/", "-_")))}
    plain_hex = rf"(?i:{key.encode().hex()})"
    return re.compile("|".join(["".join(written), plain_hex, *sorted(encoded, key=len, reverse=True)]))
