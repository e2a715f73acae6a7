"""RowsDataModule: what the data modules of both models share, from a root's rows to loaders of steps."""

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datamodules.batching.bag_of_words import bag_of_words
from datamodules.batching.layouts import Layout, RowsLayout, TreeLayout
from datamodules.batching.prefix_tree import Integers
from datamodules.batching.steps import (
    EncodedRows,
    EvaluationSampler,
    MicroBatch,
    StepLoader,
    StepSampler,
    refuse_unequal_parts,
)
from datamodules.batching.token_cache import CachedRows, cached_rows
from datamodules.corpus.records import AnnotatedRow, Event
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.splits import Contamination, Split, SplitName, contamination, history_digests
from datamodules.errors import UserError, refuse_changes
from datamodules.prompting.segments import Segment, SegmentTokenizer, truncate
from datamodules.prompting.templates import Template, history_key, render_history
from datamodules.prompting.tokenizers import (
    SCRATCH,
    load_tokenizer,
    tokenizer_from_state,
    tokenizer_state,
    train_tokenizer,
)
from datamodules.ranges import Count, CountOrNone, Folds, Seed, ShareBelowOne, Vocabulary, Workers, refuse_unsound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Stage = Literal["train", "validation", "test"]
LayoutName = Literal["auto", "tree", "rows"]
STAGES: dict[str, tuple[Stage, ...]] = {"fit": ("train", "validation", "test"), "validate": ("validation",)}
log = logging.getLogger("proactive")  # the commands show it, on rank 0


@dataclass(frozen=True)
class Encoded:
    """The N tokenized rows of a split."""

    input_ids: Sequence[Sequence[int]]
    scenes: Sequence[str]  # of each row
    digest: str  # of the token ids, and of which of them are learned
    columns: dict[str, Tensor] = field(default_factory=dict)  # what a batch has of each row besides, (N, ...)
    answers: Sequence[Integers] | None = None  # of each row, which of its tokens are learned
    odds: Sequence[float] | None = None  # see StepSampler

    @cached_property
    def lengths(self) -> Integers:
        """Tokens of each row, (N,)."""
        return np.fromiter(map(len, self.input_ids), dtype=np.int64)


@dataclass(frozen=True)
class RowIds:
    """The token ids of one row, where its last segment begins, and whether it lost its oldest events to its length."""

    input_ids: list[int]
    last_segment: int
    truncated: bool


@dataclass(frozen=True)
class WordScores:
    """A bag of words, fitted on the rows that a model was trained on.

    Attributes:
        majority: The class that most of those rows have.
        validation: (N,) float64, P(positive class) of the validation rows.
        validation_target: (N,) int64, 1 for the positive class.
        test: (N,) float64, P(positive class) of what is decided on the test rows, in their order.
    """

    majority: bool
    validation: Tensor
    validation_target: Tensor
    test: Tensor


