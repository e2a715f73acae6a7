"""RewardClassifier: reads a history and one proposal, and returns the probability that the user accepts it.

Shape legend: R rows, C classes (rejected, accepted).
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from datamodules.batching.layouts import Inputs
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import RewardBatch
from datamodules.corpus.records import Category
from datamodules.ranges import NonNegativeFloat
from models.learning.checkpoint_contents import RewardCheckpoint
from models.learning.finite_check import not_finite_error
from models.learning.metrics import RewardMetrics, counted_rows, reward_metrics
from models.learning.training import BackboneModule
from models.networks.devices import as_float64
from models.networks.heads import Pooling, class_layer, classify, reads_last_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CategoryName = Literal["missed_need", "non_response", "correct_detection", "false_alarm"]


class RewardClassifier(BackboneModule):
    """A backbone with a two-class head.

    Args:
        pooling: Which hidden states the head reads: "last" (the last real token), "cls", "mean", or "auto" (as
            transformers defines it for the backbone: the last real token for a decoder, usually CLS for an encoder).
        category_weights: Factors on the loss of rows by category, for example {missed_need: 2.0}. The default is 1.
        options: See BackboneModule.

    Examples:
        >>> from lightning import Trainer
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(max_steps=2, limit_val_batches=1, enable_checkpointing=False, **quiet)
        >>> trainer.fit(RewardClassifier(learning_rate=1e-3), RewardDataModule())
        >>> trainer.global_step
        2
    """

    task = "reward"
    head = "classifier"
    data_class = RewardDataModule
    card_template = "reward_card.md"
    checkpoint_record = RewardCheckpoint
    pipeline = "text-classification"
    card_tags = ("reward-model",)
    constant_decisions = ("accept everything", "reject everything")
    monitored_metrics = ("validation/auroc", "validation/loss", "validation/accuracy", "validation/f1")
    category_weight: Tensor

    def __init__(
        self,
        pooling: Pooling = "auto",
        category_weights: dict[CategoryName, NonNegativeFloat] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.evaluated = RewardMetrics()
        weights = {str(name): weight for name, weight in (category_weights or {}).items()}
        weight_by_category = torch.tensor([weights.get(category.value, 1.0) for category in Category])
        self.register_buffer("category_weight", weight_by_category, persistent=False)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (R, C) float32 of rejected and accepted."""
        assert self.network is not None, "configure_model makes the network"
        return classify(self.network, inputs, self.hparams["pooling"]).float()

    def loss(self, batch: RewardBatch) -> Tensor:
        """A micro-batch's part of the step's loss, (). Each row's loss is multiplied by its category's weight."""
        loss_R = nn.functional.cross_entropy(self(batch["inputs"]), batch["label"], reduction="none")
        return (loss_R * self.category_weight[batch["category"]] * batch["weight"]).sum()

    def refuse_network(self, network: "PreTrainedModel") -> None:
        if self.hparams["pooling"] != "auto":
            class_layer(network)

    def decision_metrics(self, probability_N: Tensor, rows: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
        return reward_metrics(probability_N, rows["target"], rows["category"], threshold, rows["scene"])

    def read_rows(self, network: "PreTrainedModel", inputs: Inputs) -> Tensor:
        return classify(network, inputs, self.hparams["pooling"])

    def tree_problem(self, network: "PreTrainedModel") -> str | None:
        if self.hparams["pooling"] not in ("auto", "last") or not reads_last_token(network):
            return "the backbone, or model.pooling, reads more than a row's last token"
        return None

    def validation_step(self, batch: list[RewardBatch], batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and fit the calibration."""
        rows = self.evaluated.rows()
        probability_N, target_N = rows["probability"], rows["target"]
        if not torch.isfinite(probability_N).all():
            raise not_finite_error("a probability in validation", float(probability_N.sum()), self.trainer.global_step)
        self.calibrate(probability_N, target_N)
        metrics = reward_metrics(probability_N, target_N, rows["category"])
        loss = nn.functional.binary_cross_entropy(probability_N, target_N.double())
        logged = {"loss": loss, **{name: metrics[name] for name in ("accuracy", "f1", "auroc")}}
        self.log_dict({f"validation/{name}": value.float() for name, value in logged.items()}, prog_bar=True)

    def test_step(self, batch: list[RewardBatch], batch_idx: int) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        """Store the rows of all ranks in `test_rows`, and their metrics in `test_metrics`."""
        rows = self.evaluated.rows()
        scene_N = self.scenes_of("test", rows["row"])

        def metrics(probability_N: Tensor, threshold: float) -> dict[str, Tensor]:
            return reward_metrics(probability_N, rows["target"], rows["category"], threshold, scene_N)

        self.record_test({**rows, "scene": scene_N}, metrics, len(scene_N))

    def _collect(self, batch: list[RewardBatch]) -> None:
        """Store uncalibrated P(accepted) of the rows."""
        for micro_batch in batch:
            probability_R = as_float64(self(micro_batch["inputs"])).softmax(-1)[:, 1]
            self.evaluated.update(
                probability_R, micro_batch["label"], micro_batch["category"], counted_rows(micro_batch)
            )
