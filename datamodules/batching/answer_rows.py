"""AgentDataModule: answers to histories, and conversations, as micro-batches for an agent."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from datamodules.batching.bag_of_words import Decision, marked_words
from datamodules.batching.conversation_rows import COLUMNS, REWRITTEN, conversation_rows
from datamodules.batching.prefix_tree import Integers
from datamodules.batching.rows import RowsDataModule, log
from datamodules.batching.token_cache import CachedRows
from datamodules.batching.tokenized_split import Stage, TokenizedSplit
from datamodules.corpus.answers import Answer, write_answer
from datamodules.corpus.conversation_formats import conversion_report, is_conversion_count
from datamodules.corpus.conversations import open_conversations, read_conversations, reading_notes
from datamodules.corpus.records import AnnotatedRow, Category, Event, scene_of
from datamodules.corpus.sources import Corpus
from datamodules.corpus.splits import Split, history_digests, split_by_scene, split_outside_traces
from datamodules.corpus.tables import Tables
from datamodules.errors import UserError
from datamodules.prompting.segments import Data, Segment, plain_text
from datamodules.prompting.templates import AgentTemplate, render_history

TURNS_FOR_VOCABULARY = 20_000  # turns of conversations that a tokenizer is trained on
NULL_ANSWER = write_answer(Answer(proposal=None))
OFFER_ANSWER = write_answer(Answer(proposal="A"))


class AnswerKind(IntEnum):
    """Kind of a row."""

    TEXT = 0  # an accepted proposal, learned
    NULL = 1  # a correct silence, learned
    CONVERSATION = 2  # the answers of a conversation, learned
    PROBE = 3  # measures P(null) after a history, never learned
    REJECTED = 4  # a rejected proposal or silence
    MISMATCHED = 5  # the proposal of another row, which measures how far a policy has moved from its reference
    HISTORY = 6  # null after a history whose answers the agent writes itself


@dataclass(frozen=True)
class Example:
    """An answer to a history. `scene` names the scene of its row."""

    history: tuple[Event, ...]
    proposal: str | None
    kind: AnswerKind
    help_needed: bool | None
    scene: str


def _learned(rows: Sequence[AnnotatedRow]) -> list[Example]:
    """Return accepted proposals and correct silences, each pair of history and answer once."""
    kinds = {Category.CORRECT_DETECTION: AnswerKind.TEXT, Category.NON_RESPONSE: AnswerKind.NULL}
    right = [row for row in rows if row.category in kinds]
    examples = {
        (row.history_digest, row.proposal): Example(
            row.history, row.proposal, kinds[row.category], row.help_needed, row.scene
        )
        for row in right
    }
    return list(examples.values())


def probes(rows: Sequence[AnnotatedRow]) -> list[Example]:
    """Return one probe for each history for which it is known whether help was needed.

    The majority of its rows decides: each row votes by `help_needed`, or by the judgment of a null proposal. Without
    votes, an accepted proposal means that help was needed. A tie gives no probe.
    """
    votes: dict[int, Counter[bool]] = {}
    of_history = {row.history_digest: row for row in rows}
    for row in rows:
        found = votes.setdefault(row.history_digest, Counter())
        if row.help_needed is not None or row.proposal is None:
            found[not row.accepted if row.help_needed is None else row.help_needed] += 1
    for row in rows:
        if row.accepted and not votes[row.history_digest]:
            votes[row.history_digest][True] = 1
    return [
        Example(
            of_history[digest].history, None, AnswerKind.PROBE, found[True] > found[False], of_history[digest].scene
        )
        for digest, found in votes.items()
        if found[True] != found[False]
    ]


class AnswersDataModule(RowsDataModule):
    """Answers after histories. Subclasses say in `rows` which ones.

    Args:
        annotated: Whether to learn from the root's annotated rows. Their histories measure the decision to propose in
            any case.
        allow_contamination: Whether to train on tested scenes as well. The run, its metrics and its model card then say
            so.
        options: See RowsDataModule. With split "published", the root's test traces test, and whole scenes outside them
            train and validate.
    """

    branch_name = "answer"
    template_class = AgentTemplate
    template: AgentTemplate

    def __init__(self, annotated: bool = True, allow_contamination: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.annotated = annotated
        self.contamination_allowed = allow_contamination
        self._scenes: list[str] = []  # all scenes of the root
        self.held_out_scenes: set[str] = set()  # those that do not train
        self._held_out_events: list[str] = []  # their events

    def divide(self, corpus: Corpus) -> Split:
        split = (
            split_outside_traces(corpus, self.validation_fraction, self.seed)
            if self.split_name == "published"
            else split_by_scene(corpus, self.folds, self.fold, self.seed)
        )
        if self.contamination_allowed:
            split = Split(split.train + split.test, split.validation, split.test)
        sessions = [(row.scenes, row.history) for row in corpus.rows]
        traces = (tuple(step.observation for step in steps) for steps in corpus.traces.values() if steps)
        sessions += [({scene_of(trace)}, trace) for trace in traces]
        training = {row.scene for row in split.train}
        self._scenes = sorted(set().union(*(scenes for scenes, _ in sessions)))
        held_out = [(scenes, session) for scenes, session in sessions if not scenes & training]
        self.held_out_scenes = set().union(*(scenes for scenes, _ in held_out))
        self._held_out_events = sorted({event.event for _, session in held_out for event in session})
        return split

    def training_text(self) -> list[str]:
        segments = (
            segment
            for example in self.rows("train")
            for segment in [*render_history(self.template, example.history), *self.branch(example)]
        )
        return list(dict.fromkeys(map(plain_text, segments)))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            kinds = self.encoded["train"].columns["kind"]
            counts = {kind.name.lower(): int((kinds == kind).sum()) for kind in AnswerKind if kind in kinds}
            log.info(f"answers to learn: {', '.join(f'{count} {name}' for name, count in counts.items())}")
            if self.contamination_allowed:
                log.info("contaminated: data.allow_contamination trains on tested scenes")

    def rows(self, stage: Stage) -> list[Example]:
        """Return the answers of a split; for validation and test also the probes."""
        raise NotImplementedError

    def decisions(self, rows: Sequence[AnnotatedRow]) -> list[Decision]:
        """Return for each history whether help is needed."""
        return [(marked_words(probe.history), bool(probe.help_needed)) for probe in probes(rows)]

    def decision_count(self, stage: Stage) -> int:
        return sum(example.kind == AnswerKind.PROBE for example in self.rows(stage))

    def encode(self, stage: Stage) -> TokenizedSplit:
        encoded = self.encode_answers(stage)
        kinds = set(encoded.columns["kind"].tolist())
        if stage != "test" and not kinds - {AnswerKind.PROBE}:
            raise UserError(f"data: there is no answer in the {stage} split", "Give more scenes or conversations.")
        if stage == "test" and AnswerKind.PROBE not in kinds:
            raise UserError(
                "data: no history of the test split says whether help was needed",
                "Use another fold or split, or add rows with help_needed.",
            )
        return encoded

    def encode_answers(self, stage: Stage) -> TokenizedSplit:
        """Tokenize the rows of a split, of which there may be none."""
        examples = self.rows(stage)
        found = self.tokenize(stage, examples)
        columns = found.rows.with_format("numpy")
        input_ids: Any = list(columns["input_ids"][:])
        answers: Any = self._answer_positions(examples, input_ids, columns["last_segment"][:])
        scenes = [example.scene for example in examples]
        needed = [-1 if example.help_needed is None else int(example.help_needed) for example in examples]
        fields = {
            "kind": torch.tensor([int(example.kind) for example in examples], dtype=torch.int64),
            "help_needed": torch.tensor(needed, dtype=torch.int64),
        }
        return TokenizedSplit(input_ids, scenes, found.digest, fields, answers)

    def _answer_positions(self, examples: list[Example], input_ids: list[Integers], starts: Integers) -> list[Integers]:
        """Return the positions of each answer's tokens; of a probe, those after the choice of null or an offer."""
        silence, offer = (
            self.segmenter.encode([(self.template.answer,), (Data(self.lead + text),)], continues=True)[1]
            for text in (NULL_ANSWER, OFFER_ANSWER)
        )
        choice = next(position for position, (a, b) in enumerate(zip(silence, offer, strict=False)) if a != b)
        return [
            np.arange(start + (choice if example.kind == AnswerKind.PROBE else 0), len(ids))
            for example, ids, start in zip(examples, input_ids, starts, strict=True)
        ]

    def generation_prompt(self) -> list[int]:
        """Return the token ids between the history and the answer."""
        return self.segmenter.encode([(self.template.answer,)], continues=True)[0]

    def segments(self, history: Sequence[Event]) -> list[list[int]]:
        """Return the token ids of the instructions, with the tokenizer's prefix, and of each event."""
        first, *events = self.segmenter.encode(render_history(self.template, history))
        return [[*self.segmenter.prefix, *first], *events]

    @property
    def prompt_length(self) -> int:
        """Maximum number of tokens before an answer: those that training keeps of a history, and the prompt."""
        return self.max_length - self.branch_length + len(self.generation_prompt())

    def branch(self, row: Example) -> list[Segment]:
        return [(self.template.answer,), (Data(self.lead + write_answer(Answer(proposal=row.proposal))),)]

    @property
    def lead(self) -> str:
        """White space that an answer begins with."""
        return self.chat.lead if self.chat else ""

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        token = (self.chat and self.chat.end_token) or self.tokenizer.eos_token
        return int(self.tokenizer.convert_tokens_to_ids(token))

    @property
    def end(self) -> list[int]:
        return [self.end_id]


