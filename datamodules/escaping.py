"""Escaping of foreign text for terminals, single lines and spreadsheets."""

import json
import re


def printable(text: str) -> str:
    """Escape line breaks, control characters and everything else that is not printable."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def shortened(text: str, limit: int) -> str:
    """Return a text with at most `limit` characters; a longer one ends in …."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def error_text(error: BaseException, limit: int) -> str:
    """Return the message of an exception on one line, with at most `limit` characters."""
    return shortened(" ".join(str(error).split()), limit)


FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # first characters of a cell that a spreadsheet takes for a formula


def to_cell(text: str) -> str:
    """Return a cell of a CSV file for a text: an apostrophe before what a spreadsheet would take for a formula."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULA_STARTS) else text


def from_cell(cell: str) -> str:
    """Return the text of a cell from `to_cell`."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def on_one_line(text: str) -> str:
    """Escape line breaks and other control characters as JSON does; all other text stays as it is."""
    return _CONTROL.sub(lambda match: json.dumps(match[0])[1:-1], text)


# Control characters, and everything that a terminal, an editor or str.splitlines takes for the end of a line.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
