"""Branches of one cache against `generate`, called after each event: the same tokens, and each token read once."""

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from datamodules.errors import UserError
from datamodules.prompting.segments import truncate
from datamodules.prompting.tokenizers import train_tokenizer
from models.decoding.answer_writer import AnswerWriter, GeneratedAnswer
from models.decoding.branch_checks import branch_problem
from models.decoding.generation import AnswerStream, generate_answers
from models.decoding.grammar import AnswerGrammar
from models.decoding.growing_cache import GrowingLayer
from tests.models.networks.test_tree_reading import FAMILIES, SMALL

VOCABULARY = 61
END = 3
NO_END = -1  # a token that is never chosen
GENERATION_PROMPT = [7, 8]
NEW = 10
Answers = dict[tuple[int, int, int], GeneratedAnswer]


def network(family: str, **options: Any) -> PreTrainedModel:
    """With weights large enough for answers that differ, which those of a new network hardly do."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    made = AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return network("llama")


def uneven_traces(seed: int = 1) -> list[list[list[int]]]:
    draw = random.Random(seed)
    return [
        [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 9))] for _ in range(events + 1)]
        for events in (5, 1, 7, 3, 0, 4)
    ]


def generated(
    model: PreTrainedModel, traces: Any, generation_prompt: Sequence[int] = GENERATION_PROMPT, **options: Any
) -> Answers:
    answers = list(
        generate_answers(model, traces, generation_prompt, **{"end_id": END, "max_new_tokens": NEW, **options})
    )
    found = {(a.trace, a.step, a.candidate): a for a in answers}
    assert len(found) == len(answers)
    return found


def count_tokens(model: PreTrainedModel, traces: Any, **options: Any) -> int:
    """How many tokens the network is given."""
    given = 0

    def count(module: Any, arguments: Any, inputs: dict[str, Tensor]) -> None:
        nonlocal given
        given += inputs["input_ids"].numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        generated(model, traces, **options)
    finally:
        handle.remove()
    return given


def plain(
    model: PreTrainedModel,
    traces: Any,
    generation_prompt: Sequence[int] = GENERATION_PROMPT,
    *,
    new: int = NEW,
    limit: int = 10_000,
    end_id: int = END,
    processor: Callable[[int], Any] | None = None,
) -> Answers:
    """What `generate` of transformers answers, each prompt on its own."""
    found = {}
    for number, (first, *events) in enumerate(traces):
        for step in range(1, len(events) + 1):
            prompt = truncate([first, *events[:step], generation_prompt], limit)[0]
            given = torch.tensor([prompt])
            output = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=end_id,
                pad_token_id=0,
                logits_processor=[processor(len(prompt))] if processor else [],
            )
            ids = output[0, len(prompt) :].tolist()
            finished = ids[-1] == end_id
            found[number, step, 0] = GeneratedAnswer(number, step, 0, ids[: -1 if finished else None], finished)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_answers_of_generate(family: str) -> None:
    model = network(family)
    assert branch_problem(model, longest=300) is None
    traces = uneven_traces()
    expected = plain(model, traces)
    for batch_size in (1, 2, 5):
        assert generated(model, traces, batch_size=batch_size) == expected


@pytest.fixture(scope="module")
def without_end(llama: PreTrainedModel) -> Answers:
    return plain(llama, uneven_traces(), new=24, end_id=NO_END)


@pytest.fixture(scope="module")
def uneven(without_end: Answers) -> tuple[int, Answers]:
    """The end token that makes the lengths of answers differ most, and what is left of them."""

    def cut(ids: list[int], end_id: int) -> list[int]:
        return ids[: ids.index(end_id)] if end_id in ids else ids

    found = {end_id: {at: cut(a.token_ids, end_id) for at, a in without_end.items()} for end_id in range(VOCABULARY)}
    end_id = max(found, key=lambda token: len({len(ids) for ids in found[token].values()}))
    return end_id, {at: GeneratedAnswer(*at, ids, len(ids) < 24) for at, ids in found[end_id].items()}


@pytest.mark.parametrize("waste", [0.0, 0.5, 2.0])  # caches are never made smaller, now and then, at every token
def test_finished_branches_and_traces_are_dropped(
    llama: PreTrainedModel, uneven: tuple[int, Answers], waste: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_id, expected = uneven
    assert len({len(answer.token_ids) for answer in expected.values()}) > 5
    kept: list[int] = []
    keep = GrowingLayer.keep

    def noted(self: GrowingLayer, row_B: Tensor, token_BK: Tensor) -> None:
        kept.append(len(row_B))
        keep(self, row_B, token_BK)

    monkeypatch.setattr(GrowingLayer, "keep", noted)
    monkeypatch.setattr("models.decoding.branches.MIN_USED", waste)
    for batch_size in (1, 2, 5):
        assert generated(llama, uneven_traces(), end_id=end_id, max_new_tokens=24, batch_size=batch_size) == expected
    assert bool(kept) == bool(waste)
    assert len(set(kept)) > 1 or not waste


def test_finished_answers_are_not_computed_further(
    llama: PreTrainedModel, uneven: tuple[int, Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is read once, but for the last of an answer that was cut off."""
    end_id, expected = uneven
    read = [len(a.token_ids) - (not a.finished) for at, a in expected.items() if at[0] == 2]
    given = count_tokens(llama, [uneven_traces()[2]], end_id=end_id, max_new_tokens=24, branched=True)
    trunk = sum(map(len, uneven_traces()[2]))
    assert given == trunk + sum(length + len(GENERATION_PROMPT) for length in read)


