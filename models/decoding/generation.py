"""Generates an agent's answers after each event of a trace, in one pass over the trace.

The tokens of a trace are the trunk. Their keys and values are computed once. The answer after an event is a branch: it
attends to the trunk up to that event, to the opening (the tokens between the last event and the answer) and to itself.
The branches of several trunks are extended together, one token per decoding step.

Shape legend: B trunks in a batch, S steps per trunk, W branches per trunk, T tokens of a prompt, N answers,
V vocabulary size.
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
from models.networks.configurations import max_positions
from models.networks.trials import uncompiled

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedModel

Trace = Sequence[Sequence[int]]  # token ids of the instructions and of each event


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer to a trace's first `step` events.

    `token_ids` exclude the end token. `finished` is False if the answer reached `max_new_tokens`. With a grammar, such
    an answer ends with tokens that the network did not generate; they complete its JSON.
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
    """Generate the answers after the events of traces; yields each answer when it is done, in no fixed order.

    The answers equal those of `network.generate` for each prompt (instructions, events and opening). A random number
    depends only on the seed, the trace's stream, the step, the candidate and the token index. So an answer does not
    depend on the other answers. The network is in evaluation mode until the last answer.

    Args:
        network: A causal language model of transformers.
        traces: For each trace, the token ids of the instructions (including the tokenizer's prefix) and of each
            event.
        opening: Token ids between the last event and the answer.
        end_id: Id of the token that ends an answer.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_size: Number of traces per batch.
        candidates: Number of answers per step.
        temperature: Divides the logits before sampling; 0 is greedy.
        seed: Seed of the random numbers.
        grammar: Constrains the answers to JSON; unconstrained if None.
        max_length: Maximum number of tokens of prompt and answer. Longer prompts lose their oldest events, as in
            training. The network's number of positions if None.
        wanted: The (trace index, step) pairs to answer; step k is after event k, counted from 1. All if None.
        branched: True generates from a branched cache, False one prompt at a time. If None, a trial decides.
        streams: For each trace an integer >= 0 that seeds its random numbers; the trace index if None.

    Raises:
        UserError: There are several candidates at temperature 0, the temperature is negative, or the instructions
            leave no room for an answer.
    """
    refuse_impossible_draws(candidates, temperature)
    writer = AnswerWriter(end_id, max_new_tokens, temperature, seed, grammar)
    room = max_positions(network.config) if max_length is None else max_length
    trunks = _trunks(traces, opening, wanted, room - max_new_tokens, streams)
    return _generate_answers(network, trunks, opening, candidates, writer, batch_size, branched)


def refuse_impossible_draws(candidates: int, temperature: float) -> None:
    """Raise a UserError for several candidates at temperature 0, or a negative temperature."""
    if candidates > 1 and not temperature:
        raise UserError(
            f"candidates: {candidates} answers at temperature 0 are equal",
            "Set a temperature above 0, such as 0.7, or ask for one candidate.",
        )
    if temperature < 0:
        raise UserError(f"temperature: {temperature} is below 0", "Use 0 for greedy decoding, or more to sample.")


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
    """Generates the answers after a growing history. Each token of the history is computed once.

    The answers equal those of `generate_answers` for the same history.

    Args:
        network: A causal language model of transformers.
        opening: Token ids between the last event and the answer.
        writer: Chooses the tokens of answers.
        candidates: Number of answers per step.
        max_length: Maximum number of tokens of prompt and answer.
        stream: An integer >= 0 that seeds the random numbers, together with the writer's seed.
        branched: Whether the network can generate from a branched cache, see `can_branch`.
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
        self._read: list[int] = []  # the prompt whose keys and values the cache contains

    def answer(self, segments: Trace) -> list[GeneratedAnswer]:
        """Return the candidates after a history, in order; `segments` are the token ids of instructions and events."""
        step = len(segments) - 1
        limit = self.max_length - self.writer.max_new_tokens
        (trunk,) = _trunks([segments], self.opening, {(0, step)}, limit, [self.stream])
        with reading_branches(self.network):
            if not self.branched:
                return list(_one_by_one(self.network, [trunk], self.opening, self.candidates, self.writer))
            prompt = trunk.token_ids
            # Without an opening, run the last token of the prompt again to get the logits after it.
            known = min(common_prefix(self._read, prompt), len(prompt) - (not self.opening))
            logits_11V = self._reader.resume(known, [*prompt[known:], *self.opening])
            self._read = prompt
            answers = _extend(self._reader, [trunk], self.candidates, self.writer, logits_11V)
            return sorted(answers, key=lambda answer: answer.candidate)


@dataclass(frozen=True)
class _Trunk:
    """The tokens that several steps of a trace share.

    `end` maps each step to the number of trunk tokens that its answers attend to.
    """

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
    """Return the trunks of the wanted steps.

    Steps of a trace share a trunk if the same number of events is dropped from their histories.
    """
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
            older = max(step - limit, 0)  # these cannot fit: an event has at least one token
            dropped = older + truncate([first, *events[older:step], opening], limit)[1]
            by_dropped.setdefault(dropped, []).append(step)
        for dropped, steps in by_dropped.items():
            lengths = np.cumsum([len(first), *map(len, events[dropped : steps[-1]])])
            token_ids = [token for part in (first, *events[dropped : steps[-1]]) for token in part]
            stream = trace if streams is None else streams[trace]
            trunks.append(_Trunk(trace, stream, token_ids, {step: int(lengths[step - dropped]) for step in steps}))
    # Batches of similar trunks need the least padding.
    return sorted(trunks, key=lambda trunk: (len(trunk.end), len(trunk.token_ids)))


@dataclass
class _Answer:
    """An answer that is being generated.

    `finished`: it ended by itself. `done`: it is finished, or has `max_new_tokens` tokens.
    """

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
    """Chooses the tokens of answers from logits; `generate_answers` explains the fields."""

    end_id: int
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    grammar: AnswerGrammar | None = None

    def start(self, trunk: _Trunk, step: int, candidate: int) -> _Answer:
        """Return an empty answer, with its random numbers."""
        # In float32 they are at most 1 - 2**-24, so their product with a sum in float64 stays below the sum.
        random = np.random.default_rng([self.seed, trunk.stream, step, candidate])
        draws = random.random(self.max_new_tokens, np.float32)
        return _Answer(trunk.trace, step, candidate, draws, self.grammar.start() if self.grammar else None)

    def extend(self, answers: Sequence[_Answer], logits_NV: Tensor) -> list[int]:
        """Choose the next token of each answer, append it or finish the answer, and return the tokens."""
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
        """Return the next tokens (N,): the most probable ones, or samples by the inverse of the cumulative sum."""
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
        """Return the generated answer. The grammar completes the JSON of an answer that was cut off."""
        token_ids = answer.token_ids
        if self.grammar and not answer.finished:
            token_ids = self.grammar.close(token_ids)
        return GeneratedAnswer(answer.trace, answer.step, answer.candidate, token_ids, answer.finished)


def _side_by_side(
    network: "PreTrainedModel", trunks: Sequence[_Trunk], opening: Sequence[int], candidates: int, writer: AnswerWriter
) -> Iterator[GeneratedAnswer]:
    """Generate the answers of a batch of trunks as branches of their caches."""
    reader = _reader(network)
    logits_BSV = reader.begin([t.token_ids for t in trunks], [list(t.end.values()) for t in trunks], opening)
    yield from _extend(reader, trunks, candidates, writer, logits_BSV)


def _extend(
    reader: BranchReader, trunks: Sequence[_Trunk], candidates: int, writer: AnswerWriter, logits_BSV: Tensor
) -> Iterator[GeneratedAnswer]:
    """Generate all answers of a batch of trunks, starting from the logits (B, S, V) after the openings."""
    # For each trunk: the unfinished answers, each with the index of its branch.
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
    """Return the reader for a network. On a GPU its decoding steps have fixed shapes and replay a CUDA graph."""
    from models.decoding.fixed_branches import FixedBranchReader

    fixed = network.get_input_embeddings().weight.device.type == "cuda"
    return FixedBranchReader(network) if fixed else BranchReader(network)


def _one_by_one(
    network: "PreTrainedModel", trunks: Sequence[_Trunk], opening: Sequence[int], candidates: int, writer: AnswerWriter
) -> Iterator[GeneratedAnswer]:
    """Generate one prompt at a time, for networks whose cache cannot branch."""
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
    # Without the penalties that the backbone's own configuration may contain.
    own, network.generation_config = network.generation_config, GenerationConfig()
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
