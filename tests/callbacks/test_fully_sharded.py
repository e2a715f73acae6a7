"""Weights spread over ranks: the same steps as on one device, on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.corpus.sources import load_corpus
from tests.callbacks.sharded_runs import compiled, mixed_precision, steps, stored_in_bfloat16
from tests.gguf_files import small_llama, with_cache, write_gguf
from tests.models.small import LLAMA
from tests.ranks import on_ranks

# Trees and rows are shared unevenly: 8 rows a step, by their lengths. The families differ in what their blocks are
# called, in their heads, in whether the whole network's own forward is called. None has biases on keys, whose gradient
# is zero: Adam would make whole steps of its rounding.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"layout": "tree", "token_budget": 160}),
    ("llama", {"gradient_checkpointing": True}, {"layout": "rows"}),
    ("gemma3_text", {}, {"layout": "tree", "token_budget": 160}),
    ("modernbert", {}, {"layout": "rows"}),
    # Blocks of a matrix's rows, a head of 2 rows, and vectors whose parts are no whole blocks.
    ("llama", {"scratch": LLAMA, "optimizer": "adamw_8bit"}, {"layout": "tree", "token_budget": 160}),
]


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Each case on one device, without any sharding."""
    return on_ranks(1, steps, root, CASES, 0, folder=tmp_path_factory.mktemp("alone"))


def assert_same_steps(found: list[Any], expected: list[Any], cases: list[Any] = CASES) -> None:
    for one, other, case in zip(found, expected, cases, strict=False):
        for part, tolerance in (("before", 0.0), ("after", 1e-5)):
            assert one[part].keys() == other[part].keys()
            for name, weight in other[part].items():
                message = f"{case}: {name} {part} the step"
                torch.testing.assert_close(one[part][name], weight, rtol=0, atol=tolerance, msg=message)
        torch.testing.assert_close(torch.tensor(one["curve"]), torch.tensor(other["curve"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_the_same_on_any_number_of_ranks(ranks: int, root: Path, alone: list[Any], tmp_path: Path) -> None:
    assert_same_steps(on_ranks(ranks, steps, root, CASES, folder=tmp_path), alone)


def test_eight_ranks_train_like_one(root: Path, alone: list[Any], tmp_path: Path) -> None:
    assert_same_steps(on_ranks(8, steps, root, CASES[:1], folder=tmp_path), alone)


def test_replicas_give_the_same_losses(root: Path, alone: list[Any], tmp_path: Path) -> None:
    assert_same_steps(on_ranks(4, steps, root, CASES[:1], 2, folder=tmp_path), alone)


def test_a_gguf_file_trains_alike_on_two_ranks_with_all_or_its_upper_layers(root: Path, tmp_path: Path) -> None:
    """Embeddings and frozen layers stay those of the file. The head is beside the embeddings in FSDP's last group."""
    file = str(write_gguf(tmp_path / "small.gguf", *small_llama(load_corpus(str(root)).train)))
    options, tree = {"backbone": file, "learning_rate": 1e-3}, {"layout": "tree", "token_budget": 160}
    cases: list[Any] = [("llama", {**options, "freeze_layers": count}, tree) for count in (0, 1, 2)]
    cases.append(("llama", {**options, "freeze_layers": 1, "gradient_checkpointing": True}, {"layout": "rows"}))
    arguments = (with_cache, tmp_path / "cache", steps, root, cases)
    two = on_ranks(2, *arguments, folder=tmp_path)
    assert_same_steps(two, on_ranks(1, *arguments, 0, folder=tmp_path), cases)
    for result, (_, model_options, _) in zip(two, cases, strict=True):
        count = model_options["freeze_layers"]
        frozen = tuple(f"model.layers.{index}." for index in range(count)) + ("model.embed_tokens.",) * (count > 0)
        for name, weight in result["before"].items():
            assert torch.equal(result["after"][name], weight) == name.startswith(frozen), name


def test_compiled_blocks_give_the_same_losses(root: Path, alone: list[Any], tmp_path: Path) -> None:
    assert_same_steps(on_ranks(1, compiled, root, folder=tmp_path), alone)


def test_bf16_mixed_computes_in_bfloat16_and_reduces_in_float32(root: Path, alone: list[Any], tmp_path: Path) -> None:
    result = on_ranks(2, mixed_precision, root, folder=tmp_path)
    full, half = "torch.float32", "torch.bfloat16"
    assert result["types"] == {"master": full, "gradient": full, "optimizer": full, "states": half}
    assert result["layout"] == "tree"  # which was tested in the precision that it is computed in
    torch.testing.assert_close(torch.tensor(result["curve"]), torch.tensor(alone[0]["curve"]), rtol=3e-2, atol=1e-2)


def test_bfloat16_weights_are_sharded_with_their_optimizer_state(root: Path, tmp_path: Path) -> None:
    """On three ranks, which share no number of rows evenly; rotary frequencies stay float32."""
    alone = on_ranks(1, stored_in_bfloat16, root, False, folder=tmp_path / "alone")
    spread = on_ranks(3, stored_in_bfloat16, root, True, folder=tmp_path / "spread")
    for result in (alone, spread):
        assert result["types"] == {"weight": "torch.bfloat16", "gradient": "torch.bfloat16", "rotary": "torch.float32"}
        assert result["layout"] == "tree"
    torch.testing.assert_close(torch.tensor(spread["curve"]), torch.tensor(alone["curve"]), rtol=3e-2, atol=2e-2)
