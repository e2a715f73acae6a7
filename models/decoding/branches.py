"""A KV cache with branches: several continuations share the keys and values of one prompt, the trunk.

The attention mask alone separates branches: a branch attends to the trunk up to its start, and to itself.

Shape legend: B trunks in a batch, S steps per trunk, W branches per trunk, O tokens of an opening, T of a trunk,
K tokens in the cache, Q query tokens, N answers, D hidden size, V vocabulary size.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from models.networks.attention import GROUPED, MASKED_ATTENTIONS, register
from models.networks.trials import (
    FEW,
    LEAST,
    NO_DIFFERENCE,
    difference_problem,
    random_tokens,
    reading_problem,
    relative_difference,
    uncompiled,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWTH = 1.25  # a full cache grows by this factor
BRANCHES = 16  # in a trial
READ = 2  # answer tokens that a trial reads
WASTE = 0.5  # a cache is compacted if less than this share of it is still attended to
OTHER_LOGITS = "the logits of an answer differ from those after its prompt"
log = logging.getLogger("proactive")


@contextlib.contextmanager
def reading_branches(network: "PreTrainedModel") -> Iterator[None]:
    """Set evaluation mode and an attention that accepts branch masks; restore both afterwards."""
    training, attention = network.training, network.config._attn_implementation
    network.eval()
    try:
        _attend_to_branches(network)
        yield
    finally:
        network.set_attn_implementation(attention)
        network.train(training)


def _attend_to_branches(network: "PreTrainedModel") -> None:
    """Select an attention that accepts any mask, and on a GPU one that does not copy keys for each head.

    FlexAttention, which training uses for trees, would compile again for each length.
    """
    if network.config._attn_implementation == "flex_attention":
        try:
            network.set_attn_implementation("sdpa")
        except ValueError:  # its attention has features that sdpa lacks
            network.set_attn_implementation("eager")
    on_gpu = network.get_input_embeddings().weight.device.type == "cuda"
    if on_gpu and network.config._attn_implementation == "sdpa":
        register()
        network.set_attn_implementation(GROUPED)


def attention_mask(network: "PreTrainedModel", visible_BQK: Tensor) -> Tensor:
    """Convert a mask, (B, Q, K) bool, True where a query attends to a key, to the form of the network: (B, 1, Q, K)."""
    mask_B1QK = visible_BQK[:, None]
    if network.config._attn_implementation != "eager":
        return mask_B1QK
    lowest = torch.finfo(network.dtype).min  # eager adds the mask to the scores
    return torch.zeros_like(mask_B1QK, dtype=network.dtype).masked_fill(~mask_B1QK, lowest)


def cache_option(network: torch.nn.Module) -> str:
    """The name of the forward argument for the cache, which transformers has renamed."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


