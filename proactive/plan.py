"""`python -m proactive.plan`: what a run would take, in memory and time, before any weight is loaded."""

if __name__ == "__main__":
    from proactive.commands import start

    start("plan")

import json
import os
import re
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, Strategy

from datamodules.batching.rows import RowsDataModule
from datamodules.batching.steps import BatchSize, batch_size
from datamodules.errors import UserError
from datamodules.files.writing import write_atomically
from datamodules.prompting.tokenizers import SCRATCH
from datamodules.ranges import Count, PositiveShare
from models.learning.training import BackboneModule
from models.networks.configurations import network_config
from models.networks.heads import reads_last_token
from models.networks.operations import (
    ASSUMED_UTILIZATION,
    GIB,
    MEASURED_UTILIZATION,
    Device,
    Operations,
    find_device,
    trained_count,
    weight_count,
)
from models.networks.tree_reading import pair_cost
from models.networks.trials import attention_window
from models.planning.memory import Change, Memory, MemoryPlan, Setting, Sharing, cheapest_fit
from proactive.fit import FitCLI, task_of
from proactive.parser import did_you_mean
from proactive.terminal import Table, show

STEPS_COUNTED = 200  # of an epoch, at most; what a longer one has follows from them
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class PlanCLI(FitCLI):
    """The options of a run, without its trainer and its folder."""

    command = "plan"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--devices", type=Count | None, default=None, help="How many devices, in place of trainer.devices."
        )
        parser.add_argument("--memory", type=str, default=None, help="Of one device, such as 80GiB; the device's own.")
        parser.add_argument("--device", type=str, default=None, help="Which one, such as h100; this machine's GPU.")
        parser.add_argument(
            "--utilization",
            type=PositiveShare | None,
            default=None,
            help="The share of the device's peak that time is reckoned with; what was measured on such a card.",
        )
        parser.add_argument("--output", type=Path, default=None, help="Write the plan to this JSON file.")

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None:
        LightningCLI.instantiate_classes(self)

    def instantiate_trainer(self, **kwargs: Any) -> Any: ...


def plan_run(cli: PlanCLI) -> dict[str, Any]:
    """Parameters, memory, tokens, operations and time of a run, and what would make it fit."""
    model, data, options = cli.model, cli.datamodule, cli.config
    assert isinstance(model, BackboneModule)
    assert isinstance(data, RowsDataModule)
    device = _device(options.device)
    counted_by = _read_data(data)
    hparams = model.hparams
    config, source = _config(model, data)
    setting = _setting(cli, device is not None)
    empty = MemoryPlan(model, config, {})
    plain = empty.network(Setting(dtype=hparams["dtype"], precision="32-true", optimizer="adamw"))
    cost = 0.0 if device and hparams["attn_implementation"] is None else pair_cost(plain)
    window = attention_window(config)
    reads_trees = model.head == "language model" or reads_last_token(plain)
    wanted = data.layout
    if window is not None and window < data.max_length:
        reads_trees = False
    layout = "rows" if wanted == "rows" or not reads_trees else "tree"
    tree, rows = (_count(data, name, setting.devices, cost) for name in ("tree", "rows"))
    found = tree if layout == "tree" else rows
    accumulates = found["most_at_once"] > setting.devices
    tokens = None
    if layout == "tree":
        tokens = data.token_budget if accumulates else found["largest_tokens"]
    setting = replace(setting, tokens=tokens, accumulates=accumulates)
    attention = hparams["attn_implementation"]
    plan = MemoryPlan(model, config, found.pop("largest"), "eager" if attention == "eager" else None)
    (rows if layout == "tree" else tree).pop("largest")
    network = plan.network(setting)
    memory = plan.memory(setting)
    room = _bytes(options.memory) if options.memory else device.memory if device else None
    operations = Operations.of(network).count(found["size"].real_tokens, found["size"].pairs, found["size"].targets)
    executed = operations * (4 / 3 if setting.checkpointing else 1)
    utilization, its_source = _utilization(options.utilization, device, setting, layout)
    seconds = executed / (setting.devices * device.peak * utilization) if device else None
    change = None
    if room is not None and memory.peak > room:
        change = cheapest_fit(plan, setting, _longest(data, layout), room)
    return {
        "backbone": source,
        "parameters": weight_count(network),
        "trained_parameters": trained_count(network),
        "devices": setting.devices,
        "sharing": setting.sharing,
        "memory": asdict(memory) | {"peak": memory.peak},
        "tokens_at_once": tokens or found["largest_tokens"],
        "room": room,
        "fits": None if room is None else memory.peak <= room,
        "change": _told(change),
        "layout": layout,
        "tokens_counted_by": counted_by,
        "epoch": {
            name: {"tokens": one["size"].tokens, "largest_micro_batch": one["largest_tokens"], "steps": one["steps"]}
            for name, one in (("tree", tree), ("rows", rows))
        },
        "effective_tokens": found["size"].effective_tokens,
        "operations_an_epoch": operations,
        "utilization": utilization,
        "utilization_is": its_source,
        "seconds_an_epoch": seconds,
    }


def _utilization(given: float | None, device: Device | None, setting: Setting, layout: str) -> tuple[float, str]:
    """The share of the device's peak that the run may reach, and where that is from: given, measured or assumed."""
    if given is not None:
        return given, "given"
    if device is not None and setting.devices == 1 and layout == "tree":
        measured = MEASURED_UTILIZATION.get((device.family, "adapters" if setting.adapter else "all weights"))
        if measured is not None:
            return measured, "measured"
    return ASSUMED_UTILIZATION, "assumed"


