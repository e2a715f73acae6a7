"""`python -m proactive.plan`: estimate memory and time of a run without loading weights."""

if __name__ == "__main__":
    from proactive.commands import start

    start("plan")

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from datamodules.errors import UserError
from datamodules.files.writing import write_atomically
from datamodules.ranges import Count, PositiveFraction
from models.networks.operations import GIB
from proactive.fitting.cli import FitCLI
from proactive.fitting.configs import task_of
from proactive.planning.estimate import plan_run
from proactive.tables import Table, show


class PlanCLI(FitCLI):
    """The options of a run, without its trainer and run folder."""

    command = "plan"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add = parser.add_argument
        add("--devices", type=Count | None, default=None, help="Number of devices, instead of trainer.devices.")
        add("--memory", type=str, default=None, help="Memory of a device, such as 80GiB; default: the device's own.")
        add("--device", type=str, default=None, help="Name of the device, such as h100; default: this machine's GPU.")
        add(
            "--utilization",
            type=PositiveFraction | None,
            default=None,
            help="Share of the device's peak rate that the run reaches; default: as measured on such a card, else 0.4.",
        )
        add("--output", type=Path, default=None, help="Write the plan to this JSON file.")

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None:
        LightningCLI.instantiate_classes(self)

    def instantiate_trainer(self, **kwargs: Any) -> Any: ...


def main(arguments: list[str]) -> None:
    """Parse, estimate, print."""
    cli = PlanCLI(task_of(arguments), arguments)
    if cli.config.output and cli.config.output.is_dir():
        raise UserError(f"--output: {cli.config.output} is a folder", "Give the path of a file.")
    if not cli.task.module.plannable:
        raise UserError(
            f"--task {cli.task.module.task}: its rows are written while it trains, so they cannot be counted before",
            "For its memory plan task agent with the same model; for its time measure --trainer.max_steps 5.",
        )
    found = plan_run(cli)
    if cli.config.output:
        write_atomically(cli.config.output, json.dumps(found, indent=2) + "\n")
    if not cli.config.quiet:
        show(_memory_table(found), _file_table(found), _run_table(found))


def _memory_table(found: dict[str, Any]) -> Table:
    table = Table(title="Memory of a device")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in found["memory"].items():
        if name == "peak":
            table.add_section()
        table.add_row(name, f"{size / GIB:.2f}")
    return table


def _file_table(found: dict[str, Any]) -> Table:
    table = Table(title="Files of the run")
    table.add_column("file")
    table.add_column("GiB", justify="right")
    for name, size in found["file_sizes"].items():
        table.add_row(name, f"{size / GIB:.3f}")
    return table


def _run_table(found: dict[str, Any]) -> Table:
    table = Table("What it takes", f"tokens are those of {found['tokens_counted_by']}", show_header=False)
    table.add_row("backbone", found["backbone"])
    table.add_row("parameters", f"{found['parameters']:,}, of which {found['trained_parameters']:,} are trained")
    table.add_row("devices", f"{found['devices']}, {found['sharing']}")
    table.add_row("tokens at once", f"{found['tokens_at_once']:,}")
    if found["room"] is not None:
        table.add_row(f"in {found['room'] / GIB:.4g} GiB", "it fits" if found["fits"] else "it does not fit")
    if found["change"]:
        change = found["change"]
        table.add_row("it would fit with", f"{'; '.join(change['what'])}: {change['peak'] / GIB:.2f} GiB")
        table.add_row("", " ".join(change["options"]))
    elif found["fits"] is False:
        table.add_row("it would fit with", "none of the changes that plan tries")
    for name, epoch in found["epoch"].items():
        configured = ", as configured" if name == found["layout"] else ""
        table.add_row(f"tokens an epoch, {name}{configured}", f"{epoch['tokens']:,} in {epoch['steps']} steps")
    table.add_row("tokens of all rows", f"{found['effective_tokens']:,}")
    table.add_row("operations an epoch", f"{found['operations_an_epoch']:.3g}")
    if found["seconds_an_epoch"] is not None:
        title = f"seconds an epoch at a utilization of {found['utilization']:.0%} ({found['utilization_is']})"
        table.add_row(title, f"{found['seconds_an_epoch']:,.0f}")
    return table
