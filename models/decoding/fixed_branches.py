"""Branches that are read in steps of fixed shapes, so that a GPU can replay them as one CUDA graph.

With a large network a step is a thousand small kernels, which a processor starts more slowly than a GPU does them.
Here the cache has room for some steps in advance, branches that have ended keep their places, and what a step reads
and where it writes lies in tensors that stay: so each step is the same kernels at the same addresses. The first step
runs as it is, the second is recorded, and from then on it is replayed. When the room is used up, or most places stand
for branches that have ended, all is laid out anew, and recorded again.

Shape legend: B trunks, W branches of a trunk, K tokens that the cache has room for, V tokens of the vocabulary.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.decoding.branches import WASTE, BranchReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS_AHEAD = 64  # for which there is room
EVEN = 64  # of which the room's tokens are a multiple, as kernels of attention like it
log = logging.getLogger("proactive")
Place = tuple[int, int]  # a trunk and a branch of it


class FixedBranchReader(BranchReader):
    """As `BranchReader`; where the caller's branches are in here is its own affair."""

    def __init__(self, network: "PreTrainedModel") -> None:
        super().__init__(network)
        self.records = self.device.type == "cuda"
        self._at: list[list[Place]] | None = None  # of the caller's trunks and branches; where they are if None
        self._steps_left = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BWV: Tensor | None = None  # of the last step; a recorded one writes them here

    def resume(self, known: int, tokens: Sequence[int]) -> Tensor:
        self._graph = self._logits_BWV = self._at = None
        self._steps_left = 0
        return super().resume(known, tokens)

    def branch(self, places: Sequence[Sequence[int]]) -> list[int]:
        rows = [row for row, branches in enumerate(places) if branches]
        at = [[self._at[row][place] if self._at else (row, place) for place in places[row]] for row in rows]
        live = [one for branches in at for one in branches]
        divided = len(set(live)) < len(live)  # a branch goes on as several
        if not self._steps_left or divided or len(live) <= WASTE * self.position_BW.numel():
            at = self._lay_out(at)
        self._at = at
        return rows

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        assert self._at is not None, "branch() comes first"
        rows, width = len(tokens), max(map(len, tokens))
        ids_BW = torch.zeros(self._ids_BW.shape, dtype=torch.int64)
        at_PRW = torch.zeros(2, rows, width, dtype=torch.int64)
        for row, branches in enumerate(self._at):
            for number, (place, token) in enumerate(zip(branches, tokens[row], strict=True)):
                ids_BW[place] = token
                at_PRW[:, row, number] = torch.tensor(place)
        self._ids_BW.copy_(ids_BW)
        self._steps_left -= 1
        if self._graph is None and self._logits_BWV is not None and self.records:
            self._record()
        if self._graph is None:
            self._logits_BWV = self._step()
        else:
            self._graph.replay()
        assert self._logits_BWV is not None
        at_PRW = at_PRW.to(self.device)
        return self._logits_BWV[at_PRW[0], at_PRW[1]]

    def _lay_out(self, at: list[list[Place]]) -> list[list[Place]]:
        """Drop all but some branches and what they see, and make room; where the branches are then."""
        self._graph = self._logits_BWV = None  # their memory is free for what follows
        here: list[list[int]] = [[] for _ in range(len(self.position_BW))]
        for branches in at:
            for row, place in branches:
                here[row].append(place)
        kept = self._branch(here, waste=1.0)
        rows, width, used = self.visible_BWK.shape
        room = -(-(used + width * STEPS_AHEAD) // EVEN) * EVEN
        self._steps_left = (room - used) // width
        self.visible_BWK = torch.nn.functional.pad(self.visible_BWK, (0, room - used))
        self._target_W = torch.arange(used - width, used, device=self.device)  # of the step before the first
        self._ids_BW = torch.zeros(rows, width, dtype=torch.int64, device=self.device)
        for layer in self.cache.layers:
            layer.reserve(room, self._target_W)
        return [[(kept.index(branches[0][0]), number) for number in range(len(branches))] for branches in at]

    @torch.no_grad()
    def _step(self) -> Tensor:
        """Read a token of each branch; logits (B, W, V) after it. All that it changes lies on the device."""
        rows, width = self._ids_BW.shape
        self._target_W.add_(width)
        self.visible_BWK.scatter_(2, self._target_W[None, :, None].expand(rows, -1, 1), True)
        logits_BWV = self._forward(self._ids_BW, self.position_BW, self.visible_BWK, width)
        self.position_BW.add_(1)
        return logits_BWV

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits_BWV = self._step()
        except RuntimeError as error:  # a network that waits for its device, or reads numbers off it
            self.records = False
            reason = " ".join(str(error).split())[:120]
            log.info("Each token takes as long as the processor needs to start its kernels: %s.", reason)
            return
        self._graph, self._logits_BWV = graph, logits_BWV
