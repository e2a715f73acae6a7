"""The agent's answers after each event of a trace, in one pass over the trace.

The keys and values of a trace's tokens, its trunk, are computed once. The answer after an event is a branch: it sees
the trunk up to that event, the opening and itself. All branches of several trunks are extended side by side, a token
each at a time, and what they see is a matter of the attention mask alone.

Shape legend: B trunks side by side, S steps of a trunk, W branches of a trunk, T tokens of a prompt, N answers,
V tokens of the vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from datamodules.batching.prefix_tree import common_prefix
from datamodules.errors import UserError
from datamodules.prompting.segments import truncate
from models.decoding.branches import BranchReader, can_branch, reading_branches
from models.decoding.grammar import AnswerGrammar
from models.networks.backbone import position_room
from models.networks.trials import uncompiled

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedModel

Trace = Sequence[Sequence[int]]  # token ids of the instructions and of each event


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
    streams: Sequence[int] | None = None,
) -> Iterator[GeneratedAnswer]:
    """Generate the answers after the events of some traces, each when it is done, so in no particular order.

    The answers are those of `network.generate`, called for each prompt: instructions, events and opening. What is
    drawn for a token depends on the seed, the trace's stream, the step, the candidate and the token's place alone, so
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
        streams: Of each trace the number, 0 or more, of its stream of random draws; its index if None.

    Raises:
        UserError: Candidates would all be the same, or the instructions leave no room for an answer.
    """
    refuse_impossible_draws(candidates, temperature)
    writer = AnswerWriter(end_id, max_new_tokens, temperature, seed, grammar)
    room = position_room(network.config) if max_length is None else max_length
    trunks = _trunks(traces, opening, wanted, room - max_new_tokens, streams)
    return _generate_answers(network, trunks, opening, candidates, writer, batch_size, branched)


def refuse_impossible_draws(candidates: int, temperature: float) -> None:
    """Raise a UserError for candidates that would all be the same, or a temperature below 0."""
    if candidates > 1 and not temperature:
        raise UserError(
            f"candidates: {candidates} answers at temperature 0 are {candidates} times the same one",
            "Set a temperature above 0, such as 0.7, or ask for one candidate.",
        )
    if temperature < 0:
        raise UserError(f"temperature: {temperature} is below 0", "Use 0 for the likeliest tokens, or more to draw.")


def _generate_answers(
    network: "PreTrainedModel",
    trunks: "Sequence[_Trunk]",
    opening: Sequence[int],
    candidates: int,
    writer: "AnswerWriter",
    batch_size: int,
    branched: bool | None,
) -> Iterator[GeneratedAnswer]:
    longest = max((len(trunk.token_ids) for trunk in trunks), default=0) + len(opening) + writer.max_new_tokens
    with reading_branches(network):
        if branched is None and trunks:
            branched = can_branch(network, longest)
        if branched:
            for start in range(0, len(trunks), batch_size):
                yield from _side_by_side(network, trunks[start : start + batch_size], opening, candidates, writer)
        else:
            yield from _one_by_one(network, trunks, opening, candidates, writer)


class AnswerStream:
    """The answers after one history that grows: what was read of it before is not read again.

    They are those of `generate_answers` for the same history.

    Args:
        network: As there.
        opening: As there.
        writer: Chooses the tokens of answers.
        candidates: How many answers each step gets.
        max_length: Tokens of prompt and answer together, as there.
        stream: The number, 0 or more, of the stream of random draws.
        branched: Whether the network's cache can hold branches, see `can_branch`.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        opening: Sequence[int],
        writer: "AnswerWriter",
        *,
        candidates: int,
        max_length: int,
        stream: int,
        branched: bool,
    ) -> None:
        refuse_impossible_draws(candidates, writer.temperature)
        self.network = network
        self.opening = opening
        self.writer = writer
        self.candidates = candidates
        self.max_length = max_length
        self.stream = stream
        self.branched = branched
        self._reader = _reader(network)
        self._read: list[int] = []  # the prompt whose keys and values the reader's cache begins with

    def answer(self, segments: Trace) -> list[GeneratedAnswer]:
        """The candidates after a history, in order; `segments` are the token ids of instructions and events."""
        step = len(segments) - 1
        limit = self.max_length - self.writer.max_new_tokens
        (trunk,) = _trunks([segments], self.opening, {(0, step)}, limit, [self.stream])
        with reading_branches(self.network):
            if not self.branched:
                return list(_one_by_one(self.network, [trunk], self.opening, self.candidates, self.writer))
            prompt = trunk.token_ids
            # Without an opening, the logits after the prompt are those of its last token, which is read again.
            known = min(common_prefix(self._read, prompt), len(prompt) - (not self.opening))
            logits_11V = self._reader.resume(known, [*prompt[known:], *self.opening])
            self._read = prompt
            answers = _extend(self._reader, [trunk], self.candidates, self.writer, logits_11V)
            return sorted(answers, key=lambda answer: answer.candidate)


