"""Finding a trained reward classifier: in a run folder, a checkpoint or an export."""

from pathlib import Path
from typing import Any

from callbacks.checkpoints import BEST, LAST, load_run
from callbacks.files import CHECKPOINTS
from datamodules.errors import UserError
from models.reward import EXPORT_STATE, RewardClassifier


def load_reward(target: Path, option: str) -> tuple[RewardClassifier, dict[str, Any], Path]:
    """The classifier, its data module's state, and the file or folder that the weights came from.

    Args:
        target: A run folder (its best weights), a .ckpt file, or an export folder.
        option: Which option names the target, for messages.

    Raises:
        UserError: The target holds no reward classifier.
    """
    if (target / EXPORT_STATE).is_file():
        return (*RewardClassifier.from_export(target), target)
    if (target / CHECKPOINTS).is_dir():
        target = next((path for name in (BEST, LAST) if (path := target / CHECKPOINTS / name).exists()), target)
    if target.is_dir() or not target.exists():
        raise UserError(
            f"{option}: {target} holds no checkpoint" if target.exists() else f"{option}: there is no {target}",
            f"Give a run folder, a .ckpt file, or an export folder (with {EXPORT_STATE}).",
        )
    checkpoint = load_run(target)
    return RewardClassifier.from_checkpoint(checkpoint), checkpoint["RewardDataModule"], target