class GrowingLayer(DynamicLayer):
    """A layer's keys and values with spare capacity, so that one more token does not copy all previous ones."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without capacity."""
        super().lazy_initialization(key_states, value_states)
        self._room = [key_states[..., :0, :], value_states[..., :0, :]]
        self._places: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._places is not None:
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room.index_copy_(2, self._places, states)
            return self._room[0], self._room[1]
        used = self.get_seq_length()
        needed = used + key_states.shape[-2]
        for place, states in enumerate((key_states, value_states)):
            if self._room[place].shape[-2] < needed:
                larger = states.new_empty(*states.shape[:-2], int(needed * GROWTH), states.shape[-1])
                larger[..., :used, :] = self._room[place][..., :used, :]
                self._room[place] = larger
            self._room[place][..., used:needed, :] = states
        self.keys, self.values = (states[..., :needed, :] for states in self._room)
        return self.keys, self.values

    def keep(self, row_B: Tensor, token_BK: Tensor) -> None:
        """Keep the given batch rows, and of each the given tokens in the given order."""
        at = row_B[:, None], slice(None), token_BK
        self._room = [states[at].transpose(1, 2) for states in (self.keys, self.values)]
        self.keys, self.values = self._room
        self._places = None

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens."""
        self.keys, self.values = self.keys[..., :max_length, :], self.values[..., :max_length, :]
        self._places = None

    def reserve(self, tokens: int, places: Tensor) -> None:
        """Allocate a fixed number of tokens, and write new tokens at the indices in `places` instead of appending them.

        All allocated tokens count as keys and values. Those not written yet are 0, and the mask must hide them.
        """
        used = self.get_seq_length()
        for place, states in enumerate((self.keys, self.values)):
            self._room[place] = states.new_zeros(*states.shape[:-2], tokens, states.shape[-1])
            self._room[place][..., :used, :] = states
        self.keys, self.values = self._room
        self._places = places


class BranchReader:
    """Runs forward passes over branches, with one cache per trunk.

    `visible_BWK` is the mask of each branch over the cache, `position_BW` the position of its next token. Trunks with
    fewer branches than others are padded with unused branches.
    """

    def __init__(self, network: "PreTrainedModel") -> None:
        self.network = network
        self.device = network.get_input_embeddings().weight.device
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)
        self.visible_BWK = torch.empty(0)
        self.position_BW = torch.empty(0)
        self._options = inspect.signature(network.forward).parameters
        self._cache_option = cache_option(network)

    def begin(self, trunks: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], opening: Sequence[int]) -> Tensor:
        """Run trunks and the opening of each branch; return the logits (B, S, V) after each opening.

        The cache holds the trunk, then the first token of every opening, then the second token of every opening, ...

        Args:
            trunks: Token ids of each trunk.
            ends: For each trunk, the number of trunk tokens that each branch attends to.
            opening: Token ids. If empty, each branch repeats the last trunk token that it attends to.
        """
        length, width, depth = max(map(len, trunks)), max(map(len, ends)), max(len(opening), 1)
        trunk_BT, end_BS = self._padded(trunks, length), self._padded(ends, width)
        if opening:
            opening_BSO = torch.tensor(opening, device=self.device).expand(*end_BS.shape, -1)
        else:
            end_BS = (end_BS - 1).clamp(min=0)
            opening_BSO = trunk_BT.gather(1, end_BS)[:, :, None]
        position_BT = torch.arange(length, device=self.device).expand(len(trunks), -1)
        position_BOS = end_BS[:, None] + torch.arange(depth, device=self.device)[:, None]
        visible_BQK = _openings_after_trunk(end_BS, length, depth)
        self.visible_BWK, self.position_BW = visible_BQK[:, -width:], end_BS + depth
        input_ids_BQ = torch.cat([trunk_BT, opening_BSO.transpose(1, 2).flatten(1)], 1)
        return self._forward(input_ids_BQ, torch.cat([position_BT, position_BOS.flatten(1)], 1), visible_BQK, width)

    def resume(self, known: int, tokens: Sequence[int]) -> Tensor:
        """Continue a single trunk: crop the cache to its first `known` tokens, then run `tokens`.

        Returns:
            Logits (1, 1, V) after the last token, where its only branch starts.
        """
        for layer in self.cache.layers:
            layer.crop(known)
        length = known + len(tokens)
        visible_1QK = torch.ones(1, len(tokens), length, dtype=torch.bool, device=self.device).tril(known)
        position_1Q = torch.arange(known, length, device=self.device)[None]
        self.visible_BWK, self.position_BW = visible_1QK[:, -1:], position_1Q[:, -1:] + 1
        return self._forward(self._padded([tokens], len(tokens)), position_1Q, visible_1QK, 1)

    def branch(self, places: Sequence[Sequence[int]]) -> list[int]:
        """Select branches of each trunk by index, in the given order; a repeated index forks the branch.

        Trunks without branches, and tokens that no branch attends to, are dropped if that makes the cache much smaller.

        Returns:
            The indices of the remaining trunks.
        """
        return self._branch(places, WASTE)

    def _branch(self, places: Sequence[Sequence[int]], waste: float) -> list[int]:
        row_B1 = torch.arange(len(places), device=self.device)[:, None]
        place_BW = self._padded(places, max(map(len, places)))
        self.visible_BWK, self.position_BW = self.visible_BWK[row_B1, place_BW], self.position_BW[row_B1, place_BW]
        rows = [row for row, branches in enumerate(places) if branches]
        row_B = torch.tensor(rows, device=self.device)
        seen_BK = self.visible_BWK[row_B].any(1)
        left = int(seen_BK.sum(1).max())
        if len(rows) * left > waste * len(places) * seen_BK.shape[1]:
            return list(range(len(places)))
        token_BK = seen_BK.int().argsort(dim=1, descending=True, stable=True)[:, :left]
        for layer in self.cache.layers:
            layer.keep(row_B, token_BK)
        self.position_BW = self.position_BW[row_B]
        self.visible_BWK = self.visible_BWK[row_B].gather(2, token_BK[:, None].expand(-1, place_BW.shape[1], -1))
        return rows

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Run one token per branch; return the logits (B, W, V) after it."""
        width = self.visible_BWK.shape[1]
        itself_BWW = torch.eye(width, dtype=torch.bool, device=self.device).expand(len(tokens), -1, -1)
        self.visible_BWK = torch.cat([self.visible_BWK, itself_BWW], 2)
        logits_BWV = self._forward(self._padded(tokens, width), self.position_BW, self.visible_BWK, width)
        self.position_BW = self.position_BW + 1
        return logits_BWV

    @torch.no_grad()
    def _forward(self, input_ids_BT: Tensor, position_BT: Tensor, visible_BTK: Tensor, kept: int) -> Tensor:
        """The logits (B, kept, V) of the last `kept` tokens."""
        options: dict[str, Any] = {"logits_to_keep": kept} if "logits_to_keep" in self._options else {}
        options[self._cache_option] = self.cache
        with uncompiled(self.network):
            output = self.network(
                input_ids=input_ids_BT,
                position_ids=position_BT,
                attention_mask=attention_mask(self.network, visible_BTK),
                use_cache=True,
                **options,
            )
        return output.logits[:, -kept:]

    def _padded(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)