def main(arguments: list[str]) -> None:
    """Parse, plan, print."""
    cli = PlanCLI(task_of(arguments), arguments)
    if cli.config.output and cli.config.output.is_dir():
        raise UserError(f"--output: {cli.config.output} is a folder", "Give the path of a file.")
    found = plan_run(cli)
    if cli.config.output:
        write_atomically(cli.config.output, json.dumps(found, indent=2) + "\n")
    if not cli.config.quiet:
        show(*_tables(found))


def _read_data(data: RowsDataModule) -> str:
    """Read and tokenize; if the backbone's tokenizer is out of reach, with one made of the data. Says which."""
    name = data.tokenizer_name
    try:
        data.setup("fit")
    except UserError as error:
        if name == SCRATCH or "tokenizer" not in error.what:
            raise
        data.tokenizer_name = SCRATCH
        data.setup("fit")
        return f"a tokenizer made of the data, for {name} is out of reach"
    return "a tokenizer made of the data" if name == SCRATCH else name


def _config(model: BackboneModule, data: RowsDataModule) -> tuple[Any, str]:
    """The backbone's configuration; that of model.scratch if it is out of reach."""
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
        return config, f"{name}, by the shape that model.scratch gives"


def _setting(cli: PlanCLI, on_gpu: bool) -> Setting:
    hparams, trainer = cli.model.hparams, cli.config_init.trainer
    asked = cli.config.devices
    if asked is None:
        asked = _number(trainer.devices) * trainer.num_nodes
    return Setting(
        dtype=hparams["dtype"],
        precision=_precision(trainer.precision),
        optimizer=hparams["optimizer"],
        checkpointing=hparams["gradient_checkpointing"],
        adapter=cli.model.adapter,
        quantization=hparams["quantization"],
        devices=asked,
        sharing=_sharing(trainer.strategy, asked),
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


def _number(devices: Any) -> int:
    """How many devices trainer.devices means; one if it leaves that to the machine."""
    if isinstance(devices, list):
        return len(devices)
    return max(int(devices), 1) if str(devices).lstrip("-").isdecimal() else max(torch.cuda.device_count(), 1)


def _device(name: str | None) -> Device | None:
    if name is None:
        return find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    device = find_device(name)
    if device is None:
        from models.networks.operations import DEVICES

        raise UserError(
            f"--device: {name} is not known{did_you_mean(name, DEVICES)}",
            f"Give one of {', '.join(DEVICES)}, or --memory alone.",
        )
    return device


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * UNITS[found[2].upper()] if found else 0
    if not 1 <= size < 2**63:
        raise UserError(f"--memory: {text} is no size", "Give one such as 80GiB.")
    return int(size)


def _count(data: RowsDataModule, layout: Any, ranks: int, cost: float) -> dict[str, Any]:
    """What the first epoch computes in a layout, and its largest micro-batch."""
    total, largest, tokens, most, counted = BatchSize(), None, 0, 0, 0
    for step in islice(data.epoch(layout, ranks, cost), STEPS_COUNTED):
        counted += 1
        most = max(most, len(step))
        for micro_batch in step:
            total += (size := batch_size(micro_batch))
            if size.tokens > tokens:
                largest, tokens = micro_batch, size.tokens
    share = data.steps_per_epoch / counted
    whole = BatchSize(*(round(value * share) for value in vars(total).values()))
    return {
        "size": whole,
        "largest": largest,
        "largest_tokens": tokens,
        "most_at_once": most,
        "steps": data.steps_per_epoch,
    }


def _longest(data: RowsDataModule, layout: str) -> int:
    return max(len(ids) for ids in data._encoded["train"].input_ids) if layout == "tree" else data.max_length


def _told(change: tuple[list[Change], Memory] | None) -> dict[str, Any] | None:
    if change is None:
        return None
    made, memory = change
    return {"what": [one.what for one in made], "options": [one.option for one in made], "peak": memory.peak}


def _tables(found: dict[str, Any]) -> list[Table]:
    memory = Table(title="Memory of a device")
    memory.add_column("part")
    memory.add_column("GiB", justify="right")
    for name, size in found["memory"].items():
        if name == "peak":
            memory.add_section()
        memory.add_row(name, f"{size / GIB:.2f}")
    takes = Table("What it takes", f"tokens are those of {found['tokens_counted_by']}", show_header=False)
    takes.add_row("backbone", found["backbone"])
    takes.add_row("parameters", f"{found['parameters']:,}, of which {found['trained_parameters']:,} are trained")
    takes.add_row("devices", f"{found['devices']}, {found['sharing']}")
    takes.add_row("tokens at once", f"{found['tokens_at_once']:,}")
    if found["room"] is not None:
        takes.add_row(f"in {found['room'] / GIB:.4g} GiB", "it fits" if found["fits"] else "it does not fit")
    if found["change"]:
        change = found["change"]
        takes.add_row("it would with", f"{'; '.join(change['what'])}: {change['peak'] / GIB:.2f} GiB")
        takes.add_row("", " ".join(change["options"]))
    elif found["fits"] is False:
        takes.add_row("it would with", "none of the changes that are tried here")
    for name, one in found["epoch"].items():
        chosen = ", as configured" if name == found["layout"] else ""
        takes.add_row(f"tokens an epoch, {name}{chosen}", f"{one['tokens']:,} in {one['steps']} steps")
    takes.add_row("tokens of all rows", f"{found['effective_tokens']:,}")
    takes.add_row("operations an epoch", f"{found['operations_an_epoch']:.3g}")
    if found["seconds_an_epoch"] is not None:
        title = f"seconds an epoch at a utilization of {found['utilization']:.0%} ({found['utilization_is']})"
        takes.add_row(title, f"{found['seconds_an_epoch']:,.0f}")
    return [memory, takes]
