"""Samplers of steps, and the dataset and loader that make their micro-batches."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.batching.layouts import AnswerTokens, Inputs, Layout
from datamodules.errors import UserError


class Batch(TypedDict):
    """A micro-batch of R rows."""

    inputs: Inputs
    row: Tensor  # (R,) int64, index of the row in its split
    weight: Tensor  # (R,) float32, see MicroBatch; 0 for a filler row
    size: dict[str, int]  # fields of its BatchSize


class RewardBatch(Batch):
    """Proposals to classify."""

    label: Tensor  # (R,) int64, 1 for accepted
    category: Tensor  # (R,) int64, index of the category


class AgentBatch(Batch):
    """Answers to learn or to measure."""

    answers: AnswerTokens
    kind: Tensor  # (R,) int64, index of the AnswerKind
    help_needed: Tensor  # (R,) int64, 1 if help was needed, 0 if not, -1 if that is unknown


class PreferenceBatch(AgentBatch):
    """Judged proposals, in groups of two rows."""

    groups: Tensor  # (G, 2) int64, positions of the rows of each group, 0 to R - 1
    group_weight: Tensor  # (G,) float32, the weight in the step's mean loss; 0 for a filler


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the rows, or groups of rows, of a micro-batch, and the weight of each.

    The mean loss of a step is the sum of weight x loss over its rows, or their tokens, averaged over ranks as DDP and
    FSDP average gradients.
    """

    rows: tuple[int, ...]
    weight: float


Step = tuple[MicroBatch, ...]  # one rank's micro-batches of an optimizer step


def refuse_small_budget(token_budget: int, max_length: int) -> None:
    """Raise a UserError if a row may have more tokens than a tree."""
    if token_budget < max_length:
        raise UserError(
            f"data.token_budget: {token_budget} is less than the maximum length of a row",
            f"Make it at least data.max_length, {max_length}.",
        )


def refuse_unequal_parts(batch_size: int, scenes_per_step: int | None) -> None:
    """Raise a UserError unless `scenes_per_step` divides `batch_size`."""
    if scenes_per_step is None or (scenes_per_step > 0 and batch_size % scenes_per_step == 0):
        return
    divisor = max(n for n in range(1, max(scenes_per_step, 1) + 1) if batch_size % n == 0)
    raise UserError(
        f"data.scenes_per_step: {batch_size} rows of a step cannot come in equal parts from {scenes_per_step} scenes",
        f"Make data.batch_size a multiple of it, or give --data.scenes_per_step {divisor}.",
    )


