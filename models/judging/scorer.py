"""Computes P(accepted) of proposals after histories, without a Trainer.

Shape legend: R rows, D hidden size, C classes.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from datamodules.batching.layouts import Inputs
from datamodules.batching.prefix_tree import Integers
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import EvaluationSampler
from datamodules.corpus.traces import Pair
from datamodules.errors import UserError
from datamodules.prompting.templates import render_proposal
from models.decoding.prefix_cache import PrefixCache, cache_problem
from models.judging.weights import Weights, best_device
from models.learning.calibration import calibrated
from models.learning.reward_classifier import RewardClassifier
from models.networks.devices import as_float64
from models.networks.heads import classify_states


class Scorer:
    """A trained reward classifier that stays on its device between calls.

    Pairs with several histories are computed as in training, as prefix trees if the backbone supports them. Pairs that
    all have the same history use a KV cache that is kept between calls, so a session computes each event once. Each
    session has its own cache.

    Args:
        weights: A trained reward classifier and the state of its data module.
        device: The device of the weights. If None, a GPU if there is one.

    Attributes:
        truncated: Number of rows so far that lost their oldest events, because they were longer than `data.max_length`.

    Examples:
        >>> from pathlib import Path
        >>> from datamodules.corpus.records import Event
        >>> from models.judging.weights import load_weights
        >>> scorer = Scorer(load_weights((RewardClassifier,), Path("runs/reward-tiny/0"), "path"))
        >>> history = (Event(time="1717377997", event="The user opens parse_rows.py."),)
        >>> probabilities = scorer.score([Pair(history, "Explain the file."), Pair(history, None)])
        >>> [0 < probability < 1 for probability in probabilities]
        [True, True]
    """

    def __init__(self, weights: Weights[RewardClassifier], device: torch.device | None = None) -> None:
        self.weights = weights
        self.device = device or best_device()
        weights.model.eval()
        self.data = RewardDataModule.from_state(weights.state)
        self.truncated = 0
        self._layout = self.data.layout
        self._checked_lengths = (0, 0)  # tokens of the longest row and of the largest tree of the last self-check
        self._can_cache = False  # whether a kept KV cache works with this network
        self._caches: dict[str, PrefixCache] = {}  # by session

    def score(self, pairs: Sequence[Pair], session: str = "") -> list[float]:
        """Return the calibrated P(accepted) of each pair of a history and a proposal.

        Args:
            pairs: The pairs.
            session: The session whose cache is used if all pairs have the same history. `forget` frees it.

        Raises:
            UserError: Instructions and a proposal are longer than `data.max_length`, or a probability is NaN.
        """
        if not pairs:
            return []
        model, rows = self.weights.model, [self.row_of(pair) for pair in pairs]
        if model.network.device != self.device:  # type: ignore[union-attr]
            model.to(self.device)
        one_history = all(pair.history == pairs[0].history for pair in pairs)
        self._choose_layout(rows, one_history)
        with torch.inference_mode():
            use_cache = one_history and self._can_cache
            logits_RC = self._with_cache(rows, session) if use_cache else self._batched(rows)
            probability_R = as_float64(logits_RC.float().cpu()).softmax(-1)[:, 1]
        if not torch.isfinite(probability_R).all():
            raise UserError(
                f"{self.weights.source}: a probability is NaN",
                "Use an earlier checkpoint.",
            )
        return calibrated(probability_R, model.temperature).tolist()

    def release(self) -> None:
        """Free the device memory. The next call moves the weights back to the device."""
        self._caches.clear()
        self.weights.model.cpu()

    def forget(self, session: str) -> None:
        """Free the cache of a session that has ended."""
        self._caches.pop(session, None)

    def row_of(self, pair: Pair) -> Integers:
        """Return the token ids of a pair, (T,) int64."""
        data = self.data
        recent = pair.history[-data.max_length :]  # older events cannot fit: an event has at least one token
        where = pair.where or f"a proposal after {len(pair.history)} events"
        found = data.row_tokenizer.encode(recent, [render_proposal(data.template, pair.proposal)], where)
        self.truncated += found.truncated or len(recent) < len(pair.history)
        return data.without_padding_at_the_end(np.array(found.input_ids))

    def _choose_layout(self, rows: Sequence[Integers], one_history: bool) -> None:
        """Choose the layout with self-checks, unless earlier ones had rows and trees at least as large as these.

        Calls with one history, and repeated self-checks, use the maximum sizes, because later rows may be longer.
        """
        longest, largest = max(map(len, rows)), min(self.data.token_budget, sum(map(len, rows)))
        if longest <= self._checked_lengths[0] and largest <= self._checked_lengths[1]:
            return
        if one_history or any(self._checked_lengths):
            longest, largest = self.data.max_length, self.data.token_budget
        self._checked_lengths = longest, largest
        model, data = self.weights.model, self.data
        assert model.network is not None, "a loaded model has weights"
        data.layout = self._layout
        model.choose_layout(data, longest, largest)
        self._can_cache = data.layout == "tree" and cache_problem(model.network, longest) is None

    def _with_cache(self, rows: Sequence[Integers], session: str) -> Tensor:
        """Return the logits (R, C) of rows with the same history, computed with the session's KV cache."""
        network = self.weights.model.network
        assert network is not None, "a loaded model has weights"
        cache = self._caches.setdefault(session, PrefixCache(network))
        return classify_states(network, cache.states([row.tolist() for row in rows]))

    def _batched(self, rows: Sequence[Integers]) -> Tensor:
        """Return the logits (R, C) of any rows, computed in micro-batches as in an evaluation."""
        layout = self.data.layout_of(cast("Sequence[Sequence[int]]", rows))
        parts: list[Tensor] = []
        order: list[int] = []
        for (micro_batch,) in EvaluationSampler(layout, len(rows)):
            laid_out = layout.lay_out(micro_batch.rows)
            inputs = {name: value.to(self.device) for name, value in cast("dict[str, Tensor]", laid_out.inputs).items()}
            parts.append(self.weights.model(cast(Inputs, inputs)))
            order += laid_out.rows
        return torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]
