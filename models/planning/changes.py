"""Changes of settings that save memory, and the choice of the cheapest ones with which a run fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from models.networks.adapters import AdapterOptions
from models.planning.memory import Memory, MemoryPlan, Setting


@dataclass(frozen=True)
class Change:
    """A change of settings that saves memory.

    Attributes:
        what: The change in words.
        option: The command-line options of the change.
        apply: Returns the changed setting.
    """

    what: str
    option: str
    apply: Callable[[Setting], Setting]


def changes(longest: int, setting: Setting) -> list[Change]:
    """The changes that save memory, cheapest first.

    Args:
        longest: Tokens of the longest row, which is the smallest possible tree.
        setting: The current setting.
    """
    found = []
    if setting.tokens is not None and setting.tokens > longest:
        found.append(
            Change(
                f"a smaller token budget, {longest}",
                f"--data.token_budget {longest}",
                lambda s: replace(s, tokens=longest),
            )
        )
    if not setting.checkpointing:
        found.append(
            Change(
                "gradient checkpointing, for a third more operations",
                "--model.gradient_checkpointing true",
                lambda s: replace(s, checkpointing=True),
            )
        )
    if setting.optimizer == "adamw" and setting.adapter is None:
        found.append(
            Change("an 8-bit optimizer", "--model.optimizer adamw_8bit", lambda s: replace(s, optimizer="adamw_8bit"))
        )
    if setting.adapter is None:
        for devices in (2, 4, 8, 16, 32, 64):
            if devices > setting.devices:
                found.append(_more_devices(devices))
        found.append(
            Change(
                "an adapter instead of all weights",
                "--model.adapter.rank 16",
                lambda s: replace(s, adapter=AdapterOptions(), devices=1, sharing="one device"),
            )
        )
    if setting.quantization == "none":
        found.append(
            Change(
                "an adapter on weights in 4 bits",
                "--model.adapter.rank 16 --model.quantization nf4 --model.dtype bfloat16",
                lambda s: replace(
                    s,
                    adapter=s.adapter or AdapterOptions(),
                    quantization="nf4",
                    dtype="bfloat16",
                    devices=1,
                    sharing="one device",
                ),
            )
        )
    return found


def _more_devices(devices: int) -> Change:
    return Change(
        f"{devices} devices that share weights, gradients and optimizer",
        f"--trainer.devices {devices} --trainer.strategy fully_sharded",
        lambda s: replace(s, devices=devices, sharing="sharded"),
    )


def cheapest_fit(plan: MemoryPlan, setting: Setting, longest: int, room: int) -> tuple[list[Change], Memory] | None:
    """The cheapest changes with which a setting fits.

    A single change is preferred. Otherwise the first changes are combined until the setting fits.

    Args:
        plan: Estimates the memory.
        setting: The current setting.
        longest: Tokens of the longest row.
        room: Bytes of one device.

    Returns:
        The changes and the memory with them; None if the setting does not fit with all changes.
    """
    offered = changes(longest, setting)
    for change in offered:
        if (memory := plan.memory(change.apply(setting))).peak <= room:
            return [change], memory
    together: list[Change] = []
    devices_tried: Change | None = None
    for change in offered:
        if "devices" in change.option:  # a larger number of devices replaces a smaller one
            together = [one for one in together if one is not devices_tried]
            devices_tried = change
        together.append(change)
        changed = setting
        for one in together:
            changed = one.apply(changed)
        if (memory := plan.memory(changed)).peak <= room:
            return list(together), memory
    return None