@settings(max_examples=25)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5), min_size=1, max_size=5), max_size=4
    ),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
    st.integers(1, 4),
    st.integers(0, VOCABULARY - 1),
    st.integers(1, 6),
)
def test_random_traces_get_the_answers_of_generate(
    llama: PreTrainedModel, traces: Any, generation_prompt: list[int], batch_size: int, end_id: int, new: int
) -> None:
    """Generation prompts may be empty, and ends may come early."""
    options: Any = {"max_new_tokens": new, "batch_size": batch_size, "end_id": end_id, "branched": True}
    assert generated(llama, traces, generation_prompt, **options) == plain(
        llama, traces, generation_prompt, new=new, end_id=end_id
    )


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("max_length", [22, 31, 300])  # most, some and none of the prompts lose events
def test_the_oldest_events_are_dropped_as_in_training(llama: PreTrainedModel, max_length: int, new: int) -> None:
    traces = uneven_traces()
    answers = generated(llama, traces, max_length=max_length, max_new_tokens=new)
    assert answers == plain(llama, traces, new=new, limit=max_length - new)


def test_positions_limit_the_prompt() -> None:
    model = network("gpt2", max_position_embeddings=30)
    traces = uneven_traces()
    assert generated(model, traces) == plain(model, traces, limit=30 - NEW)


def test_instructions_that_leave_no_room_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="max_length: instructions and generation prompt have 6 tokens, and 5 are left"):
        generated(llama, [[[1, 2, 3, 4], [5]]], max_length=15)


def test_an_immediate_end_token_is_an_empty_answer(llama: PreTrainedModel) -> None:
    traces = uneven_traces()
    first = plain(llama, traces, new=1)[0, 1, 0].token_ids[0]
    answers = generated(llama, traces, end_id=first)
    assert answers[0, 1, 0] == GeneratedAnswer(0, 1, 0, [], finished=True)
    assert answers == plain(llama, traces, end_id=first)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_with_masks_give_equal_answers(attention: str) -> None:
    model = network("qwen3")
    model.set_attn_implementation(attention)
    assert branch_problem(model, longest=300) is None
    assert generated(model, uneven_traces()) == plain(model, uneven_traces())


