"""The Trainer's options: our defaults, their ranges, and combinations that cannot work."""

from typing import Annotated, Any

from annotated_types import Ge, Le
from jsonargparse import Namespace

from datamodules.errors import UserError
from datamodules.ranges import FINITE, Count, Fraction, NonNegativeInt, PositiveFraction, Seed, check_ranges

TRAINER_DEFAULTS = {
    "max_epochs": 5,
    "log_every_n_steps": 5,
    "use_distributed_sampler": False,  # the data module's sampler divides rows among ranks
    "enable_model_summary": False,
}
MANUAL = (
    "the model uses manual optimization",
    "Use data.batch_size for the rows of a step, data.token_budget for the tokens of a micro-batch, and "
    "model.gradient_clip_norm for the maximum gradient norm.",
)
NEEDED = ("a run needs its checkpoints and metrics", "Leave it out.")
STEPS = ("a batch is a whole step", "Use trainer.limit_train_batches for a part of the steps.")
# Options of Lightning that are refused: the value that is allowed, the reason, and what to do instead.
REFUSED: dict[str, tuple[Any, str, str]] = {
    "accumulate_grad_batches": (1, *MANUAL),
    "gradient_clip_val": (None, *MANUAL),
    "gradient_clip_algorithm": (None, *MANUAL),
    "enable_checkpointing": (None, *NEEDED),
    "barebones": (False, *NEEDED),
    "overfit_batches": (0.0, *STEPS),
}
LIMIT = Annotated[int, Ge(-1), Le(2**31 - 1), FINITE]  # -1 for no limit
# Ranges that Lightning's annotations leave open. A run ends with its test, so the test needs rows.
TRAINER_RANGES = {
    "max_epochs": LIMIT | None,
    "min_epochs": NonNegativeInt | None,
    "max_steps": LIMIT,
    "min_steps": NonNegativeInt | None,
    "num_nodes": Count,
    "limit_train_batches": Count | PositiveFraction | None,
    "limit_val_batches": NonNegativeInt | Fraction | None,
    "limit_test_batches": Count | PositiveFraction | None,
    "limit_predict_batches": NonNegativeInt | Fraction | None,
    "check_val_every_n_epoch": Count | None,
    "num_sanity_val_steps": LIMIT | None,
    "log_every_n_steps": NonNegativeInt | None,
    "fast_dev_run": bool | NonNegativeInt,
    "reload_dataloaders_every_n_epochs": NonNegativeInt,
}


def refuse_impossible_options(config: Namespace) -> None:
    """Check the trainer, the seed and the monitor of a run.

    Args:
        config: All options. Whole numbers that the parser read as floats become integers.

    Raises:
        UserError: A value is out of range or refused, or the monitored metric is not computed.
    """
    for name, value in config.trainer.as_dict().items():
        # Options that take a number of batches or a share of them: the parser may read 3 as 3.0.
        if name in TRAINER_RANGES and isinstance(value, float) and value > 1 and value.is_integer():
            config.trainer[name] = int(value)
    check_ranges(TRAINER_RANGES, config.trainer.as_dict(), "trainer")
    check_ranges({"seed_everything": Seed | bool}, config.as_dict(), "")
    if config.run.monitor == "validation/json_validity" and not config.model.sampled_answers:
        raise UserError(
            "run.monitor: validation/json_validity needs sampled answers, but model.sampled_answers is 0",
            "Set model.sampled_answers, or monitor another metric.",
        )
    for name, (allowed, reason, instead) in REFUSED.items():
        if (value := config.trainer[name]) != allowed:
            raise UserError(f"trainer.{name}: {value} is not possible, because {reason}", instead)
