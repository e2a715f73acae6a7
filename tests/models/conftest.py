"""Data and weights that the tests of models share."""

from pathlib import Path

import pytest
import torch

from models.networks.configurations import network_from_config
from models.networks.network_options import NetworkOptions
from tests.models.small import LLAMA, small_data


@pytest.fixture(scope="session")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained causal language model with its tokenizer; as a classifier it gets a new head."""
    folder = tmp_path_factory.mktemp("base")
    data = small_data(root)
    data.setup("fit")
    torch.manual_seed(1)
    config = LLAMA | {"vocab_size": len(data.tokenizer), "pad_token_id": data.tokenizer.pad_token_id}
    network_from_config(NetworkOptions("language model"), config).save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return folder
