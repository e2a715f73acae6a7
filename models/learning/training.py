"""BackboneModule, the base class of both models: training loop, calibration, test and checkpoints."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from datamodules.batching.rows import RowsDataModule, log
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from datamodules.ranges import Fraction, NonNegativeFloat, NonNegativeInt, Positive, check_ranges
from models.learning.calibration import Calibration, calibrated, metrics_by_reading
from models.learning.checkpoint_contents import CheckpointContent
from models.learning.finite_check import FiniteCheck, not_finite_error
from models.learning.metrics import GatheredRows
from models.learning.network_module import NetworkModule, mesh_of
from models.learning.optimizers import (
    SHARDED,
    OptimizerName,
    ScheduleName,
    build_optimizer,
    build_schedule,
    clip,
    default_learning_rate,
    optimizer_class,
    set_options,
    warn_of_lost_updates,
)
from models.learning.run_length import total_steps
from models.networks.adapter_files import AdapterBase, trained_names
from models.networks.adapters import AdapterOptions
from models.networks.network_options import DtypeName
from models.networks.quantization import Quantization
from models.networks.sharding import full_tensor
from models.networks.weight_files import naming_file, refuse_other_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BackboneModule(NetworkModule):
    """A backbone with a head, and its training. `configure_model` creates its weights.

    Args:
        backbone: Hub id or local path of any Hugging Face backbone that supports the head, a GGUF file, or a name:
            "smollm2" and "minilm" are in Python packages, "scratch" is a small decoder with random weights and a
            tokenizer trained on the run's own text.
        scratch: For backbone "scratch": a transformers configuration with its model_type, instead of the
            project's small Llama-type one.
        dtype: The dtype in which weights are stored. The trainer's precision sets the dtype of computation.
        attn_implementation: Attention of transformers: eager, sdpa, flex_attention, flash_attention_2, ... If null,
            transformers' default for rows. For trees the one that skips most masked pairs: flex_attention on a CUDA
            device, sdpa in blocks on a CPU.
        dropout: Dropout probability in all parts of the backbone that have dropout. If null, as the backbone has it.
        gradient_checkpointing: Recompute the activations inside layers in the backward pass, to save memory.
        compile: Compile each block with torch.compile. This takes a minute at the start; steps are faster afterwards.
        trust_remote_code: Allow a backbone from the hub to run its own code. This is a security risk.
        optimizer: adamw is PyTorch's. adamw_8bit stores 2 bytes per weight instead of 8; with dtype bfloat16 it
            stores one more, so that small updates are not lost to rounding. paged_adamw_8bit is bitsandbytes'.
        learning_rate: Peak learning rate. If null, 1e-4 with an adapter, 1e-3 from scratch, and 2e-5 for a pretrained
            backbone, which a higher rate would damage.
        weight_decay: Decoupled weight decay on matrices.
        warmup_ratio: Share of all steps over which the learning rate rises.
        schedule: How the learning rate falls to zero after that.
        gradient_clip_norm: The largest norm of a step's gradient. Larger gradients are scaled down to it. If null,
            gradients are not clipped.
        adapter: Train low-rank adapters (LoRA) instead of all weights. Checkpoints and exports contain only these.
        quantization: With an adapter: how the frozen linear layers are stored. nf4 (QLoRA) takes 4 bits per weight,
            int8 takes 8.
        freeze_layers: Number of the lowest layers of a pretrained backbone that are not trained, counted from the
            embeddings, which are not trained then either. No gradients are computed for them, so a step is faster.
            With 0, all layers and the embeddings are trained.
    """

    # Options that may change on a resume. The optimizer's take effect in `on_train_start`.
    may_change: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "weight_decay",
        "warmup_ratio",
        "schedule",
        "gradient_clip_norm",
        "attn_implementation",
        "gradient_checkpointing",
        "compile",
    )
    task: ClassVar[str]  # the value of --task
    data_class: ClassVar[type[RowsDataModule]]
    checkpoint_record: ClassVar[type[CheckpointContent]]  # validates its checkpoints
    # Options of the data that follow from the model's, by the model's name.
    linked_options: ClassVar[dict[str, str]] = {"backbone": "tokenizer", "trust_remote_code": "trust_remote_code"}
    plannable: ClassVar[bool] = True  # whether its rows are known before it trains
    pipeline: ClassVar[str]  # of transformers, for the model card
    card_template: ClassVar[str]  # of the model card
    card_tags: ClassVar[tuple[str, ...]] = ()
    constant_decisions: ClassVar[tuple[str, str]]  # names of the two baselines that always decide the same
    monitored_metrics: ClassVar[tuple[str, ...]]  # choices of --run.monitor; the first is the default
    evaluated: GatheredRows  # the rows of the running validation or test
    test_rows: dict[str, Tensor]  # columns of the rows of the last test, see `record_test`
    test_metrics: dict[str, dict[str, float]]  # metrics of the last test, see `record_test`
    test_count: int  # rows of the test split that the last test used
    before_metrics: dict[str, float]  # metrics of the reference on the same rows; empty for a task without one

    def __init__(
        self,
        backbone: str = SCRATCH,
        scratch: dict[str, Any] | None = None,
        dtype: DtypeName = "float32",
        attn_implementation: str | None = None,
        dropout: Fraction | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
        optimizer: OptimizerName = "adamw",
        learning_rate: NonNegativeFloat | None = None,
        weight_decay: NonNegativeFloat = 0.1,
        warmup_ratio: Fraction = 0.1,
        schedule: ScheduleName = "linear",
        gradient_clip_norm: Positive | None = 1.0,
        adapter: AdapterOptions | None = None,
        quantization: Quantization = "none",
        freeze_layers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.adapter = AdapterOptions(**adapter) if isinstance(adapter, dict) else adapter  # a checkpoint has a dict
        self.save_hyperparameters()
        check_ranges(type(self), {**self.hparams, "adapter": self.adapter}, "model")
        self._startup_message: str | None = None
        if learning_rate is None:  # config.yaml and checkpoints store the rate that is used
            rate, kind = default_learning_rate(backbone, adapter)
            self.save_hyperparameters({"learning_rate": rate})
            self._startup_message = f"model.learning_rate: {rate:g}, the default for {kind}"
        self.hparams["adapter"] = None if self.adapter is None else asdict(self.adapter)
        self.base: AdapterBase | None = None
        self.automatic_optimization = False  # the number of micro-batches of a step depends on its rows
        self.network: PreTrainedModel | None = None
        self.calibration: Calibration | None = None  # fitted on validation rows, and saved with the weights
        self.test_rows = {}
        self.test_metrics = {}
        self.test_count = 0
        self.before_metrics = {}
        self._finite = FiniteCheck()
        self._checked_values: dict[str, Tensor] = {}  # of the current step, by name

    # What subclasses define

    @property
    def extra_forward_passes(self) -> int:
        """How often `prepare_step` reads each micro-batch, without gradients."""
        return 0

    def prepare_step(self, batch: list[Any]) -> list[Any]:
        """Return the micro-batches of a step, after computing what their losses need; by default they are `batch`."""
        return batch

    def loss(self, batch: Any) -> Tensor:
        """Return the micro-batch's contribution to the step's loss, a scalar tensor."""
        raise NotImplementedError

    def decision_metrics(self, probability_N: Tensor, rows: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
        """The metrics of decisions about test rows, such as those of a baseline.

        Args:
            probability_N: (N,) float64, of the positive class.
            rows: Columns as in `test_rows`.
            threshold: A probability above it decides for the positive class.
        """
        raise NotImplementedError

    # Training

    def configure_model(self) -> None:
        """Check the length of the run and the optimizer, then build the network; see `NetworkModule`."""
        if self._startup_message:
            log.info(self._startup_message)
            self._startup_message = None  # a test calls this method again
        if self.trainer.state.fn == TrainerFn.FITTING:
            total_steps(self.trainer)  # refuses a run without an end
        optimizer = self.hparams["optimizer"]
        optimizer_class(optimizer)  # raises a UserError if its library is missing
        if mesh_of(self.trainer) is not None and optimizer not in SHARDED:
            raise UserError(
                f"model.optimizer: {optimizer} cannot shard its state",
                f"Use model.optimizer {' or '.join(SHARDED)}.",
            )
        super().configure_model()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = self.hparams
        warn_of_lost_updates(self.parameters(), options["optimizer"], options["learning_rate"])
        optimizer = build_optimizer(
            self.parameters(),
            options["optimizer"],
            options["learning_rate"],
            options["weight_decay"],
            loss_is_scaled=self._scaler is not None,
        )
        schedule = build_schedule(optimizer, options["schedule"], options["warmup_ratio"], total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Apply the current options to a resumed optimizer and schedule, which restored those of the checkpoint."""
        set_options(
            self.optimizers(),  # type: ignore[arg-type]
            self.lr_schedulers(),  # type: ignore[arg-type]
            self.hparams["learning_rate"],
            self.hparams["weight_decay"],
        )

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        """One optimizer step over the micro-batches of this rank."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        batch = self.prepare_step(batch)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, micro_batch in enumerate(batch, start=1):
            with self._gradient_exchange(is_last=number == len(batch)):
                part = self.loss(micro_batch)
                self.manual_backward(part)
            loss += part.detach()
        loss = self.trainer.strategy.reduce(loss, reduce_op="mean")  # over ranks, so that all stop at the same step
        self.refuse_not_finite()  # the previous step has ended by now, so this does not wait for the device
        self.log("train/loss", loss)
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log("train/learning_rate", torch.tensor(rate))  # on the CPU: a copy to the GPU would block
        self._checked_values = {"the loss": loss}
        optimizer.step()  # type: ignore[union-attr]
        self._finite.note(self.trainer.global_step - 1, self._checked_values)
        optimizer.zero_grad()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients. Here they are those of the whole step and of all ranks, without a loss scale."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = full_tensor(nn.utils.get_total_norm(gradients))
        if self._scaler is None:  # a scaler skips steps whose norm is not finite
            self._checked_values["the gradient norm"] = norm
        if (max_norm := self.hparams["gradient_clip_norm"]) is not None:
            clip(optimizer, self.parameters(), max_norm, norm)
        self.log("train/gradient_norm", norm)

    def on_train_batch_end(self, *args: Any) -> None:
        """Validate at the run's last step if there was no validation before, so that the model is calibrated."""
        if self.calibration is None and self.trainer.global_step >= total_steps(self.trainer):
            self.trainer.should_stop = True  # Lightning validates before it stops

    @property
    def _scaler(self) -> Any:
        """The loss scaler of 16-mixed precision; None in any other."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _gradient_exchange(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Let ranks exchange gradients only in the last micro-batch of a step."""
        strategy = self.trainer.strategy
        if not is_last and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()

    # Finite values

    def refuse_not_finite(self) -> None:
        """Check the values of the last step. Whatever uses the weights calls this first.

        Raises:
            UserError: A value is not finite.
        """
        if problem := self._finite.problem():
            raise not_finite_error(*problem)

    def on_validation_start(self) -> None:
        self.refuse_not_finite()

    def on_train_end(self) -> None:
        self.refuse_not_finite()

    # Calibration and test

    def on_validation_epoch_start(self) -> None:
        self.evaluated.reset()

    def on_test_epoch_start(self) -> None:
        self.evaluated.reset()

    def on_validation_end(self) -> None:
        """Free the rows. The trainer would also move them to its device, which may have no float64."""
        self.evaluated.reset()

    def on_test_end(self) -> None:
        self.evaluated.reset()

    def calibrate(self, probability_N: Tensor, target_N: Tensor) -> None:
        """Fit the calibration on validation rows. The sanity check before training fits none.

        Args:
            probability_N: (N,) float64, uncalibrated.
            target_N: (N,) int64, 1 for the positive class.
        """
        if not self.trainer.sanity_checking:
            of_rows = self.trainer.datamodule.decision_count("validation")  # type: ignore[attr-defined]
            self.calibration = Calibration.fitted(probability_N, target_N, of_rows)

    @property
    def temperature(self) -> float:
        """The divisor of log-odds; 1 without a calibration."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def saved_calibration(self) -> dict[str, float | int | None] | None:
        """The calibration as checkpoints and exports store it."""
        return None if self.calibration is None else asdict(self.calibration)

    def scenes_of(self, stage: str, row_N: Tensor) -> Tensor:
        """(N,) int64, the scene of each of some rows of a split."""
        return self.trainer.datamodule.scene_numbers(stage)[row_N]  # type: ignore[attr-defined]

    def record_test(
        self, rows: dict[str, Tensor], metrics: Callable[[Tensor, float], dict[str, Tensor]], count: int
    ) -> None:
        """Store the rows of a test, and store and log its metrics; see `metrics_by_reading`.

        Args:
            rows: Columns (N,). One of them is the uncalibrated `probability`; `calibrated` is added.
            metrics: Computes the metrics from probabilities (N,) and a threshold.
            count: The number of rows of the test split that were used.
        """
        self.test_count = count
        self.test_rows = {**rows, "calibrated": calibrated(rows["probability"], self.temperature)}
        self.test_metrics = {}
        for reading, found in metrics_by_reading(self.test_rows, metrics, self.calibration).items():
            self.test_metrics[reading] = {name: float(value) for name, value in found.items()}
            self.log_dict({f"test/{reading}_{name}": value.float() for name, value in found.items()})

    # Checkpoints

    @property
    def exports_adapter(self) -> bool:
        """Whether an export contains only an adapter. An adapter on a base from scratch is always merged."""
        return self.adapter is not None and not self.adapter.merge and self.hparams["backbone"] != SCRATCH

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.network is not None, "a checkpoint is saved after configure_model"
        self.refuse_not_finite()
        checkpoint["task"] = self.task
        checkpoint["backbone_config"] = self.network.config.to_json_string(use_diff=False)
        checkpoint["calibration"] = self.saved_calibration
        if self.base is not None:
            checkpoint["base"] = asdict(self.base)
            trained = trained_names(self)
            checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        if self.base is not None:
            self.base.refuse_other(checkpoint.get("base"))
            trained = trained_names(self)
            own = {name: weight for name, weight in own.items() if name in trained}
        if "state_dict" in checkpoint:  # a sharded network has already read its part
            try:
                with naming_file((self._trainer and self._trainer.ckpt_path) or ""):
                    refuse_other_tensors(checkpoint["state_dict"], own)
            except UserError:
                self._refuse_other_data(checkpoint)
                raise
        self.calibration = Calibration.of(checkpoint["calibration"])

    def _refuse_other_data(self, checkpoint: dict[str, Any]) -> None:
        """On a resume with other data, say so. Lightning compares the data only later."""
        if self._trainer and self._trainer.training:
            data = self._trainer.datamodule  # type: ignore[attr-defined]
            if saved := checkpoint.get(type(data).__qualname__):
                data.load_state_dict(saved)
