"""PreferenceDataModule: judged proposals in groups of two rows, for an agent that learns from judgments."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from datamodules.batching.answer_rows import AnswerKind, AnswersDataModule, Example, probes
from datamodules.batching.prefix_tree import Integers
from datamodules.batching.rows import RowsDataModule, Stage, log
from datamodules.batching.tokenized_split import TokenizedSplit
from datamodules.corpus.conversations import MIN_EVENT_LENGTH
from datamodules.corpus.preferences import (
    FIELDS,
    JudgedProposal,
    Preference,
    PreferenceRecord,
    judged_rows,
    open_preferences,
    preferences_of,
    read_preferences,
)
from datamodules.corpus.records import history_digest, scene_of
from datamodules.corpus.splits import validates
from datamodules.errors import UserError

Objective = Literal["dpo", "kto"]


class Groups(NamedTuple):
    """Groups of two rows, of which each distinct row is listed once."""

    examples: list[Example]
    histories: list[int]  # the digest of each example's history
    rows: Integers  # (G, 2), the rows of each group
    weight: list[float]  # of each group in the mean loss


class PreferenceDataModule(AnswersDataModule):
    """Judged proposals: annotated rows, and tables of preferences.

    Every group has two rows, which stay in one micro-batch. With objective dpo, they are an accepted and a rejected
    proposal after one history. With kto, they are a judged proposal, and the proposal of another row after the same
    history, which measures how far the agent is from its reference.

    Args:
        preferences: Preferences to learn from: CSV, Parquet or JSON files, folders of them, or datasets of the Hugging
            Face hub, with history, chosen and rejected, or history, proposal and accepted.
        objective: Which groups to make. Set by model.objective.
        options: See AnswersDataModule.
    """

    may_change = (*RowsDataModule.may_change, "preferences")

    def __init__(self, preferences: list[str] | None = None, objective: Objective = "dpo", **options: Any) -> None:
        super().__init__(**options)
        self.preferences = preferences or []
        self.objective = objective
        self.left_out = 0  # preferences of tables with events of held-out scenes
        self._records: list[PreferenceRecord] | None = None
        self._groups: dict[Stage, Groups] = {}
        if not self.annotated and not self.preferences:
            raise UserError("data.annotated: false leaves no training data", "Give data.preferences.")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            counts = ", ".join(f"{len(self.groups(name).weight)} {name}" for name in ("train", "validation", "test"))
            log.info(f"{'pairs' if self.objective == 'dpo' else 'judged proposals'}: {counts}")
            if self.left_out:
                log.info(f"preferences left out: {self.left_out} with events of test or validation scenes")

    def rows(self, stage: Stage) -> list[Example]:
        """Return the distinct rows of all groups; for validation and test also the probes."""
        return self.groups(stage).examples + ([] if stage == "train" else probes(getattr(self.split, stage)))

    def encode_answers(self, stage: Stage) -> TokenizedSplit:
        groups = self.groups(stage)
        if stage != "test" and not groups.weight:
            what = "pair of an accepted and a rejected" if self.objective == "dpo" else "judged"
            raise UserError(
                f"data: there is no {what} proposal in the {stage} split", "Give more scenes, or --data.preferences."
            )
        weight = torch.tensor(groups.weight, dtype=torch.float32)
        return replace(super().encode_answers(stage), groups=groups.rows, group_weight=weight)

    @property
    def seen(self) -> dict[str, list[Any]]:
        """Includes the histories and scenes of preferences in tables."""
        seen = super().seen
        if self._saved is not None:
            return seen
        stages: dict[str, Stage] = {"training": "train", "validation": "validation"}
        for prefix, stage in stages.items():
            histories = [line.history for line in self._lines(stage)]
            for name, found in (("histories", map(history_digest, histories)), ("scenes", map(scene_of, histories))):
                seen[f"{prefix}_{name}"] = sorted({*seen[f"{prefix}_{name}"], *found})
        return seen

    def groups(self, stage: Stage) -> Groups:
        """Return the groups of a split."""
        if stage not in self._groups:
            found: dict[tuple[Any, ...], int] = {}
            examples: list[Example] = []
            histories: list[int] = []
            index: dict[tuple[int, int], float] = {}
            for *pair, weight in self._pairs(stage) if self.objective == "dpo" else self._singles(stage):
                numbers = []
                for example in pair:
                    digest = history_digest(example.history)
                    key = digest, example.proposal, example.kind
                    if key not in found:
                        found[key] = len(examples)
                        examples.append(example)
                        histories.append(digest)
                    numbers.append(found[key])
                index.setdefault((numbers[0], numbers[1]), weight)
            array = np.array(list(index), dtype=np.int64).reshape(-1, 2)
            self._groups[stage] = Groups(examples, histories, array, list(index.values()))
        return self._groups[stage]

    def pairs(self, stage: Stage) -> Integers:
        """Return the rows of all pairs of an accepted and a rejected proposal after the same history, (P, 2)."""
        groups = self.groups(stage)
        if self.objective == "dpo":
            return groups.rows
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for number, (example, history) in enumerate(zip(groups.examples, groups.histories, strict=True)):
            if example.kind != AnswerKind.MISMATCHED:
                sides = rows.setdefault(history, ([], []))
                sides[example.kind == AnswerKind.REJECTED].append(number)
        return np.array([(a, b) for chosen, rejected in rows.values() for a in chosen for b in rejected]).reshape(-1, 2)

    def _pairs(self, stage: Stage) -> Iterator[tuple[Example, Example, float]]:
        """Yield pairs of an accepted and a rejected proposal; a pair may come again."""
        lines = self._lines(stage)
        given = [Preference(line.judged[0], line.judged[1], line.weight) for line in lines if line.accepted is None]
        single = [proposal for line in lines if line.accepted is not None for proposal in line.judged]
        for one in given + preferences_of(self._annotated(stage) + single):
            yield _example(one.chosen), _example(one.rejected), one.weight

    def _singles(self, stage: Stage) -> Iterator[tuple[Example, Example, float]]:
        """Yield judged proposals, each with a mismatched one: that of the row half a split away."""
        judged = self._annotated(stage) + [proposal for line in self._lines(stage) for proposal in line.judged]
        for number, one in enumerate(judged):
            other = judged[(number + len(judged) // 2) % len(judged)]
            mismatched = Example(one.history, other.proposal, AnswerKind.MISMATCHED, None, one.scene)
            yield _example(one), mismatched, one.weight

    def _annotated(self, stage: Stage) -> list[JudgedProposal]:
        return judged_rows(getattr(self.split, stage)) if self.annotated or stage == "test" else []

    def _lines(self, stage: Stage) -> list[PreferenceRecord]:
        """Return the preferences of tables that train or validate. Those with held-out events are left out."""
        if stage == "test" or not self.preferences:
            return []
        if self._records is None:
            lines = []
            for tables in map(open_preferences, self.preferences):
                lines += read_preferences(tables)
                for note in tables.reading_notes(FIELDS, "preferences"):
                    log.info(f"data.preferences: {note}")
            held_out = {event for event in self._held_out_events if len(event) >= MIN_EVENT_LENGTH}
            scenes = self.held_out_scenes
            self._records = [
                line
                for line in lines
                if self.contamination_allowed
                or (scene_of(line.history) not in scenes and held_out.isdisjoint(e.event for e in line.history))
            ]
            self.left_out = len(lines) - len(self._records)
        in_validation = stage == "validation"
        return [
            line
            for line in self._records
            if validates(scene_of(line.history), self.validation_fraction) is in_validation
        ]


def _example(one: JudgedProposal) -> Example:
    kind = AnswerKind.NULL if one.proposal is None else AnswerKind.TEXT
    return Example(one.history, one.proposal, kind if one.accepted else AnswerKind.REJECTED, None, one.scene)
