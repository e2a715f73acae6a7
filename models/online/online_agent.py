"""OnlineAgent: an agent that learns from a judge's rewards of the answers that it writes while it trains.

Shape legend: H histories of a step on one rank, K candidates, R rows (answers) of a micro-batch, L distinct tokens of
their answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from datamodules.batching.answer_rows import Example
from datamodules.batching.history_rows import HistoryDataModule
from datamodules.batching.rows import Stage, log
from datamodules.batching.steps import AgentBatch, EncodedRows, MicroBatch
from datamodules.corpus.answers import Answer, read_answer
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from datamodules.ranges import FINITE, Count, NonNegativeFloat
from models.decoding.branch_checks import can_branch
from models.decoding.generation import generate_answers
from models.learning.answer_metrics import decisions, probed_rows
from models.learning.checkpoint_contents import CheckpointContent, OnlineCheckpoint
from models.learning.network_module import mesh_of
from models.learning.proactive_agent import ProactiveAgent, answer_lengths
from models.networks.building import build_network
from models.networks.heads import token_losses
from models.online.rewards import JudgeReward, advantages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_CONSTANT_STEPS = 20  # a run ends after so many steps in a row with only offers, or with none
Candidates = Annotated[int, Ge(2), Le(1024), FINITE]


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer that the agent wrote.

    Attributes:
        token_ids: Its token ids, with the end token unless it was cut off.
        answer: Its content; None if it was cut off or is unreadable.
    """

    token_ids: list[int]
    answer: Answer | None

    @property
    def is_offer(self) -> bool:
        """Whether it is an offer, and not silence."""
        return self.answer is not None and self.answer.proposal is not None


