"""The split that a saved model was trained with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datamodules.corpus.splits import Split, history_digests
from datamodules.corpus.tables import is_hub_name
from datamodules.errors import UserError

if TYPE_CHECKING:
    from datamodules.batching.rows import RowsDataModule


def split_of_training(data: "RowsDataModule", saved: Mapping[str, Any]) -> Split | None:
    """Load the split that a model was trained with.

    Args:
        data: The data module that measures the model, maybe on another root.
        saved: The state of the data module of its training.

    Returns:
        None if the rows are no longer available.
    """
    own = type(data)(**{**saved["hyperparameters"], "prompt": None})
    if own.root != data.root and is_hub_name(own.root):  # nobody asked to download it
        return None
    try:
        split = own.divide(own.load())
    except UserError:
        return None
    return split if history_digests(split.train) == saved.get("training_histories", []) else None
