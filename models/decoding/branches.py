"""Branches of one cache: tokens that go on from several places of what has been read once.

What a branch sees is a matter of the attention mask alone: the trunk up to where it leaves it, and itself.

Shape legend: B trunks side by side, S steps of a trunk, W branches of a trunk, O tokens of the opening, T of a trunk,
K tokens in the cache, Q tokens read at once, N answers, R rows, D hidden size, V tokens of the vocabulary.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from models.networks.attention import BLOCKWISE, GROUPED, register
from models.networks.tree_reading import attention_window
from models.networks.trials import (
    FEW,
    LEAST,
    NO_DIFFERENCE,
    difference_problem,
    finely_tried,
    random_tokens,
    relative_difference,
    tried,
    uncompiled,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKED_ATTENTIONS = ("sdpa", BLOCKWISE, GROUPED, "eager")  # that take any mask for a few tokens after many
GROWTH = 1.25  # by how much the memory of a cache is enlarged when it is full
BRANCHES = 16  # of a trial
READ = 2  # tokens of an answer that a trial reads
WASTE = 0.5  # a cache of which less than this is still seen is made smaller
OTHER_LOGITS = "an answer's logits are others than those after its prompt"
log = logging.getLogger("proactive")


@contextlib.contextmanager
def reading_branches(network: "PreTrainedModel") -> Iterator[None]:
    """Within it, a network is in evaluation mode and has an attention that takes the masks of branches."""
    training, attention = network.training, network.config._attn_implementation
    network.eval()
    try:
        _attend_to_branches(network)
        yield
    finally:
        network.set_attn_implementation(attention)
        network.train(training)


def _attend_to_branches(network: "PreTrainedModel") -> None:
    """Give a network an attention that takes any mask, and on a GPU one that does not copy keys for each head.

    FlexAttention, which trees are read with, would be compiled for each length.
    """
    if network.config._attn_implementation == "flex_attention":
        try:
            network.set_attn_implementation("sdpa")
        except ValueError:  # it has more in its attention than sdpa can
            network.set_attn_implementation("eager")
    on_gpu = network.get_input_embeddings().weight.device.type == "cuda"
    if on_gpu and network.config._attn_implementation == "sdpa":
        register()
        network.set_attn_implementation(GROUPED)


def attention_mask(network: "PreTrainedModel", visible_BQK: Tensor) -> Tensor:
    """Which keys each query sees, (B, Q, K) bool, as the network's attention takes it: (B, 1, Q, K)."""
    mask_B1QK = visible_BQK[:, None]
    if network.config._attn_implementation != "eager":
        return mask_B1QK
    lowest = torch.finfo(network.dtype).min  # eager adds the mask to its scores
    return torch.zeros_like(mask_B1QK, dtype=network.dtype).masked_fill(~mask_B1QK, lowest)


