"""AgentDataModule: answers after histories, and conversations, as micro-batches for an agent."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from datamodules.batching.bag_of_words import marked_words
from datamodules.batching.prefix_tree import Integers
from datamodules.batching.rows import Encoded, RowsDataModule, Stage, log
from datamodules.batching.token_cache import CachedRows, cached_rows
from datamodules.corpus.answers import Answer, write_answer
from datamodules.corpus.conversations import mentions, read_conversations, telltale_pattern
from datamodules.corpus.records import AnnotatedRow, Category, Event, scene_of
from datamodules.corpus.sources import Corpus
from datamodules.corpus.splits import Split, history_digests, split_by_scene, split_outside_traces
from datamodules.errors import UserError
from datamodules.files.reading import open_file
from datamodules.prompting.conversation_tokenizer import ConversationTokenizer
from datamodules.prompting.segments import Data, Segment, plain_text
from datamodules.prompting.templates import AgentTemplate, render_history
from datamodules.prompting.tokenizers import tokenizer_state

TURNS_FOR_VOCABULARY = 20_000  # of conversations, to train a tokenizer on
REWRITTEN = "rewritten"  # among the counts of conversations, those that are not left out
SILENCE = write_answer(Answer(proposal=None))
AN_OFFER = write_answer(Answer(proposal="A"))


class AnswerKind(IntEnum):
    """What a row is learned or asked for."""

    TEXT = 0  # an accepted proposal
    NULL = 1  # silence, where that was right
    CONVERSATION = 2  # a conversation's answers
    PROBE = 3  # P(null) after a history; never learned


@dataclass(frozen=True)
class Example:
    """An answer after a history."""

    history: tuple[Event, ...]
    proposal: str | None
    kind: AnswerKind
    help_needed: bool | None


def _learned(rows: Sequence[AnnotatedRow]) -> list[Example]:
    """The accepted proposals, and silence where that was right; each once."""
    kinds = {Category.CORRECT_DETECTION: AnswerKind.TEXT, Category.NON_RESPONSE: AnswerKind.NULL}
    right = [row for row in rows if row.category in kinds]
    examples = {
        (row.history_digest, row.proposal): Example(row.history, row.proposal, kinds[row.category], row.help_needed)
        for row in right
    }
    return list(examples.values())


def _probes(rows: Sequence[AnnotatedRow]) -> list[Example]:
    """One for each history of which is known whether help was needed.

    Most of its rows say it, outright or by a judgment of null; where none does, an accepted proposal says yes. Where as
    many rows say yes as no, it is not known.
    """
    votes: dict[int, Counter[bool]] = {}
    histories: dict[int, tuple[Event, ...]] = {}
    for row in rows:
        histories[row.history_digest] = row.history
        found = votes.setdefault(row.history_digest, Counter())
        if row.help_needed is not None or row.proposal is None:
            found[not row.accepted if row.help_needed is None else row.help_needed] += 1
    for row in rows:
        if row.accepted and not votes[row.history_digest]:
            votes[row.history_digest][True] = 1
    return [
        Example(histories[digest], None, AnswerKind.PROBE, found[True] > found[False])
        for digest, found in votes.items()
        if found[True] != found[False]
    ]


class AgentDataModule(RowsDataModule):
    """The accepted proposals of annotated rows, null where null was right, and conversations.

    Args:
        annotated: Whether the root's annotated rows are learned. Their histories measure the decision to propose in any
            case.
        conversations: Conversation files to learn from as well: JSON lists or JSON lines of
            {"conversations": [{"role": ..., "content": ...}, ...]}.
        allow_contamination: Whether to train on scenes that are tested on as well. The run, its figures and its model
            card then say so.
        options: See RowsDataModule. With split "published" the root's test traces test, and whole scenes outside them
            train and validate.
    """

    may_change = (*RowsDataModule.may_change, "conversations")
    branch_name = "answer"
    template_class = AgentTemplate
    template: AgentTemplate

    def __init__(
        self,
        annotated: bool = True,
        conversations: list[str] | None = None,
        allow_contamination: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.annotated = annotated
        self.conversations = [Path(path) for path in conversations or []]
        self.contamination_allowed = allow_contamination
        self.left_out: Counter[str] = Counter()  # conversations, by why
        self._scenes: list[str] = []  # all that the root knows of, and the events of those that are not trained on
        self._held_out_events: list[str] = []
        self._digests: dict[Path, str] = {}
        if not annotated and not self.conversations:
            raise UserError("data.annotated: false leaves nothing to learn from", "Give data.conversations.")

    def divide(self, corpus: Corpus) -> Split:
        split = (
            split_outside_traces(corpus, self.validation_fraction, self.seed)
            if self.split_name == "published"
            else split_by_scene(corpus, self.folds, self.fold, self.seed)
        )
        if self.contamination_allowed:
            split = Split(split.train + split.test, split.validation, split.test)
        sessions = [row.history for row in corpus.rows]
        sessions += [tuple(step.observation for step in steps) for steps in corpus.traces.values() if steps]
        training = {row.scene for row in split.train}
        self._scenes = sorted({scene_of(session) for session in sessions})
        held_out = (session for session in sessions if scene_of(session) not in training)
        self._held_out_events = sorted({event.event for session in held_out for event in session})
        return split

    @property
    def trained_on(self) -> dict[str, list[Any]]:
        """As of rows; conversations that nothing keeps away from a scene may tell any of them."""
        if self._trained_on is None and self.contamination_allowed and self.conversations:
            rows = [*self.split.train, *self.split.validation, *self.split.test]
            return {"training_histories": history_digests(rows), "training_scenes": self._scenes}
        return super().trained_on

    def training_text(self) -> list[str]:
        segments = (
            segment
            for example in self.rows("train")
            for segment in [*render_history(self.template, example.history), *self.branch(example)]
        )
        conversations = chain.from_iterable(map(read_conversations, self.conversations))
        told = (turn.content for conversation in conversations for turn in conversation.conversations)
        return list(dict.fromkeys(chain(map(plain_text, segments), islice(told, TURNS_FOR_VOCABULARY))))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            kinds = self._encoded["train"].columns["kind"]
            counts = {kind.name.lower(): int((kinds == kind).sum()) for kind in AnswerKind if kind in kinds}
            log.info(f"answers to learn: {', '.join(f'{count} {name}' for name, count in counts.items())}")
            if left_out := [f"{n} {why}" for why, n in self.left_out.items() if why != REWRITTEN]:
                log.info(f"conversations left out: {', '.join(left_out)}")
            if rewritten := self.left_out[REWRITTEN]:
                log.info(f"conversations learned as the chat format writes them, with texts changed: {rewritten}")
            if self.contamination_allowed:
                log.info("contaminated: data.allow_contamination trains on scenes that are tested on")

    def rows(self, stage: Stage) -> list[Example]:
        """The answers, and but for training a probe of each history; conversations come besides."""
        rows: list[AnnotatedRow] = getattr(self.split, stage)
        return (_learned(rows) if self.annotated else []) + (_probes(rows) if stage != "train" else [])

    def decisions(self, rows: Sequence[AnnotatedRow]) -> list[tuple[str, bool]]:
        """Whether help is needed after a history."""
        return [(marked_words(probe.history), bool(probe.help_needed)) for probe in _probes(rows)]

    def decision_count(self, stage: Stage) -> int:
        return sum(example.kind == AnswerKind.PROBE for example in self.rows(stage))

    def encode(self, stage: Stage) -> Encoded:
        examples = self.rows(stage)
        found = self.tokenize(stage, examples)
        columns = found.rows.with_format("numpy")
        input_ids: Any = list(columns["input_ids"][:])
        answers: Any = self._answers(examples, input_ids, columns["last_segment"][:])
        scenes = [scene_of(example.history) for example in examples]
        kinds = [int(example.kind) for example in examples]
        needed = [-1 if example.help_needed is None else int(example.help_needed) for example in examples]
        digest = found.digest
        if self.conversations and stage != "test":
            told = self._tell(stage)
            digest += told.digest
            if len(rows := told.rows.with_format("numpy")):
                input_ids = ConcatDataset([input_ids, rows["input_ids"]]) if input_ids else rows["input_ids"]
                answers = ConcatDataset([answers, rows["answer"]]) if answers else rows["answer"]
                scenes += rows["scene"][:].tolist()
                kinds += [int(AnswerKind.CONVERSATION)] * len(rows)
                needed += [-1] * len(rows)
        if stage != "test" and not set(kinds) - {AnswerKind.PROBE}:
            raise UserError(f"data: there is no answer in the {stage} split", "Give more scenes or conversations.")
        if stage == "test" and AnswerKind.PROBE not in kinds:
            raise UserError(
                "data: of no history in the test split is it known whether help was needed",
                "Use another fold or split, or add rows with help_needed.",
            )
        return Encoded(
            input_ids,
            scenes,
            digest,
            {
                "kind": torch.tensor(kinds, dtype=torch.int64),
                "help_needed": torch.tensor(needed, dtype=torch.int64),
            },
            answers,
        )

    def _answers(self, examples: list[Example], input_ids: list[Integers], begins: Integers) -> list[Integers]:
        """The places of each example's answer; of a probe's, of what follows the choice between null and an offer."""
        silence, offer = self.segmenter.encode([(Data(SILENCE),), (Data(AN_OFFER),)])
        decided_after = next(place for place, (a, b) in enumerate(zip(silence, offer, strict=False)) if a != b)
        return [
            np.arange(begin + (decided_after if example.kind == AnswerKind.PROBE else 0), len(ids))
            for example, ids, begin in zip(examples, input_ids, begins, strict=True)
        ]

    def opening(self) -> list[int]:
        """The token ids that an answer follows."""
        return self.segmenter.encode([(self.template.answer,)])[0]

    def segments(self, history: Sequence[Event]) -> list[list[int]]:
        """The token ids of the instructions, with what begins every text, and of each event."""
        first, *events = self.segmenter.encode(render_history(self.template, history))
        return [[*self.segmenter.prefix, *first], *events]

    @property
    def prompt_length(self) -> int:
        """Tokens before an answer, at most: as many as training keeps of a history, and the opening."""
        return self.max_length - self.branch_length + len(self.opening())

    def branch(self, row: Example) -> list[Segment]:
        return [(self.template.answer,), (Data(write_answer(Answer(proposal=row.proposal))),)]

    @property
    def end(self) -> list[int]:
        return [self.tokenizer.eos_token_id]

    def _tell(self, stage: Stage) -> CachedRows:
        """The tokenized conversations of a split, on disk; whole ones that begin alike stay together."""
        what = [
            *map(self._digest, self.conversations),
            tokenizer_state(self.tokenizer),
            self.max_length,
            self.validation_fraction,
            stage,
            None if self.contamination_allowed else self._held_out_events,
        ]
        told = cached_rows(
            what,
            lambda counts: self._told(stage, counts),
            {"input_ids": ["int32"], "answer": ["int32"], "scene": "string"},
            self.cache_folder,
            f"tokenizing {stage} conversations",
        )
        self.left_out.update(told.counts)
        return told

    def _told(self, stage: Stage, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        """The conversations of a split, one after the other; those that are not learned are counted."""
        encoder = ConversationTokenizer(self.tokenizer, self.max_length)
        guard = None if self.contamination_allowed else telltale_pattern(self._held_out_events)
        for path in self.conversations:
            for conversation in read_conversations(path):
                held_out = int(conversation.scene, 16) < self.validation_fraction * 2**64
                if held_out is not (stage == "validation"):
                    continue
                if mentions(conversation, guard):
                    left_out["for events of test scenes"] += 1
                elif (encoded := encoder.encode(conversation)) is None:
                    left_out["for their length"] += 1
                elif encoded[1]:
                    yield {"input_ids": encoded[0], "answer": encoded[1], "scene": conversation.scene}
                else:
                    left_out["for the chat format leaves nothing of their last answer"] += 1
        left_out[REWRITTEN] += encoder.rewritten

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            with open_file(path, None, "data.conversations") as file:
                self._digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[path]
