"""`python -m proactive.inspect`: counts of a data root, contamination of its splits, and examples of its rows."""

if __name__ == "__main__":
    from proactive.commands import start

    start("inspect")

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

from datamodules.batching.prefix_tree import PrefixOrder
from datamodules.corpus.agreement import agreement, interval
from datamodules.corpus.columns import Columns
from datamodules.corpus.records import AnnotatedRow, Category
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.splits import contamination, history_digests, split_by_scene
from datamodules.prompting.chat_format import Format, formatted
from datamodules.prompting.segments import SegmentTokenizer
from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, render, training_text
from datamodules.prompting.tokenizers import SCRATCH, load_tokenizer, train_tokenizer
from datamodules.ranges import Folds, Seed
from proactive.commands import program
from proactive.inspection.example_options import ExampleOptions
from proactive.parser import Parser
from proactive.tables import Table, show
from proactive.terminal import say

VOCABULARY_SIZE = 4096


def inspect_root(
    root: str = "embedded",
    columns: Columns | None = None,
    folds: Folds = 5,
    tokenizer: str = SCRATCH,
    format: Format = "auto",
    seed: Seed = 0,
    examples: ExampleOptions | None = None,
) -> dict[str, Any]:
    """Count rows, scenes, histories, tokens, agreement and contamination, and show examples.

    Args:
        root: Source of the data: embedded, published, a folder in the published layout, or a table.
        columns: Which columns of the table hold the fields of a row.
        folds: Number of parts that by_scene divides the scenes into.
        tokenizer: Tokenizer that counts tokens: a hub id or path, or "scratch" for one trained on the root's rows.
        format: Format of the rows that are counted and shown, as in data.format.
        seed: Seed of the embedded data and of the folds.
        examples: Which examples to render; None for none.

    Raises:
        UserError: The data or the tokenizer cannot be read, or an option does not fit.
    """
    corpus = load_corpus(root, seed, columns)
    template = RewardTemplate.read(DEFAULT_PROMPT)
    if tokenizer == SCRATCH:
        used = train_tokenizer(training_text(template, corpus.train), VOCABULARY_SIZE)
    else:
        used = load_tokenizer(tokenizer)
    template, chat, _ = formatted(template, used, format)
    segmenter = SegmentTokenizer(used, chat=chat is not None)
    shown = None
    if examples and examples.examples:
        from proactive.inspection.examples import rendered_examples

        shown = rendered_examples(corpus, examples, folds=folds, tokenizer=tokenizer, format=format, seed=seed)
    files = {name: rows for name, rows in (("train", corpus.train), ("test", corpus.test)) if rows}
    return {
        "root": root,
        "read": list(corpus.notes),
        "format": "plain" if chat is None else "chat",
        "rows": {name: _row_counts(rows, template, segmenter) for name, rows in files.items()},
        "all": {
            "rows": len(corpus.rows),
            "scenes": len({row.scene for row in corpus.rows}),
            "distinct_histories": len(history_digests(corpus.rows)),
            "rows_per_history": len(corpus.rows) / len(history_digests(corpus.rows)),
        },
        "contamination": _contamination(corpus, folds, seed),
        "traces": _trace_counts(corpus),
        "examples": shown,
    }


def main(arguments: list[str]) -> None:
    """Parse, count, print."""
    parser = Parser(prog=program("inspect"), description=inspect_root.__doc__)
    parser.add_function_arguments(inspect_root, as_group=False, skip={"examples"})
    parser.add_class_arguments(ExampleOptions, as_group=False)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    parser.with_output_options()
    options = parser.parse_args(arguments)
    columns = options.columns and Columns(**options.columns.as_dict())
    examples = ExampleOptions(**{field.name: options[field.name] for field in fields(ExampleOptions)})
    found = inspect_root(
        options.root, columns, options.folds, options.tokenizer, options.format, options.seed, examples
    )
    if options.json:
        print(json.dumps(found, indent=2))
    elif not options.quiet:
        for note in found["read"]:
            say(note)
        show(_rows_table(found), _splits_table(found))
        if found["examples"]:
            from proactive.inspection.examples import show_examples

            show_examples(examples.task, found["examples"])


