"""The agent's answers after each event of a trace, in one pass over the trace.

The keys and values of a trace's tokens, its trunk, are computed once. The answer after an event is a branch: it sees
the trunk up to that event, the opening and itself. All branches of several trunks are extended side by side, a token
each at a time, and what they see is a matter of the attention mask alone.

Shape legend: B trunks side by side, S steps of a trunk, W branches of a trunk, O tokens of the opening, T of a trunk,
K tokens in the cache, N answers, V tokens of the vocabulary.
"""

import inspect
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from datamodules.errors import UserError
from datamodules.prompts import truncate
from models.attention import BLOCKWISE, GROUPED, register
from models.backbone import position_room
from models.grammar import AnswerGrammar
from models.tree import attention_window
from models.trials import (
    FEW,
    LEAST,
    NO_DIFFERENCE,
    finely_tried,
    random_tokens,
    relative_difference,
    tolerance,
    tried,
    uncompiled,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedModel

Trace = Sequence[Sequence[int]]  # token ids of the instructions and of each event
MASKED_ATTENTIONS = ("sdpa", BLOCKWISE, GROUPED, "eager")  # that take any mask for a few tokens after many
GROWTH = 1.25  # by how much the memory of a cache is enlarged when it is full
BRANCHES = 16  # of a trial
READ = 2  # tokens of an answer that a trial reads
WASTE = 0.5  # a cache of which less than this is still seen is made smaller
log = logging.getLogger("proactive")


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer to a trace's first `step` events.

    `token_ids` come without the end token. An answer is not `finished` if it reached the greatest number of tokens;
    with a grammar, its `token_ids` then end in a closing that the network has not written.
    """

    trace: int
    step: int
    candidate: int
    token_ids: list[int]
    finished: bool


def generate_answers(
    network: "PreTrainedModel",
    traces: Sequence[Trace],
    opening: Sequence[int],
    *,
    end_id: int,
    max_new_tokens: int,
    batch_size: int = 4,
    candidates: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    grammar: AnswerGrammar | None = None,
    max_length: int | None = None,
    wanted: Collection[tuple[int, int]] | None = None,
    branched: bool | None = None,
) -> Iterator[GeneratedAnswer]:
    """Generate the answers after the events of some traces, each when it is done, so in no particular order.

    The answers are those of `network.generate`, called for each prompt: instructions, events and opening. What is
    drawn for a token depends on the seed, the trace's number, the step, the candidate and the token's place alone, so
    the answers do not depend on what else is generated. The network is in evaluation mode until the last answer.

    Args:
        network: A causal language model of transformers.
        traces: Of each, the token ids of the instructions (with what the tokenizer puts before a text) and of each
            event.
        opening: Token ids between the last event and the answer.
        end_id: The token that ends an answer.
        max_new_tokens: Greatest number of tokens of an answer.
        batch_size: How many traces are read side by side.
        candidates: How many answers each step gets.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest token.
        seed: Of the draws.
        grammar: Holds the answers to JSON; None lets the network write what it likes.
        max_length: Tokens of prompt and answer together; the oldest events are dropped, as in training, where they
            would be more. As many as the network has positions for if None.
        wanted: The (trace, step) to answer; step k stands after event k, counted from 1. All of them if None.
        branched: Whether answers branch off one cache, or are generated each from its prompt; found out if None.

    Raises:
        UserError: Candidates would all be the same, or the instructions leave no room for an answer.
    """
    if candidates > 1 and not temperature:
        raise UserError(
            f"candidates: {candidates} answers at temperature 0 are {candidates} times the same one",
            "Set a temperature above 0, such as 0.7, or ask for one candidate.",
        )
    if temperature < 0:
        raise UserError(f"temperature: {temperature} is below 0", "Use 0 for the likeliest tokens, or more to draw.")
    writer = _Writer(end_id, max_new_tokens, temperature, seed, grammar)
    room = position_room(network.config) if max_length is None else max_length
    trunks = _trunks(traces, opening, wanted, room - max_new_tokens)
    return _generate_answers(network, trunks, opening, candidates, writer, batch_size, branched)


def _generate_answers(
    network: "PreTrainedModel",
    trunks: "Sequence[_Trunk]",
    opening: Sequence[int],
    candidates: int,
    writer: "_Writer",
    batch_size: int,
    branched: bool | None,
) -> Iterator[GeneratedAnswer]:
    longest = max((len(trunk.token_ids) for trunk in trunks), default=0) + len(opening) + writer.max_new_tokens
    training, attention = network.training, network.config._attn_implementation
    network.eval()
    try:
        _attend_to_branches(network)
        if branched is None and trunks:
            branched = can_branch(network, longest)
        if branched:
            for start in range(0, len(trunks), batch_size):
                yield from _side_by_side(network, trunks[start : start + batch_size], opening, candidates, writer)
        else:
            yield from _one_by_one(network, trunks, opening, candidates, writer)
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


@dataclass(frozen=True)
class _Trunk:
    """What some steps of a trace see of it; `end` says how many of its tokens each of them sees."""

    trace: int
    token_ids: list[int]
    end: dict[int, int]


def _trunks(
    traces: Sequence[Trace], opening: Sequence[int], wanted: Collection[tuple[int, int]] | None, limit: int
) -> list[_Trunk]:
    """The trunks of all wanted steps: one a trace, and one more wherever older events have to be dropped."""
    if wanted is None:
        wanted = [(trace, step) for trace, segments in enumerate(traces) for step in range(1, len(segments))]
    steps_of: dict[int, list[int]] = {}
    for trace, step in sorted(set(wanted)):
        if not (0 <= trace < len(traces) and 0 <= step < len(traces[trace])):
            raise ValueError(f"there is no step {step} of trace {trace}")
        steps_of.setdefault(trace, []).append(step)
    trunks = []
    for trace, trace_steps in steps_of.items():
        first, *events = traces[trace]
        if len(first) + len(opening) > limit:
            raise UserError(
                f"max_length: instructions and opening have {len(first) + len(opening)} tokens, and {limit} are left "
                "beside the answer",
                "Raise max_length, or lower max_new_tokens.",
            )
        by_dropped: dict[int, list[int]] = {}
        for step in trace_steps:
            older = max(step - limit, 0)  # an event has a token at least
            dropped = older + truncate([first, *events[older:step], opening], limit)[1]
            by_dropped.setdefault(dropped, []).append(step)
        for dropped, steps in by_dropped.items():
            lengths = np.cumsum([len(first), *map(len, events[dropped : steps[-1]])])
            token_ids = [token for part in (first, *events[dropped : steps[-1]]) for token in part]
            trunks.append(_Trunk(trace, token_ids, {step: int(lengths[step - dropped]) for step in steps}))
    return sorted(trunks, key=lambda trunk: (len(trunk.end), len(trunk.token_ids)))  # side by side pads least


@dataclass
class _Answer:
    """An answer under way."""

    trace: int
    step: int
    candidate: int
    draws: "np.ndarray[Any, Any]"
    matcher: "LLMatcher | None"
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    done: bool = False


@dataclass(frozen=True)
class _Writer:
    """Chooses the tokens of answers from logits."""

    end_id: int
    max_new_tokens: int
    temperature: float
    seed: int
    grammar: AnswerGrammar | None

    def start(self, trace: int, step: int, candidate: int) -> _Answer:
        # 24 bits each: below 1 also after a product in float64.
        draws = np.random.default_rng([self.seed, trace, step, candidate]).random(self.max_new_tokens, np.float32)
        return _Answer(trace, step, candidate, draws, self.grammar.start() if self.grammar else None)

    def extend(self, answers: Sequence[_Answer], logits_NV: Tensor) -> list[int]:
        """Add a token to each answer, or end it; the tokens."""
        tokens = self._choose(answers, logits_NV.float()).tolist()
        for answer, token in zip(answers, tokens, strict=True):
            answer.finished = token == self.end_id
            if not answer.finished:
                answer.token_ids.append(token)
                if self.grammar and answer.matcher:
                    answer.finished = self.grammar.advance(answer.matcher, token)
            answer.done = answer.finished or len(answer.token_ids) == self.max_new_tokens
        return tokens

    def _choose(self, answers: Sequence[_Answer], logits_NV: Tensor) -> Tensor:
        if self.grammar:
            matchers = [a.matcher for a in answers if a.matcher]
            allowed_NV = self.grammar.allowed(matchers, logits_NV.shape[1], logits_NV.device)
            logits_NV = logits_NV.masked_fill_(~allowed_NV, -torch.inf)
        if not self.temperature:
            return logits_NV.argmax(-1)
        share_NV = (logits_NV.double() / self.temperature).softmax(-1).cumsum(-1)
        draws = torch.tensor([a.draws[len(a.token_ids)] for a in answers], dtype=torch.float64)
        draw_N1 = draws[:, None].to(logits_NV.device) * share_NV[:, -1:]
        return torch.searchsorted(share_NV, draw_N1, right=True)[:, 0]

    def result(self, answer: _Answer) -> GeneratedAnswer:
        token_ids = answer.token_ids
        if self.grammar and not answer.finished:
            token_ids = self.grammar.close(token_ids)
        return GeneratedAnswer(answer.trace, answer.step, answer.candidate, token_ids, answer.finished)


def _side_by_side(
    network: "PreTrainedModel", trunks: Sequence[_Trunk], opening: Sequence[int], candidates: int, writer: _Writer
) -> Iterator[GeneratedAnswer]:
    """The answers of some trunks, as branches of their caches."""
    reader = _reader(network)
    logits_BSV = reader.begin([t.token_ids for t in trunks], [list(t.end.values()) for t in trunks], opening)
    # Of each trunk: the answers under way, each with the place of its logits and of what it sees.
    live = [
        [(place, writer.start(t.trace, step, n)) for place, step in enumerate(t.end) for n in range(candidates)]
        for t in trunks
    ]
    logits_BWV = logits_BSV
    while True:
        places = torch.tensor([(row, place) for row, answers in enumerate(live) for place, _ in answers])
        answers = [answer for answers in live for _, answer in answers]
        writer.extend(answers, logits_BWV[places[:, 0], places[:, 1]])
        yield from (writer.result(answer) for answer in answers if answer.done)
        live = [[(place, answer) for place, answer in answers if not answer.done] for answers in live]
        if not any(live):
            return
        rows = reader.branch([[place for place, _ in answers] for answers in live])
        live = [[(place, answer) for place, (_, answer) in enumerate(live[row])] for row in rows]
        logits_BWV = reader.read([[answer.token_ids[-1] for _, answer in answers] for answers in live])


def _reader(network: "PreTrainedModel") -> "BranchReader":
    """What reads branches: on a GPU, in steps that can be recorded and replayed."""
    from models.fixed_branches import FixedBranchReader

    fixed = network.get_input_embeddings().weight.device.type == "cuda"
    return FixedBranchReader(network) if fixed else BranchReader(network)


def _one_by_one(
    network: "PreTrainedModel", trunks: Sequence[_Trunk], opening: Sequence[int], candidates: int, writer: _Writer
) -> Iterator[GeneratedAnswer]:
    """The same with `generate` for each answer: what serves networks whose caches hold no branches."""
    for trunk in trunks:
        for step, end in trunk.end.items():
            for candidate in range(candidates):
                answer = writer.start(trunk.trace, step, candidate)
                _generate(network, [*trunk.token_ids[:end], *opening], answer, writer)
                yield writer.result(answer)


@torch.no_grad()
def _generate(network: "PreTrainedModel", prompt: list[int], answer: _Answer, writer: _Writer) -> None:
    from transformers import GenerationConfig

    def choose(input_ids_1T: Tensor, logits_1V: Tensor) -> Tensor:
        (token,) = writer.extend([answer], logits_1V)
        only_1V = torch.full_like(logits_1V, -torch.inf)
        only_1V[0, token] = 0.0
        return only_1V

    def done(input_ids_1T: Tensor, scores: Any) -> Tensor:
        return torch.tensor([answer.done], device=input_ids_1T.device)

    input_ids_1T = torch.tensor([prompt], device=network.get_input_embeddings().weight.device)
    own, network.generation_config = network.generation_config, GenerationConfig()  # no penalties of the backbone's
    try:
        with uncompiled(network):
            network.generate(
                input_ids_1T,
                attention_mask=torch.ones_like(input_ids_1T),
                do_sample=False,
                max_new_tokens=writer.max_new_tokens,
                logits_processor=[choose],
                stopping_criteria=[done],
            )
    finally:
        network.generation_config = own


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
        mask_B1TK = visible_BTK[:, None]
        if self.network.config._attn_implementation == "eager":  # adds the mask to its scores
            lowest = torch.finfo(self.network.dtype).min
            mask_B1TK = torch.zeros_like(mask_B1TK, dtype=self.network.dtype).masked_fill(~mask_B1TK, lowest)
        options: dict[str, Any] = {"logits_to_keep": kept} if "logits_to_keep" in self._options else {}
        options["cache" if "cache" in self._options else "past_key_values"] = self.cache  # transformers renamed it
        with uncompiled(self.network):
            output = self.network(
                input_ids=input_ids_BT,
                position_ids=position_BT,
                attention_mask=mask_B1TK,
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

    It is tried, first on a few tokens, then on as many as the prompts have, as `models.tree.tree_problem` does.

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
    return _difference(network, found, _last_logits(network, [*trunk, *opening, *right[:2]], 2))


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
    return _difference(network, found_SOV[chosen].flatten(0, 1), torch.cat(expected))


@torch.no_grad()
def _last_logits(network: "PreTrainedModel", prompt: list[int], kept: int) -> Tensor:
    """The last logits (kept, V) of a prompt by itself."""
    prompt_1T = torch.tensor([prompt], device=network.get_input_embeddings().weight.device)
    options = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    return network(input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), **options).logits[0, -kept:]


def _difference(network: "PreTrainedModel", found_NV: Tensor, expected_NV: Tensor) -> str | None:
    difference = relative_difference(found_NV, expected_NV)
    if difference <= tolerance(network, found_NV.dtype):
        return None
    return f"an answer's logits are others than those after its prompt (relative difference {difference:.1e})"
