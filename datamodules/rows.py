"""RowsDataModule: what the data modules of both models share, from a root's rows to loaders of steps."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datamodules.batches import (
    EncodedRows,
    EvaluationSampler,
    Layout,
    MicroBatch,
    RowsLayout,
    StepSampler,
    TreeLayout,
)
from datamodules.errors import UserError
from datamodules.prompts import SegmentTokenizer, Template
from datamodules.records import AnnotatedRow
from datamodules.sources import Corpus, load_corpus
from datamodules.splits import Contamination, Split, SplitName, contamination, history_digests
from datamodules.tokenizer import (
    SCRATCH,
    load_tokenizer,
    tokenizer_from_state,
    tokenizer_state,
    train_tokenizer,
)
from datamodules.tree import Integers

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader
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
    columns: dict[str, Tensor] = field(default_factory=dict)  # what a batch has of each row besides, (N, ...)
    answers: Sequence[Integers] | None = None  # of each row, which of its tokens are learned
    odds: Sequence[float] | None = None  # see StepSampler


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
        max_length: Tokens a row, at most; the oldest events are dropped first.
        batch_size: Rows of one optimizer step, over all devices together. How often gradients are accumulated
            follows from it and from what a device computes at once.
        layout: "tree" computes what rows share once; "rows" pads row by row; the result is the same to rounding.
            "auto" is tree where the backbone allows it, which is tested at the start, and says so where not.
        token_budget: For layout tree: tokens that one device computes at once, at most; not below max_length.
        micro_batch_size: For layout rows: rows that one device computes at once.
        scenes_per_step: From how many scenes a step takes its rows: fewer share more, more are better mixed. All
            alike if null.
        num_workers: Processes that prepare batches.
        cache: Whether to keep tokenized rows in the cache of Hugging Face `datasets`.
        seed: Which embedded data and which division into splits; the order of rows follows seed_everything.
    """

    template_class: type[Template]
    settled: tuple[str, ...] = ("max_length", "batch_size", "scenes_per_step", "num_workers")  # while a run lasts

    def __init__(
        self,
        root: str = "embedded",
        split: SplitName = "by_scene",
        folds: int = 5,
        fold: int = 0,
        validation_fraction: float = 0.1,
        prompt: str | None = None,
        tokenizer: str = SCRATCH,
        trust_remote_code: bool = False,
        vocabulary_size: int = 4096,
        max_length: int = 1024,
        batch_size: int = 32,
        layout: LayoutName = "auto",
        token_budget: int = 2048,
        micro_batch_size: int = 8,
        scenes_per_step: int | None = 4,
        num_workers: int = 0,
        cache: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
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
        self.truncated: dict[Stage, int] = {}
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._trained_on: dict[str, list[Any]] | None = None  # a checkpoint's, where this data only evaluates it
        self._training_digest: str | None = None  # the same
        self._split: Split | None = None
        self._encoded: dict[Stage, Encoded] = {}
        self._layouts: dict[Stage, Layout] = {}
        self._pair_cost = 0.0
        self._refuse_impossible_sizes()

    contamination_allowed = False  # whether the user asked for training on what is tested

    # What the kinds of rows differ in

    def rows(self, stage: Stage) -> Sequence[Any]:
        """The rows of a split, before they are tokenized."""
        return getattr(self.split, stage)

    def divide(self, corpus: Corpus) -> Split:
        """Which of a root's rows train, validate and test."""
        raise NotImplementedError

    def training_text(self) -> list[str]:
        """What a tokenizer is trained on."""
        raise NotImplementedError

    def encode(self, stage: Stage) -> Encoded:
        """The rows of a split as token ids."""
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
    def trained_on(self) -> dict[str, list[Any]]:
        """Sorted digests of the histories, and the scenes, that the model was trained on."""
        if self._trained_on is not None:
            return self._trained_on
        return {
            "training_histories": history_digests(self.split.train),
            "training_scenes": sorted({row.scene for row in self.split.train}),
        }

    @property
    def row_counts(self) -> dict[Stage, int]:
        """How many rows each split has."""
        return {name: len(self.rows(name)) for name in ("train", "validation", "test")}

    @property
    def contamination(self) -> Contamination:
        """How many of the test rows have a history that was trained on."""
        return contamination(self.trained_on["training_histories"], self.split.test)

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

    @property
    def steps_per_epoch(self) -> int:
        """How many optimizer steps see every training row once."""
        return -(-len(self._encoded["train"].input_ids) // self.batch_size)

    def train_dataloader(self) -> "StatefulDataLoader":
        from torchdata.stateful_dataloader import StatefulDataLoader

        sampler = self._train_sampler(*self._place)
        if self.trainer is not None:  # a resumed run's workers ask for rows before Lightning sets the epoch
            sampler.set_epoch(self.trainer.current_epoch)
        return StatefulDataLoader(self._rows("train"), **self._loader_options(sampler))

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
            **self.trained_on,
            "training_rows": self._training_digest or self.training_digest(),
        }

    def training_digest(self) -> str:
        """A digest of all that is trained on."""
        return rows_digest(self.split.train)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run goes on with the data that it began with.

        Raises:
            UserError: The training rows, what orders them, the prompt or the tokenizer are not those of the
                checkpoint.
        """
        current = self.state_dict()
        # The loader's position is kept for each worker.
        for name in self.settled:
            before, now = state_dict["hyperparameters"][name], current["hyperparameters"][name]
            if before != now:
                raise UserError(
                    f"data.{name}: {now}, but the checkpoint's run has {before}",
                    f"Resume with --data.{name} {before}, or start a new run.",
                )
        for key, option in (("training_rows", "data.root or data.split"), ("prompt", "data.prompt")):
            if state_dict[key] != current[key]:
                raise UserError(
                    f"the {key.replace('_', ' ')} differ from those of the checkpoint",
                    f"Resume with the same {option}, or start a new run.",
                )
        if state_dict["tokenizer"]["json"] != current["tokenizer"]["json"]:
            raise UserError(
                "the tokenizer differs from the one in the checkpoint",
                "Resume with the same model.backbone and data.vocabulary_size, or start a new run.",
            )

    @classmethod
    def from_state(cls, state: dict[str, Any], **overrides: Any) -> Self:
        """The data module of a checkpoint, with some options replaced, for evaluation only."""
        given = {name: value for name, value in overrides.items() if value is not None}
        data = cls(**{**state["hyperparameters"], "prompt": None, **given})
        if "prompt" not in given:
            data.template = cls.template_class.parse(state["prompt"], "the checkpoint")
        data._tokenizer = tokenizer_from_state(state["tokenizer"])
        data._trained_on = {name: list(state.get(name, [])) for name in ("training_histories", "training_scenes")}
        data._training_digest = state["training_rows"]
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
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
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
            self._layouts[stage] = (
                TreeLayout(ids, self.token_budget, self._pair_cost, answers)
                if self.layout == "tree"
                else RowsLayout(ids, self.tokenizer.pad_token_id, self.micro_batch_size, answers)
            )
        return self._layouts[stage]

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
        for name, least in (("batch_size", 1), ("micro_batch_size", 1), ("num_workers", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"data.{name}: expected {least} or more, got {value}", "Give a greater one.")
        if self.token_budget < self.max_length:
            raise UserError(
                f"data.token_budget: {self.token_budget} is less than one row may have",
                f"Make it at least data.max_length, {self.max_length}.",
            )

    def note_truncated(self, stage: Stage, dropped_events: Sequence[int]) -> None:
        """Say how many rows lost events to `max_length`."""
        self.truncated[stage] = sum(dropped > 0 for dropped in dropped_events)
        if self.truncated[stage]:
            log.info(
                f"{self.truncated[stage]} of {len(dropped_events)} {stage} rows lost their oldest events to "
                f"data.max_length {self.max_length}"
            )


def cached_map(rows: int, encode: Any, what: Any, cache: bool, label: str) -> Any:
    """Tokenize rows by their number into a `datasets.Dataset`, which a digest of `what` finds again in the cache.

    Args:
        rows: How many there are.
        encode: Takes a list of numbers, gives a list for each column.
        what: Everything that the result follows from, as JSON can write it.
        cache: Whether to keep the result on disk.
        label: What the progress bar says.
    """
    import datasets

    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    cache_file = Path(datasets.config.HF_DATASETS_CACHE, "proactive", f"{fingerprint}.arrow")
    if cache:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
    return datasets.Dataset.from_dict({"index": range(rows)}).map(
        encode,
        input_columns="index",
        batched=True,
        remove_columns="index",
        cache_file_name=str(cache_file) if cache else None,
        new_fingerprint=fingerprint,
        keep_in_memory=not cache,
        desc=label,
    )


def rows_digest(rows: Sequence[AnnotatedRow]) -> str:
    """A digest of some rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.history_digest, row.proposal, row.accepted]).encode())
    return digest.hexdigest()
