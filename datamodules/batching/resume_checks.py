"""Checks that a resumed run has the data of the run that it resumes."""

from collections.abc import Collection, Mapping
from typing import Any

from datamodules.errors import UserError, refuse_changes


def refuse_other_data(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str], *, own_tokenizer: bool
) -> None:
    """Compare the state of a data module in a checkpoint with the present one.

    Args:
        saved: The state in the checkpoint.
        now: The state of the resumed run's data module.
        may_change: Names of the options that a resume may change.
        own_tokenizer: Whether the tokenizer was trained on the rows. Other rows then change the tokenizer as well, so
            the rows are compared first.

    Raises:
        UserError: Options, order of rows, prompt, tokenizer or training rows differ.
    """
    refuse_changes("data", saved["hyperparameters"], now["hyperparameters"], may_change)
    refuse_changes("", {"seed_everything": saved["order_seed"]}, {"seed_everything": now["order_seed"]}, ())
    prompt = ("prompt", "the prompt or its format differs from the one in", "data.prompt and data.format")
    tokenizer = ("tokenizer", "the tokenizer, or its chat template, differs from the one in", "model.backbone")
    rows = ("training_rows", "the training rows differ from those of", "data.root and data.conversations")
    for key, difference, option in (prompt, rows, tokenizer) if own_tokenizer else (tokenizer, prompt, rows):
        if saved[key] != now[key]:
            raise UserError(f"{difference} the checkpoint", f"Resume with the same {option}, or start a new run.")
