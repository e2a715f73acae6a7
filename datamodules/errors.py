"""The one exception for mistakes that the person at the terminal can mend, and the mistakes of a resume."""

import json
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from datamodules.escaping import printable, shortened

LONGEST_MESSAGE = 1000  # characters of what went wrong; a name or value in it may have any length


class UserError(Exception):
    """Something the user gave is wrong: `what` happened, and `hint` what to do about it, one printable line each."""

    def __init__(self, what: str, hint: str) -> None:
        self.what = shortened(printable(what), LONGEST_MESSAGE)
        self.hint = printable(hint)
        super().__init__(self.what, self.hint)

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}"


def refuse_changes(group: str, before: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Refuse a resume with other options than the run began with.

    Args:
        group: What the options belong to, as the command line names it: data, model, ..., or nothing.
        before: The options that a checkpoint was written with.
        now: Those that are given now; one that only one side knows is null on the other.
        may_change: The names of those that a resume may change.

    Raises:
        UserError: Another one differs; the message has its name and both values.
    """
    for name in {**before, **now}:
        was, given = before.get(name), now.get(name)
        if was != given and name not in may_change and not name.startswith("_"):
            values = [value if isinstance(value, str) else json.dumps(value, default=str) for value in (given, was)]
            option = f"{group}.{name}" if group else name
            raise UserError(
                f"{option}: {values[0]}, but the checkpoint's run has {values[1]}",
                f"Resume with --{option} {shlex.quote(values[1])}, or start a new run.",
            )
