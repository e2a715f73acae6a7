"""decisions.jsonl of a run: what the tested model decided on each test row, so that runs can be compared row by row.

The file holds digests of histories and proposals, and no text.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, ClassVar

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from datamodules.batching.rows import RowsDataModule
from datamodules.corpus.records import Event, history_digest, scene_of
from datamodules.ranges import Fraction
from models.learning.training import BackboneModule

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}(\.\d+)?$")]


class DecidedRow(BaseModel):
    """A test row with its decision.

    Attributes:
        row: Digest of history, proposal and target. Equal rows are numbered.
        scene: Name of the scene.
        target: 1 for the positive class: accepted, or for an agent help needed.
        probability: P(positive class), as the network gives it.
        calibrated: The same, calibrated.
        bag_of_words: P(positive class) by a bag of words that was fitted on the training rows; None without them.
        majority: The more frequent class of the training rows, 0 or 1; None without them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    hint: ClassVar[str] = "Test the run again, or leave it out."

    row: Digest
    scene: Digest
    target: Annotated[int, Ge(0), Le(1)]
    probability: Fraction
    calibrated: Fraction
    bag_of_words: Fraction | None
    majority: Annotated[int, Ge(0), Le(1)] | None


def decided_rows_text(model: BackboneModule, data: RowsDataModule) -> str:
    """The content of decisions.jsonl, a line for each row that a tested model has decided.

    Args:
        model: The tested model.
        data: The data of the test.
    """
    rows, examples = model.test_rows, data.rows("test")
    words_N, majority = scored_by_words(data, rows["row"])
    seen: Counter[str] = Counter()
    lines = []
    for index, number in enumerate(rows["row"].tolist()):
        history, target = examples[number].history, int(rows["target"][index])
        name = row_name(history, examples[number].proposal, target)
        seen[name] += 1
        row = DecidedRow(
            row=name if seen[name] == 1 else f"{name}.{seen[name]}",
            scene=scene_of(history),
            target=target,
            probability=float(rows["probability"][index]),
            calibrated=float(rows["calibrated"][index]),
            bag_of_words=None if words_N is None else float(words_N[index]),
            majority=majority,
        )
        lines.append(json.dumps(row.model_dump()) + "\n")
    return "".join(lines)


def scored_by_words(data: RowsDataModule, row_N: Tensor) -> tuple[Tensor | None, int | None]:
    """What a bag of words and the majority of the training rows say of test rows.

    Args:
        data: The data of the test.
        row_N: (N,) int64, indices of rows with a decision.

    Returns:
        P(positive class), (N,) float64, and the more frequent class; None if the training rows are not available.
    """
    scores = data.word_scores
    if scores is None:
        return None, None
    first = data.row_counts["test"] - data.decision_count("test")  # rows with a decision are the last ones
    return scores.test[row_N - first], int(scores.majority)


def row_name(history: Sequence[Event], proposal: str | None, target: int) -> str:
    """The digest of a row, 16 hexadecimal digits."""
    text = json.dumps([history_digest(history), proposal, target])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
