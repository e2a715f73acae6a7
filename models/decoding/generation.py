"""Generates an agent's answers after each event of a trace, in one pass over the trace.

The tokens of a trace are the trunk. Their keys and values are computed once. Each answer is a branch: it attends to the
trunk up to its event, to the generation prompt (the tokens between the last event and the answer, as chat templates
add them) and to itself. The branches of several trunks are extended together, one token per decoding step.

    trunk      instructions  event 1  event 2  event 3
    answer 1   instructions  event 1  generation prompt  answer...
    answer 2   instructions  event 1  event 2  generation prompt  answer...
    answer 3   instructions  event 1  event 2  event 3  generation prompt  answer...

Shape legend: B trunks in a batch, S steps per trunk, W branches per trunk, T tokens of a prompt, N answers,
V vocabulary size.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.batching.prefix_tree import common_prefix
from datamodules.ranges import refuse_equal_samples
from models.decoding.answer_writer import AnswerWriter, GeneratedAnswer, UnfinishedAnswer
from models.decoding.branch_checks import can_branch
from models.decoding.branches import BranchReader, reading_branches
from models.decoding.grammar import AnswerGrammar
from models.decoding.trunks import TraceIds, Trunk, trunks_of
from models.networks.configurations import max_positions
from models.networks.self_checks import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate_answers(
    network: "PreTrainedModel",
    traces: Sequence[TraceIds],
    generation_prompt: Sequence[int],
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

    The answers equal those of `network.generate` for each prompt: instructions, events and generation prompt. A random
    number depends only on the seed, the trace's stream, the step, the candidate and the token index. So an answer does
    not depend on the other answers. The network is in evaluation mode until the last answer.

    Args:
        network: A causal language model of transformers.
        traces: For each trace, the token ids of the instructions (including the tokenizer's prefix) and of each
            event.
        generation_prompt: Token ids between the last event and the answer.
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
        branched: True generates from a branched cache, False one prompt at a time. If None, a self-check decides.
        streams: For each trace an integer >= 0 that seeds its random numbers; the trace index if None.

    Raises:
        UserError: There are several candidates at temperature 0, the temperature is negative, or the instructions
            leave no room for an answer.
    """
    refuse_equal_samples(candidates, temperature)
    writer = AnswerWriter(end_id, max_new_tokens, temperature, seed, grammar)
    room = max_positions(network.config) if max_length is None else max_length
    trunks = trunks_of(traces, generation_prompt, wanted, room - max_new_tokens, streams)
    return _generate_answers(network, trunks, generation_prompt, candidates, writer, batch_size, branched)


def _generate_answers(
    network: "PreTrainedModel",
    trunks: Sequence[Trunk],
    generation_prompt: Sequence[int],
    candidates: int,
    writer: AnswerWriter,
    batch_size: int,
    branched: bool | None,
) -> Iterator[GeneratedAnswer]:
    longest = (
        max((len(trunk.token_ids) for trunk in trunks), default=0) + len(generation_prompt) + writer.max_new_tokens
    )
    with reading_branches(network):
        if branched is None and trunks:
            branched = can_branch(network, longest)
        if branched:
            for start in range(0, len(trunks), batch_size):
                yield from _generate_branched(
                    network, trunks[start : start + batch_size], generation_prompt, range(candidates), writer
                )
        else:
            yield from _generate_prompt_by_prompt(network, trunks, generation_prompt, range(candidates), writer)