def test_each_token_of_a_trace_is_read_once(llama: PreTrainedModel) -> None:
    """The trunk's tokens, the generation prompt of each step, and each answer's tokens but the last."""
    traces = uneven_traces()
    given = count_tokens(llama, traces, batch_size=1, end_id=NO_END, branched=True)
    events = sum(len(trace) - 1 for trace in traces)
    trunks = sum(len(part) for trace in traces if len(trace) > 1 for part in trace)
    assert given == trunks + events * (len(GENERATION_PROMPT) + NEW - 1)


@pytest.mark.parametrize("branched", [True, False])
def test_only_the_wanted_steps_are_generated(llama: PreTrainedModel, branched: bool) -> None:
    traces = uneven_traces()
    every = generated(llama, traces)
    wanted = [(2, 7), (0, 2), (2, 1)]
    some = generated(llama, traces, wanted=wanted, branched=branched)
    assert some == {(*at, 0): every[(*at, 0)] for at in wanted}
    assert generated(llama, traces, wanted=[]) == {}
    assert len(generated(llama, traces, wanted=[(4, 0)])) == 1  # before the first event
    for trace, step in ((1, 2), (6, 1), (0, -1)):
        with pytest.raises(ValueError, match=f"there is no step {step} of trace {trace}"):
            generated(llama, traces, wanted=[(trace, step)])


DRAWN: Any = {"candidates": 3, "temperature": 1.0, "seed": 5}


def test_candidates_depend_only_on_the_seed(llama: PreTrainedModel) -> None:
    traces = uneven_traces()
    drawn = generated(llama, traces, **DRAWN)
    assert len(drawn) == 3 * 20
    for options in ({"batch_size": 1}, {"batch_size": 5}, {"branched": False}):
        assert generated(llama, traces, **DRAWN, **options) == drawn
    wanted = [(0, 3), (3, 1), (3, 3)]
    some = generated(llama, traces, **DRAWN, wanted=wanted)
    assert some == {at: answer for at, answer in drawn.items() if at[:2] in wanted}
    assert generated(llama, traces, **{**DRAWN, "candidates": 1}) == {at: a for at, a in drawn.items() if not at[2]}
    texts = {tuple(drawn[2, 7, n].token_ids) for n in range(3)}
    assert len(texts) == 3
    assert generated(llama, traces, **{**DRAWN, "seed": 6}) != drawn


def test_a_low_temperature_is_greedy(llama: PreTrainedModel) -> None:
    traces = uneven_traces()
    assert generated(llama, traces, temperature=1e-4) == generated(llama, traces)


