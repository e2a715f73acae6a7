"""NetworkModule: builds the network of a run: first without weights, to check the options, then with weights."""

import contextlib
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from datamodules.batching.layouts import Inputs
from datamodules.batching.rows import RowsDataModule
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from models.networks.adapter_files import AdapterBase
from models.networks.adapters import AdapterOptions, add_adapter, refuse_unfit_adapter, target_layers
from models.networks.building import build_network, fixed_seed
from models.networks.configurations import max_positions, meta_network, network_config
from models.networks.distributed_loading import build_sharded_network
from models.networks.freezing import freeze_lowest, refuse_unfit_freezing
from models.networks.heads import last_states
from models.networks.network_options import Head, NetworkOptions
from models.networks.self_checks import padding_problem
from models.networks.sharding import blocks, reshard
from models.networks.tree_reading import choose_attention, pair_cost, tree_problem

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class NetworkModule(LightningModule):
    """A module with one network of transformers, which `configure_model` builds with the trainer.

    Subclasses save the options as hyperparameters and set `adapter`, `base` and `network` in their constructor.
    """

    head: ClassVar[Head]
    adapter: AdapterOptions | None
    base: AdapterBase | None  # of the adapter
    network: "PreTrainedModel | None"

    @property
    def network_options(self) -> NetworkOptions:
        """The options that determine the network."""
        names = [field.name for field in fields(NetworkOptions) if field.name != "head"]
        return NetworkOptions(self.head, **{name: self.hparams[name] for name in names})

    # What subclasses may define

    def read_rows(self, network: "PreTrainedModel", inputs: Inputs) -> Tensor:
        """What the head reads of padded rows, (R, D)."""
        return last_states(network, inputs)

    def tree_problem(self, network: "PreTrainedModel") -> str | None:
        """Why the model cannot read trees, whatever its backbone supports; None if it can."""
        return None

    def refuse_network(self, network: "PreTrainedModel") -> None:
        """Refuse a new network that cannot be trained for the task. By default none is refused.

        Raises:
            UserError: The network cannot be trained for the task.
        """

    # Building

    def to(self, *arguments: Any, **options: Any) -> Self:
        """PyTorch's `to`, but buffers that are in no file keep their dtype.

        All models need rotary frequencies in float32. A trainer with precision bf16-true converts the whole module to
        bfloat16, in which distant positions cannot be distinguished.
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
        """Build the network once, on the trainer's device, and choose the layout with the data module.

        Lightning calls this with the trainer's device as default for new tensors. Self-checks and transformers do not
        expect that: a CPU generator cannot draw tensors for CUDA, and `from_pretrained` would need another library.
        So the default is the CPU here, and tensors are moved to the device explicitly.

        Raises:
            UserError: The options, the backbone and the data do not fit together.
        """
        refuse_unfit_adapter(self.adapter, self.hparams["quantization"], self.trainer.strategy)
        sharded = mesh_of(self.trainer) is not None
        refuse_unfit_freezing(
            self.hparams["freeze_layers"], self.hparams["backbone"], has_adapter=self.adapter is not None
        )
        with torch.device("cpu"):
            is_new = self.network is None
            if is_new:
                self._check_options()
                self._build()
            assert self.network is not None
            if not sharded:
                self.network.to(self.trainer.strategy.root_device)  # self-checks run on the device
            if is_new:
                self.refuse_network(self.network)
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.choose_layout(data, data.longest, data.largest_tree)
            if is_new and self.hparams["compile"]:  # after the self-checks, which read only few tokens
                for block in blocks(self.network):
                    block.compile(dynamic=True)  # one graph for micro-batches of any length
            if sharded:
                reshard(self.network)

    def _check_options(self) -> None:
        """Check the options with a network without weights, before weights are loaded."""
        options, data = self.network_options, self.trainer.datamodule  # type: ignore[attr-defined]
        network = checked_meta_network(options, data.tokenizer, data.max_length)
        self.refuse_network(network)
        refuse_unsupported(network, options, self.adapter, self.hparams["gradient_checkpointing"])
        self.freeze_layers(network)
        problem = self.tree_problem(network) or tree_problem(network, data.longest)
        if data.layout == "tree" and problem:
            data.choose_layout(problem)

    def _build(self) -> None:
        """Build the network, with adapters or frozen layers if there are options for them."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        has_adapter = self.adapter is not None
        self.network = build_for_trainer(self.network_options, data.tokenizer, self.trainer, has_adapter)
        self.insert_adapter(self.trainer.strategy.root_device)
        self.freeze_layers(self.network)
        if self.hparams["gradient_checkpointing"]:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        self.network.train()

    def insert_adapter(self, device: torch.device | None = None) -> None:
        """Insert adapters into the network if there are options for them, and describe the base in `base`.

        Args:
            device: The device of quantized layers; their own if None.
        """
        if self.adapter is None:
            return
        assert self.network is not None
        self.base = AdapterBase.of(self.network, self.head, self.hparams["backbone"])
        add_adapter(self.network, self.head, self.adapter, self.hparams["quantization"], device)
        self.strict_loading = False  # a checkpoint contains only trained weights

    def freeze_layers(self, network: "PreTrainedModel") -> None:
        """Freeze the lowest layers if model.freeze_layers is not 0; see `freeze_lowest`."""
        if self.hparams["freeze_layers"]:
            freeze_lowest(network, self.hparams["freeze_layers"])

    def choose_layout(self, data: RowsDataModule, longest: int, largest: int) -> None:
        """Choose the layout and the attention with self-checks, and tell the data module. The network is on its device.

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
        data.choose_layout(problem, pair_cost(network))
        if data.layout == "rows" and data.micro_batch_size > 1:
            data.choose_micro_batch_size(padding_problem(network, partial(self.read_rows, network), longest))


def checked_meta_network(
    options: NetworkOptions, tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> "PreTrainedModel":
    """The network on the meta device. Errors in options show here, before weights are loaded, which may take minutes.

    Args:
        options: The network's options.
        tokenizer: As in `build_network`.
        max_length: The largest number of tokens of a row.

    Raises:
        UserError: As in `build_network`, or the backbone has fewer positions.
    """
    config = network_config(options, tokenizer)
    if max_length > (positions := max_positions(config)):
        raise UserError(
            f"data.max_length: {max_length} tokens, but {options.backbone} has positions for {positions}",
            f"Use --data.max_length {positions}, or a backbone that reads longer texts.",
        )
    return meta_network(options, config)


def refuse_unsupported(
    network: "PreTrainedModel", options: NetworkOptions, adapter: AdapterOptions | None, gradient_checkpointing: bool
) -> None:
    """Refuse an adapter or gradient checkpointing that a network does not support.

    Raises:
        UserError: The network does not support it.
    """
    if adapter is not None:
        target_layers(network, options.head, adapter)
    if gradient_checkpointing and not network.supports_gradient_checkpointing:
        raise UserError(
            f"model.gradient_checkpointing: {type(network).__name__} does not support it",
            "Leave it out, or use another backbone.",
        )


def build_for_trainer(
    options: NetworkOptions, tokenizer: "PreTrainedTokenizerFast", trainer: Trainer, has_adapter: bool
) -> "PreTrainedModel":
    """The network with weights, sharded if the trainer's strategy shards it.

    Args:
        options: The network's options.
        tokenizer: As in `build_network`.
        trainer: Its strategy and precision are used.
        has_adapter: Whether the network is the base of an adapter.

    Raises:
        UserError: As in `build_network` and `build_sharded_network`.
    """
    device, mesh = trainer.strategy.root_device, mesh_of(trainer)
    if mesh is not None:
        return build_sharded_network(options, tokenizer, mesh=mesh, device=device, precision=str(trainer.precision))
    place: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if options.backbone == SCRATCH:
        place = fixed_seed() if has_adapter else device  # a GPU initializes a large network much faster
    with place:
        return build_network(options, tokenizer)


def mesh_of(trainer: Trainer) -> "DeviceMesh | None":
    """The mesh of ranks that weights are sharded over; None if each rank has all weights."""
    strategy = trainer.strategy
    return strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
