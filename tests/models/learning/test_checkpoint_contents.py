"""Records of checkpoints and exports. Bad files are in tests/proactive/bad_inputs."""

from collections.abc import Iterator

import pytest
import torch

from models.learning.checkpoint_contents import options_record
from models.learning.proactive_agent import ProactiveAgent


@pytest.fixture
def fresh_records() -> Iterator[None]:
    options_record.cache_clear()
    yield
    options_record.cache_clear()


def test_options_are_those_of_our_own_classes_even_if_constructors_of_libraries_are_wrapped(
    fresh_records: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory trackers and loaders without weights wrap PyTorch's constructors."""

    def wrapper(self: torch.nn.Module, module: torch.nn.Module) -> None:
        raise AssertionError("nothing is made")

    monkeypatch.setattr(torch.nn.Module, "__init__", wrapper)
    fields = options_record(ProactiveAgent).model_fields
    assert {"backbone", "null_weight"} <= fields.keys()
    assert "module" not in fields