def _openings_after_trunk(end_BS: Tensor, length: int, depth: int) -> Tensor:
    """The attention mask of trunks followed by their openings, (B, T + O S, T + O S) bool.

    Args:
        end_BS: The number of trunk tokens that each opening attends to.
        length: T. Shorter trunks are padded at the end, and no token attends to the padding.
        depth: O. The first tokens of all openings come first, then the second tokens, ...
    """
    device, (rows, width) = end_BS.device, end_BS.shape
    trunk_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    sees_trunk_BST = torch.arange(length, device=device) < end_BS[:, :, None]
    earlier_OO = torch.ones(depth, depth, dtype=torch.bool, device=device).tril()
    own_QQ = torch.kron(earlier_OO, torch.eye(width, dtype=torch.bool, device=device))
    above_BTK = torch.nn.functional.pad(trunk_TT, (0, depth * width)).expand(rows, -1, -1)
    below_BQK = torch.cat([sees_trunk_BST.repeat(1, depth, 1), own_QQ.expand(rows, -1, -1)], 2)
    return torch.cat([above_BTK, below_BQK], 1)


def can_branch(network: "PreTrainedModel", longest: int) -> bool:
    """Whether the network can generate from a branched cache; logs the reason if not. See `branch_problem`."""
    problem = branch_problem(network, longest)
    if problem:
        log.info("Slow generation, one prompt at a time: %s.", problem)
    return problem is None


def branch_problem(network: "PreTrainedModel", longest: int) -> str | None:
    """The reason why a network cannot generate from a branched cache; None if it can.

    Trials compare logits, first on a few tokens, then at the length of the longest prompt; see `reading_problem`.

    Args:
        network: A causal language model of transformers.
        longest: Tokens of the longest prompt and its answer.
    """
    at_least = max(longest, LEAST)

    def long_trial() -> str | None:
        problem = _misread_long_trunk(network, at_least) or _misread_many_branches(network, at_least)
        return problem and f"{problem}, for prompts with answers of up to {at_least} tokens"

    lengths = ("prompts with answers", longest)
    return reading_problem(network, "branches", MASKED_ATTENTIONS, lengths, lambda: _misread(network), long_trial)


def _misread(network: "PreTrainedModel") -> str | None:
    """The difference between the logits of branches and of whole prompts on a few tokens; None if they agree."""
    tokens = random_tokens(network, 16)
    first, left, other, right = (tokens[start : start + 4] for start in range(0, 16, 4))
    trunk, opening = [*first, *left], first[:2]

    def read(event: list[int], beside: list[int]) -> Tensor:
        """The logits of a branch after `left`, with another event after it and another branch beside it."""
        reader = BranchReader(network)
        reader.begin([[*trunk, *event], trunk[:5]], [[len(trunk), len(trunk) + len(event)], [5]], opening)
        logits = []
        for mine, its in zip(right[:2], beside[:2], strict=True):
            reader.branch([[0, 1], [0]])
            logits.append(reader.read([[mine, its], [its]])[0, 0])
        return torch.stack(logits)

    found, beside_other = read(right, left), read(other, right)
    if relative_difference(found, beside_other) > NO_DIFFERENCE:
        return "an answer depends on later events or on other answers"
    return difference_problem(network, found, _last_logits(network, [*trunk, *opening, *right[:2]], 2), OTHER_LOGITS)


def _misread_long_trunk(network: "PreTrainedModel", longest: int) -> str | None:
    """The same for a trunk of the greatest length, with branches at its start, middle and end."""
    end = longest - FEW - READ
    return _misread_branches(network, random_tokens(network, end), [min(FEW, end), (end + 1) // 2, end], FEW)


def _misread_many_branches(network: "PreTrainedModel", longest: int) -> str | None:
    """The same for a short trunk with many branches, which together have twice the tokens of the longest prompt."""
    depth = max(2 * longest // BRANCHES, 1)
    ends = [1 + branch % FEW for branch in range(BRANCHES)]
    return _misread_branches(network, random_tokens(network, FEW), ends, depth)


def _misread_branches(network: "PreTrainedModel", trunk: list[int], ends: list[int], depth: int) -> str | None:
    """The difference for the first, a middle and the last branch, with openings of `depth` tokens."""
    tokens, reader = random_tokens(network, depth + READ, seed=1), BranchReader(network)
    opening, answer = tokens[:depth], tokens[depth:]
    found = [reader.begin([trunk], [ends], opening)]
    for token in answer:
        reader.branch([range(len(ends))])
        found.append(reader.read([[token] * len(ends)]))
    found_SOV = torch.cat(found).transpose(0, 1)
    chosen = [0, len(ends) // 2, len(ends) - 1]
    expected = [_last_logits(network, [*trunk[: ends[branch]], *tokens], READ + 1) for branch in chosen]
    return difference_problem(network, found_SOV[chosen].flatten(0, 1), torch.cat(expected), OTHER_LOGITS)


@torch.no_grad()
def _last_logits(network: "PreTrainedModel", prompt: list[int], kept: int) -> Tensor:
    """The last `kept` logits (kept, V) of one prompt."""
    prompt_1T = torch.tensor([prompt], device=network.get_input_embeddings().weight.device)
    options = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    return network(input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), **options).logits[0, -kept:]