def _row_counts(rows: Sequence[AnnotatedRow], template: RewardTemplate, segmenter: SegmentTokenizer) -> dict[str, Any]:
    categories = Counter(row.category for row in rows)
    ids = [[*segmenter.prefix, *chain(*segmenter.encode(render(template, row))), *segmenter.suffix] for row in rows]
    tokens = [len(row) for row in ids]
    answers = [answer == row.accepted for row in rows for answer in row.annotation]
    return {
        "rows": len(rows),
        "categories": {category.value: categories[category] for category in Category},
        "scenes": len({row.scene for row in rows}),
        "distinct_histories": len(history_digests(rows)),
        "tokens_per_row": {"mean": sum(tokens) / len(tokens), "greatest": max(tokens)},
        "tokens": {"as_rows": sum(tokens), "as_tree": PrefixOrder(ids).tokens(range(len(ids)))},
        "human_agreement": sum(answers) / len(answers) if answers else None,
        "krippendorff_alpha": {
            "all": _alpha(rows),
            "offers": _alpha([row for row in rows if row.proposal is not None]),
            "silence": _alpha([row for row in rows if row.proposal is None]),
        },
    }


def _alpha(rows: Sequence[AnnotatedRow]) -> dict[str, float | None]:
    """Krippendorff's alpha, and its interval over scenes."""
    found = agreement((row.scene, row.annotation) for row in rows)
    return {name: value for name, value in found.items() if name.startswith("alpha")}


def _contamination(corpus: Corpus, folds: int, seed: int) -> dict[str, Any]:
    found = {}
    if corpus.test:
        found["published"] = contamination(history_digests(corpus.train), corpus.test)
    if len({row.scene for row in corpus.rows}) >= folds:
        for fold in range(folds):
            split = split_by_scene(corpus, folds, fold, seed)
            found[f"by_scene, fold {fold} of {folds}"] = contamination(history_digests(split.train), split.test)
    return {
        name: {
            "test_rows": one.test_rows,
            "contaminated_rows": one.contaminated_rows,
            "fraction": one.fraction,
        }
        for name, one in found.items()
    }


def _trace_counts(corpus: Corpus) -> dict[str, Any]:
    """Count the events of the agent's test traces that occur in annotated training rows."""
    in_rows = {(event.time, event.event) for row in corpus.train for event in row.history}
    steps = [step.observation for trace in corpus.traces.values() for step in trace]
    in_traces = {(event.time, event.event) for event in steps}
    scenes: dict[str, bool] = {}
    for row in corpus.rows:
        touched = any((event.time, event.event) in in_traces for event in row.history)
        scenes[row.scene] = scenes.get(row.scene, False) or touched
    return {
        "traces": len(corpus.traces),
        "events": len(steps),
        "events_in_training_rows": sum((event.time, event.event) in in_rows for event in steps),
        "scenes_outside_traces": sum(not touched for touched in scenes.values()),
        "scenes": len(scenes),
    }


def _rows_table(counts: dict[str, Any]) -> Table:
    table = Table(title=f"Annotated rows: {counts['root']}, {counts['format']} format")
    table.add_column("")
    for name in counts["rows"]:
        table.add_column(name, justify="right")
    columns = list(counts["rows"].values())

    def add(label: str, cells: Iterable[object]) -> None:
        table.add_row(label, *map(str, cells))

    add("rows", (column["rows"] for column in columns))
    for category in Category:
        add(f"  {category.replace('_', ' ')}", (column["categories"][category.value] for column in columns))
    add("scenes", (column["scenes"] for column in columns))
    add("distinct histories", (column["distinct_histories"] for column in columns))
    add("tokens per row, mean", (f"{column['tokens_per_row']['mean']:.1f}" for column in columns))
    add("tokens per row, maximum", (column["tokens_per_row"]["greatest"] for column in columns))
    add("tokens, row by row", (f"{column['tokens']['as_rows']:,}" for column in columns))
    add("tokens, as a prefix tree", (f"{column['tokens']['as_tree']:,}" for column in columns))
    add("human agreement", (_number(column["human_agreement"]) for column in columns))
    for kind, label in (("all", "annotators' alpha"), ("offers", "  offers"), ("silence", "  silence")):
        add(label, (interval(column["krippendorff_alpha"][kind], "alpha") for column in columns))
    every = counts["all"]
    table.caption = (
        f"together {every['rows']} rows, {every['scenes']} scenes, {every['distinct_histories']} distinct histories, "
        f"{every['rows_per_history']:.1f} rows per history"
    )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _splits_table(counts: dict[str, Any]) -> Table:
    table = Table(title="Contamination: test rows whose history also occurs in the training rows")
    table.add_column("split")
    for title in ("test rows", "contaminated", "share"):
        table.add_column(title, justify="right")
    for name, found in counts["contamination"].items():
        table.add_row(name, str(found["test_rows"]), str(found["contaminated_rows"]), f"{found['fraction']:.0%}")
    traces = counts["traces"]
    if traces["traces"]:
        table.caption = (
            f"{traces['traces']} agent test traces: {traces['events_in_training_rows']} of {traces['events']} events "
            f"occur in the training rows; {traces['scenes_outside_traces']} of {traces['scenes']} scenes lie outside"
        )
    return table