@dataclass(frozen=True)
class _Trunk:
    """What some steps of a trace see of it; `end` says how many of its tokens each of them sees."""

    trace: int
    stream: int
    token_ids: list[int]
    end: dict[int, int]


def _trunks(
    traces: Sequence[Trace],
    opening: Sequence[int],
    wanted: Collection[tuple[int, int]] | None,
    limit: int,
    streams: Sequence[int] | None = None,
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
            stream = trace if streams is None else streams[trace]
            trunks.append(_Trunk(trace, stream, token_ids, {step: int(lengths[step - dropped]) for step in steps}))
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
class AnswerWriter:
    """Chooses the tokens of answers from logits; for the fields see `generate_answers`."""

    end_id: int
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    grammar: AnswerGrammar | None = None

    def start(self, trunk: _Trunk, step: int, candidate: int) -> _Answer:
        # 24 bits each: below 1 also after a product in float64.
        random = np.random.default_rng([self.seed, trunk.stream, step, candidate])
        draws = random.random(self.max_new_tokens, np.float32)
        return _Answer(trunk.trace, step, candidate, draws, self.grammar.start() if self.grammar else None)

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
    network: "PreTrainedModel", trunks: Sequence[_Trunk], opening: Sequence[int], candidates: int, writer: AnswerWriter
) -> Iterator[GeneratedAnswer]:
    """The answers of some trunks, as branches of their caches."""
    reader = _reader(network)
    logits_BSV = reader.begin([t.token_ids for t in trunks], [list(t.end.values()) for t in trunks], opening)
    yield from _extend(reader, trunks, candidates, writer, logits_BSV)


def _extend(
    reader: BranchReader, trunks: Sequence[_Trunk], candidates: int, writer: AnswerWriter, logits_BSV: Tensor
) -> Iterator[GeneratedAnswer]:
    """Write all answers of some trunks a token at a time, from the logits after each step's opening on."""
    # Of each trunk: the answers under way, each with the place of its logits and of what it sees.
    live = [
        [(place, writer.start(t, step, n)) for place, step in enumerate(t.end) for n in range(candidates)]
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


def _reader(network: "PreTrainedModel") -> BranchReader:
    """What reads branches: on a GPU, in steps that can be recorded and replayed."""
    from models.decoding.fixed_branches import FixedBranchReader

    fixed = network.get_input_embeddings().weight.device.type == "cuda"
    return FixedBranchReader(network) if fixed else BranchReader(network)


def _one_by_one(
    network: "PreTrainedModel", trunks: Sequence[_Trunk], opening: Sequence[int], candidates: int, writer: AnswerWriter
) -> Iterator[GeneratedAnswer]:
    """The same with `generate` for each answer: what serves networks whose caches hold no branches."""
    for trunk in trunks:
        for step, end in trunk.end.items():
            for candidate in range(candidates):
                answer = writer.start(trunk, step, candidate)
                _generate(network, [*trunk.token_ids[:end], *opening], answer, writer)
                yield writer.result(answer)


@torch.no_grad()
def _generate(network: "PreTrainedModel", prompt: list[int], answer: _Answer, writer: AnswerWriter) -> None:
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
