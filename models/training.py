"""BackboneModule: what both models share: a backbone that is trained a step at a time, kept, and exported."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.tokenizer import SCRATCH
from models.backbone import (
    DtypeName,
    Head,
    build_network,
    load_network,
    network_from_config,
    position_room,
    quiet,
)
from models.optimizers import OptimizerName, ScheduleName, build_optimizer, build_schedule, optimizer_maker
from models.sharding import blocks, build_sharded_network, reshard, whole
from models.tree import pair_cost, tree_problem

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

EXPORT_STATE = "proactive.json"


class BackboneModule(LightningModule):
    """A backbone with a head; its weights come into being in `configure_model`.

    Args:
        backbone: Hub id or local path of any Hugging Face backbone that can have the head, or "scratch" for a small
            decoder with random weights and a tokenizer trained on the run's own text.
        scratch: For backbone "scratch": a transformers configuration with its model_type, in place of the
            project's small Llama-type one.
        dtype: How the weights are stored; the trainer's precision says how they are computed with.
        attn_implementation: Attention of transformers: eager, sdpa, flex_attention, flash_attention_2, ... If null,
            its own choice, and for trees on a CUDA device flex_attention, which skips what the mask hides.
        dropout: Dropout everywhere the backbone has it; as the backbone has it if null.
        gradient_checkpointing: Trade compute for memory: keep no activations inside a layer.
        compile: Compile each block with torch.compile: a minute at the start, and faster steps after it.
        trust_remote_code: Let a backbone from the hub run code of its own. Off for a reason.
        optimizer: adamw; adamw_8bit and paged_adamw_8bit from bitsandbytes; adamw_8bit_stochastic_rounding from
            torchao, for dtype bfloat16, in which small updates would be lost to rounding.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay on matrices.
        warmup_ratio: The share of all steps over which the learning rate rises.
        schedule: How the learning rate falls to zero afterwards.
        gradient_clip_norm: The greatest norm of a step's gradient; longer ones are scaled down to it. None if null.
    """

    task: ClassVar[str]  # as --task names it
    head: ClassVar[Head]
    logged_figures: ClassVar[tuple[str, ...]]  # by which --run.monitor may pick the best weights; the first by default
    test_figures: dict[str, dict[str, float]]  # once a test has run: its figures, raw and calibrated

    def __init__(
        self,
        backbone: str = SCRATCH,
        scratch: dict[str, Any] | None = None,
        dtype: DtypeName = "float32",
        attn_implementation: str | None = None,
        dropout: float | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_ratio: float = 0.1,
        schedule: ScheduleName = "linear",
        gradient_clip_norm: float | None = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_ratio <= 1:
            raise UserError(f"model.warmup_ratio: {warmup_ratio} is no share", "Give a number from 0 to 1.")
        if learning_rate < 0:
            raise UserError(f"model.learning_rate: {learning_rate} is negative", "Give 0 or more.")
        self.save_hyperparameters()
        self.automatic_optimization = False  # a step's number of micro-batches follows from its rows
        self.network: PreTrainedModel | None = None
        self.temperature = 1.0  # these two are fitted on validation rows, and kept with the weights
        self.threshold = 0.5
        self.test_figures = {}

    # What the models differ in

    def loss(self, batch: Any) -> Tensor:
        """A micro-batch's part of the step's loss."""
        raise NotImplementedError

    def tree_problem(self, network: "PreTrainedModel", longest: int) -> str | None:
        """What keeps the model from reading trees of rows of up to `longest` tokens; None if nothing does."""
        return tree_problem(network, longest)

    # Training

    def configure_model(self) -> None:
        """Make the network, once, and settle with the data module in which layout it reads rows."""
        options, data = self.hparams, self.trainer.datamodule  # type: ignore[attr-defined]
        optimizer_maker(options["optimizer"])  # says what is missing before any weight is loaded
        if self._mesh is not None and options["optimizer"] != "adamw":
            raise UserError(
                f"model.optimizer: {options['optimizer']} keeps blocks of weights whole, which sharding cuts apart",
                "Use model.optimizer adamw; its state is sharded as well.",
            )
        if self.network is None:
            build = build_network if self._mesh is None else self._build_sharded
            self.network = build(
                self.head,
                options["backbone"],
                data.tokenizer,
                options["scratch"],
                dtype=options["dtype"],
                attn_implementation=options["attn_implementation"],
                dropout=options["dropout"],
                trust_remote_code=options["trust_remote_code"],
            )
            if data.max_length > (room := position_room(self.network.config)):
                raise UserError(
                    f"data.max_length: {data.max_length} tokens, but {options['backbone']} has positions for {room}",
                    f"Use --data.max_length {room}, or a backbone that reads longer texts.",
                )
            if options["gradient_checkpointing"]:
                self.network.gradient_checkpointing_enable({"use_reentrant": False})
            if options["compile"]:
                for block in blocks(self.network):
                    block.compile(dynamic=True)  # every micro-batch has another length
            self.network.train()
        self._settle_layout(data)
        if self._mesh is not None:
            reshard(self.network)

    def _settle_layout(self, data: Any) -> None:
        assert self.network is not None
        if data.layout == "rows":
            data.settle_layout(None)
            return
        if self.hparams["attn_implementation"] is None and self.trainer.strategy.root_device.type == "cuda":
            with contextlib.suppress(ValueError):  # a backbone without it keeps its own
                self.network.set_attn_implementation("flex_attention")
        data.settle_layout(self.tree_problem(self.network, data.max_length), pair_cost(self.network))

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        """One optimizer step over this rank's micro-batches."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        loss = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(batch, start=1):
            with self._gradients_stay_here(number < len(batch)):
                part = self.loss(micro_batch)
                self.manual_backward(part)
            loss += part.detach()
        loss = self.trainer.strategy.reduce(loss, reduce_op="mean")  # of all ranks, so that they stop together
        if not torch.isfinite(loss):
            raise self.not_finite("the loss", loss)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip; the gradients are then those of the whole step, of all ranks and without a loss scale."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if not torch.isfinite(norm) and self._scaler is None:  # a scaler leaves such a step out
            raise self.not_finite("the gradient norm", norm)
        if self.hparams["gradient_clip_norm"] is not None:
            nn.utils.clip_grads_with_norm_(self.parameters(), self.hparams["gradient_clip_norm"], norm)
        self.log("train/gradient_norm", norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = self.hparams
        optimizer = build_optimizer(
            self.parameters(),
            options["optimizer"],
            options["learning_rate"],
            options["weight_decay"],
            loss_is_scaled=self._scaler is not None,
        )
        schedule = build_schedule(optimizer, options["schedule"], options["warmup_ratio"], self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def not_finite(self, what: str, value: Tensor) -> UserError:
        """The error that ends a run whose numbers are no numbers any more."""
        return UserError(
            f"{what} is {value.item()} at step {self.trainer.global_step}; the last good checkpoint is kept",
            "Resume from checkpoints/previous.ckpt if there is one, else from last.ckpt, with a smaller "
            "model.learning_rate or with trainer.precision 32-true.",
        )

    # Keeping

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.network is not None, "a checkpoint is saved after configure_model"
        checkpoint["task"] = self.task
        checkpoint["backbone_config"] = self.network.config.to_json_string(use_diff=False)
        checkpoint["calibration"] = self._calibration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, saved = self.state_dict(), checkpoint.get("state_dict", {})
        if saved and {name: own[name].shape for name in own} != {name: saved[name].shape for name in saved}:
            raise UserError(
                "the model or its tokenizer differs in size from the one in the checkpoint",
                "Resume with the same model options and data.vocabulary_size, or start a new run.",
            )
        self._calibration = checkpoint["calibration"]

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> Self:
        """The model of a loaded checkpoint, weights included, without its backbone's original files."""
        options = {name: value for name, value in checkpoint["hyper_parameters"].items() if not name.startswith("_")}
        model = cls(**options)
        model.network = network_from_config(
            cls.head, json.loads(checkpoint["backbone_config"]), options["dtype"], options["attn_implementation"]
        )
        model.load_state_dict(checkpoint["state_dict"])
        model.on_load_checkpoint(checkpoint)
        return model

    def export(self, folder: Path, state: dict[str, Any], weights: dict[str, Tensor] | None = None) -> None:
        """Write weights and configuration for transformers, and what only this project reads.

        Args:
            folder: Where to, made if missing.
            state: What else `proactive.json` shall hold: the data module's state.
            weights: The network's, where it holds shards of them alone; see `models.sharding.gather`.
        """
        assert self.network is not None, "configure_model makes the network"
        with quiet():
            self.network.save_pretrained(folder, state_dict=weights)
        options = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        content = {"task": self.task, "model": options, "calibration": self._calibration, "data": state}
        (folder / EXPORT_STATE).write_text(json.dumps(content, indent=1))

    @classmethod
    def from_export(cls, folder: Path) -> tuple[Self, dict[str, Any]]:
        """The model of an exported folder, and the state that it was exported with.

        Raises:
            UserError: The folder is no export of this project, or one of the other model.
        """
        try:
            content = json.loads((folder / EXPORT_STATE).read_text())
            if (task := content["task"]) != cls.task:
                raise UserError(f"{folder} holds a model of task {task}, not {cls.task}", "Give another export folder.")
            model = cls(**content["model"])
            model._calibration = content["calibration"]
            state = content["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is not a complete export: {EXPORT_STATE}: {error}",
                "Give the export folder of a run.",
            ) from error
        attention = content["model"]["attn_implementation"]
        model.network = load_network(cls.head, str(folder), attn_implementation=attention)
        return model, state

    @property
    def _calibration(self) -> dict[str, float]:
        return {"temperature": self.temperature, "threshold": self.threshold}

    @_calibration.setter
    def _calibration(self, fitted: dict[str, float]) -> None:
        self.temperature, self.threshold = fitted["temperature"], fitted["threshold"]

    def _total_steps(self) -> int:
        """The optimizer steps of the whole run.

        Lightning's own estimate makes the training loader before a resumed run's position in it is restored.
        """
        trainer = self.trainer
        steps, limit = trainer.datamodule.steps_per_epoch, trainer.limit_train_batches  # type: ignore[attr-defined]
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            ends.append(trainer.max_epochs * steps)
        if not ends:
            raise UserError("a run without an end has no schedule", "Give trainer.max_epochs or trainer.max_steps.")
        return min(ends)

    @property
    def _mesh(self) -> "DeviceMesh | None":
        """The ranks that the weights are spread over; None if each has them all."""
        strategy = self.trainer.strategy
        return strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None

    def _build_sharded(self, *arguments: Any, **options: Any) -> "PreTrainedModel":
        assert self._mesh is not None
        trainer = self.trainer
        return build_sharded_network(
            *arguments,
            mesh=self._mesh,
            device=trainer.strategy.root_device,
            precision=str(trainer.precision),
            **options,
        )

    @property
    def _scaler(self) -> Any:
        """What scales the loss in 16-mixed precision; None in any other."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _gradients_stay_here(self, more_follow: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients with a step's last micro-batch alone."""
        strategy = self.trainer.strategy
        if more_follow and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()
