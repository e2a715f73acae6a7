"""Steps and micro-batches: which rows go together, in which order, on which rank, and in which layout."""

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
    """What every micro-batch of R rows has."""

    inputs: Inputs
    row: Tensor  # (R,) int64, the row's place in its split
    weight: Tensor  # (R,) float32, see MicroBatch; 0 for a row that only fills a rank's share up
    size: dict[str, int]  # the fields of its BatchSize


class RewardBatch(Batch):
    """Proposals to judge."""

    label: Tensor  # (R,) int64, 1 for accepted
    category: Tensor  # (R,) int64, the category's index


class AgentBatch(Batch):
    """Answers to write."""

    answers: AnswerTokens
    kind: Tensor  # (R,) int64, the index of the answer's AnswerKind
    help_needed: Tensor  # (R,) int64, 1 if help was needed, 0 if not, -1 if that is unknown


@dataclass(frozen=True)
class MicroBatch:
    """Rows computed together.

    `weight` is such that the sum of weight x loss over a step's rows, averaged over ranks (as DDP and FSDP do
    with gradients), is the mean loss of the step's rows, or of their tokens.
    """

    rows: tuple[int, ...]
    weight: float


Step = tuple[MicroBatch, ...]  # one rank's share of an optimizer step


def refuse_unequal_parts(batch_size: int, scenes_per_step: int | None) -> None:
    """Raise a UserError if a step's rows cannot be taken in equal parts from its scenes."""
    if scenes_per_step is None or (scenes_per_step > 0 and batch_size % scenes_per_step == 0):
        return
    fits = max((n for n in range(1, max(scenes_per_step, 1) + 1) if batch_size % n == 0), default=1)
    raise UserError(
        f"data.scenes_per_step: {batch_size} rows a step cannot be taken in equal parts from {scenes_per_step} scenes",
        f"Make data.batch_size a multiple of it, or give --data.scenes_per_step {fits}.",
    )


@dataclass(frozen=True)
class BatchSize:
    """What is in a micro-batch or several."""

    rows: int = 0  # those that only fill a rank's share up are none
    tokens: int = 0  # computed, padding included
    effective_tokens: int = 0  # of all rows, one by one and without padding
    real_tokens: int = 0  # computed, without padding
    pairs: int = 0  # of tokens, of which one sees the other
    targets: int = 0  # tokens to predict, each once where rows share it

    def __add__(self, other: "BatchSize") -> "BatchSize":
        return BatchSize(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def batch_size(micro_batch: Any) -> BatchSize:
    """What is in a micro-batch, whatever its layout."""
    inputs = micro_batch["inputs"]
    rows = (micro_batch["weight"] > 0).sum()
    if "subtree_end" in inputs:
        depth_1T = inputs["position_ids"] + 1  # a token sees those before it in its row, and itself
        real, pairs = torch.tensor(inputs["input_ids"].numel()), depth_1T.sum()
        effective = depth_1T[0, inputs["read_out"]].sum()
    else:
        length_R = inputs["attention_mask"].sum(1)
        real, pairs = length_R.sum(), (length_R * (length_R + 1) // 2).sum()
        effective = real
    counts = torch.stack([count.to(rows.device) for count in (rows, effective, real, pairs)]).tolist()
    targets = len(micro_batch["answers"]["target"]) if "answers" in micro_batch else 0
    rows_counted, effective_tokens, real_tokens, pairs_counted = counts
    tokens = inputs["input_ids"].numel()
    return BatchSize(rows_counted, tokens, effective_tokens, real_tokens, pairs_counted, targets)


class StepSampler(Sampler[Step]):
    """Every row once an epoch, in steps of `batch_size` rows over all ranks, in an order set by seed and epoch.

    Args:
        layout: Divides a step's rows into micro-batches, which changes no step's loss.
        scenes: The scene of each row.
        batch_size: Rows a step, over all ranks together; an epoch's last step may have fewer.
        scenes_per_step: From how many scenes, in equal parts, a step takes its rows, as long as scenes have rows
            left for a part; what remains is mixed. None draws from all rows alike.
        seed: Together with the epoch's number, settles the order.
        rank: Whose share of each step to give.
        world_size: How many ranks share a step; each gets equally many micro-batches.
        odds: An epoch draws as many rows with replacement, each in proportion to its odds.
        sizes: How many times each row counts in a step's mean, such as its number of tokens; once if None.

    `batch_size` has to be a multiple of `scenes_per_step`, see `refuse_unequal_parts`.
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
        odds: Sequence[float] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        refuse_unequal_parts(batch_size, scenes_per_step)
        self.layout = layout
        self.scenes = scenes
        self.batch_size = batch_size
        self.scenes_per_step = scenes_per_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.odds = odds
        self.sizes = sizes
        self.epoch = 0
        self.first_step = 0  # of the epoch; a resumed run has done those before it

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.scenes) // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        for rows in self.steps()[self.first_step :]:
            total = len(rows) if self.sizes is None else sum(self.sizes[row] for row in rows)
            yield share(self.layout.split(rows, self.world_size), self.rank, self.world_size, total)

    def steps(self) -> list[list[int]]:
        """The rows of each step of this epoch, the same on every rank and in every layout."""
        random = np.random.default_rng([self.seed, self.epoch])
        if self.odds is None:
            rows = random.permutation(len(self.scenes)).tolist()
        else:
            odds = np.array(self.odds)
            rows = random.choice(len(odds), size=len(odds), p=odds / odds.sum()).tolist()
        steps, rest = self._from_few_scenes(rows, random)
        steps += [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        whole = [step for step in steps if len(step) == self.batch_size]
        return [whole[place] for place in random.permutation(len(whole))] + steps[len(whole) :]

    def _from_few_scenes(self, rows: list[int], random: np.random.Generator) -> tuple[list[list[int]], list[int]]:
        """Whole steps of `scenes_per_step` scenes each, and the rows that are left, those of a scene together."""
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
            # The scenes with the most rows left first, so that scenes do not run out while others are still full.
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
    """Every row once, in micro-batches that follow from the layout alone; each is a step of its own."""

    def __init__(self, layout: Layout, rows: int, rank: int = 0, world_size: int = 1) -> None:
        parts = layout.split(range(rows), world_size) if rows else []
        self.micro_batches = share(parts, rank, world_size, rows)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[Step]:
        return ((micro_batch,) for micro_batch in self.micro_batches)


def share(parts: Sequence[Sequence[int]], rank: int, world_size: int, total: int) -> Step:
    """One rank's micro-batches of a step whose mean is over `total` rows or tokens, equally many on each rank.

    A rank left without rows computes the first one of the step and gives it no weight.
    """
    rounds = -(-len(parts) // world_size)
    mine = [parts[place] if place < len(parts) else None for place in range(rank, rounds * world_size, world_size)]
    return tuple(
        MicroBatch(tuple(part), world_size / total) if part is not None else MicroBatch((parts[0][0],), 0.0)
        for part in mine
    )


class EncodedRows(Dataset[list[dict[str, Any]]]):
    """Tokenized rows that give the micro-batches of each step asked for.

    Args:
        layout: How rows are laid out.
        columns: What a micro-batch has of each row besides: tensors (N, ...) by name.
    """

    def __init__(self, layout: Layout, columns: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self.columns = columns

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
        return {**batch, "size": vars(batch_size(batch))}  # counted here, where all of it is on the host


class StepLoader(DataLoader[list[dict[str, Any]]]):
    """A loader of training steps that a resumed run begins in the middle of an epoch.

    Its state is the number of steps that the loop has taken from it in this epoch. Steps that workers have prepared
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