class OnlineAgent(ProactiveAgent):
    """An agent that learns from rewards: group relative policy optimization (GRPO, arXiv 2402.03300).

    After each history of a step the agent writes several answers at temperature 1. A judge rewards them, and answers
    with more reward than the others after the same history become more likely. Training starts from a trained agent,
    whose export is the backbone. It is also the reference, which the agent is kept close to.

    Args:
        judge: The judge that rewards answers: a run, checkpoint or export of a reward classifier.
        held_out_judge: Another judge, whose rewards are only logged. If they fall behind, the agent has learned to
            exploit the mistakes of its judge (reward hacking).
        candidates: Answers after each history, the group size of GRPO.
        max_new_tokens: Maximum number of tokens of an answer. A longer one is cut off and counts as unreadable.
        cost_ratio: Cost of a rejected offer relative to the value of an accepted one.
        divergence_weight: Weight of the KL divergence from the reference (beta in the paper).
        options: See ProactiveAgent. `null_weight` has no effect.
    """

    task = "online"
    plannable = False
    data_class = HistoryDataModule
    checkpoint_record: ClassVar[type[CheckpointContent]] = OnlineCheckpoint
    monitored_metrics = ("validation/reward", "validation/f1", "validation/auroc")
    linked_options: ClassVar[dict[str, str]] = {**ProactiveAgent.linked_options, "max_new_tokens": "max_new_tokens"}
    may_change = (*ProactiveAgent.may_change, "judge", "held_out_judge")

    def __init__(
        self,
        judge: str,
        held_out_judge: str | None = None,
        candidates: Candidates = 4,
        max_new_tokens: Count = 64,
        cost_ratio: NonNegativeFloat = 1.0,
        divergence_weight: NonNegativeFloat = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.judge_digests: dict[str, str] = {}  # by the name of the option
        self.constant_steps = 0
        self._judges: dict[str, JudgeReward] = {}
        self._reference: tuple[PreTrainedModel, ...] = ()  # a tuple, so that checkpoints do not contain it
        self._branched: bool | None = None
        self._examples: list[Example] = []  # the rows of the training split
        self._divergence = torch.zeros(())  # of the current step

    # Setup

    def on_fit_start(self) -> None:
        """Load the judges and the reference.

        Raises:
            UserError: The backbone is from scratch, weights are sharded, or a judge does not fit.
        """
        if self.hparams["backbone"] == SCRATCH:
            raise UserError("model.backbone: online training needs a trained agent", "Give the export of one.")
        if mesh_of(self.trainer) is not None:
            raise UserError("trainer.strategy: sharded weights cannot write answers", "Use ddp, or one device.")
        self._load_judges()
        self._examples = self.trainer.datamodule.rows("train")  # type: ignore[attr-defined]
        assert self.network is not None
        reference = build_network(self.network_options, self.trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        reference.set_attn_implementation(self.network.config._attn_implementation)
        self._reference = (reference.to(self.device).eval().requires_grad_(False),)

    def _load_judges(self) -> None:
        names = [name for name in ("judge", "held_out_judge") if self.hparams[name] is not None]
        for name in names:
            judge = JudgeReward(self.hparams[name], f"model.{name}", self.hparams["cost_ratio"], self.device)
            self._refuse_judge(name, judge)
            self._judges[name], self.judge_digests[name] = judge, judge.digest
        if len(set(self.judge_digests.values())) < len(names):
            raise UserError("model.held_out_judge: it is the judge that rewards", "Give another one.")

    def _refuse_judge(self, name: str, judge: JudgeReward) -> None:
        """Raise a UserError if a judge is another one than before a resume, or was trained on scenes of the test."""
        if self.judge_digests.get(name, judge.digest) != judge.digest:
            raise UserError(f"model.{name}: it is another judge than that of the run so far", "Give the same one.")
        data: HistoryDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        tested = any(row.scene in judge.scenes or row.history_digest in judge.histories for row in data.split.test)
        if tested and not data.contamination_allowed:
            raise UserError(
                f"model.{name}: it was trained on scenes of the agent's test",
                "Give a judge of the same fold, or --data.allow_contamination, which marks the run.",
            )

    # Training

    def prepare_step(self, batch: list[AgentBatch]) -> list[Any]:
        """Write and reward answers, and return them as the micro-batches of the step."""
        self._divergence = torch.zeros((), device=self.device)
        rows, shares = _rows_of(batch)
        histories = [self._examples[row] for row in rows]
        written = self.write(histories, self.hparams["candidates"], 1.0, rows)
        reward_HK = self._rewards("judge", histories, written)
        self._log_step(written, reward_HK)
        advantage_N = advantages(reward_HK).flatten()
        weight_N = torch.tensor(shares).repeat_interleave(self.hparams["candidates"]) / self.hparams["candidates"]
        return self._micro_batches(histories, written, advantage_N.float(), weight_N)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the divergence, and clip the gradients."""
        # In an epoch's first step, what training_step logs after this hook erases what it has logged before.
        self.log("train/divergence", self.trainer.strategy.reduce(self._divergence, reduce_op="mean"))
        super().on_before_optimizer_step(optimizer)

    def write(
        self, examples: Sequence[Example], count: int, temperature: float, rows: Sequence[int]
    ) -> list[WrittenAnswer]:
        """Write `count` answers after each history, without dropout and grammar.

        Args:
            examples: The histories.
            count: Number of answers after each.
            temperature: Sampling temperature; 0 is greedy.
            rows: Indices of the histories in their split. With the run's seed and the step, they seed the samples.
        """
        assert self.network is not None
        data: HistoryDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        tokens, end_id = self.hparams["max_new_tokens"], data.end_id
        max_length = data.prompt_length + tokens
        if self._branched is None:
            self._branched = can_branch(self.network, max_length)
        found: list[WrittenAnswer | None] = [None] * (len(examples) * count)
        for one in generate_answers(
            self.network,
            [data.segments(example.history) for example in examples],
            data.generation_prompt(),
            end_id=end_id,
            max_new_tokens=tokens,
            candidates=count,
            temperature=temperature,
            seed=data.order_seed,
            max_length=max_length,
            branched=self._branched,
            wanted={(index, len(example.history)) for index, example in enumerate(examples)},
            streams=[(self.trainer.global_step << 32) + row for row in rows],
        ):
            answer = read_answer(data.tokenizer.decode(one.token_ids)) if one.finished else None
            ids = [*one.token_ids, end_id] if one.finished else one.token_ids
            found[one.trace * count + one.candidate] = WrittenAnswer(ids, answer)
        self.train()
        return [one for one in found if one is not None]

    def _rewards(self, judge: str, histories: Sequence[Example], written: Sequence[WrittenAnswer]) -> Tensor:
        """The rewards of the answers after each history, (H, K) float64."""
        count = len(written) // len(histories)
        repeated = [example.history for example in histories for _ in range(count)]
        return self._judges[judge].rewards(repeated, [one.answer for one in written]).view(-1, count)

    def _micro_batches(
        self, histories: Sequence[Example], written: Sequence[WrittenAnswer], advantage_N: Tensor, weight_N: Tensor
    ) -> list[Any]:
        """Lay the answers out like the rows of an agent, with the reference's losses of their tokens."""
        data: HistoryDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        count = len(written) // len(histories)
        prompts = [data.prompt(example.history) for example in histories]
        input_ids, answers = [], []
        for index, one in enumerate(written):
            prompt = prompts[index // count]
            input_ids.append([*prompt, *one.token_ids])
            answers.append(np.arange(len(prompt), len(prompt) + len(one.token_ids)))
        layout = data.layout_of(input_ids, answers)
        columns = {"advantage": advantage_N, "answer_weight": weight_N.float()}
        parts = tuple(MicroBatch(tuple(part), 1.0) for part in layout.split(range(len(written)), 1))
        batches = self.trainer.strategy.batch_to_device(EncodedRows(layout, columns)[parts], self.device)
        with torch.no_grad():
            for batch in batches:
                batch["reference_loss"] = self._token_losses(self._reference[0], batch)
        return batches

    def loss(self, batch: Any) -> Tensor:
        assert self.network is not None
        answers, lengths_R = batch["answers"], answer_lengths(batch)
        loss_L = self._token_losses(self.network, batch)
        difference_L = loss_L - batch["reference_loss"]  # log-probability under the reference minus that of the agent
        divergence_L = difference_L.exp() - difference_L - 1  # k3 of http://joschu.net/blog/kl-approx.html
        row_P, token_P = answers["pair_row"], answers["pair_token"]
        # Each answer was written by the current weights, so its probability ratio is 1, and the gradient of the ratio
        # is that of the log-probability.
        weight_P = (batch["answer_weight"] / lengths_R)[row_P]  # of each token: a mean over tokens, then over answers
        divergence = (weight_P * divergence_L[token_P]).sum()
        self._divergence += divergence.detach()
        policy_loss = (weight_P * batch["advantage"][row_P] * loss_L[token_P]).sum()
        return policy_loss + self.hparams["divergence_weight"] * divergence

    def _log_step(self, written: Sequence[WrittenAnswer], reward_HK: Tensor) -> None:
        """Log figures of a step's answers over all ranks, and end the run if all answers have long been of one kind."""
        figures = {
            "reward": float(reward_HK.mean()),
            "offer_rate": _offer_rate(written),
            "unreadable": sum(one.answer is None for one in written) / len(written),
            "answer_tokens": sum(len(one.token_ids) for one in written) / len(written),
        }
        own = torch.tensor(list(figures.values()), device=self.device)
        means = dict(zip(figures, self.trainer.strategy.reduce(own, reduce_op="mean"), strict=True))
        self.log_dict({f"train/{name}": mean for name, mean in means.items()})
        offer_rate = float(means["offer_rate"])
        self.constant_steps = self.constant_steps + 1 if offer_rate in (0.0, 1.0) else 0
        if self.constant_steps >= MAX_CONSTANT_STEPS:
            what = "offers only" if offer_rate else "no offer"
            log.warning(f"the run ends: {what} in {MAX_CONSTANT_STEPS} steps in a row, so rewards teach no decision")
            self.trainer.should_stop = True

    # Validation and checkpoints

    def answer_metrics(self, rows: dict[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Add P(null), and the judges' rewards of greedy answers after each probed history."""
        data: HistoryDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        metrics = super().answer_metrics(rows, stage)
        offers_N, _ = decisions(rows)
        metrics["p_null"] = 1 - offers_N.mean()
        if not self._judges:
            self._load_judges()
        all_examples = data.rows(stage)
        examples = [all_examples[row] for row in probed_rows(rows).tolist()]
        written = self.write(examples, 1, 0.0, range(len(examples)))
        for name in self._judges:
            prefix = "" if name == "judge" else "held_out_"
            metrics[f"{prefix}reward"] = self._rewards(name, examples, written).mean()
        metrics["offer_rate"] = torch.tensor(_offer_rate(written))
        return metrics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["judges"] = self.judge_digests
        checkpoint["constant_steps"] = self.constant_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.judge_digests = dict(checkpoint["judges"])
        self.constant_steps = checkpoint["constant_steps"]

    @staticmethod
    def _token_losses(network: "PreTrainedModel", batch: Any) -> Tensor:
        answers = batch["answers"]
        return token_losses(network, batch["inputs"], answers["predicted_at"], answers["target"])


def _rows_of(batch: Sequence[AgentBatch]) -> tuple[list[int], list[float]]:
    """The rows of a step's micro-batches, without fillers, and the weight of each row in the mean of the step."""
    rows: list[int] = []
    shares: list[float] = []
    for part in batch:
        share_R = part["weight"] * answer_lengths(part)  # the mean of an agent's step is over tokens
        for row, share in zip(part["row"].tolist(), share_R.tolist(), strict=True):
            if share > 0:
                rows.append(row)
                shares.append(share)
    return rows, shares


def _offer_rate(written: Sequence[WrittenAnswer]) -> float:
    return sum(one.is_offer for one in written) / len(written)
