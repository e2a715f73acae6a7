"""What mixing costs: F1 and loss on held-out scenes, by the number of scenes that a step takes its rows from.

    python benchmarks/scenes_per_step.py --root embedded
    python benchmarks/scenes_per_step.py --root DIR

A small decoder from scratch (hidden size 96, 4 layers), 32 rows a step; every fold of the by_scene split
that is asked for, with every seed. The best epoch by validation AUROC is tested, as `python -m proactive.fit` does.
Runs share nothing and go on side by side, each with one thread. Prints the mean over folds and seeds, and the
standard error of the difference from 4 scenes, fold by fold and seed by seed.
"""

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from jsonargparse import auto_cli
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import track
from rich.table import Table

from datamodules.batching.reward_rows import RewardDataModule
from models.learning.reward_classifier import RewardClassifier

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
REFERENCE = "4"
Run = tuple[str, str, int, int, int]  # root, scenes a step, fold, seed, epochs


def fit(run: Run) -> dict[str, float]:
    """Train once; figures of the test rows, seconds and tokens of training."""
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    root, scenes, fold, seed, epochs = run
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    data = RewardDataModule(
        root=root, fold=fold, scenes_per_step=None if scenes == "all" else int(scenes), layout="tree"
    )
    data.order_seed = seed
    model = RewardClassifier(scratch=BACKBONE, learning_rate=2e-3)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="validation/auroc", mode="max")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[best],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        begin = time.process_time()
        trainer.fit(model, data)
        seconds = time.process_time() - begin
        trainer.test(model, data, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    rows = model.test_rows
    loss = torch.nn.functional.binary_cross_entropy(rows["probability"], rows["target"].double())
    figures = model.test_metrics["calibrated"]
    return {"F1": figures["f1"], "AUROC": figures["auroc"], "loss": float(loss), "CPU seconds": seconds}


def main(
    root: str,
    scenes: list[str] = ["1", "2", "4", "8", "all"],  # noqa: B006
    folds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    epochs: int = 5,
) -> None:
    """Train with each number of scenes, fold and seed, and print the table.

    Args:
        root: embedded, published, or a directory in the published layout.
        scenes: Numbers of scenes a step, and all.
        folds: Folds of five.
        seeds: Seeds of weights and order.
        epochs: Epochs of each run.
    """
    runs: list[Run] = [(root, number, fold, seed, epochs) for fold in folds for seed in seeds for number in scenes]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(track(pool.map(fit, runs), total=len(runs), console=Console(stderr=True)))
    found = dict(zip(runs, results, strict=True))
    table = Table(title=f"{root}: {len(folds)} folds, {len(seeds)} seeds; difference from 4 scenes ± standard error")
    table.add_column("scenes a step")
    for name in results[0]:
        table.add_column(name, justify="right")
    for number in scenes:
        cells = []
        for name in results[0]:
            values = [found[root, number, fold, seed, epochs][name] for fold in folds for seed in seeds]
            cell = f"{statistics.mean(values):.3f}"
            if number != REFERENCE and REFERENCE in scenes and name != "CPU seconds":
                others = [found[root, REFERENCE, fold, seed, epochs][name] for fold in folds for seed in seeds]
                differences = [value - other for value, other in zip(values, others, strict=True)]
                error = statistics.stdev(differences) / len(differences) ** 0.5
                cell += f" ({statistics.mean(differences):+.3f} ± {error:.3f})"
            cells.append(cell)
        table.add_row(number, *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
