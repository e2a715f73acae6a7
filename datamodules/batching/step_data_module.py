"""StepDataModule: from tokenized rows to loaders of steps."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datamodules.batching.layout_name import LayoutName
from datamodules.batching.layouts import Layout, RowsLayout, TreeLayout
from datamodules.batching.prefix_tree import Integers
from datamodules.batching.steps import EncodedRows, EvaluationSampler, MicroBatch, StepLoader, StepSampler
from datamodules.batching.tokenized_split import Stage, TokenizedSplit
from datamodules.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("proactive")  # commands print it on rank 0


class StepDataModule(LightningDataModule):
    """Makes loaders of steps from tokenized rows. A subclass sets the options below and fills `encoded`.

    Attributes:
        batch_size: Rows of one optimizer step, over all devices.
        layout: Layout of micro-batches.
        token_budget: With layout tree, maximum number of tokens of a micro-batch.
        micro_batch_size: With layout rows, number of rows of a micro-batch.
        scenes_per_step: Number of scenes that the rows of a step come from; None for any.
        num_workers: Number of processes that prepare batches.
        order_seed: Seed of the order of training rows; `fit` sets it to seed_everything.
        encoded: The tokenized splits.
    """

    batch_size: int
    layout: LayoutName
    token_budget: int
    micro_batch_size: int
    scenes_per_step: int | None
    num_workers: int

    def __init__(self) -> None:
        super().__init__()
        self.order_seed = 0
        self.encoded: dict[Stage, TokenizedSplit] = {}
        self._layout: Layout | None = None  # of training steps
        self._pair_cost = 0.0

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer; padded rows need its padding token."""
        raise NotImplementedError

    def choose_layout(self, problem: str | None, pair_cost: float = 0.0) -> None:
        """Choose tree or rows, after the model has tried its backbone.

        Args:
            problem: Why the backbone cannot read trees; None if it can.
            pair_cost: Cost of attention per pair of tokens, see `prefix_tree.split`.

        Raises:
            UserError: The layout must be tree, and the backbone cannot read trees.
        """
        if problem is not None and self.layout == "tree":
            raise UserError(f"data.layout: tree is not possible: {problem}", "Use --data.layout auto or rows.")
        if problem is not None and self.layout == "auto":
            log.info(f"data.layout: rows, because trees are not possible: {problem}")
        self.layout = "rows" if problem is not None or self.layout == "rows" else "tree"
        self._pair_cost = pair_cost
        self._layout = None

    def choose_micro_batch_size(self, problem: str | None) -> None:
        """Use micro-batches of one row if `problem` says that padding changes what the backbone computes."""
        if problem is not None:
            log.info(f"data.micro_batch_size: 1, because padded rows are not possible: {problem}")
            self.micro_batch_size = 1
            self._layout = None

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row of the splits that are set up."""
        return max((int(encoded.lengths.max(initial=0)) for encoded in self.encoded.values()), default=0)

    @property
    def largest_tree(self) -> int:
        """Maximum number of tokens of a tree: the budget, or the tokens of a whole split if they are fewer."""
        tokens = max((int(encoded.lengths.sum()) for encoded in self.encoded.values()), default=0)
        return min(self.token_budget, tokens)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of an epoch."""
        return -(-len(self.encoded["train"].item_scenes) // self.batch_size)

    def scene_numbers(self, stage: Stage) -> Tensor:
        """Return the index of each tokenized row's scene, (N,) int64. Scenes are numbered in order of appearance."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(scene, len(numbers)) for scene in self.encoded[stage].scenes])

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self._train_rows(), **self._loader_options(self._train_sampler(*self._rank_of_world)))

    def val_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        return self.evaluation_loader("test")

    def epoch(
        self, layout: Literal["tree", "rows"], ranks: int = 1, pair_cost: float = 0.0
    ) -> Iterator[list[dict[str, Any]]]:
        """Return the micro-batches of all ranks for each step of an epoch, in a given layout."""
        self.layout, self._pair_cost = layout, pair_cost
        self._layout = None
        rows, laid_out = self._train_rows(), self.train_layout
        for step in self._train_sampler().steps():
            yield rows[tuple(MicroBatch(tuple(part), 1.0) for part in laid_out.split(step, ranks))]

    def _train_sampler(self, rank: int = 0, world_size: int = 1) -> StepSampler:
        encoded = self.encoded["train"]
        return StepSampler(
            self.train_layout,
            encoded.item_scenes,
            self.batch_size,
            self.scenes_per_step,
            seed=self.order_seed,
            rank=rank,
            world_size=world_size,
            sampling_weights=encoded.sampling_weights,
            item_weights=encoded.item_weights,
        )

    @property
    def train_layout(self) -> Layout:
        """The layout of training steps."""
        if self._layout is None:
            encoded = self.encoded["train"]
            self._layout = self.layout_of(encoded.input_ids, encoded.answers, encoded.groups)
        return self._layout

    def layout_of(
        self,
        input_ids: Sequence[Sequence[int]],
        answers: Sequence[Integers] | None = None,
        groups: Integers | None = None,
    ) -> Layout:
        """Return the chosen layout for some rows, or groups of rows."""
        if self.layout == "tree":
            return TreeLayout(input_ids, self.token_budget, self._pair_cost, answers, groups)
        return RowsLayout(input_ids, self.tokenizer.pad_token_id, self.micro_batch_size, answers, groups)

    def _train_rows(self) -> EncodedRows:
        encoded = self.encoded["train"]
        return EncodedRows(self.train_layout, encoded.columns, encoded.group_weight)

    def evaluation_loader(self, stage: Stage) -> DataLoader[list[dict[str, Any]]]:
        """Return a loader of every row of a split once, without groups."""
        encoded = self.encoded[stage]
        layout = self.layout_of(encoded.input_ids, encoded.answers)
        sampler = EvaluationSampler(layout, len(encoded.input_ids), *self._rank_of_world)
        return DataLoader(EncodedRows(layout, encoded.columns), **self._loader_options(sampler))

    @property
    def _rank_of_world(self) -> tuple[int, int]:
        """Rank of this process, and number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader_options(self, sampler: Sampler[Any]) -> dict[str, Any]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # batch_size None: the sampler gives the rows of a step, and the dataset makes its micro-batches.
        return {"sampler": sampler, "batch_size": None, "num_workers": self.num_workers, "pin_memory": on_cuda}
