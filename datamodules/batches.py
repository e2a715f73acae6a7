"""Micro-batches: which rows go together, in which order, on which rank, and with which weight in the step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from datamodules.errors import UserError


class RewardBatch(TypedDict):
    """A padded micro-batch of B rows, T tokens long."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 for real tokens; padding is on the right
    label: Tensor  # (B,) int64, 1 for accepted
    category: Tensor  # (B,) int64, the category's index
    row: Tensor  # (B,) int64, the row's place in its split
    weight: Tensor  # (B,) float32, see MicroBatch; 0 for a row that only fills the batch up


@dataclass(frozen=True)
class MicroBatch:
    """Rows computed together.

    `weights` are such that the sum of weight x loss over a step's micro-batches, divided by the number of
    micro-batches that a full step has and averaged over ranks (as Lightning and DDP do), is the mean loss of
    the step's rows: also in a short last step, and with rows of weight 0 that give each rank equal work.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]


class MicroBatchSampler(Sampler[MicroBatch]):
    """Every row once an epoch, in steps of `batch_size` rows over all ranks, in an order set by seed and epoch.

    Rows of one step are put together by length, which changes no step's loss and pads less. With `odds`, an
    epoch draws as many rows with replacement, each in proportion to its odds.

    Raises:
        UserError: `batch_size` is not a multiple of `micro_batch_size` times the number of ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        micro_batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        odds: Sequence[float] | None = None,
    ) -> None:
        per_round = micro_batch_size * world_size
        if batch_size < 1 or micro_batch_size < 1 or batch_size % per_round:
            raise UserError(
                f"data.batch_size: {batch_size} rows a step cannot be shared among {world_size} device(s) "
                f"with data.micro_batch_size {micro_batch_size}",
                f"Make batch_size a multiple of {max(per_round, 1)}, or change micro_batch_size.",
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.odds = odds
        self.epoch = 0

    @property
    def micro_batches_per_step(self) -> int:
        """How many micro-batches each rank computes in a full step: the accumulation."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full_steps, rest = divmod(len(self.lengths), self.batch_size)
        return full_steps * self.micro_batches_per_step + math.ceil(rest / (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        order = self._order()
        for start in range(0, len(order), self.batch_size):
            yield from self._step(order[start : start + self.batch_size])

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.odds is not None:
            odds = torch.tensor(self.odds, dtype=torch.float64)
            return torch.multinomial(odds, len(self.lengths), replacement=True, generator=generator).tolist()
        if self.shuffle:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        return list(range(len(self.lengths)))

    def _step(self, rows: list[int]) -> Iterator[MicroBatch]:
        weight = self.micro_batches_per_step * self.world_size / len(rows)
        by_length = sorted(rows, key=lambda row: self.lengths[row])
        rounds = math.ceil(len(rows) / (self.micro_batch_size * self.world_size))
        size = math.ceil(len(rows) / (rounds * self.world_size))
        for number in range(rounds):
            start = (number * self.world_size + self.rank) * size
            mine = by_length[start : start + size]
            # A rank left without a row computes the step's shortest one and gives it no weight.
            yield (MicroBatch(tuple(mine), (weight,) * len(mine)) if mine else MicroBatch((by_length[0],), (0.0,)))


class EncodedRows(Dataset[RewardBatch]):
    """Tokenized rows that give a padded batch for each micro-batch asked for."""

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        labels: Sequence[int],
        categories: Sequence[int],
        pad_id: int,
    ) -> None:
        self.input_ids = input_ids
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.categories = torch.tensor(categories, dtype=torch.int64)
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, batch: MicroBatch) -> RewardBatch:
        rows = torch.tensor(batch.rows)
        ids = [torch.as_tensor(self.input_ids[row], dtype=torch.int64) for row in batch.rows]
        lengths = torch.tensor([len(row) for row in ids])
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        return RewardBatch(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            label=self.labels[rows],
            category=self.categories[rows],
            row=rows,
            weight=torch.tensor(batch.weights),
        )
