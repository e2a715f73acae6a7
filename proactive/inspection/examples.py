"""Some training rows as text, with their learned tokens marked."""

import sys
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from datamodules.batching.answer_rows import AgentDataModule, AnswerKind
from datamodules.batching.preference_rows import PreferenceDataModule
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.rows import RowsDataModule
from datamodules.batching.tokenized_split import TokenizedSplit
from datamodules.corpus.records import Category
from datamodules.corpus.sources import Corpus
from datamodules.corpus.splits import Split
from datamodules.errors import UserError
from datamodules.escaping import printable
from proactive.inspection.example_options import ExampleOptions, Task
from proactive.tables import WITHOUT_TERMINAL

MODULES: dict[str, type[RowsDataModule]] = {
    "reward": RewardDataModule,
    "agent": AgentDataModule,
    "preference": PreferenceDataModule,
}
MEANING = {  # of a marked token
    "reward": "the token at which the verdict is read; no text is learned",
    "agent": "learned tokens",
    "preference": "tokens whose probability is raised (accepted) or lowered (rejected)",
}
LONGEST = 1200  # characters of a part that is shown
MARKS = "⟦⟧"  # where there is no colour


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of an example as text; all of them are marked, or none."""

    text: str
    marked: bool


@dataclass(frozen=True)
class RenderedRow:
    """A row as the network reads it. `title` says what it is."""

    title: str
    tokens: int
    parts: list[Part]


def rendered_examples(corpus: Corpus, options: ExampleOptions, **more: Any) -> dict[str, Any]:
    """Render some training rows of a task.

    Args:
        corpus: Contents of the root.
        options: Which rows.
        more: More options of the task's data module, such as the tokenizer.

    Returns:
        `rows`: the rendered rows. `notes`: what was left out and why, and why there is no split, in sentences.

    Raises:
        UserError: The options or the files of the task are wrong.
    """
    data = MODULES[options.task](root=corpus.root, cache=False, **options.of_data(), **more)
    notes: list[str] = []
    try:
        split = data.divide(corpus)
    except UserError as error:
        notes.append(f"no split: {error.what}")
        split = Split(corpus.train, [], corpus.test)
    data.prepare(split)
    encoded = data.encode("train")
    if isinstance(data, AgentDataModule):
        notes += data.conversation_notes
    if isinstance(data, PreferenceDataModule) and data.left_out:
        notes.append(f"preferences left out: {data.left_out} with events of test or validation scenes")
    choose = _pairs if options.task == "preference" else _of_each_kind
    titled = choose(encoded, options.examples)
    return {"rows": [asdict(_rendered(data, encoded, row, title)) for title, row in titled], "notes": notes}


def _of_each_kind(encoded: TokenizedSplit, number: int) -> list[tuple[str, int]]:
    """Choose rows: the first of each kind, then others in order. Return their titles and indices."""
    if "category" in encoded.columns:
        kinds = [list(Category)[kind].value for kind in encoded.columns["category"].tolist()]
    else:
        names = {AnswerKind.TEXT: "offer", AnswerKind.NULL: "silence", AnswerKind.CONVERSATION: "conversation"}
        kinds = [names[AnswerKind(kind)] for kind in encoded.columns["kind"].tolist()]
    first = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    chosen = list(dict.fromkeys([*first.values(), *range(min(number, len(kinds)))]))[:number]
    return [(f"{kinds[row].replace('_', ' ')}, row {row}", row) for row in sorted(chosen)]


def _pairs(encoded: TokenizedSplit, number: int) -> list[tuple[str, int]]:
    assert encoded.groups is not None
    return [
        (f"pair {pair}, {side}", row)
        for pair, rows in enumerate(encoded.groups[:number].tolist())
        for side, row in zip(("accepted", "rejected"), rows, strict=True)
    ]


def _rendered(data: RowsDataModule, encoded: TokenizedSplit, row: int, title: str) -> RenderedRow:
    ids = [int(token) for token in encoded.input_ids[row]]
    marked = {len(ids) - 1} if encoded.answers is None else {int(place) for place in encoded.answers[row]}
    parts = []
    for is_marked, places in groupby(range(len(ids)), lambda place: place in marked):
        tokens = [ids[place] for place in places]
        parts.append(Part(str(data.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)), is_marked))
    return RenderedRow(title, len(ids), parts)


def show_examples(task: Task, examples: dict[str, Any]) -> None:
    """Print rendered rows: with colour in a terminal that has it, else with marks. Text is escaped."""
    console = Console() if sys.stdout.isatty() else Console(width=WITHOUT_TERMINAL)
    in_colour = console.is_terminal and console.color_system is not None and not console.no_color
    mark = "green" if in_colour else " ".join(MARKS)
    console.print(Text(f"Examples of task {task}; {mark}: {MEANING[task]}"), soft_wrap=True)
    for row in examples["rows"]:
        text = Text(f"\n{row['title']}, {row['tokens']} tokens\n", "italic")
        for part in row["parts"]:
            shown = _shown(part["text"], escape_marks=not in_colour)
            if part["marked"]:
                shown = shown.replace("\n", "\\n\n").removesuffix("\n")  # a line break may be the only marked text
                shown = shown if in_colour else f"{MARKS[0]}{shown}{MARKS[1]}"
            text.append(shown, "bold green not italic" if part["marked"] else "not italic")
        console.print(text, soft_wrap=True)
    for note in examples["notes"]:
        console.print(Text(printable(note)), soft_wrap=True)


def _shown(text: str, *, escape_marks: bool) -> str:
    """Escape everything but line breaks, and shorten a long text in its middle."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    if escape_marks:
        text = "".join(ascii(character)[1:-1] if character in MARKS else character for character in text)
    return "\n".join(map(printable, text.split("\n")))
