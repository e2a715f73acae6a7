"""`python -m proactive.prefer`: preferences between an agent's answers, from the verdicts of a judge."""

if __name__ == "__main__":
    from proactive.commands import start

    start("prefer")

import json
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from datamodules.corpus.json_records import read_json
from datamodules.corpus.records import Event
from datamodules.errors import UserError
from datamodules.files.reading import MAX_RECORDS_BYTES
from datamodules.files.writing import write_atomically
from datamodules.ranges import PositiveFraction
from models.reporting.timeline import TIMELINE_FILE, ShownOffer, ShownTraces
from proactive.commands import program
from proactive.parser import Parser
from proactive.terminal import say


def main(arguments: list[str]) -> None:
    """Parse, write the preferences, print how many there are."""
    parser = Parser(prog=program("prefer"), description="Write preferences between an agent's answers, for `fit --task "
        "preference`. Folders are those of `evaluate agent` with several --candidates.")  # fmt: skip
    add = parser.add_argument
    add("folders", type=Path, nargs="+", help="Folders that `evaluate agent` wrote.")
    add("--output", type=Path, required=True, help="The preference file to write.")
    add("--min-difference", type=PositiveFraction | None, help="Pair all answers whose P(accepted) differs by at least "
        "this. Default: pair each accepted answer with each rejected one.")  # fmt: skip
    options = parser.with_output_options().parse_args(arguments)
    records = [record for folder in options.folders for record in preferences(folder, options.min_difference)]
    if not records:
        raise UserError(
            "the evaluations contain no two answers to prefer one of",
            "Evaluate with several --candidates and a --temperature above 0, or give another --min-difference.",
        )
    write_atomically(options.output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    if not options.quiet:
        say(f"{options.output}: {len(records)} preferences after {_histories(records)} histories")


def preferences(folder: Path, min_difference: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a preference file from the judged answers of an evaluation.

    Args:
        folder: The folder of an evaluation of an agent.
        min_difference: See `--min-difference`.

    Raises:
        UserError: It is no such folder, or its judge gives no probabilities, which `min_difference` needs.
    """
    shown, _ = read_json(folder / TIMELINE_FILE, ShownTraces, MAX_RECORDS_BYTES)
    for trace in shown.traces:
        for number, step in enumerate(trace.steps, 1):
            judged = [offer for offer in step.offers if offer.parsed and not offer.held_back]
            if min_difference is not None and any(offer.probability is None for offer in judged):
                raise UserError(
                    f"--min-difference: the judge of {folder} gives no probabilities", "Leave --min-difference out."
                )
            yield from _pairs(trace.events[:number], judged, min_difference, f"evaluation {folder.resolve().name}")


def _pairs(
    history: Sequence[Event], judged: Sequence[ShownOffer], min_difference: float | None, source: str
) -> Iterator[dict[str, Any]]:
    different = {offer.text: offer for offer in reversed(judged)}.values()  # the first of equal answers
    for chosen, rejected in permutations(different, 2):
        if _is_better(chosen, rejected, min_difference):
            events = [event.model_dump() for event in history]
            yield {"history": events, "chosen": chosen.text, "rejected": rejected.text, "source": source, "weight": 1.0}


def _is_better(one: ShownOffer, other: ShownOffer, min_difference: float | None) -> bool:
    if min_difference is None:
        return one.verdict is True and other.verdict is False
    assert one.probability is not None
    assert other.probability is not None
    return one.probability - other.probability >= min_difference


def _histories(records: Sequence[dict[str, Any]]) -> int:
    return len({json.dumps(record["history"]) for record in records})
