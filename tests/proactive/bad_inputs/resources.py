"""Pipes, devices, sockets and folders where files should be, and places where nothing can be written."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.proactive.bad_inputs.case import Case, Place
from tests.proactive.bad_inputs.data import SPLITS, TEST, TRACE, TRAIN, root
from tests.proactive.bad_inputs.prompts import ASKED


def _bound(path: Path) -> None:
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(path.parent)  # an address has a hundred characters at most
        bound.bind(path.name)
        os.chdir(before)


KINDS: dict[str, Callable[[Path], None]] = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": _bound,
    "a folder": Path.mkdir,
    "a loop of links": lambda path: path.symlink_to(path),
}


def instead(name: str, kind: str) -> Callable[[Place], None]:
    """Prepares a root, and something else where a file should be."""

    def prepare(place: Place) -> None:
        root(**{} if name == TRACE else {SPLITS: '{"a": {"files": ["a.json"]}}'})(place)
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        KINDS[kind](path)

    return prepare


INSPECT = ("inspect", ["--root=r"])
EVALUATE = ("evaluate", ASKED)
PLACES: dict[str, tuple[str, list[str]]] = {
    TRAIN: INSPECT,
    TEST: INSPECT,
    TRACE: INSPECT,
    SPLITS: EVALUATE,
    "prompt.yaml": EVALUATE,
    "out/answers.jsonl": ("evaluate", [*ASKED[:3], "--data.root=r", *ASKED[5:], "--output=out"]),
    "told.jsonl": ("fit", ["--task=agent", '--data.conversations=["told.jsonl"]']),
    "best.ckpt": ("evaluate", ["reward", "--checkpoint=best.ckpt"]),
    "model/tokenizer.json": ("inspect", ["--root={root}", "--tokenizer=model"]),
}
NAMED = {"model/tokenizer.json": "model"}
CASES = [
    Case(f"{kind} as {name}", command, arguments, NAMED.get(name, Path(name).name), instead(name, kind))
    for name, (command, arguments) in PLACES.items()
    for kind in KINDS
    if kind != "a loop of links" or name not in (TEST, SPLITS, "out/answers.jsonl")  # as if they were not there
]
