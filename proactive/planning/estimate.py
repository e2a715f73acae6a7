"""Memory, operations and time of a run, computed from its options, its data and the shape of its backbone."""

import os
import re
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from datamodules.batching.rows import RowsDataModule
from datamodules.batching.steps import BatchSize, batch_size
from datamodules.errors import UserError, did_you_mean
from datamodules.prompting.tokenizers import SCRATCH
from models.learning.training import BackboneModule
from models.networks.configurations import network_config
from models.networks.heads import reads_last_token
from models.networks.operations import (
    ASSUMED_UTILIZATION,
    DEVICES,
    MEASURED_UTILIZATION,
    Device,
    Operations,
    find_device,
    trained_count,
    weight_count,
)
from models.networks.self_checks import attention_window
from models.networks.tree_reading import pair_cost
from models.planning.changes import Change, cheapest_fit
from models.planning.memory import Memory, MemoryPlan, Setting, Sharing
from proactive.fitting.cli import FitCLI
from proactive.planning.file_sizes import file_sizes

STEPS_COUNTED = 200  # at most; the size of a longer epoch is extrapolated
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
CHECKPOINTING_FACTOR = 4 / 3  # operations with gradient checkpointing, which computes the forward pass twice


@dataclass(frozen=True)
class Epoch:
    """The first epoch in one layout.

    Attributes:
        size: Tokens, rows and operations of the whole epoch, over all ranks.
        steps: Optimizer steps.
        largest: The micro-batch with the most tokens.
        largest_tokens: Its tokens, padding included.
        most_micro_batches: The largest number of micro-batches in a step, over all ranks.
    """

    size: BatchSize
    steps: int
    largest: dict[str, Any]
    largest_tokens: int
    most_micro_batches: int


def plan_run(cli: FitCLI) -> dict[str, Any]:
    """Parameters, memory, tokens, operations and time of a run, and a change that makes it fit.

    Args:
        cli: Options, model and data of the run, with the additional options of `plan`.

    Returns:
        The content of the JSON file of --output. Memory is in bytes of one device, time in seconds.

    Raises:
        UserError: The data, the backbone's shape, --device or --memory cannot be read.
    """
    model, data, options = cli.model, cli.datamodule, cli.config
    assert isinstance(model, BackboneModule)
    assert isinstance(data, RowsDataModule)
    device = _device(options.device)
    token_source = _read_data(data)
    config, backbone_source = _config(model, data)
    setting = _setting(cli, device is not None)
    plain = MemoryPlan(model, config, {}).network(
        Setting(dtype=model.hparams["dtype"], precision="32-true", optimizer="adamw")
    )
    attention = model.hparams["attn_implementation"]
    layout = _layout(model, data, config, plain)
    cost = 0.0 if device and attention is None else pair_cost(plain)
    epochs = {name: _count_epoch(data, name, setting.devices, cost) for name in ("tree", "rows")}
    epoch = epochs[layout]
    accumulates = epoch.most_micro_batches > setting.devices
    if layout == "tree":
        setting = replace(setting, tokens=data.token_budget if accumulates else epoch.largest_tokens)
    setting = replace(setting, accumulates=accumulates)

    plan = MemoryPlan(model, config, epoch.largest, "eager" if attention == "eager" else None)
    network, memory = plan.network(setting), plan.memory(setting)
    room = _room(options.memory, device)
    fits = None if room is None else memory.peak <= room
    change = None
    if room is not None and not fits:
        longest = max(len(ids) for ids in data.encoded["train"].input_ids) if layout == "tree" else data.max_length
        change = cheapest_fit(plan, setting, longest, room)

    size = epoch.size
    counts = size.unpadded_tokens, size.pairs, size.targets
    trained = Operations.of(network).count(*counts)
    prepared = model.extra_forward_passes * Operations.of(network, backward=False).count(*counts)
    utilization, utilization_source = _utilization(options.utilization, device, setting, layout)
    seconds = None
    if device:
        computed = prepared + trained * (CHECKPOINTING_FACTOR if setting.checkpointing else 1)
        seconds = computed / (setting.devices * device.peak * utilization)
    return {
        "backbone": backbone_source,
        "parameters": weight_count(network),
        "trained_parameters": trained_count(network),
        "devices": setting.devices,
        "sharing": setting.sharing,
        "memory": asdict(memory) | {"peak": memory.peak},
        "file_sizes": file_sizes(model, data, plan, setting, options.run.resumable_best, options.run.export_dtype),
        "tokens_at_once": setting.tokens or epoch.largest_tokens,
        "room": room,
        "fits": fits,
        "change": _change_record(change),
        "layout": layout,
        "tokens_counted_by": token_source,
        "epoch": {
            name: {"tokens": one.size.tokens, "largest_micro_batch": one.largest_tokens, "steps": one.steps}
            for name, one in epochs.items()
        },
        "effective_tokens": size.effective_tokens,
        "operations_an_epoch": trained + prepared,
        "utilization": utilization,
        "utilization_is": utilization_source,
        "seconds_an_epoch": seconds,
    }


