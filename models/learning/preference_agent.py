"""PreferenceAgent: an agent that learns from accepted and rejected proposals, with DPO or KTO.

Shape legend: R rows of a micro-batch, G groups of two rows, N rows of a split, P pairs.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from datamodules.batching.answer_rows import AnswerKind
from datamodules.batching.preference_rows import Objective, PreferenceDataModule
from datamodules.batching.rows import Stage, log
from datamodules.batching.steps import PreferenceBatch
from datamodules.errors import UserError
from datamodules.ranges import BelowHalf, NonNegativeFloat, Positive
from models.learning.answer_metrics import decisions, probed_rows, proposal_metrics
from models.learning.checkpoint_contents import PreferenceCheckpoint
from models.learning.preference_losses import dpo_losses, kto_losses, preference_metrics
from models.learning.proactive_agent import ProactiveAgent, answer_lengths

STAGES: tuple[Stage, ...] = ("train", "validation", "test")
Reference = dict[Literal["rows", "log_probability"], Any]


class PreferenceAgent(ProactiveAgent):
    """An agent that learns to make accepted proposals more likely than rejected ones.

    Training starts from the weights of a trained agent: give its export as backbone. These weights are also the
    reference. Their log-probabilities of all rows are computed once, before the first step, and kept in the checkpoint.

    Args:
        objective: dpo learns from pairs of an accepted and a rejected proposal after the same history. kto learns from
            single judged proposals.
        beta: Scale of the implicit reward. A greater one keeps the agent closer to its reference.
        label_smoothing: With dpo, the assumed probability that a judgment is wrong.
        rejected_weight: With kto, the weight of rejected proposals relative to accepted ones.
        supervised_weight: Weight of an additional loss: the mean cross-entropy per token of each accepted answer. It
            keeps accepted answers likely, which a preference alone does not.
        options: See ProactiveAgent. `null_weight` applies to the supervised loss.
    """

    task = "preference"
    data_class = PreferenceDataModule
    checkpoint_record = PreferenceCheckpoint
    monitored_metrics = (
        "validation/preference_loss",
        "validation/preference_accuracy",
        *ProactiveAgent.monitored_metrics,
    )
    linked_options: ClassVar[dict[str, str]] = {**ProactiveAgent.linked_options, "objective": "objective"}

    def __init__(
        self,
        objective: Objective = "dpo",
        beta: Positive = 0.1,
        label_smoothing: BelowHalf = 0.0,
        rejected_weight: NonNegativeFloat = 1.0,
        supervised_weight: NonNegativeFloat = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.reference: dict[Stage, Reference] = {}  # by split
        self._reference_N: Tensor | None = None  # of the training split, on the device
        self._divergence = torch.zeros(())  # of the current step

    # The reference

    def on_fit_start(self) -> None:
        """Compute the log-probabilities of the reference, unless a checkpoint has them."""
        data: PreferenceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        for stage in STAGES:
            digest = data.split_digest(stage)
            if stage not in self.reference:
                self.reference[stage] = {"rows": digest, "log_probability": self._log_probability(stage)}
            elif self.reference[stage]["rows"] != digest:
                raise UserError(
                    f"the checkpoint's reference is of other {stage} rows",
                    "Resume with the data of the run, or start a new run.",
                )

    def _log_probability(self, stage: Stage) -> Tensor:
        """The log-probability of each row of a split under the current weights, (N,) float64, without dropout."""
        log.info(f"reference: log-probabilities of the {stage} rows")
        training = self.training
        self.eval()
        self.evaluated.reset()
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            for batch in self.trainer.datamodule.evaluation_loader(stage):  # type: ignore[attr-defined]
                self.collect(self.trainer.strategy.batch_to_device(batch))
        found = -self.evaluated.rows()["loss"]
        self.evaluated.reset()
        self.train(training)
        return found

    # Training

    @property
    def extra_forward_passes(self) -> int:
        return int(self.hparams["objective"] == "kto")

    def prepare_step(self, batch: list[PreferenceBatch]) -> list[PreferenceBatch]:
        """With kto, estimate the divergence from the reference on the step's mismatched proposals, of all ranks."""
        if self.hparams["objective"] != "kto":
            return batch
        total = torch.zeros((), device=self.device)
        with torch.no_grad():
            for part in batch:
                ratio_R = self._log_ratios(part, self.row_losses(part))
                total += (ratio_R[part["groups"][:, 1]] * part["group_weight"]).sum()
        self._divergence = self.trainer.strategy.reduce(total, reduce_op="mean").clamp(min=0)
        self.log("train/divergence", self._divergence)
        return batch

    def loss(self, batch: PreferenceBatch) -> Tensor:  # type: ignore[override]
        options = self.hparams
        first_G, second_G = batch["groups"].unbind(1)
        loss_R = self.row_losses(batch)
        ratio_R = self._log_ratios(batch, loss_R)
        accepted_G = batch["kind"][first_G] != AnswerKind.REJECTED
        if options["objective"] == "dpo":
            loss_G = dpo_losses(ratio_R[first_G], ratio_R[second_G], options["beta"], options["label_smoothing"])
        else:
            divergence = self._divergence.to(loss_R.device)
            loss_G = kto_losses(ratio_R[first_G], accepted_G, divergence, options["beta"], options["rejected_weight"])
        if options["supervised_weight"]:
            mean_R = loss_R / answer_lengths(batch) * self.null_weights(batch)
            loss_G = loss_G + options["supervised_weight"] * torch.where(accepted_G, mean_R[first_G], 0.0)
        return (loss_G * batch["group_weight"]).sum()

    def _log_ratios(self, batch: PreferenceBatch, loss_R: Tensor) -> Tensor:
        """The log-ratio of each row of the training split to the reference, (R,) float32."""
        if not self.reference:  # `plan` computes a loss on shapes, outside of a run
            return -loss_R
        if self._reference_N is None:
            self._reference_N = self.reference["train"]["log_probability"].float().to(self.device)
        return -loss_R - self._reference_N[batch["row"]]

    # Metrics

    def answer_metrics(self, rows: dict[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Also the metrics of the pairs of a split, as far as both of their rows were read."""
        metrics = super().answer_metrics(rows, stage)
        reference_N = self._reference_of(stage)
        if reference_N is None:
            return metrics
        data: PreferenceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        ratio_N = torch.full_like(reference_N, torch.nan)
        ratio_N[rows["row"]] = -rows["loss"] - reference_N[rows["row"]]
        pair_P2 = torch.from_numpy(data.pairs(stage))
        pair_P2 = pair_P2[ratio_N[pair_P2].isfinite().all(1)]
        chosen_P, rejected_P = ratio_N[pair_P2].unbind(1)
        scene_P = self.scenes_of(stage, pair_P2[:, 0]) if stage == "test" else None
        return metrics | preference_metrics(chosen_P, rejected_P, self.hparams["beta"], scene_P)

    def on_test_epoch_end(self) -> None:
        """Also store the metrics of the reference on the same rows in `before_metrics`."""
        super().on_test_epoch_end()
        reference_N = self._reference_of("test")
        if reference_N is None:
            return
        rows = self.evaluated.rows()
        before = rows | {"loss": -reference_N[rows["row"]]}
        metrics = self.answer_metrics(before, "test")
        scene_N = self.scenes_of("test", probed_rows(before))
        metrics |= proposal_metrics(*decisions(before), scene_N=scene_N)
        # No reward of the reference is above another one: all are 0.
        self.before_metrics = {
            name: float(value) for name, value in metrics.items() if not name.startswith("preference_accuracy")
        }

    def _reference_of(self, stage: Stage) -> Tensor | None:
        """The log-probabilities of a split under the reference, (N,) float64; None if they are of other rows."""
        data: PreferenceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage not in self.reference or self.reference[stage]["rows"] != data.split_digest(stage):
            return None
        return self.reference[stage]["log_probability"]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = self.reference

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.reference = checkpoint["reference"]