class AgentDataModule(AnswersDataModule):
    """Answers to learn: accepted proposals of annotated rows, null for correct silences, and conversations.

    Args:
        conversations: Tables of conversations to learn from: JSON, CSV or Parquet files of
            {"conversations": [{"role": ..., "content": ...}, ...]}, folders of them, or names of datasets of the
            Hugging Face hub (org/name, which are downloaded).
        options: See AnswersDataModule.

    Examples:
        >>> data = AgentDataModule(root="embedded", folds=5, fold=0)
        >>> data.setup("fit")
        >>> data.row_counts
        {'train': 518, 'validation': 301, 'test': 282}
    """

    may_change = (*RowsDataModule.may_change, "conversations")

    def __init__(self, conversations: list[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.conversations = list(conversations or [])
        self.conversation_counts: Counter[str] = Counter()  # see `conversation_rows`
        if not self.annotated and not self.conversations:
            raise UserError("data.annotated: false leaves no training data", "Give data.conversations.")

    @cached_property
    def conversation_tables(self) -> list[Tables]:
        """The sources of conversations, opened once."""
        return [*map(open_conversations, self.conversations)]

    @property
    def seen(self) -> dict[str, list[Any]]:
        """With allow_contamination, conversations may contain events of any scene, so all scenes count as seen."""
        seen = super().seen
        if self._saved is None and self.contamination_allowed and self.conversations:
            rows = [*self.split.train, *self.split.validation, *self.split.test]
            seen |= {"training_histories": history_digests(rows), "training_scenes": self._scenes}
        return seen

    def training_text(self) -> list[str]:
        conversations = chain.from_iterable(map(read_conversations, self.conversation_tables))
        turns = (turn.content for conversation in conversations for turn in conversation.conversations)
        return list(dict.fromkeys(chain(super().training_text(), islice(turns, TURNS_FOR_VOCABULARY))))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            for sentence in self.conversation_notes:
                log.info(sentence)

    @property
    def conversation_notes(self) -> list[str]:
        """What was read, converted, left out and rewritten, in sentences."""
        counts = self.conversation_counts
        read = [*chain.from_iterable(map(reading_notes, self.conversation_tables)), *conversion_report(counts)]
        notes = [f"data.conversations: {sentence}" for sentence in read]
        reasons = [name for name in counts if name != REWRITTEN and not is_conversion_count(name)]
        if left_out := [f"{counts[reason]} {reason}" for reason in reasons]:
            notes.append(f"conversations left out: {', '.join(left_out)}")
        if rewritten := counts[REWRITTEN]:
            notes.append(
                f"conversations whose texts the chat format changes: {rewritten}; the changed texts are learned"
            )
        return notes

    def rows(self, stage: Stage) -> list[Example]:
        """Return the answers to learn, and for validation and test also the probes; without conversations."""
        rows: list[AnnotatedRow] = getattr(self.split, stage)
        return (_learned(rows) if self.annotated else []) + (probes(rows) if stage != "train" else [])

    def encode_answers(self, stage: Stage) -> TokenizedSplit:
        encoded = super().encode_answers(stage)
        if not self.conversations or stage == "test":
            return encoded
        conversations = self._conversation_rows(stage)
        rows = conversations.rows.with_format("numpy")
        digest, count = encoded.token_digest + conversations.digest, len(rows)
        if not count:
            return replace(encoded, token_digest=digest)
        before: list[Any] = [[encoded.input_ids], [encoded.answers]] if encoded.scenes else [[], []]
        input_ids: Any = ConcatDataset([*before[0], rows["input_ids"]])
        answers: Any = ConcatDataset([*before[1], rows["answer"]])
        added = {"kind": int(AnswerKind.CONVERSATION), "help_needed": -1}
        columns = {name: torch.cat([encoded.columns[name], torch.full((count,), n)]) for name, n in added.items()}
        return TokenizedSplit(input_ids, [*encoded.scenes, *rows["scene"][:].tolist()], digest, columns, answers)

    def _conversation_rows(self, stage: Stage) -> CachedRows:
        """Return the tokenized conversations of a split, on disk."""
        held_out = None if self.contamination_allowed else self._held_out_events
        digests = [digest for tables in self.conversation_tables for digest in tables.digests]
        key = [*digests, self.validation_fraction, stage, held_out]
        found = self.token_cache.rows(
            key,
            lambda counts: conversation_rows(
                self.conversation_tables,
                self.tokenizer,
                max_length=self.max_length,
                validation=stage == "validation",
                validation_fraction=self.validation_fraction,
                held_out_events=held_out,
                counts=counts,
            ),
            COLUMNS,
            f"{stage} conversations",
        )
        self.conversation_counts.update(found.counts)
        return found
