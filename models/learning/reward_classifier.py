"""RewardClassifier: reads a history and one proposal, gives the probability that the user accepts it.

Shape legend: R rows, C classes (rejected, accepted).
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from datamodules.batching.layouts import Inputs
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import RewardBatch
from datamodules.corpus.records import Category
from datamodules.ranges import NotNegative
from models.learning.checkpoint_contents import RewardCheckpoint
from models.learning.metrics import RewardMetrics, reward_figures
from models.learning.training import BackboneModule
from models.networks.backbone import Pooling, classify, read_out, reads_last_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CategoryName = Literal["missed_need", "non_response", "correct_detection", "false_alarm"]


class RewardClassifier(BackboneModule):
    """A backbone with a two-class head.

    Args:
        pooling: Which state is read: "auto" (the last real token of a decoder, what an encoder's architecture
            defines), "last", "cls" or "mean".
        category_weights: Factors on the loss of rows by category, for example {missed_need: 2.0}; 1 if left out.
        options: See BackboneModule.
    """

    task = "reward"
    head = "classifier"
    data_class = RewardDataModule
    checkpoint_record = RewardCheckpoint
    pipeline = "text-classification"
    card_tags = ("reward-model",)
    constant_decisions = ("accept everything", "reject everything")
    logged_figures = ("validation/auroc", "validation/loss", "validation/accuracy", "validation/f1")
    category_weight: Tensor

    def __init__(
        self,
        pooling: Pooling = "auto",
        category_weights: dict[CategoryName, NotNegative] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.metrics = RewardMetrics()
        weights = {str(name): weight for name, weight in (category_weights or {}).items()}
        weight_by_category = torch.tensor([weights.get(category.value, 1.0) for category in Category])
        self.register_buffer("category_weight", weight_by_category, persistent=False)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (R, C) float32 of rejected and accepted."""
        assert self.network is not None, "configure_model makes the network"
        return classify(self.network, inputs, self.hparams["pooling"]).float()

    def loss(self, batch: RewardBatch) -> Tensor:
        """A micro-batch's part of the step's loss; a category's weight multiplies its rows' losses."""
        loss_R = nn.functional.cross_entropy(self(batch["inputs"]), batch["label"], reduction="none")
        return (loss_R * self.category_weight[batch["category"]] * batch["weight"]).sum()

    def refuse_network(self, network: "PreTrainedModel") -> None:
        if self.hparams["pooling"] != "auto":
            read_out(network)

    def decision_metrics(self, probability_N: Tensor, rows: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
        return reward_figures(probability_N, rows["target"], rows["category"], threshold, rows["scene"])

    def read_rows(self, network: "PreTrainedModel", inputs: Inputs) -> Tensor:
        return classify(network, inputs, self.hparams["pooling"])

    def tree_problem(self, network: "PreTrainedModel") -> str | None:
        if self.hparams["pooling"] not in ("auto", "last") or not reads_last_token(network):
            return "the backbone, or model.pooling, reads more than a row's last token"
        return None

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()

    def validation_step(self, batch: list[RewardBatch], batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures, and calibrate."""
        rows = self.metrics.rows()
        probability_N, target_N = rows["probability"], rows["target"]
        if not torch.isfinite(probability_N).all():
            raise self.not_finite("a probability in validation", float(probability_N.sum()))
        self.calibrate(probability_N, target_N)
        figures = reward_figures(probability_N, target_N, rows["category"])
        loss = nn.functional.binary_cross_entropy(probability_N, target_N.double())
        logged = {"loss": loss, **{name: figures[name] for name in ("accuracy", "f1", "auroc")}}
        self.log_dict({f"validation/{name}": value.float() for name, value in logged.items()}, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        self.metrics.reset()

    def test_step(self, batch: list[RewardBatch], batch_idx: int) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        """Put the rows of all ranks in `test_rows` and their figures in `test_figures`."""
        rows = self.metrics.rows()
        scene_N = self.scenes_of("test", rows["row"])

        def figures(probability_N: Tensor, threshold: float) -> dict[str, Tensor]:
            return reward_figures(probability_N, rows["target"], rows["category"], threshold, scene_N)

        self.note_test({**rows, "scene": scene_N}, figures, len(scene_N))

    def _collect(self, batch: list[RewardBatch]) -> None:
        """Keep P(accepted), uncalibrated, of the rows that do not only fill a rank's share up."""
        for micro_batch in batch:
            real_R = micro_batch["weight"] > 0
            probability_R = self(micro_batch["inputs"]).double().softmax(-1)[:, 1]
            columns = (probability_R, micro_batch["label"], micro_batch["category"], micro_batch["row"])
            self.metrics.update(*(column[real_R] for column in columns))
