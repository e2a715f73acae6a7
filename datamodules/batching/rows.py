"""RowsDataModule: the base of both data modules, from the rows of a root to loaders of steps."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from datamodules.batching.bag_of_words import Decision, WordScores, word_scores
from datamodules.batching.layout_name import LayoutName
from datamodules.batching.resume_checks import refuse_other_data
from datamodules.batching.row_tokenizer import ROW_COLUMNS, RowTokenizer
from datamodules.batching.step_data_module import StepDataModule
from datamodules.batching.steps import refuse_small_budget, refuse_unequal_parts
from datamodules.batching.token_cache import CachedRows, TokenCache
from datamodules.batching.tokenized_split import Stage, TokenizedSplit
from datamodules.batching.training_split import split_of_training
from datamodules.corpus.columns import Columns
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.splits import Contamination, Split, SplitName, contamination, seen_rows
from datamodules.prompting.chat_format import Chat, Format, formatted, saved_chat
from datamodules.prompting.segments import Segment, SegmentTokenizer
from datamodules.prompting.templates import Template
from datamodules.prompting.tokenizers import SCRATCH, make_tokenizer, tokenizer_from_state, tokenizer_state
from datamodules.ranges import Count, Folds, FractionBelowOne, NonNegativeInt, Seed, Vocabulary, Workers, check_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STAGES: dict[str, tuple[Stage, ...]] = {"fit": ("train", "validation", "test"), "validate": ("validation",)}
SEEN = ("training_histories", "training_scenes", "validation_histories", "validation_scenes")  # see `seen_rows`
CHECKED_ROWS = 32  # whose token ids in segments are compared with those of the whole text
log = logging.getLogger("proactive")  # commands print it on rank 0


class RowsDataModule(StepDataModule):
    """Rows, tokenized and batched.

    Args:
        root: Source of the data: "embedded" (simulated sessions), "published" (downloads the files of
            ProactiveBench), a directory with reward_data/ and test_data/, or a table: a CSV, Parquet or JSON file, a
            folder of them, or the name of a dataset of the Hugging Face hub (org/name, which is downloaded).
        columns: Which columns of a table hold the fields of a row.
        split: "by_scene" holds out whole scenes. "published" tests on the root's own test set, whose histories may
            also occur in its training rows.
        folds: With by_scene, number of folds. One is tested, the next one validates.
        fold: With by_scene, index of the fold that is tested.
        validation_fraction: With published, share of the training rows that validate.
        prompt: Prompt file; by default the prompt of this project.
        format: "chat" writes rows as messages with the chat template of the tokenizer, "plain" as text without turns.
            "auto" is chat if the tokenizer has a chat template that can write the prompt.
        tokenizer: Hub id or path of a tokenizer, or "scratch" to train one. Set by model.backbone.
        trust_remote_code: Whether a tokenizer may run its own code. Set by model.trust_remote_code.
        vocabulary_size: Maximum number of tokens of a tokenizer from scratch.
        max_length: Maximum number of tokens of a row. The oldest events are dropped first. Every row reserves room for
            the longest proposal or answer, so the number of events that are read depends on the history only.
        batch_size: Rows of one optimizer step, over all devices. The number of accumulated micro-batches follows from
            it and from the size of a micro-batch.
        layout: "tree" computes shared prefixes once; "rows" pads each row. Results are equal up to rounding. "auto"
            uses trees if a self-check at the start finds that the backbone reads them correctly, and logs the reason if
            not.
        token_budget: With layout tree, maximum number of tokens of a micro-batch; at least max_length.
        micro_batch_size: With layout rows, number of rows of a micro-batch.
        scenes_per_step: Number of scenes that the rows of a step come from. Fewer scenes share more tokens, more scenes
            are mixed better. null draws from all rows.
        num_workers: Number of processes that prepare batches.
        cache: Whether to keep tokenized rows in the cache of Hugging Face `datasets`. The key of a cached file is a
            digest of the rendered text, the tokenizer, its chat template and this code.
        seed: Seed of the embedded data and of the split. The order of rows depends on seed_everything.
    """

    # Options that a resume may change: how a step is computed, and paths, because contents are compared.
    may_change: tuple[str, ...] = (
        "root",
        "columns",
        "prompt",
        "format",
        "tokenizer",
        "layout",
        "token_budget",
        "micro_batch_size",
        "cache",
    )
    template_class: type[Template]
    branch_name: str  # what follows the history of a row: proposal or answer
    tests_published_rows = False  # whether the test rows are those of the published metrics
    tests_all_rows = False  # whether every row of the root tests; only for a saved model
    contamination_allowed = False  # whether the user asked to train on tested scenes

    def __init__(
        self,
        root: str = "embedded",
        columns: Columns | None = None,
        split: SplitName = "by_scene",
        folds: Folds = 5,
        fold: NonNegativeInt = 0,
        validation_fraction: FractionBelowOne = 0.1,
        prompt: str | None = None,
        format: Format = "auto",
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
        self.columns = Columns(**columns) if isinstance(columns, dict) else columns  # a checkpoint has a dict
        check_ranges(type(self), {**self.hparams, "columns": self.columns}, "data")
        self.hparams["columns"] = None if self.columns is None else asdict(self.columns)
        self.root = root
        self.split_name = split
        self.folds = folds
        self.fold = fold
        self.validation_fraction = validation_fraction
        self.template = self.template_class.read(Path(prompt) if prompt else self.template_class.default)
        self.tokenizer_name = tokenizer
        self.format = format
        self.chat: Chat | None = None  # known after `setup`; None in plain format
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
        self.notes: tuple[str, ...] = ()  # see `Corpus`
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._saved: dict[str, Any] | None = None  # with `from_state`, the state in the checkpoint
        self._split: Split | None = None
        refuse_unequal_parts(batch_size, scenes_per_step)
        refuse_small_budget(token_budget, max_length)

    # Subclasses define these.

    def rows(self, stage: Stage) -> Sequence[Any]:
        """Return the rows of a split, not yet tokenized."""
        return getattr(self.split, stage)

    def decisions(self, rows: Sequence[AnnotatedRow]) -> list[Decision]:
        """Return the decisions that the model makes on annotated rows."""
        raise NotImplementedError

    def decision_count(self, stage: Stage) -> int:
        """Return the number of rows of a split on which decisions are measured."""
        return len(self.rows(stage))

    def divide(self, corpus: Corpus) -> Split:
        """Split the rows of a root."""
        raise NotImplementedError

    def training_text(self) -> list[str]:
        """Return the texts that a tokenizer from scratch is trained on."""
        raise NotImplementedError

    def encode(self, stage: Stage) -> TokenizedSplit:
        """Tokenize the rows of a split."""
        raise NotImplementedError

    def branch(self, row: Any) -> list[Segment]:
        """Return the segments that follow the history of a row."""
        raise NotImplementedError

    @property
    def end(self) -> list[int]:
        """Token ids that end every row."""
        raise NotImplementedError

    # Available after `setup`.

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
        """Tokenizes segments. Creating it is slow for a large vocabulary."""
        return SegmentTokenizer(self.tokenizer, chat=self.chat is not None)

    @cached_property
    def branch_length(self) -> int:
        """Number of tokens that every row reserves for what follows its history: the maximum over all rows.

        It is the same for every row, so the part of a history that is read says nothing about its answer. A checkpoint
        stores it. A proposal that is judged later may be longer; then its row has fewer events.
        """
        if self._saved is not None:
            return self._saved.get("branch_length", 0)  # older checkpoints reserved no room
        branches = (self.branch(row) for stage in STAGES["fit"] for row in self.rows(stage))
        lengths = (sum(map(len, self.segmenter.encode(branch, continues=True))) for branch in branches)
        return max(lengths, default=0) + len(self.end)

    @cached_property
    def row_tokenizer(self) -> RowTokenizer:
        """Tokenizes rows."""
        return RowTokenizer(
            self.template, self.segmenter, self.end, self.max_length, self.branch_length, self.branch_name, self.branch
        )

    @cached_property
    def token_cache(self) -> TokenCache:
        """Keeps tokenized rows on disk."""
        return TokenCache([tokenizer_state(self.tokenizer), self.max_length], keep=self.cache)

    @property
    def seen(self) -> dict[str, list[Any]]:
        """The histories and scenes that the model trained and validated on; older checkpoints lack some of them.

        Validation rows chose the best weights and fitted the calibration. See `seen_rows`.
        """
        if self._saved is not None:
            return {name: list(self._saved[name]) for name in SEEN if name in self._saved}
        return seen_rows(self.split)

    @cached_property
    def word_scores(self) -> WordScores | None:
        """The scores of a bag of words on this split; None if the model's training rows are no longer available."""
        own = self.split if self._saved is None else split_of_training(self, self._saved)
        return None if own is None else word_scores(*map(self.decisions, (own.train, own.validation, self.split.test)))

    @property
    def row_counts(self) -> dict[Stage, int]:
        """Number of rows of each split."""
        return {name: len(self.rows(name)) for name in ("train", "validation", "test")}

    @property
    def contamination(self) -> Contamination:
        """Number of test rows whose history was trained or validated on."""
        seen = self.seen
        return contamination(seen.get("training_histories", []), self.split.test, seen.get("validation_histories"))

    @property
    def description(self) -> str:
        """Name of the split, for reports."""
        if self.tests_all_rows:
            return f"{self.root}, all rows"
        if self.split_name == "published":
            return f"{self.root}, published split"
        return f"{self.root}, by_scene split, fold {self.fold} of {self.folds}"

    def load(self) -> Corpus:
        """Load the root."""
        return load_corpus(self.root, self.seed, self.columns, trains=not self.tests_all_rows)

    def prepare(self, split: Split | None = None) -> None:
        """Load and divide the root, unless a split of it is given, and make the tokenizer."""
        self._split = split or self._split
        if self._split is None:
            corpus = self.load()
            self.notes = corpus.notes
            for note in corpus.notes:
                log.info(f"data.root: {note}")
            self._split = Split([], [], corpus.rows) if self.tests_all_rows else self.divide(corpus)
        if self._tokenizer is None:
            self._tokenizer = make_tokenizer(
                self.tokenizer_name, self.training_text, self.vocabulary_size, self.trust_remote_code
            )
            self.template, self.chat, about = formatted(self.template, self._tokenizer, self.format)
            if about:
                log.info(f"data.format: {about}")

    def setup(self, stage: str) -> None:
        """Load, split and tokenize the rows. `stage` is fit, validate or test, as Lightning gives it."""
        self.prepare()
        names = STAGES.get(stage, ("test",))
        for name in names:
            if name not in self.encoded:
                self.encoded[name] = self.encode(name)
        if stage == "fit":
            counts = ", ".join(f"{len(self.encoded[name].input_ids)} {name}" for name in names)
            log.info(f"data: {self.description}: {counts} rows")
            log.info(f"contamination: {self.contamination}")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that the model can be used and evaluated without this data."""
        return {
            "hyperparameters": {name: value for name, value in self.hparams.items() if not name.startswith("_")},
            "prompt": self.template.model_dump(),
            "chat": None if self.chat is None else asdict(self.chat),
            "tokenizer": tokenizer_state(self.tokenizer),
            "branch_length": self.branch_length,
            **self.seen,
            "training_rows": self.split_digest("train") if self._saved is None else str(self._saved["training_rows"]),
            "order_seed": self.order_seed,
        }

    def split_digest(self, stage: Stage) -> str:
        """Return the digest of the tokenized rows of a split; see `TokenizedSplit.digest`."""
        if stage not in self.encoded:
            self.encoded[stage] = self.encode(stage)
        return self.encoded[stage].digest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run has the data of the run that it resumes; see `refuse_other_data`."""
        scratch = self.tokenizer_name == SCRATCH
        refuse_other_data(state_dict, self.state_dict(), self.may_change, own_tokenizer=scratch)

    @classmethod
    def from_state(cls, state: dict[str, Any], **overrides: Any) -> Self:
        """Return the data module of a checkpoint, for evaluation only.

        Args:
            state: What `state_dict` returned.
            overrides: Replace options, unless None. Split "all" tests every row of the root.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        tests_all_rows = given.get("split") == "all"
        if tests_all_rows:
            del given["split"]
        if "root" in given:
            given.setdefault("columns", None)  # the saved columns are those of the saved root
        data = cls(**{**state["hyperparameters"], "prompt": None, **given})
        data.tests_all_rows = tests_all_rows
        data._tokenizer = tokenizer_from_state(state["tokenizer"])
        if "prompt" in given:
            choice: Format = "chat" if state.get("chat") else "plain"
            data.template, data.chat, _ = formatted(data.template, data._tokenizer, choice)
        else:
            data.template = cls.template_class.parse(state["prompt"], "the checkpoint")
            data.chat = saved_chat(state, data._tokenizer)
        data._saved = state
        return data

    def tokenize(self, stage: Stage, rows: Sequence[Any]) -> CachedRows:
        """Tokenize rows of a split: columns input_ids, and last_segment as in `RowIds`."""
        found = self.token_cache.rows(
            [self.row_tokenizer.rendered_digest(rows), self.branch_length, self.chat is not None],
            lambda counts: self.row_tokenizer.encode_all(rows, stage, counts),
            ROW_COLUMNS,
            f"{stage} {self.branch_name}s",
        )
        if stage == "train" and self.chat and (count := self.row_tokenizer.divided_otherwise(rows[:CHECKED_ROWS])):
            log.info(f"data.format: {count} of {CHECKED_ROWS} rows have other token ids than apply_chat_template gives")
        self.truncated[stage] = found.counts.get("truncated", 0)
        if self.truncated[stage]:
            log.info(
                f"{self.truncated[stage]} of {len(rows)} {stage} rows lost their oldest events to data.max_length "
                f"{self.max_length}, of which {self.branch_length} are reserved for the {self.branch_name}"
            )
        return found
