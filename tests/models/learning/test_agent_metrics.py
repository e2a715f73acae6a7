"""Metrics of an agent: the published counts give the published metrics, and one rule chooses the candidate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.learning.metrics import NO_VERDICT, AgentMetrics, agent_metrics, deciding_candidate
from models.learning.published_metrics import PUBLISHED_AGENT_ROWS
from tests.datamodules.conftest import few_examples

# Row real_average of eval/results/*.csv in thunlp/ProactiveAgent: recall, precision, accuracy, false alarm, F1, accept
# rate, of 227 events.
PUBLISHED = {
    "Qwen2-7B-Proactive": (1.0, 0.4977578475, 0.5066079295, 0.5022421525, 0.6646706542, 0.4977578475),
    "LLaMA-3.1-8B-Proactive": (0.96, 0.4549763033, 0.4757709251, 0.5450236967, 0.6173633396, 0.4549763033),
    "Qwen2-72B-Instruct": (0.8636363636, 0.5864197531, 0.6387665198, 0.4135802469, 0.6985294069, 0.5864197531),
    "Qwen2-7B-Instruct": (1.0, 0.4361233480, 0.4361233480, 0.5638766520, 0.6073619589, 0.4361233480),
    "GPT-4o": (1.0, 0.4955752212, 0.4977973568, 0.5044247788, 0.6627218890, 0.4955752212),
    "GPT-4o-mini": (1.0, 0.3466666667, 0.3524229075, 0.6533333333, 0.5148514813, 0.3466666667),
    "GPT-3.5-Turbo": (0.9782608695, 0.4054054054, 0.4096916299, 0.5945945946, 0.5732484035, 0.4054054054),
    "Claude-3.5-Sonnet": (0.9662921347, 0.4195121951, 0.4625550661, 0.5804878048, 0.5850340093, 0.4195121951),
    "Claude-3-Sonnet": (0.6320754716, 0.5, 0.5330396476, 0.5, 0.5583333284, 0.5),
    "LLaMA-3.1-8B": (0.9876543209, 0.3571428571, 0.3612334802, 0.6428571428, 0.5245901600, 0.3571428571),
    "LLaMA-3.1-70B": (0.7093023255, 0.3719512195, 0.4361233480, 0.6280487804, 0.4879999954, 0.3719512195),
    "LLaMA-3-8B": (0.6739130434, 0.3899371069, 0.4405286343, 0.6100628931, 0.4940238997, 0.3899371069),
    "LLaMA-3-70B": (0.8356164382, 0.3112244898, 0.3524229075, 0.6887755102, 0.4535315945, 0.3112244898),
    "DeepSeek-7B-Chat": (0.8791208790, 0.4255319149, 0.4757709251, 0.5744680851, 0.5734766981, 0.4255319149),
}
NAMES = ("recall", "precision", "accuracy", "false_alarm", "f1", "accept_rate")


def events(tp: int, fp: int, tn: int, fn: int) -> tuple[Tensor, Tensor]:
    """`proposed` and `accepted` for some number of events of each kind."""
    kinds = [(1, 1)] * tp + [(1, 0)] * fp + [(0, 1)] * tn + [(0, 0)] * fn
    return torch.tensor([kind[0] for kind in kinds]), torch.tensor([kind[1] for kind in kinds])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_give_published_rows(name: str) -> None:
    row = PUBLISHED_AGENT_ROWS[name]
    assert sum(row[count] for count in ("tp", "fp", "tn", "fn")) == 227
    assert [row[figure] for figure in NAMES] == pytest.approx(PUBLISHED[name], abs=1e-7)


@pytest.mark.parametrize(
    ("counts", "f1"), [((111, 112, 4, 0), 66.47), ((80, 144, 2, 1), 52.46), ((95, 67, 50, 15), 69.85)]
)
def test_f1_follows_from_the_counts(counts: tuple[int, int, int, int], f1: float) -> None:
    metrics = AgentMetrics()
    metrics.update(*events(*counts))
    found = metrics.compute()
    assert round(100 * float(found["f1"]), 2) == f1
    assert tuple(int(found[name]) for name in ("tp", "fp", "tn", "fn")) == counts
    assert (int(found["events"]), int(found["undecided"])) == (227, 0)


def test_every_published_row_is_tested() -> None:
    assert set(PUBLISHED_AGENT_ROWS) == set(PUBLISHED)


@few_examples
@given(st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any))
def test_metrics_equal_their_definitions(counts: list[int]) -> None:
    tp, fp, tn, fn = counts
    proposed, accepted = events(tp, fp, tn, fn)
    metrics = AgentMetrics()
    for place in range(len(proposed)):  # one at a time, as batches come
        metrics.update(proposed[place : place + 1].bool(), accepted[place : place + 1].bool())
    found = {name: float(value) for name, value in metrics.compute().items()}

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    assert found["recall"] == pytest.approx(share(tp, tp + fn))
    assert found["precision"] == found["accept_rate"] == pytest.approx(share(tp, tp + fp))
    assert found["accuracy"] == pytest.approx(share(tp + tn, sum(counts)))
    assert found["false_alarm"] == pytest.approx(share(fp, tp + fp))
    assert found["f1"] == pytest.approx(share(2 * tp, 2 * tp + fp + fn))


def test_metrics_of_candidates_equal_values_computed_by_hand() -> None:
    """An event with a rejected, then two accepted candidates; one with none accepted; one without a verdict."""
    proposed = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    accepted = torch.tensor([[0, 1, 1], [0, 0, 0], [NO_VERDICT, 0, 1], [NO_VERDICT] * 3])
    metrics = AgentMetrics()
    metrics.update(proposed, accepted)
    found = {
        name: int(value) for name, value in metrics.compute().items() if name[:2] in ("tp", "fp", "tn", "fn", "un")
    }
    at = {k: tuple(found[f"{name}@{k}"] for name in ("tp", "fp", "tn", "fn", "undecided")) for k in (1, 2, 3)}
    assert at == {1: (0, 1, 0, 1, 2), 2: (0, 1, 1, 1, 1), 3: (0, 0, 2, 1, 1)}
    assert at[3] == tuple(found[name] for name in ("tp", "fp", "tn", "fn", "undecided"))


CANDIDATES = st.integers(1, 4).flatmap(
    lambda k: st.lists(
        st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1, NO_VERDICT])), min_size=k, max_size=k),
        min_size=1,
        max_size=8,
    )
)


@few_examples
@given(CANDIDATES)
def test_an_accepted_event_stays_accepted_with_more_candidates(drawn: list[list[tuple[int, int]]]) -> None:
    columns = torch.tensor(drawn)
    proposed, accepted = columns[..., 0], columns[..., 1]
    before = torch.zeros(len(drawn), dtype=torch.bool)
    for k in range(1, accepted.shape[1] + 1):
        chosen = deciding_candidate(accepted[:, :k])
        now = accepted.gather(1, chosen[:, None])[:, 0] == 1
        assert torch.equal(now, (accepted[:, :k] == 1).any(1))
        assert bool((before <= now).all())
        before = now
        found = agent_metrics(proposed[:, :k], accepted[:, :k], torch.arange(len(drawn)))
        assert int(found["tp"] + found["tn"]) == int(now.sum())
        counted = sum(int(found[name]) for name in ("tp", "fp", "tn", "fn", "undecided"))
        assert counted == int(found["events"]) == len(drawn)


def test_intervals_draw_whole_traces() -> None:
    """One trace is all right, one all wrong. Resamples of whole traces reach 0 and 1; single events would not."""
    proposed, accepted = events(20, 20, 0, 0)
    metrics = AgentMetrics(bootstrap=200)
    metrics.update(proposed, accepted, torch.tensor([0] * 20 + [1] * 20))
    found = metrics.compute()
    assert (float(found["precision_low"]), float(found["precision_high"])) == (0.0, 1.0)
    apart = AgentMetrics(bootstrap=200)
    apart.update(proposed[:20], accepted[:20])
    apart.update(proposed[20:], accepted[20:])
    found = apart.compute()
    assert 0.2 < float(found["precision_low"]) < 0.5 < float(found["precision_high"]) < 0.8


def test_intervals_are_deterministic_and_contain_the_metric() -> None:
    proposed, accepted = events(9, 7, 5, 3)
    trace = torch.arange(24) % 5
    first, second = (agent_metrics(proposed[:, None], accepted[:, None], trace, bootstrap=300) for _ in range(2))
    assert first == second
    for name in NAMES:
        assert first[f"{name}_low"] <= first[name] <= first[f"{name}_high"]