def _read_data(data: RowsDataModule) -> str:
    """Read and tokenize the data.

    Without access to the backbone's tokenizer, one trained on the data counts the tokens.

    Returns:
        Which tokenizer counts the tokens.
    """
    name = data.tokenizer_name
    try:
        data.setup("fit")
    except UserError as error:
        if name == SCRATCH or "tokenizer" not in error.what:
            raise
        data.tokenizer_name = SCRATCH
        data.setup("fit")
        return f"a tokenizer trained on the data, because {name} is not available"
    return "a tokenizer trained on the data" if name == SCRATCH else name


def _config(model: BackboneModule, data: RowsDataModule) -> tuple[Any, str]:
    """The backbone's configuration and its source. Without access to the backbone, the shape in model.scratch."""
    options = model.network_options
    name = options.backbone
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "5")
    try:
        return network_config(options, data.tokenizer), name
    except UserError as error:
        if name == SCRATCH:
            raise
        if options.scratch is None:
            raise UserError(
                error.what, "Give its shape: --model.scratch with model_type and sizes; see docs/how-to/plan.md."
            ) from error
        config = network_config(replace(options, backbone=SCRATCH), data.tokenizer)
        return config, f"{name}, with the shape in model.scratch"


def _setting(cli: FitCLI, on_gpu: bool) -> Setting:
    hparams, trainer = cli.model.hparams, cli.config_init.trainer
    devices = cli.config.devices
    if devices is None:
        devices = _device_count(trainer.devices) * trainer.num_nodes
    return Setting(
        dtype=hparams["dtype"],
        precision=_precision(trainer.precision),
        optimizer=hparams["optimizer"],
        checkpointing=hparams["gradient_checkpointing"],
        adapter=cli.model.adapter,
        quantization=hparams["quantization"],
        devices=devices,
        sharing=_sharing(trainer.strategy, devices),
        on_gpu=on_gpu,
    )


def _precision(given: Any) -> str:
    names = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "None": "32-true"}
    return names.get(str(given), str(given))


def _sharing(strategy: Strategy | str, devices: int) -> Sharing:
    if isinstance(strategy, str):
        if any(word in strategy for word in ("fsdp", "deepspeed", "model_parallel", "sharded")):
            return "sharded"
    elif not isinstance(strategy, DDPStrategy):
        return "sharded"
    return "replicated" if devices > 1 else "one device"


def _device_count(devices: Any) -> int:
    """The number of devices in trainer.devices. "auto" is this machine's GPUs, or one device without a GPU."""
    if isinstance(devices, list):
        return len(devices)
    return max(int(devices), 1) if str(devices).lstrip("-").isdecimal() else max(torch.cuda.device_count(), 1)


def _device(name: str | None) -> Device | None:
    """The device with this name; without a name, this machine's GPU, if it has one."""
    if name is None:
        return find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    device = find_device(name)
    if device is None:
        raise UserError(
            f"--device: {name} is not known{did_you_mean(name, DEVICES)}",
            f"Give one of {', '.join(DEVICES)}, or --memory alone.",
        )
    return device


def _room(memory: str | None, device: Device | None) -> int | None:
    """Bytes of memory of a device: as given, else the device's own, else unknown."""
    if memory:
        return _bytes(memory)
    return device.memory if device else None


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * UNITS[found[2].upper()] if found else 0
    if not 1 <= size < 2**63:
        raise UserError(f"--memory: {text} is not a size", "Give one such as 80GiB.")
    return int(size)


def _layout(model: BackboneModule, data: RowsDataModule, config: Any, network: Any) -> str:
    """The layout that the run will choose: tree or rows."""
    window = attention_window(config)
    if data.layout == "rows" or (window is not None and window < data.max_length):
        return "rows"
    return "tree" if model.head == "language model" or reads_last_token(network) else "rows"


def _count_epoch(data: RowsDataModule, layout: Any, ranks: int, cost: float) -> Epoch:
    """Count the first epoch in a layout.

    Args:
        data: The data, set up.
        layout: tree or rows.
        ranks: Number of ranks.
        cost: Cost of a pair of tokens in attention, relative to a token; see `pair_cost`.
    """
    total, largest, tokens, most, counted = BatchSize(), None, 0, 0, 0
    for step in islice(data.epoch(layout, ranks, cost), STEPS_COUNTED):
        counted += 1
        most = max(most, len(step))
        for micro_batch in step:
            size = batch_size(micro_batch)
            total += size
            if size.tokens > tokens:
                largest, tokens = micro_batch, size.tokens
    assert largest is not None
    scale = data.steps_per_epoch / counted
    size = BatchSize(*(round(value * scale) for value in vars(total).values()))
    return Epoch(size, data.steps_per_epoch, largest, tokens, most)


def _utilization(given: float | None, device: Device | None, setting: Setting, layout: str) -> tuple[float, str]:
    """The share of the device's peak rate that the run reaches, and its source: given, measured or assumed."""
    if given is not None:
        return given, "given"
    if device is not None and setting.devices == 1 and layout == "tree":
        measured = MEASURED_UTILIZATION.get((device.family, "adapters" if setting.adapter else "all weights"))
        if measured is not None:
            return measured, "measured"
    return ASSUMED_UTILIZATION, "assumed"


def _change_record(found: tuple[list[Change], Memory] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    changes, memory = found
    return {"what": [one.what for one in changes], "options": [one.option for one in changes], "peak": memory.peak}