class AnswerStream:
    """Generates the answers after a growing history. Each token of the history is computed once.

    The answers equal those of `generate_answers` for the same history.

    Args:
        network: A causal language model of transformers.
        generation_prompt: Token ids between the last event and the answer.
        writer: Chooses the tokens of answers.
        candidates: Number of answers per step.
        max_length: Maximum number of tokens of prompt and answer.
        stream: An integer >= 0 that seeds the random numbers, together with the writer's seed.
        branched: Whether the network can generate from a branched cache, see `can_branch`.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        generation_prompt: Sequence[int],
        writer: AnswerWriter,
        *,
        candidates: int,
        max_length: int,
        stream: int,
        branched: bool,
    ) -> None:
        refuse_equal_samples(candidates, writer.temperature)
        self.network = network
        self.generation_prompt = generation_prompt
        self.writer = writer
        self.candidates = candidates
        self.max_length = max_length
        self.stream = stream
        self.branched = branched
        self._reader = _reader(network)
        self._cached_ids: list[int] = []  # the tokens whose keys and values the cache contains

    def answer(self, segments: TraceIds, candidate_indices: Sequence[int] | None = None) -> list[GeneratedAnswer]:
        """Return candidates after a history, in order.

        Args:
            segments: The token ids of the instructions and of each event.
            candidate_indices: Which candidates to write, in increasing order; all if None.
        """
        step = len(segments) - 1
        chosen = range(self.candidates) if candidate_indices is None else candidate_indices
        limit = self.max_length - self.writer.max_new_tokens
        (trunk,) = trunks_of([segments], self.generation_prompt, {(0, step)}, limit, [self.stream])
        with reading_branches(self.network):
            if not self.branched:
                return list(
                    _generate_prompt_by_prompt(self.network, [trunk], self.generation_prompt, chosen, self.writer)
                )
            prompt = trunk.token_ids
            # Without a generation prompt, run the last token of the prompt again to get the logits after it.
            last = 0 if self.generation_prompt else 1
            known = min(common_prefix(self._cached_ids, prompt), len(prompt) - last)
            logits_11V = self._reader.resume(known, [*prompt[known:], *self.generation_prompt])
            self._cached_ids = prompt
            answers = _extend_branches(self._reader, [trunk], chosen, self.writer, logits_11V)
            return sorted(answers, key=lambda answer: answer.candidate)


def _generate_branched(
    network: "PreTrainedModel",
    trunks: Sequence[Trunk],
    generation_prompt: Sequence[int],
    candidate_indices: Sequence[int],
    writer: AnswerWriter,
) -> Iterator[GeneratedAnswer]:
    """Generate the answers of a batch of trunks as branches of their caches."""
    reader = _reader(network)
    logits_BSV = reader.begin([t.token_ids for t in trunks], [list(t.ends.values()) for t in trunks], generation_prompt)
    yield from _extend_branches(reader, trunks, candidate_indices, writer, logits_BSV)


def _extend_branches(
    reader: BranchReader,
    trunks: Sequence[Trunk],
    candidate_indices: Sequence[int],
    writer: AnswerWriter,
    logits_BSV: Tensor,
) -> Iterator[GeneratedAnswer]:
    """Generate candidates of a batch of trunks, starting from the logits (B, S, V) after the generation prompts."""
    # For each trunk: the unfinished answers, each with the index of its branch.
    unfinished = [
        [
            (branch, writer.start(trunk, step, candidate))
            for branch, step in enumerate(trunk.ends)
            for candidate in candidate_indices
        ]
        for trunk in trunks
    ]
    logits_BWV = logits_BSV
    while True:
        indices = torch.tensor([(row, branch) for row, answers in enumerate(unfinished) for branch, _ in answers])
        extended = [answer for answers in unfinished for _, answer in answers]
        writer.extend(extended, logits_BWV[indices[:, 0], indices[:, 1]])
        yield from (writer.result(answer) for answer in extended if answer.done)
        unfinished = [[(branch, answer) for branch, answer in answers if not answer.done] for answers in unfinished]
        if not any(unfinished):
            return
        rows = reader.branch([[branch for branch, _ in answers] for answers in unfinished])
        unfinished = [[(branch, answer) for branch, (_, answer) in enumerate(unfinished[row])] for row in rows]
        logits_BWV = reader.read([[answer.token_ids[-1] for _, answer in answers] for answers in unfinished])


def _reader(network: "PreTrainedModel") -> BranchReader:
    """Return the reader for a network. On a GPU its decoding steps have fixed shapes and replay a CUDA graph."""
    from models.decoding.fixed_branches import FixedBranchReader

    fixed = network.get_input_embeddings().weight.device.type == "cuda"
    return FixedBranchReader(network) if fixed else BranchReader(network)


def _generate_prompt_by_prompt(
    network: "PreTrainedModel",
    trunks: Sequence[Trunk],
    generation_prompt: Sequence[int],
    candidate_indices: Sequence[int],
    writer: AnswerWriter,
) -> Iterator[GeneratedAnswer]:
    """Generate one prompt at a time, for networks whose cache cannot branch."""
    for trunk in trunks:
        for step, end in trunk.ends.items():
            for candidate in candidate_indices:
                answer = writer.start(trunk, step, candidate)
                _generate_one(network, [*trunk.token_ids[:end], *generation_prompt], answer, writer)
                yield writer.result(answer)


@torch.no_grad()
def _generate_one(
    network: "PreTrainedModel", prompt: list[int], answer: UnfinishedAnswer, writer: AnswerWriter
) -> None:
    """Generate one answer with `generate` of transformers; the writer chooses the tokens."""
    from transformers import GenerationConfig

    def choose(input_ids_1T: Tensor, logits_1V: Tensor) -> Tensor:
        (token,) = writer.extend([answer], logits_1V)
        chosen_1V = torch.full_like(logits_1V, -torch.inf)
        chosen_1V[0, token] = 0.0
        return chosen_1V

    def done(input_ids_1T: Tensor, scores: Any) -> Tensor:
        return torch.tensor([answer.done], device=input_ids_1T.device)

    input_ids_1T = torch.tensor([prompt], device=network.get_input_embeddings().weight.device)
    # The backbone's own generation configuration may contain penalties.
    original, network.generation_config = network.generation_config, GenerationConfig()
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
        network.generation_config = original
