"""The number of optimizer steps of a run."""

from lightning import Trainer

from datamodules.errors import UserError


def total_steps(trainer: Trainer) -> int:
    """The optimizer steps of the whole run, from the trainer's limits and its data module.

    Lightning's own estimate would create the training loader before a resumed run restores its position.

    Raises:
        UserError: The run has no end.
    """
    steps, limit = trainer.datamodule.steps_per_epoch, trainer.limit_train_batches  # type: ignore[attr-defined]
    steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
    limits = []
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * steps)
    if not limits:
        raise UserError("a run without an end has no schedule", "Give trainer.max_epochs or trainer.max_steps.")
    return min(limits)