def test_tokens_are_sampled_with_their_probabilities(llama: PreTrainedModel) -> None:
    traces = [[[1, 2], [3, 4]]]
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([[1, 2, 3, 4, *GENERATION_PROMPT]])).logits[0, -1]
    expected = (logits / 2).softmax(-1)
    drawn = generated(llama, traces, candidates=4000, temperature=2.0, max_new_tokens=1, end_id=NO_END)
    tokens = torch.tensor([answer.token_ids[0] for answer in drawn.values()])
    share = torch.bincount(tokens, minlength=VOCABULARY) / len(tokens)
    assert float((share - expected).abs().max()) < 4 * 0.5 / len(tokens) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"candidates": 2}, "2 candidates at temperature 0"), ({"temperature": -1.0}, "temperature: -1.0 is below 0")],
)
def test_impossible_sampling_options_are_refused(llama: PreTrainedModel, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generated(llama, uneven_traces(), **options)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_weights_generate(family: str) -> None:
    model = network(family).to(torch.bfloat16)
    assert branch_problem(model, longest=300) is None
    assert generated(model, uneven_traces()).keys() == plain(model, uneven_traces()).keys()


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (
            "mistral",
            {"sliding_window": 8},
            "its layers attend to the last 8 tokens, and prompts with answers have up to",
        ),
        ("gemma3_text", {"sliding_window": 8}, "its layers attend to the last 8 tokens"),
        ("bloom", {}, "it refuses branches"),
    ],
)
def test_networks_whose_cache_cannot_branch_generate_one_prompt_at_a_time(
    family: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(family, **options)
    monkeypatch.setattr(logging.getLogger("proactive"), "propagate", True)
    with caplog.at_level(logging.INFO, "proactive"):
        assert generated(model, uneven_traces()) == plain(model, uneven_traces())
    assert sum(reason in message for message in caplog.messages) == 1


def test_a_network_that_ignores_the_mask_is_detected() -> None:
    model = network("llama")
    inner = model.model.forward

    def forward(**inputs: Any) -> Any:
        return inner(**{**inputs, "attention_mask": None})

    model.model.forward = forward
    assert "depends on later events or on other answers" in str(branch_problem(model, longest=64))


def test_a_network_that_ignores_the_positions_is_detected() -> None:
    model = network("gpt2")
    inner = model.transformer.forward

    def forward(*arguments: Any, **inputs: Any) -> Any:
        return inner(*arguments, **{**inputs, "position_ids": None})

    model.transformer.forward = forward
    assert "logits of an answer differ from those after its prompt" in str(branch_problem(model, longest=64))


def test_an_attention_without_masks_is_reported(llama: PreTrainedModel) -> None:
    model = network("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert branch_problem(model, longest=64) == "attention flash_attention_2 accepts no custom mask"


def test_the_backbones_generation_config_is_not_used() -> None:
    """They would in `generate`, and do not where answers branch."""
    model = network("llama")
    expected = generated(model, uneven_traces(), branched=False)
    model.generation_config.repetition_penalty = 5.0
    assert generated(model, uneven_traces(), branched=False) == expected
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("branched", [True, False])
def test_the_networks_mode_and_attention_are_restored(llama: PreTrainedModel, branched: bool) -> None:
    model = network("llama").train()
    answers = generate_answers(
        model, uneven_traces(), GENERATION_PROMPT, end_id=END, max_new_tokens=NEW, branched=branched
    )
    next(answers)
    assert not model.training
    assert torch.is_grad_enabled()
    answers.close()
    assert model.training


class Held:
    """The grammar as a processor of `generate`, for one answer."""

    def __init__(self, grammar: AnswerGrammar, start: int) -> None:
        self.grammar = grammar
        self.matcher = grammar.start()
        self.read = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for token in input_ids[0, self.read :].tolist():
            self.grammar.advance(self.matcher, token)
        self.read = input_ids.shape[1]
        return scores.masked_fill(~self.grammar.allowed([self.matcher], scores.shape[1]), -torch.inf)


def test_constrained_answers_equal_those_of_constrained_generate() -> None:
    tokenizer = train_tokenizer(['{"purpose": "a", "thoughts": "b", "proposal": null, "response": "c"}'] * 3, 300)
    grammar = AnswerGrammar(tokenizer, tokenizer.eos_token_id)
    model = network("llama", vocab_size=320)  # more than the tokenizer has
    traces, new = uneven_traces(), 40
    end_id = tokenizer.eos_token_id
    expected = plain(model, traces, new=new, end_id=end_id, processor=lambda start: Held(grammar, start))
    closed = {
        at: GeneratedAnswer(*at, a.token_ids if a.finished else grammar.close(a.token_ids), a.finished)
        for at, a in expected.items()
    }
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"branched": False}):
        found = generated(model, traces, end_id=end_id, max_new_tokens=new, grammar=grammar, **options)
        assert found == closed


