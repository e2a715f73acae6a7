"""Prompt files that hold no prompt."""

import json
from collections.abc import Callable

from tests.proactive.bad_inputs.case import Case, Place, write
from tests.proactive.bad_inputs.data import ESCAPES, root

PARTS = {"instructions": "Judge.", "event": "{time} {event}", "proposal": "{proposal}", "no_proposal": "none"}
CHAT = {"system": "You help.", "user": "{events}"}
NO_YAML: dict[str, str | bytes] = {
    "a list that does not end": "instructions: [",
    "a tab": "instructions:\n\t- x",
    "a tag": "instructions: !!python/object/apply:os.getcwd []",
    "two documents": "a: 1\n---\nb: 2\n",
    "a control character": "instructions: \x07",
    "brackets": "[" * 100_000,
    "an alias of nothing": "instructions: *nothing",
    "UTF-16": json.dumps(PARTS).encode("utf-16"),
    "bytes": b"\xff\xfe\x00\x01",
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
UNFIT: dict[str, tuple[str, str]] = {  # of a classifier's prompt: what is named
    "empty": ("", "top level"),
    "a list": ("- a", "top level"),
    "text": ("text", "top level"),
    "a part missing": (json.dumps({"instructions": "x"}), "part event"),
    "a part more": (json.dumps({**PARTS, "more": "x"}), "part more"),
    "a part of control characters": (json.dumps({**PARTS, ESCAPES: "x"}), "\\x1b]0;owned"),
    "a number": (json.dumps({**PARTS, "instructions": 5}), "part instructions"),
    "a null": (json.dumps({**PARTS, "no_proposal": None}), "part no_proposal"),
    "a date": ("instructions: 2024-01-01\nevent: '{event}'\n", "part"),
    "half a surrogate": (json.dumps({**PARTS, "event": "{event} \ud83d"}), "prompt.yaml"),
    "an unknown placeholder": (json.dumps({**PARTS, "event": "{task}"}), "{task}"),
    "no placeholder": (json.dumps({**PARTS, "proposal": "so"}), "does not say where the proposal"),
}
UNFIT_CHATS: dict[str, tuple[str, str]] = {
    "empty": ("", "top level"),
    "a part missing": (json.dumps({"user": "{events}"}), "part system"),
    "a part more": (json.dumps({**CHAT, ESCAPES: "x"}), "\\x1b]0;owned"),
    "a number": (json.dumps({**CHAT, "system": 5}), "part system"),
    "no placeholder": (json.dumps({**CHAT, "user": "x"}), "part user"),
    "a judge's placeholder": (json.dumps({**CHAT, "user": "{events} {proposal}"}), "part user"),
    "a bomb": (BOMB, "prompt.yaml"),
    "one beyond the limit": ("x" * (2**20 + 1), "limit"),
}
ASKED = [
    *("agent", "--agent.url=http://127.0.0.1:9/v1", "--agent.model=m", "--agent.prompt=prompt.yaml", "--data.root=r"),
    *("--judge.url=http://127.0.0.1:9/v1", "--judge.model=m"),
]


def prompt(content: str | bytes) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        root()(place)
        write("prompt.yaml", content)(place)

    return prepare


CASES = [
    *(
        Case(f"no YAML: {name}", "evaluate", ASKED, "prompt.yaml", prompt(content))
        for name, content in {**NO_YAML, "a picture": b"\x89PNG\r\n\x1a\n"}.items()
    ),
    *(Case(f"a chat: {name}", "evaluate", ASKED, named, prompt(c)) for name, (c, named) in UNFIT_CHATS.items()),
    *(
        Case(f"a prompt: {name}", "fit", ["--data.prompt=prompt.yaml"], named, prompt(content))
        for name, (content, named) in UNFIT.items()
    ),
]
