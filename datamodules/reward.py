"""RewardDataModule: annotated rows as micro-batches for a reward classifier."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.batches import EncodedRows, MicroBatchSampler, RewardBatch
from datamodules.errors import UserError
from datamodules.prompts import (
    DEFAULT_PROMPT,
    PromptTemplate,
    SegmentTokenizer,
    render,
    training_text,
    truncate,
)
from datamodules.records import AnnotatedRow
from datamodules.sources import Corpus, load_corpus
from datamodules.splits import (
    Contamination,
    Split,
    SplitName,
    contamination,
    history_digests,
    split_by_scene,
    split_published,
)
from datamodules.tokenizer import (
    SCRATCH,
    load_tokenizer,
    tokenizer_from_state,
    tokenizer_state,
    train_tokenizer,
)

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from transformers import PreTrainedTokenizerFast

Stage = Literal["train", "validation", "test"]
log = logging.getLogger("proactive")  # the commands show it, on rank 0


class RewardDataModule(LightningDataModule):
    """Annotated rows, tokenized and batched.

    Args:
        root: Where the data is: "embedded" (simulated sessions), "published" (downloads the files of
            ProactiveBench), or a directory that holds reward_data/ and test_data/.
        split: "by_scene" holds whole scenes out; "published" tests on the root's own test file, whose
            histories may also occur in the training rows.
        folds: For by_scene: into how many parts the scenes are divided; one tests, the next one validates.
        fold: For by_scene: which part tests.
        validation_fraction: For published: the share of the training rows that validates.
        prompt: A prompt file; the project's own if not given.
        tokenizer: Hub id or path of a tokenizer, or "scratch" to train one. Follows from model.backbone.
        trust_remote_code: Whether a tokenizer may run code of its own. Follows from model.trust_remote_code.
        vocabulary_size: Tokens of a tokenizer made from scratch, at most.
        max_length: Tokens a row, at most; the oldest events are dropped first.
        batch_size: Rows of one optimizer step, over all devices together.
        micro_batch_size: Rows that one device computes at once; accumulation follows from both.
        balance: "category" draws training rows so that all categories are equally frequent.
        num_workers: Processes that prepare batches.
        cache: Whether to keep tokenized rows in the cache of Hugging Face `datasets`.
        seed: Which embedded data and which division into splits; the order of rows follows seed_everything.
    """

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
        micro_batch_size: int = 8,
        balance: Literal["none", "category"] = "none",
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
        self.template = PromptTemplate.read(Path(prompt) if prompt else DEFAULT_PROMPT)
        self.tokenizer_name = tokenizer
        self.trust_remote_code = trust_remote_code
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.balance = balance
        self.num_workers = num_workers
        self.cache = cache
        self.seed = seed
        self.truncated: dict[Stage, int] = {}
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._training_digests: list[int] | None = None
        self._split: Split | None = None
        self._encoded: dict[Stage, EncodedRows] = {}

    @property
    def split(self) -> Split:
        """The rows of the three splits, once `setup` has run."""
        if self._split is None:
            raise RuntimeError("setup() has not run")
        return self._split

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, once `setup` has run."""
        if self._tokenizer is None:
            raise RuntimeError("setup() has not run")
        return self._tokenizer

    @property
    def contamination(self) -> Contamination:
        """How many of the test rows have a history that was trained on."""
        digests = history_digests(self.split.train) if self._training_digests is None else self._training_digests
        return contamination(digests, self.split.test)

    @property
    def description(self) -> str:
        """The split in words, for reports."""
        if self.split_name == "published":
            return f"{self.root}, published split"
        return f"{self.root}, by_scene split, fold {self.fold} of {self.folds}"

    def setup(self, stage: str) -> None:
        """Load, split and tokenize the rows; `stage` is Lightning's: fit, validate or test."""
        if self._split is None:
            self._split = self._divide(load_corpus(self.root, self.seed))
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer(self._split.train)
        for name in ("train", "validation", "test") if stage == "fit" else ("test",):
            if name not in self._encoded:
                self._encoded[name] = self._encode(name, getattr(self._split, name))
        if stage == "fit":
            self._follow_batch_size()
            counts = ", ".join(f"{len(getattr(self._split, name))} {name}" for name in self._encoded)
            log.info(f"data: {self.description}: {counts} rows")
            log.info(f"contamination: {self.contamination}")

    def train_dataloader(self) -> "StatefulDataLoader":
        from torchdata.stateful_dataloader import StatefulDataLoader

        rows = self.split.train
        frequency = Counter(row.category for row in rows)
        odds = [1 / frequency[row.category] for row in rows] if self.balance == "category" else None
        sampler = self._sampler("train", shuffle=True, odds=odds)
        return StatefulDataLoader(self._encoded["train"], sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> DataLoader[RewardBatch]:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[RewardBatch]:
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the model can be used, and honestly measured, without this data."""
        digests = history_digests(self.split.train) if self._training_digests is None else self._training_digests
        return {
            "hyperparameters": {name: value for name, value in self.hparams.items() if not name.startswith("_")},
            "prompt": self.template.model_dump(),
            "tokenizer": tokenizer_state(self.tokenizer),
            "training_histories": digests,
            "training_rows": _rows_digest(self.split.train),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run goes on with the data that it began with.

        Raises:
            UserError: The training rows, the prompt or the tokenizer are not those of the checkpoint.
        """
        current = self.state_dict()
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
    def from_state(cls, state: dict[str, Any], **overrides: Any) -> "RewardDataModule":
        """The data module of a checkpoint, with some options replaced, for evaluation only."""
        given = {name: value for name, value in overrides.items() if value is not None}
        data = cls(**{**state["hyperparameters"], "prompt": None, **given})
        if "prompt" not in given:
            data.template = PromptTemplate.parse(state["prompt"], "the checkpoint")
        data._tokenizer = tokenizer_from_state(state["tokenizer"])
        data._training_digests = list(state["training_histories"])
        return data

    def _divide(self, corpus: Corpus) -> Split:
        if self.split_name == "published":
            return split_published(corpus, self.validation_fraction, self.seed)
        return split_by_scene(corpus, self.folds, self.fold, self.seed)

    def _make_tokenizer(self, rows: Sequence[AnnotatedRow]) -> "PreTrainedTokenizerFast":
        if self.tokenizer_name == SCRATCH:
            return train_tokenizer(training_text(self.template, rows), self.vocabulary_size)
        return load_tokenizer(self.tokenizer_name, self.trust_remote_code)

    def _encode(self, stage: Stage, rows: Sequence[AnnotatedRow]) -> EncodedRows:
        import datasets

        segmenter = SegmentTokenizer(self.tokenizer)
        room = self.max_length - len(segmenter.prefix) - len(segmenter.suffix)

        def encode(indices: list[int]) -> dict[str, list[Any]]:
            columns: dict[str, list[Any]] = {"input_ids": [], "dropped_events": []}
            for index in indices:
                ids, dropped = truncate(segmenter.encode(render(self.template, rows[index])), room)
                if len(ids) > room:
                    raise UserError(
                        f"data.max_length: instructions and proposal of row {index} of the {stage} split take "
                        f"{len(ids) + self.max_length - room} tokens, more than {self.max_length}",
                        "Use a greater max_length or a shorter prompt.",
                    )
                columns["input_ids"].append([*segmenter.prefix, *ids, *segmenter.suffix])
                columns["dropped_events"].append(dropped)
            return columns

        what = [
            _rows_digest(rows),
            self.template.model_dump(),
            tokenizer_state(self.tokenizer),
            self.max_length,
        ]
        fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        cache_file = Path(datasets.config.HF_DATASETS_CACHE, "proactive", f"{fingerprint}.arrow")
        if self.cache:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
        datasets.disable_progress_bars()
        encoded = datasets.Dataset.from_dict({"index": range(len(rows))}).map(
            encode,
            input_columns="index",
            batched=True,
            remove_columns="index",
            cache_file_name=str(cache_file) if self.cache else None,
            new_fingerprint=fingerprint,
            keep_in_memory=not self.cache,
        )
        self.truncated[stage] = sum(dropped > 0 for dropped in encoded["dropped_events"])
        if self.truncated[stage]:
            log.info(
                f"{self.truncated[stage]} of {len(rows)} {stage} rows lost their oldest events to "
                f"data.max_length {self.max_length}"
            )
        return EncodedRows(
            encoded.with_format("numpy")["input_ids"][:] if len(rows) else [],
            [int(row.accepted) for row in rows],
            [row.category.number for row in rows],
            self.tokenizer.pad_token_id,
        )

    def _sampler(self, stage: Stage, *, shuffle: bool, odds: Sequence[float] | None = None) -> MicroBatchSampler:
        lengths = [len(ids) for ids in self._encoded[stage].input_ids]
        world_size = self.trainer.world_size if self.trainer else 1
        per_round = self.micro_batch_size * world_size
        return MicroBatchSampler(
            lengths,
            self.batch_size if shuffle else max(-(-len(lengths) // per_round), 1) * per_round,
            self.micro_batch_size,
            shuffle=shuffle,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=world_size,
            odds=odds,
        )

    def _evaluation_loader(self, stage: Stage) -> DataLoader[RewardBatch]:
        return DataLoader(
            self._encoded[stage],
            sampler=self._sampler(stage, shuffle=False),
            **self._loader_options(),
        )

    def _loader_options(self) -> dict[str, Any]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # batch_size None: the sampler says what a batch is, the dataset makes it.
        return {"batch_size": None, "num_workers": self.num_workers, "pin_memory": on_cuda}

    def _follow_batch_size(self) -> None:
        """Have the trainer accumulate as many micro-batches as a step holds.

        Raises:
            UserError: The sizes do not fit each other, or the trainer was told another accumulation.
        """
        accumulation = self._sampler("train", shuffle=True).micro_batches_per_step
        if self.trainer is not None:
            if self.trainer.accumulate_grad_batches not in (1, accumulation):
                raise UserError(
                    f"trainer.accumulate_grad_batches: {self.trainer.accumulate_grad_batches}, but data.batch_size "
                    f"{self.batch_size} and data.micro_batch_size {self.micro_batch_size} make it {accumulation}",
                    "Leave it out: it follows from the two sizes.",
                )
            self.trainer.accumulate_grad_batches = accumulation


def _rows_digest(rows: Sequence[AnnotatedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.history_digest, row.proposal, row.accepted]).encode())
    return digest.hexdigest()