class RowsDataModule(LightningDataModule):
    """Rows of some kind, tokenized and batched.

    Args:
        root: Where the data is: "embedded" (simulated sessions), "published" (downloads the files of
            ProactiveBench), or a directory that holds reward_data/ and test_data/.
        split: "by_scene" holds whole scenes out; "published" tests on the root's own test set, whose histories may
            also occur in its training rows.
        folds: For by_scene: into how many parts the scenes are divided; one tests, the next one validates.
        fold: For by_scene: which part tests.
        validation_fraction: For published: the share of the training rows that validates.
        prompt: A prompt file; the project's own if not given.
        tokenizer: Hub id or path of a tokenizer, or "scratch" to train one. Follows from model.backbone.
        trust_remote_code: Whether a tokenizer may run code of its own. Follows from model.trust_remote_code.
        vocabulary_size: Tokens of a tokenizer made from scratch, at most.
        max_length: Tokens a row, at most; the oldest events are dropped first. Every row keeps room for the longest
            proposal or answer, so that how much of a history is read follows from the history alone.
        batch_size: Rows of one optimizer step, over all devices together. How often gradients are accumulated
            follows from it and from what a device computes at once.
        layout: "tree" computes what rows share once; "rows" pads row by row; the result is the same to rounding.
            "auto" is tree where the backbone allows it, which is tested at the start, and says so where not.
        token_budget: For layout tree: tokens that one device computes at once, at most; not below max_length.
        micro_batch_size: For layout rows: rows that one device computes at once.
        scenes_per_step: From how many scenes a step takes its rows: fewer share more, more are better mixed. All
            alike if null.
        num_workers: Processes that prepare batches.
        cache: Whether to keep tokenized rows in the cache of Hugging Face `datasets`. They are found again by all that
            they follow from: the text as it is rendered, the tokenizer, its chat template, and this code.
        seed: Which embedded data and which division into splits; the order of rows follows seed_everything.
    """

    # What may change on a resume: how a step is computed, and where its data lies, whose content is compared.
    may_change: tuple[str, ...] = (
        "root",
        "prompt",
        "tokenizer",
        "layout",
        "token_budget",
        "micro_batch_size",
        "cache",
    )
    template_class: type[Template]
    branch_name: str  # what follows a row's history, in words

    def __init__(
        self,
        root: str = "embedded",
        split: SplitName = "by_scene",
        folds: Folds = 5,
        fold: CountOrNone = 0,
        validation_fraction: ShareBelowOne = 0.1,
        prompt: str | None = None,
        tokenizer: str = SCRATCH,
        trust_remote_code: bool = False,
        vocabulary_size: Vocabulary = 4096,
        max_length: Count = 1024,
        batch_size: Count = 32,
        layout: LayoutName = "auto",
        token_budget: Count = 2048,
        micro_batch_size: Count = 8,
        scenes_per_step: Count | None = 4,
        num_workers: Workers = 0,
        cache: bool = True,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        refuse_unsound(type(self), self.hparams, "data")
        self.root = root
        self.split_name = split
        self.folds = folds
        self.fold = fold
        self.validation_fraction = validation_fraction
        self.template = self.template_class.read(Path(prompt) if prompt else self.template_class.default)
        self.tokenizer_name = tokenizer
        self.trust_remote_code = trust_remote_code
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.batch_size = batch_size
        self.layout = layout
        self.token_budget = token_budget
        self.micro_batch_size = micro_batch_size
        self.scenes_per_step = scenes_per_step
        self.num_workers = num_workers
        self.cache = cache
        self.seed = seed
        self.order_seed = 0  # the order of training rows follows from it; `fit` sets it to seed_everything
        self.truncated: dict[Stage, int] = {}
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._trained_on: dict[str, list[Any]] | None = None  # a checkpoint's, where this data only evaluates it
        self._validated_on: dict[str, list[Any]] | None = None  # the same; empty where it does not say
        self._trained_with: dict[str, Any] | None = None  # the same: the options of its run
        self._training_digest: str | None = None  # the same
        self._branch_length: int | None = None  # the same
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # in place of the cache
        self._split: Split | None = None
        self._encoded: dict[Stage, Encoded] = {}
        self._layouts: dict[Stage, Layout] = {}
        self._pair_cost = 0.0
        self._refuse_impossible_sizes()

    tests_published_rows = False  # whether the test rows are those that published metrics are of
    contamination_allowed = False  # whether the user asked for training on what is tested

    # What the kinds of rows differ in

    def rows(self, stage: Stage) -> Sequence[Any]:
        """The rows of a split, before they are tokenized."""
        return getattr(self.split, stage)

    def decisions(self, rows: Sequence[AnnotatedRow]) -> list[tuple[str, bool]]:
        """What is decided about annotated rows: the words to decide by, and what is right."""
        raise NotImplementedError

    def decision_count(self, stage: Stage) -> int:
        """How many rows of a split a decision is measured on."""
        return len(self.rows(stage))

    def scene_numbers(self, stage: Stage) -> Tensor:
        """(N,) int64, the scene of each tokenized row of a split, counted in the order of their first rows."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(scene, len(numbers)) for scene in self._encoded[stage].scenes])

    def divide(self, corpus: Corpus) -> Split:
        """Which of a root's rows train, validate and test."""
        raise NotImplementedError

    def training_text(self) -> list[str]:
        """What a tokenizer is trained on."""
        raise NotImplementedError

    def encode(self, stage: Stage) -> Encoded:
        """The rows of a split as token ids."""
        raise NotImplementedError

    def branch(self, row: Any) -> list[Segment]:
        """The segments that follow a row's history."""
        raise NotImplementedError

    @property
    def end(self) -> list[int]:
        """The token ids that end every row."""
        raise NotImplementedError

    # What is known once `setup` has run

    @property
    def split(self) -> Split:
        """The annotated rows of the three splits."""
        if self._split is None:
            raise RuntimeError("setup() has not run")
        return self._split

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer."""
        if self._tokenizer is None:
            raise RuntimeError("setup() has not run")
        return self._tokenizer

    @cached_property
    def segmenter(self) -> SegmentTokenizer:
        """What tokenizes segments; made once, for a large vocabulary takes a while."""
        return SegmentTokenizer(self.tokenizer)

    @property
    def branch_length(self) -> int:
        """How many of `max_length` tokens are kept for what follows a history: the most that any row needs.

        The same for every row, for what is left of a history must not tell how long its answer is. A checkpoint
        carries it. Only where rows come later, as proposals to be judged do, may one of them need more; that one then
        takes the place of more events.
        """
        if self._branch_length is None:
            branches = (self.branch(row) for stage in STAGES["fit"] for row in self.rows(stage))
            lengths = (sum(map(len, self.segmenter.encode(branch))) for branch in branches)
            self._branch_length = max(lengths, default=0) + len(self.end)
        return self._branch_length

    @property
    def trained_on(self) -> dict[str, list[Any]]:
        """Sorted digests of the histories, and the scenes, that the model was trained on."""
        if self._trained_on is not None:
            return self._trained_on
        return {
            "training_histories": history_digests(self.split.train),
            "training_scenes": sorted({row.scene for row in self.split.train}),
        }

    @property
    def validated_on(self) -> dict[str, list[Any]]:
        """The same of what chose the best weights and calibrated them; empty where an old checkpoint does not say."""
        if self._validated_on is not None:
            return self._validated_on
        return {
            "validation_histories": history_digests(self.split.validation),
            "validation_scenes": sorted({row.scene for row in self.split.validation}),
        }

    @cached_property
    def own_split(self) -> Split | None:
        """The rows that the model was trained, validated and tested with; None where they are not at hand any more."""
        if self._trained_with is None or self._trained_on is None:
            return self.split
        own = type(self)(**self._trained_with)
        try:
            split = own.divide(load_corpus(own.root, own.seed))
        except UserError:
            return None
        return split if history_digests(split.train) == self._trained_on["training_histories"] else None

    @cached_property
    def word_scores(self) -> "WordScores | None":
        """What a bag of words makes of this split; None without the rows that the model was trained on."""
        own = self.own_split
        if own is None or not (examples := self.decisions(own.train)):
            return None
        texts, labels = zip(*examples, strict=True)
        score = bag_of_words(texts, labels)
        validation, test = self.decisions(own.validation), self.decisions(self.split.test)
        return WordScores(
            majority=sum(labels) * 2 > len(labels),
            validation=score([text for text, _ in validation]),
            validation_target=torch.tensor([int(label) for _, label in validation], dtype=torch.int64),
            test=score([text for text, _ in test]),
        )

    @property
    def row_counts(self) -> dict[Stage, int]:
        """How many rows each split has."""
        return {name: len(self.rows(name)) for name in ("train", "validation", "test")}

    @property
    def contamination(self) -> Contamination:
        """How many of the test rows have a history that was trained or validated on."""
        validated = self.validated_on.get("validation_histories")
        return contamination(self.trained_on["training_histories"], self.split.test, validated)

    @property
    def description(self) -> str:
        """The split in words, for reports."""
        if self.split_name == "published":
            return f"{self.root}, published split"
        return f"{self.root}, by_scene split, fold {self.fold} of {self.folds}"

    def setup(self, stage: str) -> None:
        """Load, split and tokenize the rows; `stage` is Lightning's: fit, validate or test."""
        if self._split is None:
            self._split = self.divide(load_corpus(self.root, self.seed))
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        names = STAGES.get(stage, ("test",))
        for name in names:
            if name not in self._encoded:
                self._encoded[name] = self.encode(name)
        if stage == "fit":
            counts = ", ".join(f"{len(self._encoded[name].input_ids)} {name}" for name in names)
            log.info(f"data: {self.description}: {counts} rows")
            log.info(f"contamination: {self.contamination}")

    def settle_layout(self, problem: str | None, pair_cost: float = 0.0) -> None:
        """Choose between tree and rows, once the model knows its backbone.

        Args:
            problem: What keeps the backbone from reading trees; None if nothing does.
            pair_cost: What attention to one token more costs the backbone, see `tree.split`.

        Raises:
            UserError: The layout was to be tree, and the backbone cannot.
        """
        if problem is not None and self.layout == "tree":
            raise UserError(f"data.layout: tree does not serve here: {problem}", "Use --data.layout auto or rows.")
        if problem is not None and self.layout == "auto":
            log.info(f"data.layout: rows, for trees do not serve here: {problem}")
        self.layout = "rows" if problem is not None or self.layout == "rows" else "tree"
        self._pair_cost = pair_cost
        self._layouts.clear()

    def settle_padding(self, problem: str | None) -> None:
        """Compute row by row, each alone, if a problem keeps the backbone from reading padded rows as it reads one."""
        if problem is not None:
            log.info(f"data.micro_batch_size: 1, for rows do not serve together: {problem}")
            self.micro_batch_size = 1
            self._layouts.clear()

    @property
    def longest(self) -> int:
        """Tokens of the longest row of the splits that are set up."""
        return max((int(encoded.lengths.max(initial=0)) for encoded in self._encoded.values()), default=0)

    @property
    def largest_tree(self) -> int:
        """Tokens that a tree may have: the budget, or all of a split if they are fewer."""
        return min(
            self.token_budget, max((int(encoded.lengths.sum()) for encoded in self._encoded.values()), default=0)
        )

    @property
    def steps_per_epoch(self) -> int:
        """How many optimizer steps see every training row once."""
        return -(-len(self._encoded["train"].input_ids) // self.batch_size)

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self._rows("train"), **self._loader_options(self._train_sampler(*self._place)))

    def val_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the model can be used, and honestly measured, without this data."""
        return {
            "hyperparameters": {name: value for name, value in self.hparams.items() if not name.startswith("_")},
            "prompt": self.template.model_dump(),
            "tokenizer": tokenizer_state(self.tokenizer),
            "branch_length": self.branch_length,
            **self.trained_on,
            **self.validated_on,
            "training_rows": self.training_digest,
            "order_seed": self.order_seed,
        }

    @property
    def training_digest(self) -> str:
        """A digest of all that is trained on: token ids, what is learned of them, and in which order they stand."""
        if self._training_digest is None:
            if "train" not in self._encoded:
                self._encoded["train"] = self.encode("train")
            encoded = self._encoded["train"]
            digest = hashlib.sha256(json.dumps([encoded.digest, list(encoded.scenes)]).encode())
            for name, column in sorted(encoded.columns.items()):
                digest.update(name.encode() + column.numpy().tobytes())
            self._training_digest = digest.hexdigest()
        return self._training_digest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run goes on with the data that it began with.

        Raises:
            UserError: The training rows, what orders them, the prompt or the tokenizer are not those of the
                checkpoint.
        """
        current = self.state_dict()
        refuse_changes("data", state_dict["hyperparameters"], current["hyperparameters"], self.may_change)
        before, now = ({"seed_everything": state["order_seed"]} for state in (state_dict, current))
        refuse_changes("", before, now, ())
        tokenizer = ("tokenizer", "the tokenizer, or its chat template, differs from the one in", "model.backbone")
        rows = ("training_rows", "the training rows differ from those of", "data.root and data.conversations")
        made_of_rows = self.tokenizer_name == SCRATCH
        for key, what, option in (
            ("prompt", "the prompt differs from the one in", "data.prompt"),
            *((rows, tokenizer) if made_of_rows else (tokenizer, rows)),
        ):
            if state_dict[key] != current[key]:
                raise UserError(f"{what} the checkpoint", f"Resume with the same {option}, or start a new run.")

    @classmethod
    def from_state(cls, state: dict[str, Any], **overrides: Any) -> Self:
        """The data module of a checkpoint, with some options replaced, for evaluation only."""
        given = {name: value for name, value in overrides.items() if value is not None}
        data = cls(**{**state["hyperparameters"], "prompt": None, **given})
        if "prompt" not in given:
            data.template = cls.template_class.parse(state["prompt"], "the checkpoint")
        data._tokenizer = tokenizer_from_state(state["tokenizer"])
        data._trained_on = {name: list(state.get(name, [])) for name in ("training_histories", "training_scenes")}
        kept = ("validation_histories", "validation_scenes")
        data._validated_on = {name: list(state[name]) for name in kept if name in state}
        data._trained_with = {**state["hyperparameters"], "prompt": None}
        data._training_digest = state["training_rows"]
        data._branch_length = state.get("branch_length", 0)  # older checkpoints kept no room
        return data

    def epoch(
        self, layout: Literal["tree", "rows"], ranks: int = 1, pair_cost: float = 0.0
    ) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of all ranks together, step by step: what an epoch would compute in a layout."""
        self.layout, self._pair_cost = layout, pair_cost
        self._layouts.clear()
        rows, laid_out = self._rows("train"), self._layout("train")
        for step in self._train_sampler().steps():
            yield rows[tuple(MicroBatch(tuple(part), 1.0) for part in laid_out.split(step, ranks))]

    def _train_sampler(self, rank: int = 0, world_size: int = 1) -> StepSampler:
        encoded = self._encoded["train"]
        return StepSampler(
            self._layout("train"),
            encoded.scenes,
            self.batch_size,
            self.scenes_per_step,
            seed=self.order_seed,
            rank=rank,
            world_size=world_size,
            odds=encoded.odds,
            sizes=None if encoded.answers is None else [len(places) for places in encoded.answers],
        )

    def _make_tokenizer(self) -> "PreTrainedTokenizerFast":
        if self.tokenizer_name == SCRATCH:
            return train_tokenizer(self.training_text(), self.vocabulary_size)
        return load_tokenizer(self.tokenizer_name, self.trust_remote_code)

    def _layout(self, stage: Stage) -> Layout:
        if stage not in self._layouts:
            ids, answers = self._encoded[stage].input_ids, self._encoded[stage].answers
            self._layouts[stage] = self.layout_of(ids, answers)
        return self._layouts[stage]

    def layout_of(self, input_ids: Sequence[Sequence[int]], answers: Sequence[Integers] | None = None) -> Layout:
        """How rows are laid out, once that is settled."""
        if self.layout == "tree":
            return TreeLayout(input_ids, self.token_budget, self._pair_cost, answers)
        return RowsLayout(input_ids, self.tokenizer.pad_token_id, self.micro_batch_size, answers)

    def _rows(self, stage: Stage) -> EncodedRows:
        return EncodedRows(self._layout(stage), self._encoded[stage].columns)

    def _evaluation_loader(self, stage: Stage) -> DataLoader[list[dict[str, Any]]]:
        sampler = EvaluationSampler(self._layout(stage), len(self._encoded[stage].input_ids), *self._place)
        return DataLoader(self._rows(stage), **self._loader_options(sampler))

    @property
    def _place(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader_options(self, sampler: Sampler[Any]) -> dict[str, Any]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # batch_size None: the sampler says what a step is, the dataset makes it.
        return {"sampler": sampler, "batch_size": None, "num_workers": self.num_workers, "pin_memory": on_cuda}

    def _refuse_impossible_sizes(self) -> None:
        refuse_unequal_parts(self.batch_size, self.scenes_per_step)
        if self.token_budget < self.max_length:
            raise UserError(
                f"data.token_budget: {self.token_budget} is less than one row may have",
                f"Make it at least data.max_length, {self.max_length}.",
            )

    def tokenize(self, stage: Stage, rows: Sequence[Any]) -> CachedRows:
        """The token ids of some rows of a split, and where the last segment of each begins."""
        rendered = hashlib.sha256()
        for row in rows:
            # An event has a token at least, so older ones leave no trace in any row.
            rendered.update(history_key(self.template, row.history[-self.max_length :]))
            rendered.update(repr(self.branch(row)).encode())
        found = cached_rows(
            [rendered.hexdigest(), tokenizer_state(self.tokenizer), self.max_length, self.branch_length],
            lambda counts: self._tokenized(stage, rows, counts),
            {"input_ids": ["int32"], "last_segment": "int32"},
            self.cache_folder,
            f"tokenizing {stage} {self.branch_name}s",
        )
        self.truncated[stage] = found.counts.get("truncated", 0)
        if self.truncated[stage]:
            log.info(
                f"{self.truncated[stage]} of {len(rows)} {stage} rows lost their oldest events to data.max_length "
                f"{self.max_length}, of which {self.branch_length} are kept for the {self.branch_name}"
            )
        return found

    def _tokenized(self, stage: Stage, rows: Sequence[Any], counts: Counter[str]) -> Iterator[Mapping[str, Any]]:
        for index, row in enumerate(rows):
            found = self.row_ids(row.history, self.branch(row), f"row {index} of the {stage} split")
            counts["truncated"] += found.truncated
            yield {"input_ids": found.input_ids, "last_segment": found.last_segment}

    def row_ids(self, history: Sequence[Event], branch: Sequence[Segment], where: str) -> RowIds:
        """The token ids of a history and of what follows it.

        Args:
            history: Its events; the oldest are left out as far as the row would have more than `max_length` tokens.
            branch: The segments that follow.
            where: Which row it is, in words.

        Raises:
            UserError: Instructions and branch alone are too long.
        """
        room = self.max_length - len(self.segmenter.prefix)
        recent, older = self._recent(history, room)
        *before, last = self.segmenter.encode(branch)
        tail = [token for segment in (*before, last, self.end) for token in segment]
        ids, dropped = truncate([*recent, tail], room, self.branch_length)
        ids = [*self.segmenter.prefix, *ids]
        if len(ids) > self.max_length:
            raise UserError(
                f"data.max_length: instructions and {self.branch_name} of {where} take {len(ids)} tokens, more than "
                f"{self.max_length}",
                "Use a greater max_length or a shorter prompt.",
            )
        return RowIds(ids, len(ids) - len(self.end) - len(last), older + dropped > 0)

    def _recent(self, history: Sequence[Event], room: int) -> tuple[list[list[int]], int]:
        """The token ids of the instructions and of the last events, as many as fill `room`; how many are left out."""
        number = 32
        while True:
            segments = self.segmenter.encode(render_history(self.template, history[-number:]))
            if number >= len(history) or sum(map(len, segments[1:])) > room:
                return segments, max(len(history) - number, 0)
            number *= 2

    @property
    def cache_folder(self) -> Path | None:
        """Where tokenized rows are kept; None for the cache of Hugging Face `datasets`."""
        if self.cache:
            return None
        self._folder = self._folder or tempfile.TemporaryDirectory()
        return Path(self._folder.name)
