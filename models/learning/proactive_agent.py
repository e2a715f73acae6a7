"""ProactiveAgent: reads a history and writes an answer: an offer, or null.

Shape legend: R rows, L distinct tokens of their answers, N probed histories.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from datamodules.batching.answer_rows import AgentDataModule, AnswerKind, AnswersDataModule
from datamodules.batching.rows import Stage
from datamodules.batching.steps import AgentBatch
from datamodules.corpus.answers import read_answer
from datamodules.corpus.records import history_digest
from datamodules.errors import UserError
from datamodules.ranges import NonNegativeFloat, NonNegativeInt
from models.decoding.branch_checks import can_branch
from models.decoding.generation import generate_answers
from models.learning.answer_metrics import AnswerLosses, answer_losses, decisions, probed_rows, proposal_metrics
from models.learning.checkpoint_contents import AgentCheckpoint, CheckpointContent
from models.learning.finite_check import not_finite_error
from models.learning.metrics import counted_rows
from models.learning.training import BackboneModule
from models.networks.configurations import max_positions
from models.networks.heads import language_problem, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED_TOKENS = 64


class ProactiveAgent(BackboneModule):
    """A causal language model that learns the tokens of answers.

    Args:
        null_weight: Factor on the loss of null answers. They are short, and a step's loss is the mean over its tokens.
        sampled_answers: Number of validation histories after which each validation generates an answer for people to
            read. The share of answers in valid JSON is logged.
        options: See BackboneModule.

    Examples:
        >>> from lightning import Trainer
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(max_steps=2, limit_val_batches=1, enable_checkpointing=False, **quiet)
        >>> trainer.fit(ProactiveAgent(sampled_answers=1), AgentDataModule())
        >>> trainer.global_step
        2
    """

    task = "agent"
    data_class: ClassVar[type[AnswersDataModule]] = AgentDataModule
    checkpoint_record: ClassVar[type[CheckpointContent]] = AgentCheckpoint
    pipeline = "text-generation"
    card_template = "agent_card.md"
    constant_decisions = ("propose always", "never")
    head = "language model"
    monitored_metrics: ClassVar[tuple[str, ...]] = (
        "validation/loss",
        "validation/f1",
        "validation/auroc",
        "validation/json_validity",
    )

    def __init__(
        self, null_weight: NonNegativeFloat = 1.0, sampled_answers: NonNegativeInt = 8, **options: Any
    ) -> None:
        super().__init__(**options)
        self.evaluated = AnswerLosses()
        self.samples: list[dict[str, Any]] = []  # answers of the last validation
        self._can_branch: bool | None = None  # determined at the first validation

    def refuse_network(self, network: "PreTrainedModel") -> None:
        if problem := language_problem(network):
            raise UserError(
                f"model.backbone: {self.hparams['backbone']} cannot be trained as an agent: {problem}",
                "Use a decoder, such as Llama, Qwen, Mistral, Gemma or Phi.",
            )

    def decision_metrics(self, probability_N: Tensor, rows: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
        return proposal_metrics(probability_N, rows["target"], threshold, rows["scene"])

    def row_losses(self, batch: AgentBatch) -> Tensor:
        """The summed cross-entropy of each row's answer, (R,) float32."""
        assert self.network is not None, "configure_model makes the network"
        answers = batch["answers"]
        loss_L = token_losses(self.network, batch["inputs"], answers["predicted_at"], answers["target"])
        zero_R = torch.zeros(len(batch["row"]), dtype=loss_L.dtype, device=loss_L.device)
        return zero_R.index_add(0, answers["pair_row"], loss_L[answers["pair_token"]])

    def loss(self, batch: AgentBatch) -> Tensor:
        return (self.row_losses(batch) * self.null_weights(batch) * batch["weight"]).sum()

    def null_weights(self, batch: AgentBatch) -> Tensor:
        """The factor on the loss of each row, (R,)."""
        return torch.where(batch["kind"] == AnswerKind.NULL, self.hparams["null_weight"], 1.0)

    def answer_metrics(self, rows: dict[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """The metrics of the answers of a split, from the columns of `AnswerLosses`."""
        return answer_losses(rows)

    def validation_step(self, batch: list[AgentBatch], batch_idx: int) -> None:
        self.collect(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and fit the calibration."""
        rows = self.evaluated.rows()
        if not torch.isfinite(rows["loss"]).all():
            raise not_finite_error(
                "an answer's loss in validation", float(rows["loss"].sum()), self.trainer.global_step
            )
        metrics = self.answer_metrics(rows, "validation")
        offers_N, needed_N = decisions(rows)
        if len(needed_N):
            self.calibrate(offers_N, needed_N)
            metrics |= proposal_metrics(offers_N, needed_N)
        self.samples = self._write_samples()
        if self.samples:
            valid = [sample["valid"] for sample in self.samples]
            metrics["json_validity"] = torch.tensor(sum(valid) / len(valid))
        self.log_dict({f"validation/{name}": value.float() for name, value in metrics.items()}, prog_bar=True)

    def test_step(self, batch: list[AgentBatch], batch_idx: int) -> None:
        self.collect(batch)

    def on_test_epoch_end(self) -> None:
        """Store the probed histories of all ranks in `test_rows`, and the metrics in `test_metrics`."""
        rows = self.evaluated.rows()
        offers_N, needed_N = decisions(rows)
        scene_N = self.scenes_of("test", probed_rows(rows))

        answers = self.answer_metrics(rows, "test")

        def metrics(probability_N: Tensor, threshold: float) -> dict[str, Tensor]:
            return answers | proposal_metrics(probability_N, needed_N, threshold, scene_N)

        columns = {"probability": offers_N, "target": needed_N, "row": probed_rows(rows), "scene": scene_N}
        self.record_test(columns, metrics, len(rows["row"]))

    def _write_samples(self) -> list[dict[str, Any]]:
        """Greedy answers, without a grammar, after validation histories spread over the split."""
        assert self.network is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        probes = [example for example in data.rows("validation") if example.kind == AnswerKind.PROBE]
        count = min(self.hparams["sampled_answers"], len(probes))
        chosen = [probes[index * len(probes) // count] for index in range(count)]
        max_length = min(data.prompt_length + SAMPLED_TOKENS, max_positions(self.network.config))
        if self._can_branch is None and chosen:
            self._can_branch = can_branch(self.network, max_length)
        generated = generate_answers(
            self.network,
            [data.segments(example.history) for example in chosen],
            data.generation_prompt(),
            end_id=data.end_id,
            max_new_tokens=SAMPLED_TOKENS,
            max_length=max_length,
            branched=self._can_branch,
            wanted={(index, len(example.history)) for index, example in enumerate(chosen)},
        )
        texts = {answer.trace: data.tokenizer.decode(answer.token_ids) for answer in generated}
        return [
            {
                "history": f"{history_digest(example.history) % 2**64:016x}",
                "event": example.history[-1].event,
                "help_needed": example.help_needed,
                "answer": texts[index],
                "valid": read_answer(texts[index]) is not None,
            }
            for index, example in enumerate(chosen)
        ]

    def collect(self, batch: list[AgentBatch]) -> None:
        """Add the losses of rows to `evaluated`."""
        for micro_batch in batch:
            self.evaluated.update(
                self.row_losses(micro_batch),
                answer_lengths(micro_batch),
                micro_batch["kind"],
                micro_batch["help_needed"],
                counted_rows(micro_batch),
            )


def answer_lengths(batch: AgentBatch) -> Tensor:
    """The number of tokens of each row's answer, (R,) int64."""
    pair_row = batch["answers"]["pair_row"]
    zero_R = torch.zeros(len(batch["row"]), dtype=torch.int64, device=pair_row.device)
    return zero_R.index_add(0, pair_row, torch.ones_like(pair_row))
