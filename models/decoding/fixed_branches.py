"""Decoding steps of fixed shapes, which a GPU replays as one CUDA graph.

A step of a large network is a thousand small kernels, and launching them takes the CPU longer than running them takes
the GPU. Here the cache has capacity for several steps, finished branches keep their slots, and inputs and outputs stay
in the same tensors. So every step runs the same kernels at the same addresses. The first step runs eagerly, the second
is captured, and later ones are replayed. If the capacity is used up, or most slots belong to finished branches, the
cache is laid out again and a new graph is captured.

Shape legend: B trunks, W branches per trunk, K tokens of cache capacity, V vocabulary size.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.decoding.branches import MIN_USED, BranchReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS_AHEAD = 64  # decoding steps that the cache has capacity for
CAPACITY_MULTIPLE = 64  # the capacity is a multiple of it: attention kernels prefer that
log = logging.getLogger("proactive")
Slot = tuple[int, int]  # trunk index, branch index


class FixedBranchReader(BranchReader):
    """A `BranchReader` with fixed shapes. Each branch has a slot, and keeps it until the cache is laid out again.

    Attributes:
        uses_graph: Whether decoding steps are captured and replayed as a CUDA graph.
    """

    def __init__(self, network: "PreTrainedModel") -> None:
        super().__init__(network)
        self.uses_graph = self.device.type == "cuda"
        # By trunk and branch, as the caller numbers them: the slot of the branch. None if both numberings are equal.
        self._slots: list[list[Slot]] | None = None
        self._steps_left = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BWV: Tensor | None = None  # of the last step; the CUDA graph writes them here

    def resume(self, known: int, tokens: Sequence[int]) -> Tensor:
        self._graph = self._logits_BWV = self._slots = None
        self._steps_left = 0
        return super().resume(known, tokens)

    def branch(self, indices: Sequence[Sequence[int]]) -> list[int]:
        rows = [row for row, branches in enumerate(indices) if branches]
        slots = [[self._slots[row][index] if self._slots else (row, index) for index in indices[row]] for row in rows]
        used = [slot for branches in slots for slot in branches]
        forked = len(set(used)) < len(used)
        if not self._steps_left or forked or len(used) <= MIN_USED * self.position_BW.numel():
            slots = self._lay_out(slots)
        self._slots = slots
        return rows

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        assert self._slots is not None, "branch() comes first"
        rows, width = len(tokens), max(map(len, tokens))
        ids_BW = torch.zeros(self._ids_BW.shape, dtype=torch.int64)
        slot_2RW = torch.zeros(2, rows, width, dtype=torch.int64)
        for row, branches in enumerate(self._slots):
            for number, (slot, token) in enumerate(zip(branches, tokens[row], strict=True)):
                ids_BW[slot] = token
                slot_2RW[:, row, number] = torch.tensor(slot)
        self._ids_BW.copy_(ids_BW)
        self._steps_left -= 1
        if self._graph is None and self._logits_BWV is not None and self.uses_graph:
            self._capture()
        if self._graph is None:
            self._logits_BWV = self._step()
        else:
            self._graph.replay()
        assert self._logits_BWV is not None
        slot_2RW = slot_2RW.to(self.device)
        return self._logits_BWV[slot_2RW[0], slot_2RW[1]]

    def _lay_out(self, slots: list[list[Slot]]) -> list[list[Slot]]:
        """Keep the branches in `slots` and the tokens that they attend to, allocate capacity, and return new slots."""
        self._graph = self._logits_BWV = None  # free their memory first
        kept_branches: list[list[int]] = [[] for _ in range(len(self.position_BW))]
        for branches in slots:
            for row, index in branches:
                kept_branches[row].append(index)
        kept = self._branch(kept_branches, min_used=1.0)
        rows, width, used = self.visible_BWK.shape
        capacity = -(-(used + width * STEPS_AHEAD) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self._steps_left = (capacity - used) // width
        self.visible_BWK = torch.nn.functional.pad(self.visible_BWK, (0, capacity - used))
        self._target_W = torch.arange(used - width, used, device=self.device)  # as if one step had run before the first
        self._ids_BW = torch.zeros(rows, width, dtype=torch.int64, device=self.device)
        for layer in self.cache.layers:
            layer.reserve(capacity, self._target_W)
        return [[(kept.index(branches[0][0]), number) for number in range(len(branches))] for branches in slots]

    @torch.no_grad()
    def _step(self) -> Tensor:
        """Run one token per branch; return the logits (B, W, V). Only tensors on the device change."""
        rows, width = self._ids_BW.shape
        self._target_W.add_(width)
        self.visible_BWK.scatter_(2, self._target_W[None, :, None].expand(rows, -1, 1), True)
        logits_BWV = self._forward(self._ids_BW, self.position_BW, self.visible_BWK, width)
        self.position_BW.add_(1)
        return logits_BWV

    def _capture(self) -> None:
        """Capture a step as a CUDA graph. If that fails, this and all later steps run eagerly."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits_BWV = self._step()
        except RuntimeError as error:  # the network synchronizes with its device
            self.uses_graph = False
            reason = " ".join(str(error).split())[:120]
            log.info("Decoding without a CUDA graph, limited by kernel launches: %s.", reason)
            return
        self._graph, self._logits_BWV = graph, logits_BWV