def cache_option(network: torch.nn.Module) -> str:
    """What a network calls its cache: transformers renamed it."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in memory with room to grow, so that a token more does not copy all before it."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve nothing yet."""
        super().lazy_initialization(key_states, value_states)
        self._room = [key_states[..., :0, :], value_states[..., :0, :]]
        self._places: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; keys and values of all there are."""
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
        """Keep some rows, and some of their tokens in the order given."""
        at = row_B[:, None], slice(None), token_BK
        self._room = [states[at].transpose(1, 2) for states in (self.keys, self.values)]
        self.keys, self.values = self._room
        self._places = None

    def crop(self, max_length: int) -> None:
        """Keep the first tokens alone."""
        self.keys, self.values = self.keys[..., :max_length, :], self.values[..., :max_length, :]
        self._places = None

    def reserve(self, tokens: int, places: Tensor) -> None:
        """Have room for so many tokens, and put new ones where `places` says, in place of behind the others.

        All of the room counts as keys and values; what is in none of its places yet is 0, and must not be seen.
        """
        used = self.get_seq_length()
        for place, states in enumerate((self.keys, self.values)):
            self._room[place] = states.new_zeros(*states.shape[:-2], tokens, states.shape[-1])
            self._room[place][..., :used, :] = states
        self.keys, self.values = self._room
        self._places = places


class BranchReader:
    """Reads tokens of branches into one cache a trunk.

    `visible_BWK` says which tokens of the cache each branch sees, `position_BW` where its next token stands. Trunks
    with fewer branches than others are filled up with a branch that no one asks for.
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
        """Read trunks, and the opening of each of their branches; logits (B, S, V) after it.

        In the cache the trunk comes first, then the openings' first tokens, then their second ones, and so on.

        Args:
            trunks: Token ids of each.
            ends: For each trunk, how many of its tokens each of its branches sees.
            opening: Token ids. Where there are none, each branch reads the last token it sees once more.
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
        """Go on with a single trunk: forget all behind its first `known` tokens, and read some more.

        Returns:
            Logits (1, 1, V) after the last token, where its one branch begins.
        """
        for layer in self.cache.layers:
            layer.crop(known)
        length = known + len(tokens)
        visible_1QK = torch.ones(1, len(tokens), length, dtype=torch.bool, device=self.device).tril(known)
        position_1Q = torch.arange(known, length, device=self.device)[None]
        self.visible_BWK, self.position_BW = visible_1QK[:, -1:], position_1Q[:, -1:] + 1
        return self._forward(self._padded([tokens], len(tokens)), position_1Q, visible_1QK, 1)

    def branch(self, places: Sequence[Sequence[int]]) -> list[int]:
        """Go on with some branches of each trunk, in the order given and any number of times each.

        Trunks without a branch, and tokens that no branch sees any more, are dropped once that makes the cache a
        good deal smaller.

        Returns:
            The places of the trunks that are left.
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
        """Read a token of each branch; logits (B, W, V) after it."""
        width = self.visible_BWK.shape[1]
        itself_BWW = torch.eye(width, dtype=torch.bool, device=self.device).expand(len(tokens), -1, -1)
        self.visible_BWK = torch.cat([self.visible_BWK, itself_BWW], 2)
        logits_BWV = self._forward(self._padded(tokens, width), self.position_BW, self.visible_BWK, width)
        self.position_BW = self.position_BW + 1
        return logits_BWV

    @torch.no_grad()
    def _forward(self, input_ids_BT: Tensor, position_BT: Tensor, visible_BTK: Tensor, kept: int) -> Tensor:
        """Logits (B, kept, V) of the last tokens."""
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
    """Which tokens each token of trunks and their openings sees, (B, T + O S, T + O S) bool.

    Args:
        end_BS: How many of the trunk's tokens each opening sees.
        length: T, trunks that are shorter filled up at their ends, which no one sees.
        depth: O; all openings' first tokens come first, then all their second ones, and so on.
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
    """Whether answers may branch off one cache; says why not, if not. See `branch_problem`."""
    problem = branch_problem(network, longest)
    if problem:
        log.info("Each answer is generated from its whole prompt, which is slow: %s.", problem)
    return problem is None


def branch_problem(network: "PreTrainedModel", longest: int) -> str | None:
    """What keeps answers from branching off one cache; None if nothing does.

    It is tried, first on a few tokens, then on as many as the prompts have, as for trees.

    Args:
        network: A causal language model of transformers.
        longest: Tokens of the longest prompt and its answer.
    """
    attention = network.config._attn_implementation
    if attention not in MASKED_ATTENTIONS:
        return f"attention {attention} takes no mask of our own"
    window = attention_window(network.config)
    if window is not None and window < longest:
        return f"its layers see {window} tokens back, and prompts with their answers have up to {longest}"
    longest = max(longest, LEAST)

    def at_length() -> str | None:
        problem = _misread_long_trunk(network, longest) or _misread_many_branches(network, longest)
        return problem and f"{problem}, with prompts and answers of up to {longest} tokens"

    return tried(network, "branches", lambda: _misread(network) or finely_tried(network, at_length))


def _misread(network: "PreTrainedModel") -> str | None:
    """How the logits of branches differ from those of their prompts, or None."""
    tokens = random_tokens(network, 16)
    first, left, other, right = (tokens[start : start + 4] for start in range(0, 16, 4))
    trunk, opening = [*first, *left], first[:2]

    def read(event: list[int], beside: list[int]) -> Tensor:
        """Logits of a branch after `left`, with an event after it and another branch beside it."""
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
    """The same where branches leave a trunk at its beginning, half-way and at its end, to be as long as the longest."""
    end = longest - FEW - READ
    return _misread_branches(network, random_tokens(network, end), [min(FEW, end), (end + 1) // 2, end], FEW)


def _misread_many_branches(network: "PreTrainedModel", longest: int) -> str | None:
    """The same where many branches leave a short trunk, to have together twice as many tokens as the longest prompt."""
    depth = max(2 * longest // BRANCHES, 1)
    ends = [1 + branch % FEW for branch in range(BRANCHES)]
    return _misread_branches(network, random_tokens(network, FEW), ends, depth)


def _misread_branches(network: "PreTrainedModel", trunk: list[int], ends: list[int], depth: int) -> str | None:
    """How branches with openings of so many tokens differ from their prompts: the first, a middle and the last one."""
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
    """The last logits (kept, V) of a prompt by itself."""
    prompt_1T = torch.tensor([prompt], device=network.get_input_embeddings().weight.device)
    options = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    return network(input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), **options).logits[0, -kept:]