@dataclass(frozen=True)
class BatchSize:
    """Counts of one or several micro-batches."""

    rows: int = 0  # without filler rows
    tokens: int = 0  # that the network computes, padding included
    unpadded_tokens: int = 0  # of these, those that are no padding
    effective_tokens: int = 0  # of the single rows: a token that rows share counts once for each
    pairs: int = 0  # of a query and a key that it attends to
    targets: int = 0  # tokens to predict; a token of several answers counts once

    def __add__(self, other: "BatchSize") -> "BatchSize":
        return BatchSize(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def batch_size(micro_batch: Any) -> BatchSize:
    """Count the rows and tokens of a micro-batch in any layout."""
    inputs = micro_batch["inputs"]
    rows = (micro_batch["weight"] > 0).sum()
    if "subtree_end" in inputs:
        depth_1T = inputs["position_ids"] + 1  # a token attends to itself and to those before it
        unpadded, pairs = torch.tensor(inputs["input_ids"].numel()), depth_1T.sum()
        effective = depth_1T[0, inputs["read_out"]].sum()
    else:
        length_R = inputs["attention_mask"].sum(1)
        unpadded, pairs = length_R.sum(), (length_R * (length_R + 1) // 2).sum()
        effective = unpadded
    counted = torch.stack([count.to(rows.device) for count in (rows, unpadded, effective, pairs)]).tolist()
    return BatchSize(
        rows=counted[0],
        tokens=inputs["input_ids"].numel(),
        unpadded_tokens=counted[1],
        effective_tokens=counted[2],
        pairs=counted[3],
        targets=len(micro_batch["answers"]["target"]) if "answers" in micro_batch else 0,
    )


class StepSampler(Sampler[Step]):
    """Yields the steps of an epoch: every row once, `batch_size` rows per step, in an order set by seed and epoch.

    Args:
        layout: Divides the rows of a step into micro-batches. The loss of a step does not depend on it.
        scenes: Scene of each row, or of each group if the layout has groups.
        batch_size: Rows, or groups, of a step, over all ranks. The last step of an epoch may have fewer.
        scenes_per_step: Number of scenes of a step, each with the same number of rows, as long as enough scenes have
            rows left. The remaining rows are mixed. None draws from all rows.
        seed: Sets the order, together with the epoch.
        rank: Rank whose micro-batches to yield.
        world_size: Number of ranks. Each gets the same number of micro-batches.
        sampling_weights: If given, an epoch samples N rows with replacement, with probabilities proportional to
            these weights.
        item_weights: Weight of each row or group in the mean loss of a step, such as its number of targets; 1 each if
            None.

    Raises:
        UserError: `scenes_per_step` does not divide `batch_size`.
    """

    def __init__(
        self,
        layout: Layout,
        scenes: Sequence[str],
        batch_size: int,
        scenes_per_step: int | None = None,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sampling_weights: Sequence[float] | None = None,
        item_weights: Sequence[float] | None = None,
    ) -> None:
        refuse_unequal_parts(batch_size, scenes_per_step)
        self.layout = layout
        self.scenes = scenes
        self.batch_size = batch_size
        self.scenes_per_step = scenes_per_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.sampling_weights = sampling_weights
        self.item_weights = item_weights
        self.epoch = 0
        self.first_step = 0  # steps before it are skipped, see `StepLoader`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.scenes) // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        for rows in self.steps()[self.first_step :]:
            weights = self.item_weights
            total = len(rows) if weights is None else sum(weights[row] for row in rows)
            yield micro_batches_of_rank(self.layout.split(rows, self.world_size), self.rank, self.world_size, total)

    def steps(self) -> list[list[int]]:
        """Return the rows of each step of this epoch. They are equal on all ranks and in all layouts."""
        random = np.random.default_rng([self.seed, self.epoch])
        if self.sampling_weights is None:
            rows = random.permutation(len(self.scenes)).tolist()
        else:
            weights = np.array(self.sampling_weights)
            rows = random.choice(len(weights), size=len(weights), p=weights / weights.sum()).tolist()
        steps, rest = self._from_few_scenes(rows, random)
        steps += [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        full = [step for step in steps if len(step) == self.batch_size]
        return [full[index] for index in random.permutation(len(full))] + steps[len(full) :]

    def _from_few_scenes(self, rows: list[int], random: np.random.Generator) -> tuple[list[list[int]], list[int]]:
        """Return full steps of `scenes_per_step` scenes each, and the remaining rows, sorted by scene."""
        if self.scenes_per_step is None:
            return [], rows
        size = self.batch_size // self.scenes_per_step
        by_scene: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            by_scene[self.scenes[row]].append(row)
        left = list(by_scene.values())
        remaining = np.array([len(part) for part in left], dtype=np.int64)
        steps: list[list[int]] = []
        while True:
            # Prefer the scenes with the most rows left, so that all scenes run out at about the same time.
            drawn = random.permutation(len(left))
            order = drawn[np.argsort(-(remaining[drawn] // size), kind="stable")].tolist()
            chosen = order[: self.scenes_per_step]
            if len(chosen) < self.scenes_per_step or any(len(left[scene]) < size for scene in chosen):
                return steps, [row for scene in order for row in left[scene]]
            steps.append([row for scene in chosen for row in left[scene][:size]])
            for scene in chosen:
                left[scene] = left[scene][size:]
                remaining[scene] -= size


class EvaluationSampler(Sampler[Step]):
    """Yields every row once, in the micro-batches of the layout; each is one step."""

    def __init__(self, layout: Layout, rows: int, rank: int = 0, world_size: int = 1) -> None:
        parts = layout.split(range(rows), world_size) if rows else []
        self.micro_batches = micro_batches_of_rank(parts, rank, world_size, rows)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[Step]:
        return ((micro_batch,) for micro_batch in self.micro_batches)


def micro_batches_of_rank(parts: Sequence[Sequence[int]], rank: int, world_size: int, total: float) -> Step:
    """Return the micro-batches of one rank. Each rank gets the same number.

    Args:
        parts: Rows of all micro-batches of the step.
        rank: The rank.
        world_size: Number of ranks.
        total: Number of rows, or of tokens, over which the loss of the step is the mean, or the sum of the weights of
            groups. A rank without a micro-batch computes a filler with weight 0.
    """
    rounds = -(-len(parts) // world_size)
    return tuple(
        MicroBatch(tuple(parts[index]), world_size / total) if index < len(parts) else MicroBatch((parts[0][0],), 0.0)
        for index in range(rank, rounds * world_size, world_size)
    )


class EncodedRows(Dataset[list[dict[str, Any]]]):
    """Dataset of tokenized rows. Its index is a step, its item the list of the step's micro-batches.

    Args:
        layout: Makes the input of a micro-batch.
        columns: More fields of each row, tensors (N, ...) by name.
        group_weight: With a layout of groups, (G,) float32, the weight of each group in the mean of a step.
    """

    def __init__(self, layout: Layout, columns: Mapping[str, Tensor], group_weight: Tensor | None = None) -> None:
        self.layout = layout
        self.columns = columns
        self.group_weight = group_weight

    def __getitem__(self, step: Step) -> list[dict[str, Any]]:
        return [self._batch(micro_batch) for micro_batch in step]

    def _batch(self, micro_batch: MicroBatch) -> dict[str, Any]:
        laid_out = self.layout.lay_out(micro_batch.rows)
        row = torch.tensor(laid_out.rows)
        batch = {
            "inputs": laid_out.inputs,
            "row": row,
            "weight": torch.full((len(row),), micro_batch.weight),
            **{name: column[row] for name, column in self.columns.items()},
        }
        if laid_out.answers is not None:
            batch["answers"] = laid_out.answers
        if laid_out.groups is not None and self.group_weight is not None:
            batch["groups"] = laid_out.groups
            batch["group_weight"] = self.group_weight[torch.tensor(micro_batch.rows)] * micro_batch.weight
        return {**batch, "size": vars(batch_size(batch))}  # counted here, before the batch is copied to the device


class StepLoader(DataLoader[list[dict[str, Any]]]):
    """A DataLoader of training steps that can resume within an epoch.

    Its state is the number of steps returned so far in this epoch. Steps that workers have prepared
    ahead do not count. The order of the steps needs no state: the sampler derives it from seed and epoch.
    """

    sampler: StepSampler
    _taken = 0
    _resume_after = 0

    def __iter__(self) -> Any:
        self._taken, self._resume_after = self._resume_after, 0
        return self._steps_after(self._taken)

    def _steps_after(self, done: int) -> Iterator[list[dict[str, Any]]]:
        self.sampler.first_step = done
        for step in super().__iter__():
            self._taken += 1
            yield step

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch."""
        return {"steps": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration after the steps of `state`; earlier versions stored torchdata's state."""
        snapshot = state.get("_snapshot", {})  # torchdata with workers
        self._resume_after = state.get("steps", state.get("_num_yielded", snapshot.get("_snapshot_step")))
