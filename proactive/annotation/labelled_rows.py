"""Exports the complete units of a project as annotated rows, and lists the labels that each row is made of."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import TRAIN_FILE
from datamodules.corpus.units import majority_rows, published_rows
from datamodules.errors import UserError
from datamodules.files.writing import Unfinished, sync
from proactive.annotation.project_file import ProjectUnit
from proactive.annotation.store import Store, StoredLabel

PROVENANCE_FILE = "provenance.jsonl"
Rule = Literal["majority", "published"]


def export(store: Store, output: Path, rule: Rule, drop_ties: bool) -> dict[str, int]:
    """Write the complete units of a project as a data root that `fit` takes.

    Args:
        store: The project.
        output: A new folder. It gets annotated rows in the published layout, and a file that lists for each unit the
            sources of its offers and its labels, with annotator, time and duration.
        rule: How labels become rows; see `datamodules.corpus.units`.
        drop_ties: Whether to leave out tied rows. Otherwise ties are an error.

    Returns:
        The number of rows and units written, of incomplete units, and of units with ties.

    Raises:
        UserError: The folder exists, no unit is complete, or there are ties.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists", "Give a new folder.")
    ties = set(store.ties()) if rule == "majority" else set()
    if ties and not drop_ties:
        raise UserError(
            f"{len(ties)} units have ties, the first of them unit {min(ties)}",
            "Adjudicate them on the overview page of `serve`, or leave tied rows out with --drop-ties.",
        )
    labels: dict[int, list[StoredLabel]] = {}
    for label in store.labels():
        if label.annotator is not None or rule == "majority":  # the published rule knows no adjudicator
            labels.setdefault(label.item, []).append(label)
    counts: Counter[str] = Counter()
    rows: list[AnnotatedRow] = []
    provenance: list[dict[str, Any]] = []
    for item in store.items():
        mine = labels.get(item.id, [])
        people = sum(label.annotator is not None for label in mine)
        if people < store.annotators_per_unit and people == len(mine):
            counts["incomplete"] += 1
            continue
        made = _rows(item, mine, rule)
        counts["ties"] += item.id in ties
        rows += made
        provenance.append(_provenance(item, mine, rule, len(made)))
    if not provenance:
        raise UserError(f"{store.path} has no complete unit to export", "Label some first: see `serve`.")
    if not rows:
        raise UserError(
            f"{store.path}: the rule {rule} makes no row of its {len(provenance)} complete units",
            "Label more units, or give another --rule.",
        )
    _write(output, {TRAIN_FILE: [row.published() for row in rows], PROVENANCE_FILE: provenance})
    return {"rows": len(rows), "units": len(provenance), **{name: counts[name] for name in ("incomplete", "ties")}}


def _rows(item: ProjectUnit, labels: list[StoredLabel], rule: Rule) -> list[AnnotatedRow]:
    said = [label.label for label in labels if label.annotator is not None]
    if rule == "published":
        return published_rows(item.unit, said)
    return majority_rows(item.unit, said, next((one.label for one in labels if one.annotator is None), None))


def _provenance(item: ProjectUnit, labels: list[StoredLabel], rule: Rule, rows: int) -> dict[str, Any]:
    return {
        "trace": item.unit.trace,
        "step": item.step,
        "rule": rule,
        "rows": rows,
        "offers": [{"offer": text, "sources": names} for text, names in item.unit.offers.items()],
        "labels": [
            {
                "annotator": label.annotator,
                "adjudicates": label.annotator is None,
                "accepted": label.label.accepted,
                "help_needed": label.label.help_needed,
                "at": label.at,
                "seconds": label.seconds,
            }
            for label in labels
        ],
    }


def _write(output: Path, files: dict[str, list[dict[str, Any]]]) -> None:
    with Unfinished(output, folder=True) as unfinished:
        for name, records in files.items():
            path = unfinished.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                sync(file)
        unfinished.path.rename(output)
