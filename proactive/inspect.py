"""`python -m proactive.inspect`: what a data root holds, and what its splits give away."""

if __name__ == "__main__":
    from proactive.commands import start

    start("inspect")

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from datamodules.batching.prefix_tree import PrefixOrder
from datamodules.corpus.agreement import agreement, interval
from datamodules.corpus.records import AnnotatedRow, Category
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.splits import contamination, history_digests, split_by_scene
from datamodules.prompting.segments import SegmentTokenizer
from datamodules.prompting.templates import DEFAULT_PROMPT, PromptTemplate, render, training_text
from datamodules.prompting.tokenizers import SCRATCH, load_tokenizer, train_tokenizer
from datamodules.ranges import Folds, Seed
from proactive.commands import program
from proactive.parser import Parser
from proactive.terminal import Table, show

VOCABULARY_SIZE = 4096


def inspect_root(root: str = "embedded", folds: Folds = 5, tokenizer: str = SCRATCH, seed: Seed = 0) -> dict[str, Any]:
    """Count rows, scenes, histories, tokens, agreement and contamination.

    Args:
        root: Where the data is: embedded, published, or a directory in the published layout.
        folds: Into how many parts by_scene divides the scenes.
        tokenizer: What counts tokens: a hub id or path, or "scratch" for one trained on the root's rows.
        seed: Which embedded data, and which division into folds.
    """
    corpus = load_corpus(root, seed)
    template = PromptTemplate.read(DEFAULT_PROMPT)
    if tokenizer == SCRATCH:
        segmenter = SegmentTokenizer(train_tokenizer(training_text(template, corpus.train), VOCABULARY_SIZE))
    else:
        segmenter = SegmentTokenizer(load_tokenizer(tokenizer))
    files = {name: rows for name, rows in (("train", corpus.train), ("test", corpus.test)) if rows}
    return {
        "root": root,
        "rows": {name: _row_figures(rows, template, segmenter) for name, rows in files.items()},
        "all": {
            "rows": len(corpus.rows),
            "scenes": len({row.scene for row in corpus.rows}),
            "distinct_histories": len(history_digests(corpus.rows)),
            "rows_per_history": len(corpus.rows) / len(history_digests(corpus.rows)),
        },
        "contamination": _contamination_figures(corpus, folds, seed),
        "traces": _trace_figures(corpus),
    }


def main(arguments: list[str]) -> None:
    """Parse, count, print."""
    parser = Parser(prog=program("inspect"), description=inspect_root.__doc__)
    parser.add_function_arguments(inspect_root, as_group=False)
    parser.add_argument("--json", action="store_true", help="Print JSON in place of tables.")
    parser.add_argument("--quiet", action="store_true", help="Print nothing but errors.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    options = parser.parse_args(arguments)
    figures = inspect_root(options.root, options.folds, options.tokenizer, options.seed)
    if options.json:
        print(json.dumps(figures, indent=2))
    elif not options.quiet:
        show(*_tables(figures))


def _row_figures(rows: Sequence[AnnotatedRow], template: PromptTemplate, segmenter: SegmentTokenizer) -> dict[str, Any]:
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


def _contamination_figures(corpus: Corpus, folds: int, seed: int) -> dict[str, Any]:
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


def _trace_figures(corpus: Corpus) -> dict[str, Any]:
    """How much of the agent's test set lies in the annotated training rows."""
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


def _tables(figures: dict[str, Any]) -> list[Table]:
    rows = Table(title=f"Annotated rows: {figures['root']}")
    rows.add_column("")
    for name in figures["rows"]:
        rows.add_column(name, justify="right")

    def add(label: str, values: list[str]) -> None:
        rows.add_row(label, *values)

    columns = list(figures["rows"].values())
    add("rows", [str(column["rows"]) for column in columns])
    for category in Category:
        add(
            f"  {category.replace('_', ' ')}",
            [str(column["categories"][category.value]) for column in columns],
        )
    add("scenes", [str(column["scenes"]) for column in columns])
    add("distinct histories", [str(column["distinct_histories"]) for column in columns])
    add("tokens per row, mean", [f"{column['tokens_per_row']['mean']:.1f}" for column in columns])
    add("tokens per row, greatest", [str(column["tokens_per_row"]["greatest"]) for column in columns])
    add("tokens, row by row", [f"{column['tokens']['as_rows']:,}" for column in columns])
    add("tokens, as a prefix tree", [f"{column['tokens']['as_tree']:,}" for column in columns])
    agreements = [column["human_agreement"] for column in columns]
    add("human agreement", ["" if agreement is None else f"{agreement:.3f}" for agreement in agreements])
    for kind in ("all", "offers", "silence"):
        label = "annotators' alpha" if kind == "all" else f"  {kind}"
        add(label, [interval(column["krippendorff_alpha"][kind], "alpha") for column in columns])
    every = figures["all"]
    rows.caption = (
        f"together {every['rows']} rows, {every['scenes']} scenes, {every['distinct_histories']} distinct histories, "
        f"{every['rows_per_history']:.1f} rows a history"
    )

    splits = Table(title="Contamination: test rows whose history also occurs in the training rows")
    for title in ("split", "test rows", "contaminated", "share"):
        splits.add_column(title, justify="left" if title == "split" else "right")
    for name, found in figures["contamination"].items():
        splits.add_row(name, str(found["test_rows"]), str(found["contaminated_rows"]), f"{found['fraction']:.0%}")
    traces = figures["traces"]
    if traces["traces"]:
        splits.caption = (
            f"{traces['traces']} agent test traces: {traces['events_in_training_rows']} of {traces['events']} events "
            f"occur in the training rows; {traces['scenes_outside_traces']} of {traces['scenes']} scenes lie outside"
        )
    return [rows, splits]
