"""Text that a terminal, a line and a spreadsheet show as it is."""

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def printable(text: str) -> str:
    """Text on one line that a terminal shows, and does not obey: other characters arrive escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def shortened(text: str, most: int) -> str:
    """The first characters of a text, `most` at most."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def error_text(error: BaseException, most: int) -> str:
    """An exception's message on one line, `most` characters at most."""
    return shortened(" ".join(str(error).split()), most)


FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # of a cell that spreadsheets compute instead of showing it


def as_cell(text: str) -> str:
    """A text as a cell of a CSV file: an apostrophe before what a spreadsheet would take for a formula."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULA_STARTS) else text


def of_cell(cell: str) -> str:
    """The text that `as_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def on_one_line(text: str) -> str:
    """Text with its line breaks and other control characters escaped as JSON does it."""
    return _CONTROL.sub(lambda match: json.dumps(match[0])[1:-1], text)


# Everything that a terminal, an editor or str.splitlines takes for the end of a line, and other control characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
