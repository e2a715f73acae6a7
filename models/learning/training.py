"""BackboneModule: what both models share: a backbone that is trained a step at a time, kept, and exported."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from datamodules.batching.layouts import Inputs
from datamodules.batching.rows import RowsDataModule, log
from datamodules.corpus.records import read_json
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from datamodules.ranges import NotNegative, Positive, Share, refuse_unsound
from models.learning.calibration import DECISION, Calibration, calibrated
from models.learning.checkpoint_contents import CheckpointContent, ExportContent, refuse_options
from models.learning.finite_check import FiniteCheck
from models.learning.optimizers import (
    SHARDED,
    OptimizerName,
    ScheduleName,
    build_optimizer,
    build_schedule,
    clip,
    lost_updates,
    optimizer_maker,
    set_options,
)
from models.networks.adapters import (
    ADAPTER_FILE,
    AdapterOptions,
    Quantization,
    add_adapter,
    base_digest,
    load_adapter,
    merged_state,
    refuse_unfit,
    save_adapter,
    target_layers,
    trained_names,
)
from models.networks.backbone import (
    DtypeName,
    Head,
    base_from_config,
    build_network,
    last_states,
    load_network,
    network_config,
    network_from_config,
    position_room,
    quiet,
    refuse_other_size,
    same_random_numbers,
    weightless_network,
)
from models.networks.sharding import blocks, build_sharded_network, reshard, whole
from models.networks.tree_reading import choose_attention, pair_cost, tree_problem
from models.networks.trials import padding_problem
from models.networks.weight_files import naming, refuse_other_tensors, weights_in

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

EXPORT_STATE = "proactive.json"
LARGEST_STATE = 2**30  # bytes: a tokenizer, and a digest of each history that was trained on
NOTEWORTHY = 0.05  # a share of updates lost to rounding that a run says at its start


def default_learning_rate(backbone: str, adapter: Any | None) -> tuple[float, str]:
    """The peak learning rate of a run that is given none, and what it is the usual one for."""
    if adapter is not None:
        return 1e-4, "an adapter"
    return (1e-3, "a backbone from scratch") if backbone == SCRATCH else (2e-5, "a pretrained backbone")


class BackboneModule(LightningModule):
    """A backbone with a head; its weights come into being in `configure_model`.

    Args:
        backbone: Hub id or local path of any Hugging Face backbone that can have the head, or "scratch" for a small
            decoder with random weights and a tokenizer trained on the run's own text.
        scratch: For backbone "scratch": a transformers configuration with its model_type, in place of the
            project's small Llama-type one.
        dtype: How the weights are stored; the trainer's precision says how they are computed with.
        attn_implementation: Attention of transformers: eager, sdpa, flex_attention, flash_attention_2, ... If null,
            its own choice, and for trees what skips most of what the mask hides: flex_attention on a CUDA device, and
            on a CPU sdpa block by block.
        dropout: Dropout everywhere the backbone has it; as the backbone has it if null.
        gradient_checkpointing: Trade compute for memory: keep no activations inside a layer.
        compile: Compile each block with torch.compile: a minute at the start, and faster steps after it.
        trust_remote_code: Let a backbone from the hub run code of its own. Off for a reason.
        optimizer: adamw is PyTorch's. adamw_8bit keeps 2 bytes a weight in place of 8; for dtype bfloat16 it keeps one
            more, without which small updates would be lost to rounding. paged_adamw_8bit is bitsandbytes'.
        learning_rate: Peak learning rate. If null, 1e-4 with an adapter, 1e-3 from scratch, and 2e-5 for a pretrained
            backbone, which a higher one would make forget what it knows.
        weight_decay: Decoupled weight decay on matrices.
        warmup_ratio: The share of all steps over which the learning rate rises.
        schedule: How the learning rate falls to zero afterwards.
        gradient_clip_norm: The greatest norm of a step's gradient; longer ones are scaled down to it. None if null.
        adapter: Train low-rank adapters (LoRA) in place of all weights; checkpoints and export hold them alone.
        quantization: With an adapter: how the frozen linear layers are stored. nf4 (QLoRA) takes 4 bits a weight,
            int8 takes 8.
    """

    # What may change on a resume, and takes effect: see `on_train_start`, and how a step is computed.
    may_change: ClassVar[tuple[str, ...]] = (
        *("learning_rate", "weight_decay", "warmup_ratio", "schedule", "gradient_clip_norm"),
        *("attn_implementation", "gradient_checkpointing", "compile"),
    )
    task: ClassVar[str]  # as --task names it
    head: ClassVar[Head]
    data_class: ClassVar[type[RowsDataModule]]
    checkpoint_record: ClassVar[type[CheckpointContent]]  # what its checkpoints hold
    pipeline: ClassVar[str]  # of transformers, for the model card
    card_tags: ClassVar[tuple[str, ...]] = ()
    constant_decisions: ClassVar[tuple[str, str]]  # what to decide always, and never, is called
    logged_figures: ClassVar[tuple[str, ...]]  # by which --run.monitor may pick the best weights; the first by default
    test_rows: dict[str, Tensor]  # once a test has run: what it was about, see `note_test`
    test_figures: dict[str, dict[str, float]]  # once a test has run: its figures, see `note_test`
    test_count: int  # once a test has run: how many rows of the test split it used

    def __init__(
        self,
        backbone: str = SCRATCH,
        scratch: dict[str, Any] | None = None,
        dtype: DtypeName = "float32",
        attn_implementation: str | None = None,
        dropout: Share | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
        optimizer: OptimizerName = "adamw",
        learning_rate: NotNegative | None = None,
        weight_decay: NotNegative = 0.1,
        warmup_ratio: Share = 0.1,
        schedule: ScheduleName = "linear",
        gradient_clip_norm: Positive | None = 1.0,
        adapter: AdapterOptions | None = None,
        quantization: Quantization = "none",
    ) -> None:
        super().__init__()
        self.adapter = AdapterOptions(**adapter) if isinstance(adapter, dict) else adapter  # as a checkpoint has it
        self.save_hyperparameters()
        refuse_unsound(type(self), {**self.hparams, "adapter": self.adapter}, "model")
        self._said_at_start: str | None = None
        if learning_rate is None:  # config.yaml and checkpoints say what was used
            rate, usual_for = default_learning_rate(backbone, adapter)
            self.save_hyperparameters({"learning_rate": rate})
            self._said_at_start = f"model.learning_rate: {rate:g}, the default for {usual_for}"
        self.hparams["adapter"] = None if self.adapter is None else asdict(self.adapter)
        self.base: dict[str, str] = {}  # of an adapter: which backbone it is for, and a digest of that
        self.automatic_optimization = False  # a step's number of micro-batches follows from its rows
        self.network: PreTrainedModel | None = None
        self.calibration: Calibration | None = None  # fitted on validation rows, and kept with the weights
        self.test_rows = {}
        self.test_figures = {}
        self.test_count = 0
        self._finite = FiniteCheck()
        self._numbers: dict[str, Tensor] = {}  # of the step in progress, by what they are called

    # What the models differ in

    def loss(self, batch: Any) -> Tensor:
        """A micro-batch's part of the step's loss."""
        raise NotImplementedError

    def read_rows(self, network: "PreTrainedModel", inputs: Inputs) -> Tensor:
        """What the model reads of each padded row, (R, D)."""
        return last_states(network, inputs)

    def tree_problem(self, network: "PreTrainedModel") -> str | None:
        """What of the model itself, whatever its backbone can, keeps it from reading trees; None if nothing does."""
        return None

    def decision_metrics(self, probability_N: Tensor, rows: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
        """The metrics of decisions about test rows, such as those of a baseline.

        Args:
            probability_N: (N,) float64, of the positive class.
            rows: As `test_rows` has them.
            threshold: The probability above which the positive class is decided.
        """
        raise NotImplementedError

    def refuse_network(self, network: "PreTrainedModel") -> None:
        """Say what keeps a new network from being trained for the task; nothing here.

        Raises:
            UserError: Something does.
        """

    # Training

    def to(self, *arguments: Any, **options: Any) -> Self:
        """As PyTorch's, but buffers that are in no file keep their dtype: rotary frequencies are float32 in all models.

        A trainer with precision bf16-true turns the whole module into bfloat16, in which places far into a text would
        be told apart no more.
        """
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        ]
        super().to(*arguments, **options)
        for module, name, buffer in kept:
            module._buffers[name] = buffer.to(module._buffers[name].device)  # type: ignore[union-attr]
        return self

    def configure_model(self) -> None:
        """Make the network, once, on the trainer's device, and settle with the data module in which layout it reads.

        Lightning calls this with the trainer's device as the default for new tensors. Neither the self-tests nor
        transformers expect that: a generator of the CPU draws no tensor for CUDA, and `from_pretrained` then needs
        another library. So the default is the CPU here, as it is everywhere else, and what belongs on the device is
        put there by name.
        """
        if self._said_at_start:
            log.info(self._said_at_start)
            self._said_at_start = None  # a test comes here again
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._total_steps()  # refuses a run without an end
        optimizer = self.hparams["optimizer"]
        optimizer_maker(optimizer)  # says what is missing before any weight is loaded
        refuse_unfit(self.adapter, self.hparams["quantization"], self.trainer.strategy)
        if self._mesh is not None and optimizer not in SHARDED:
            raise UserError(
                f"model.optimizer: {optimizer} keeps blocks of weights whole, which sharding cuts apart",
                f"Use model.optimizer {' or '.join(SHARDED)}; their state is sharded as well.",
            )
        with torch.device("cpu"):
            if made := self.network is None:
                self._rehearse()
                self._build()
            assert self.network is not None
            if self._mesh is None:
                self.network.to(self.trainer.strategy.root_device)  # where the self-tests are to run
            if made:
                self.refuse_network(self.network)
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.settle_layout(data, data.longest, data.largest_tree)
            if made and self.hparams["compile"]:  # after the trials, which read few tokens once
                for block in blocks(self.network):
                    block.compile(dynamic=True)  # one graph for micro-batches of every length
            if self._mesh is not None:
                reshard(self.network)

    def _rehearse(self) -> None:
        """Try the options on a network without weights: to load them may take minutes, and what is wrong shows here."""
        options, data = self.hparams, self.trainer.datamodule  # type: ignore[attr-defined]
        backbone, trusted = options["backbone"], options["trust_remote_code"]
        config = network_config(
            self.head,
            backbone,
            data.tokenizer,
            options["scratch"],
            dropout=options["dropout"],
            trust_remote_code=trusted,
        )
        if data.max_length > (room := position_room(config)):
            raise UserError(
                f"data.max_length: {data.max_length} tokens, but {backbone} has positions for {room}",
                f"Use --data.max_length {room}, or a backbone that reads longer texts.",
            )
        network = weightless_network(
            self.head,
            backbone,
            config,
            dtype=options["dtype"],
            attn_implementation=options["attn_implementation"],
            trust_remote_code=trusted,
        )
        self.refuse_network(network)
        if self.adapter is not None:
            target_layers(network, self.head, self.adapter)
        if options["gradient_checkpointing"] and not network.supports_gradient_checkpointing:
            raise UserError(
                f"model.gradient_checkpointing: {type(network).__name__} has none",
                "Leave it out, or use another backbone.",
            )
        problem = self.tree_problem(network) or tree_problem(network, data.longest)
        if data.layout == "tree" and problem:
            data.settle_layout(problem)

    def _build(self) -> None:
        """Make the network as the options describe it, with adapters if there are to be any."""
        options, data = self.hparams, self.trainer.datamodule  # type: ignore[attr-defined]
        build = build_network if self._mesh is None else self._build_sharded
        with self._where_weights_are_drawn():
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
        self._adapt(self.trainer.strategy.root_device)
        if options["gradient_checkpointing"]:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        self.network.train()

    def settle_layout(self, data: RowsDataModule, longest: int, largest: int) -> None:
        """Settle with a data module in which layout the network reads its rows; the network is on its device.

        Args:
            data: The data module.
            longest: Tokens of the longest row.
            largest: Tokens of the largest tree.
        """
        assert self.network is not None
        network = self.network
        problem = None if data.layout == "rows" else self.tree_problem(network)
        if data.layout != "rows" and problem is None:
            if self.hparams["attn_implementation"] is None:
                device = network.get_input_embeddings().weight.device
                problem = choose_attention(network, device.type, longest, largest)
            else:
                problem = tree_problem(network, longest, largest)
        data.settle_layout(problem, pair_cost(network))
        if data.layout == "rows" and data.micro_batch_size > 1:
            data.settle_padding(padding_problem(network, partial(self.read_rows, network), longest))

    def on_train_start(self) -> None:
        """Let the options hold in a resumed run as well, whose optimizer and schedule brought their own with them."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        set_options(
            optimizer,  # type: ignore[arg-type]
            schedule,  # type: ignore[arg-type]
            self.hparams["learning_rate"],
            self.hparams["weight_decay"],
        )

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        """One optimizer step over this rank's micro-batches."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, micro_batch in enumerate(batch, start=1):
            with self._gradients_stay_here(number < len(batch)):
                part = self.loss(micro_batch)
                self.manual_backward(part)
            loss += part.detach()
        loss = self.trainer.strategy.reduce(loss, reduce_op="mean")  # of all ranks, so that they stop together
        self.refuse_not_finite()  # the step before is over by now, so that this does not wait for the device
        self.log("train/loss", loss)
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log("train/learning_rate", torch.tensor(rate))  # on the host: Lightning would wait for its way to a GPU
        self._numbers = {"the loss": loss}
        optimizer.step()  # type: ignore[union-attr]
        self._finite.note(self.trainer.global_step - 1, self._numbers)
        optimizer.zero_grad()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip; the gradients are then those of the whole step, of all ranks and without a loss scale."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if self._scaler is None:  # which leaves out a step whose norm is not finite
            self._numbers["the gradient norm"] = norm
        if (greatest := self.hparams["gradient_clip_norm"]) is not None:
            clip(optimizer, self.parameters(), greatest, norm)
        self.log("train/gradient_norm", norm)

    def refuse_not_finite(self) -> None:
        """Look at the last step's numbers; whoever uses its weights does so first.

        Raises:
            UserError: One of them is not finite.
        """
        if problem := self._finite.problem():
            raise self.not_finite(*problem)

    def on_validation_start(self) -> None:
        self.refuse_not_finite()

    def on_train_end(self) -> None:
        self.refuse_not_finite()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = self.hparams
        lost = lost_updates(self.parameters(), options["optimizer"], options["learning_rate"])
        if lost > NOTEWORTHY:
            log.warning(
                f"model.learning_rate: steps of {options['learning_rate']:g} leave {lost:.0%} of the weights as they "
                "are, for 16 bits round them away; use --model.optimizer adamw_8bit, which loses none, or "
                "--model.dtype float32 with --trainer.precision bf16-mixed"
            )
        optimizer = build_optimizer(
            self.parameters(),
            options["optimizer"],
            options["learning_rate"],
            options["weight_decay"],
            loss_is_scaled=self._scaler is not None,
        )
        schedule = build_schedule(optimizer, options["schedule"], options["warmup_ratio"], self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *args: Any) -> None:
        """Validate at the run's last step if no validation came before it, for else nothing would be calibrated."""
        if self.calibration is None and self.trainer.global_step >= self._total_steps():
            self.trainer.should_stop = True  # Lightning validates before it stops

    def calibrate(self, probability_N: Tensor, target_N: Tensor) -> None:
        """Fit the calibration to validation rows, so that every checkpoint carries its own.

        The sanity check before training fits nothing: the network has learned nothing yet.

        Args:
            probability_N: (N,) float64, uncalibrated.
            target_N: (N,) int64, 1 for the positive class.
        """
        if not self.trainer.sanity_checking:
            of_rows = self.trainer.datamodule.decision_count("validation")  # type: ignore[attr-defined]
            self.calibration = Calibration.fitted(probability_N, target_N, of_rows)

    @property
    def temperature(self) -> float:
        """What log-odds are divided by; 1 where nothing was calibrated."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    def scenes_of(self, stage: str, row_N: Tensor) -> Tensor:
        """(N,) int64, the scene of each of some rows of a split."""
        return self.trainer.datamodule.scene_numbers(stage).to(row_N.device)[row_N]  # type: ignore[attr-defined]

    def note_test(
        self, rows: dict[str, Tensor], figures: Callable[[Tensor, float], dict[str, Tensor]], count: int
    ) -> None:
        """Keep a test's rows, and log and keep its figures in three readings.

        `raw` and `calibrated` decide at `DECISION`, `f1_optimal` decides at the calibration's `f1_threshold`; the last
        two are absent where nothing was calibrated.

        Args:
            rows: Columns (N,), uncalibrated `probability` among them.
            figures: Gives the figures at some probabilities (N,) and a threshold.
            count: How many rows of the test split they are of.
        """
        self.test_count = count
        rows = {**rows, "calibrated": calibrated(rows["probability"], self.temperature)}
        self.test_rows = {name: column.cpu() for name, column in rows.items()}
        readings = {"raw": ("probability", DECISION)}
        if self.calibration is not None:
            readings["calibrated"] = ("calibrated", DECISION)
            readings["f1_optimal"] = ("calibrated", self.calibration.f1_threshold)
        self.test_figures = {}
        for name, (column, threshold) in readings.items():
            found = figures(rows[column], threshold)
            self.test_figures[name] = {figure: float(value) for figure, value in found.items()}
            self.log_dict({f"test/{name}_{figure}": value.float() for figure, value in found.items()})

    def not_finite(self, what: str, value: float, step: int | None = None) -> UserError:
        """The error that ends a run whose numbers are no numbers any more; at the present step if none is given."""
        step = self.trainer.global_step if step is None else step
        return UserError(
            f"{what} is {value} at step {step}; the last good checkpoint is kept",
            "Resume from checkpoints/previous.ckpt if there is one, else from last.ckpt, with a smaller "
            "model.learning_rate or with trainer.precision 32-true.",
        )

    # Keeping

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.network is not None, "a checkpoint is saved after configure_model"
        self.refuse_not_finite()
        checkpoint["task"] = self.task
        checkpoint["backbone_config"] = self.network.config.to_json_string(use_diff=False)
        checkpoint["calibration"] = self._saved_calibration
        if self.adapter is not None:
            checkpoint["base"] = self.base
            trained = trained_names(self)
            checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        if self.adapter is not None:
            self._check_base(checkpoint.get("base") or {})
            trained = trained_names(self)
            own = {name: weight for name, weight in own.items() if name in trained}
        if "state_dict" in checkpoint:  # ranks have each read their part already
            with naming((self._trainer and self._trainer.ckpt_path) or ""):
                refuse_other_tensors(checkpoint["state_dict"], own)
        self.calibration = Calibration.of(checkpoint["calibration"])

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> Self:
        """The model of a loaded checkpoint, weights included, without its backbone's original files.

        Raises:
            UserError: Its options are not this class's, or its weights are not those of the network that it describes.
        """
        options = {name: value for name, value in checkpoint["hyper_parameters"].items() if not name.startswith("_")}
        refuse_options(cls, options, "hyper_parameters")
        model, config = cls(**options), json.loads(checkpoint["backbone_config"])
        sizes = [weight.numel() for weight in checkpoint["state_dict"].values() if isinstance(weight, Tensor)]
        refuse_other_size(cls.head, config, len(sizes), sum(sizes), adapter=model.adapter is not None)
        model._make_network(config)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
        return model

    def _make_network(self, config: dict[str, Any]) -> None:
        """The network that a configuration describes, for weights to be loaded into; an adapter's with its base."""
        options = self.hparams
        if self.adapter is None:
            self.network = network_from_config(self.head, config, options["dtype"], options["attn_implementation"])
            return
        refuse_unfit(self.adapter, options["quantization"])
        self.network = base_from_config(
            self.head, options["backbone"], config, options["dtype"], options["attn_implementation"]
        )
        self._adapt()

    def _adapt(self, device: torch.device | None = None) -> None:
        """Put adapters into the network, if there are to be any, and remember which base they are for."""
        if self.adapter is None:
            return
        assert self.network is not None
        self.base = {"backbone": self.hparams["backbone"], "digest": base_digest(self.network, self.head)}
        add_adapter(self.network, self.head, self.adapter, self.hparams["quantization"], device)
        self.strict_loading = False  # a checkpoint has what is trained alone

    def _check_base(self, saved: dict[str, str]) -> None:
        """Refuse an adapter that was trained on another base."""
        if saved.get("digest") != self.base["digest"]:
            raise UserError(
                f"the adapter's base was {saved.get('backbone')}, and {self.base['backbone']} has other weights now",
                "Put the base back that the adapter was trained on, or start a new run.",
            )

    def _where_weights_are_drawn(self) -> contextlib.AbstractContextManager[Any]:
        """Where, and from which random numbers, a backbone gets weights that are in no file."""
        if self.hparams["backbone"] != SCRATCH or self._mesh is not None:
            return contextlib.nullcontext()
        if self.adapter is not None:  # which is kept without its base: that is the same each time, on any device
            return same_random_numbers()
        return self.trainer.strategy.root_device  # a GPU draws those of a large one much sooner

    def export(self, folder: Path, state: dict[str, Any], weights: dict[str, Tensor] | None = None) -> None:
        """Write weights and configuration for transformers, and what only this project reads.

        Args:
            folder: Where to, made if missing.
            state: What else `proactive.json` shall hold: the data module's state.
            weights: The network's, where it holds shards of them alone; see `models.networks.sharding.gather`.
        """
        assert self.network is not None, "configure_model makes the network"
        options = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        content = {"task": self.task, "model": options, "calibration": self._saved_calibration, "data": state}
        if self.adapter is None:
            with quiet():
                self.network.save_pretrained(folder, state_dict=weights)
        elif not self.exports_adapter:
            self._merged().save_pretrained(folder)
            content["model"] = options | {"adapter": None, "quantization": "none"}
        else:
            backbone = self.base["backbone"]
            place = str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone
            save_adapter(self.network, self.head, place, folder)
            content |= {"base": self.base, "backbone_config": self.network.config.to_dict()}
        (folder / EXPORT_STATE).write_text(json.dumps(content, indent=1))

    @property
    def exports_adapter(self) -> bool:
        """Whether an export holds an adapter alone; one without a base that others have is merged."""
        return self.adapter is not None and not self.adapter.merge and self.hparams["backbone"] != SCRATCH

    @classmethod
    def from_export(cls, folder: Path) -> tuple[Self, dict[str, Any]]:
        """The model of an exported folder, and the state that it was exported with.

        Raises:
            UserError: The folder is no export of this project, one of the other model, or its weights are not those of
                the network that it describes.
        """
        content = export_state(folder)
        if (task := content["task"]) != cls.task:
            raise UserError(f"{folder} holds a model of task {task}, not {cls.task}", "Give another export folder.")
        refuse_options(cls, content["model"], f"{folder / EXPORT_STATE}, field model")
        model, state = cls(**content["model"]), content["data"]
        model.calibration = Calibration.of(content["calibration"])
        if content.get("base"):
            config = content["backbone_config"]
            refuse_other_size(cls.head, config, *weights_in([folder / ADAPTER_FILE]), adapter=True)
            model._make_network(config)
            model._check_base(content["base"])
            assert model.network is not None
            load_adapter(model.network, folder)
        else:
            model.network = load_network(
                cls.head, str(folder), attn_implementation=model.hparams["attn_implementation"]
            )
        return model, state

    def _merged(self) -> "PreTrainedModel":
        """Base and adapter as one plain network."""
        assert self.network is not None
        state, options = merged_state(self.network, self.hparams["quantization"]), self.hparams
        with torch.device("meta"):
            config = json.loads(self.network.config.to_json_string(use_diff=False))
            merged = network_from_config(self.head, config, options["dtype"], options["attn_implementation"])
        merged.load_state_dict(state, assign=True)
        merged.tie_weights()
        return merged

    @property
    def _saved_calibration(self) -> dict[str, float | int | None] | None:
        return None if self.calibration is None else asdict(self.calibration)

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


def export_state(folder: Path) -> dict[str, Any]:
    """What an exported folder's `proactive.json` holds.

    Raises:
        UserError: There is none, or it is none of this project.
    """
    return dict(read_json(folder / EXPORT_STATE, ExportContent, LARGEST_STATE)[1])
