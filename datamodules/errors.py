"""UserError, the exception for errors that the user can fix; suggestions; and the check of a resumed run's options."""

import difflib
import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from datamodules.escaping import printable, shortened

MAX_MESSAGE = 1000  # characters; names and values in a message may have any length


class UserError(Exception):
    """An error that the user can fix. `what` says what is wrong, `hint` what to do; each is one printable line."""

    def __init__(self, what: str, hint: str) -> None:
        self.what = shortened(printable(what), MAX_MESSAGE)
        self.hint = printable(hint)
        super().__init__(self.what, self.hint)

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return the addition to an error about an unknown name: the most similar known name, or nothing."""
    alike = difflib.get_close_matches(given, list(known), n=10, cutoff=0.7)
    last = given.rpartition(".")[2]  # compare without the group, which both names may share
    meant = next((name for name in alike if difflib.get_close_matches(last, [name.rpartition(".")[2]])), None)
    return f"; did you mean {meant}?" if meant else ""


def refuse_changes(group: str, before: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Refuse to resume a run with other options.

    Args:
        group: Group of the options on the command line, such as data or model; empty for none.
        before: Options in the checkpoint.
        now: Options of the resumed run. An option that only one side has counts as null on the other.
        may_change: Names of the options that may change.

    Raises:
        UserError: Another option differs; the message states its name and both values.
    """
    for name in {**before, **now}:
        if before.get(name) != now.get(name) and name not in may_change and not name.startswith("_"):
            old, new = _as_argument(before.get(name)), _as_argument(now.get(name))
            option = f"{group}.{name}" if group else name
            raise UserError(
                f"{option}: {new}, but the checkpoint's run has {old}",
                f"Resume with --{option} {shlex.quote(old)}, or start a new run.",
            )


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
