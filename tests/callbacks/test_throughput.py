"""Throughput: what is counted is what is in the batches, in both layouts; how fast that is, no test can know."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks.throughput import ThroughputLog, peak_memory
from datamodules.batching.steps import BatchSize, batch_size
from models.networks.operations import Operations, find_device, weight_count
from tests.models.small import fit, small_classifier, small_data

NAMES = {"rows_per_second", "tokens_per_second", "effective_tokens_per_second", "peak_memory_gib"}


def epoch(root: Path, layout: str) -> BatchSize:
    data = small_data(root, layout=layout, token_budget=400)
    data.setup("fit")
    return sum((batch_size(micro) for step in data.train_dataloader() for micro in step), BatchSize())


def test_layouts_have_the_same_rows_and_effective_tokens_and_a_tree_computes_fewer(root: Path) -> None:
    tree, rows = epoch(root, "tree"), epoch(root, "rows")
    data = small_data(root)
    data.setup("fit")
    lengths = [len(ids) for ids in data.encoded["train"].input_ids]
    assert tree.rows == rows.rows == len(lengths)
    assert tree.effective_tokens == rows.effective_tokens == rows.unpadded_tokens == sum(lengths)
    assert rows.pairs == sum(length * (length + 1) // 2 for length in lengths)
    assert tree.tokens == tree.unpadded_tokens < rows.unpadded_tokens < rows.tokens
    assert tree.pairs < rows.pairs


def test_operations_per_token_are_six_per_trained_weight_and_four_per_frozen_one(root: Path) -> None:
    classifier = small_classifier()
    fit(classifier, small_data(root), limit_train_batches=1, limit_val_batches=0)
    network = classifier.network
    assert network is not None
    weights = weight_count(network.base_model) - weight_count(network.get_input_embeddings())
    assert Operations.of(network) == Operations(6 * weights, 12 * 2 * 16, 0)
    assert Operations.of(network, backward=False) == Operations(2 * weights, 4 * 2 * 16, 0)
    network.requires_grad_(False)
    network.get_input_embeddings().requires_grad_(True)  # so that gradients pass through the frozen layers
    assert Operations.of(network).count(tokens=10, pairs=3) == 4 * weights * 10 + 12 * 2 * 16 * 3


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_rates_are_logged_once_the_window_is_full(root: Path, tmp_path: Path, layout: str) -> None:
    logger = CSVLogger(tmp_path, "", "logs")
    data = small_data(root, layout=layout, token_budget=400)
    trainer = fit(small_classifier(), data, ThroughputLog(window=3), max_epochs=2, logger=logger, log_every_n_steps=1)
    logged = {name.removeprefix("throughput/") for name in trainer.callback_metrics if "throughput/" in name}
    assert logged == NAMES, "and no utilization, for a CPU's peak is not known"
    assert {f"throughput/{name}" for name in NAMES} <= set(trainer.progress_bar_metrics)
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        steps = [row["throughput/rows_per_second"] for row in csv.DictReader(file) if row["train/loss"]]
    assert [bool(value) for value in steps] == [False] * 2 + [True] * 10
    rates = {name: float(trainer.callback_metrics[f"throughput/{name}"]) for name in NAMES}
    assert all(rate > 0 for rate in rates.values())
    if layout == "tree":
        assert rates["effective_tokens_per_second"] > rates["tokens_per_second"]
    else:
        assert rates["effective_tokens_per_second"] <= rates["tokens_per_second"]


def test_weights_do_not_depend_on_the_callback(root: Path) -> None:
    plain, measured = small_classifier(), small_classifier()
    fit(plain, small_data(root))
    fit(measured, small_data(root), ThroughputLog(window=2))
    state = measured.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in plain.state_dict().items())


def test_devices_are_found_by_the_names_that_drivers_report() -> None:
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "h100": 989e12,
    }
    assert {name: device.peak for name in peaks if (device := find_device(name))} == peaks
    assert find_device("NVIDIA GeForce GTX 1080") is None


def test_peak_memory_of_a_process_never_falls() -> None:
    held = []
    found = []
    for _ in range(3):
        held.append(torch.ones(2**22))
        found.append(peak_memory(torch.device("cpu")))
    assert all(before <= after for before, after in pairwise(found))
    assert found[0] > 2**24
