"""What the tests of networks share."""

import pytest
from transformers import PreTrainedTokenizerFast

from datamodules.prompting.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["The user opens a file.", "Offer: run the tests."], 280)
