"""P(accepted) from a Scorer: after one history from its cache, after many as in training, of any kind of backbone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from datamodules.errors import UserError
from models.judging.scorer import Scorer
from models.judging.weights import Weights
from models.learning.calibration import Calibration
from models.networks.building import build_network
from models.networks.network_options import NetworkOptions
from tests.helpers import small_root
from tests.models.small import small_classifier, small_data

PROPOSALS = ("Offer to run the tests", None, "Summarize the article that is open", "Offer to run the tests again")
EVENTS = tuple(Event(time=str(10 * n), event=f"The user opens file number {n * n % 7}") for n in range(30))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = small_data(small_root(tmp_path_factory.mktemp("scorer") / "root"), layout="auto", token_budget=512)
    data.setup("fit")
    return data.state_dict()


@pytest.fixture
def scorer(state: dict[str, Any]) -> Callable[..., Scorer]:
    """A Scorer with random weights of a family."""

    def made(family: str = "llama", **hyperparameters: Any) -> Scorer:
        torch.manual_seed(0)
        model = small_classifier(family, pooling="auto")
        with_options = state | {"hyperparameters": state["hyperparameters"] | hyperparameters}
        data = RewardDataModule.from_state(with_options)
        scratch = model.hparams["scratch"]
        model.network = build_network(NetworkOptions("classifier", scratch=scratch), data.tokenizer)
        for parameter in model.network.parameters():  # those of a new network hardly mind what they read
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.calibration = Calibration(1.7, 0.4, 10, 10)
        return Scorer(Weights(model, with_options, "here"))

    return made


def one_by_one(scorer: Scorer, pairs: list[Pair]) -> list[float]:
    """Each row by itself, as transformers reads it."""
    weights, found = scorer.weights, []
    network = weights.model.network
    assert network is not None
    for pair in pairs:
        ids = torch.tensor([scorer.row_of(pair).tolist()])
        with torch.no_grad():
            logits = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        found.append(float(torch.sigmoid((logits[1] - logits[0]) / 1.7)))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bert", "modernbert"])
@pytest.mark.parametrize("max_length", [160, 500])  # with the oldest events dropped, and without
def test_scores_of_one_and_of_many_histories_equal_those_of_single_rows(
    family: str, max_length: int, scorer: Callable[..., Scorer]
) -> None:
    mine = scorer(family, max_length=max_length)
    several = [Pair(EVENTS[:n], proposal) for n in (1, 4, 9, 30) for proposal in PROPOSALS]
    expected = one_by_one(mine, several)
    assert len({round(one, 4) for one in expected}) > 8
    assert mine.score(several) == pytest.approx(expected, abs=1e-5)
    for start in range(0, len(several), len(PROPOSALS)):  # a history that grows
        part = slice(start, start + len(PROPOSALS))
        assert mine.score(several[part]) == pytest.approx(expected[part], abs=1e-5)
    assert mine.score(several[:1]) == pytest.approx(expected[:1], abs=1e-5), "and begins anew"
    assert mine.score([]) == []


def token_counts(scorer: Scorer) -> list[int]:
    """A list to which each forward pass adds its number of tokens."""
    network = scorer.weights.model.network
    assert network is not None
    counts: list[int] = []
    network.base_model.register_forward_pre_hook(
        lambda module, arguments, inputs: counts.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    return counts


def test_along_a_session_each_event_is_read_once(scorer: Callable[..., Scorer]) -> None:
    mine = scorer(max_length=500, token_budget=512)
    mine.score([Pair(EVENTS[:1], None)])
    read = token_counts(mine)
    for number in range(2, 13):
        mine.score([Pair(EVENTS[:number], proposal) for proposal in PROPOSALS])
    rows = [mine.row_of(Pair(EVENTS[:12], proposal)) for proposal in PROPOSALS]
    before = [mine.row_of(Pair(EVENTS[:1], proposal)) for proposal in PROPOSALS]
    events = len(rows[0]) - len(before[0])
    proposals = sum(map(len, rows)) - len(rows) * (len(rows[0]) - len(before[0]))
    assert sum(read) < events + 11 * proposals


def test_sessions_side_by_side_read_each_event_once(scorer: Callable[..., Scorer]) -> None:
    def tokens_read(sessions: tuple[str, str]) -> tuple[int, list[float]]:
        """The number of tokens of all forward passes, and the scores, of two sessions that take turns."""
        mine = scorer(max_length=500, token_budget=512)
        mine.score([Pair(EVENTS[:1], None)])
        read = token_counts(mine)
        histories = [EVENTS, EVENTS[::-1]]
        scores = [
            mine.score([Pair(history[:number], PROPOSALS[0])], name)[0]
            for number in range(1, 13)
            for name, history in zip(sessions, histories, strict=True)
        ]
        for name in sessions:
            mine.forget(name)
        assert mine._caches.keys() <= {""}
        return sum(read), scores

    (own, scores), (shared, same) = tokens_read(("a", "b")), tokens_read(("a", "a"))
    assert scores == pytest.approx(same, abs=1e-6)
    assert own < shared / 2


def test_the_self_check_is_repeated_for_longer_rows(scorer: Callable[..., Scorer]) -> None:
    mine = scorer(max_length=160)
    mine.score([Pair(EVENTS[:1], None), Pair(EVENTS[:2], None)])
    assert mine._checked_lengths[0] < 160
    mine.score([Pair(EVENTS, None), Pair(EVENTS[:2], None)])
    assert mine._checked_lengths == (160, 512)


def test_truncated_rows_are_counted(scorer: Callable[..., Scorer]) -> None:
    mine = scorer(max_length=160)
    mine.score([Pair(EVENTS[:2], None), Pair(EVENTS, None), Pair(EVENTS, PROPOSALS[0])])
    assert mine.truncated == 2


def test_a_proposal_that_is_too_long_is_named(scorer: Callable[..., Scorer]) -> None:
    mine = scorer(max_length=160)
    for where, said in (("trace_1.json, event 3", "trace_1.json, event 3"), ("", "a proposal after 3 events")):
        with pytest.raises(UserError, match=f"instructions and proposal of {said} take .* tokens, more than 160"):
            mine.score([Pair(EVENTS[:3], "really " * 200, where)])


def test_a_released_scorer_scores_again(scorer: Callable[..., Scorer]) -> None:
    mine = scorer()
    pairs = [Pair(EVENTS[:5], proposal) for proposal in PROPOSALS]
    before = mine.score(pairs)
    mine.release()
    assert mine.score(pairs) == before


def test_a_nan_probability_is_refused(scorer: Callable[..., Scorer]) -> None:
    mine = scorer()
    assert mine.weights.model.network is not None
    torch.nn.init.constant_(mine.weights.model.network.score.weight, float("nan"))
    for pairs in ([Pair(EVENTS[:2], None)], [Pair(EVENTS[:2], None), Pair(EVENTS[:3], None)]):
        with pytest.raises(UserError, match="here: a probability is NaN"):
            mine.score(pairs)