def followed(
    model: PreTrainedModel, traces: Any, generation_prompt: Sequence[int] = GENERATION_PROMPT, **options: Any
) -> Answers:
    """The answers of streams that are fed event by event, all traces at the same time."""
    used = {"end_id": END, "new": NEW, "candidates": 1, "max_length": 10_000, "branched": True, **options}
    writer = AnswerWriter(used["end_id"], used["new"], used.get("temperature", 0.0), used.get("seed", 0))
    streams = [
        AnswerStream(
            model,
            generation_prompt,
            writer,
            candidates=used["candidates"],
            max_length=used["max_length"],
            stream=number,
            branched=used["branched"],
        )
        for number in range(len(traces))
    ]
    found: Answers = {}
    for step in range(1, max(map(len, traces))):
        for number, trace in enumerate(traces):
            if step < len(trace):
                for answer in streams[number].answer(trace[: step + 1]):
                    at = (number, step, answer.candidate)
                    found[at] = GeneratedAnswer(*at, answer.token_ids, answer.finished)
    return found


@pytest.mark.parametrize("branched", [True, False])
@pytest.mark.parametrize(
    ("generation_prompt", "options"),
    [
        (GENERATION_PROMPT, {}),
        ([], {}),
        (GENERATION_PROMPT, {"max_length": 31}),
        (GENERATION_PROMPT, DRAWN),
        ([], {**DRAWN, "max_length": 31}),
    ],
)
def test_a_growing_history_gets_the_answers_of_the_whole_trace(
    llama: PreTrainedModel, generation_prompt: list[int], options: dict[str, Any], branched: bool
) -> None:
    traces = uneven_traces()
    assert followed(llama, traces, generation_prompt, branched=branched, **options) == generated(
        llama, traces, generation_prompt, **options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_a_growing_history(family: str) -> None:
    model, traces = network(family), uneven_traces()
    assert followed(model, traces) == generated(model, traces, branched=True)


def test_each_token_of_a_growing_history_is_computed_once(llama: PreTrainedModel) -> None:
    trace = uneven_traces()[2]
    given: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda module, arguments, inputs: given.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    try:
        followed(llama, [trace], end_id=NO_END)
    finally:
        handle.remove()
    assert sum(given) == sum(map(len, trace)) + (len(trace) - 1) * (len(GENERATION_PROMPT) + NEW - 1)


def test_another_history_and_a_repeated_one_get_the_right_answers(llama: PreTrainedModel) -> None:
    traces = uneven_traces()
    writer = AnswerWriter(END, NEW)
    stream = AnswerStream(llama, GENERATION_PROMPT, writer, candidates=1, max_length=10_000, stream=0, branched=True)
    expected = generated(llama, traces)
    for number, step in ((2, 7), (2, 3), (2, 3), (0, 5), (2, 4)):
        (answer,) = stream.answer(traces[number][: step + 1])
        assert answer.token_ids == expected[number, step, 0].token_ids


@pytest.mark.parametrize("branched", [True, False])
def test_candidates_can_be_generated_one_after_the_other(llama: PreTrainedModel, branched: bool) -> None:
    trace = uneven_traces()[2]
    writer = AnswerWriter(END, NEW, DRAWN["temperature"], DRAWN["seed"])
    options: Any = {"candidates": 3, "max_length": 10_000, "stream": 0, "branched": branched}
    together = AnswerStream(llama, GENERATION_PROMPT, writer, **options)
    stream = AnswerStream(llama, GENERATION_PROMPT, writer, **options)
    for step in (3, 5):
        segments = trace[: step + 1]
        alone = [stream.answer(segments, [number])[0].token_ids for number in range(3)]
        assert alone == [answer.token_ids for answer in together.answer(segments)]
        assert len({tuple(tokens) for tokens in alone}) > 1


def test_random_numbers_depend_on_the_stream_not_on_the_index(llama: PreTrainedModel) -> None:
    traces = uneven_traces()
    alone = generated(llama, [traces[2]], **DRAWN, streams=[2])
    together = generated(llama, traces, **DRAWN)
    assert {at[1:]: answer.token_ids for at, answer in alone.items()} == {
        at[1:]: answer.token_ids for at, answer in together.items() if at[0] == 2
    }
