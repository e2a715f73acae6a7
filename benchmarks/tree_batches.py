"""Prefix-tree batches against rows and against the Hugging Face Trainer: rows a second, tokens, memory.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/tree_batches.py --root DIR

Each way runs in a process of its own, one after the other: the same backbone from scratch (about 30 million
parameters, 4,096 of them tokens of a BPE vocabulary trained on the rows), the same rows of whole scenes, AdamW,
32 rows a step, float32. Rows a second leave out the first two steps. The Trainer pads dynamically and groups by
length, with 8 rows at once and with 32; scoring takes the 8, which are faster.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn

from datamodules.batching.layout_name import LayoutName
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.rows import RowsDataModule
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import Corpus
from datamodules.corpus.splits import Split
from models.learning.reward_classifier import RewardClassifier

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
WARM_UP_STEPS = 2
Task = Literal["train", "score"]


class WholeScenes(RewardDataModule):
    """All rows of a root for scoring; for training those of as many whole scenes as make up some rows."""

    def __init__(self, rows: int, **options: Any) -> None:
        super().__init__(split="published", **options)
        self.train_rows = rows

    def divide(self, corpus: Corpus) -> Split:
        by_scene: dict[str, list[AnnotatedRow]] = {}
        for row in corpus.train:
            by_scene.setdefault(row.scene, []).append(row)
        chosen: list[AnnotatedRow] = []
        for scene in by_scene.values():
            if len(chosen) < self.train_rows:
                chosen += scene
        return Split(chosen, [], corpus.rows)


class Clock(Callback):
    """When each step of training ended; when a test began and ended."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def _note(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    on_train_batch_end = on_test_start = on_test_end = _note


class Tokens:
    """How many tokens a backbone is given, padding included."""

    def __init__(self, network: nn.Module) -> None:
        self.count = 0
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        self.count += (arguments[0] if arguments else options["input_ids"]).numel()


def timing_trainer(clock: Clock, **length: int) -> Trainer:
    """A trainer that does nothing beside training; `length` is its max_epochs or max_steps."""
    return Trainer(
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **length,  # type: ignore[arg-type]
    )


def ours(task: Task, layout: LayoutName, scenes_per_step: int | None, root: str, rows: int) -> dict[str, float]:
    """Train an epoch, or score every row, with this project."""
    data = WholeScenes(rows, root=root, layout=layout, scenes_per_step=scenes_per_step, max_length=1024)
    model = RewardClassifier(scratch=BACKBONE)
    clock = Clock()
    trainer = timing_trainer(clock, max_epochs=1)
    counted: list[Tokens] = []
    make = model.configure_model

    def configure_model() -> None:
        make()
        assert model.network is not None
        if not counted:
            counted.append(Tokens(model.network.base_model))

    model.configure_model = configure_model  # type: ignore[method-assign]
    if task == "train":
        trainer.fit(model, data)
        seconds = clock.ends[-1] - clock.ends[WARM_UP_STEPS]
        done = len(data.split.train) - WARM_UP_STEPS * data.batch_size
        return figures_of(done / seconds, counted[0].count / len(data.split.train))
    trainer.test(model, data, verbose=False)
    total = len(data.split.test)
    return figures_of(total / (clock.ends[-1] - clock.ends[-2]), counted[0].count / total)


def backbone_config(data: RowsDataModule, **more: int) -> Any:
    """The configuration of the backbone with the tokens of some data."""
    import transformers

    tokens = {"vocab_size": len(data.tokenizer), "pad_token_id": data.tokenizer.pad_token_id}
    return transformers.AutoConfig.for_model(**BACKBONE, **tokens, **more)


def hugging_face(task: Task, rows_at_once: int, root: str, rows: int) -> dict[str, float]:
    """The same with the Trainer of transformers."""
    import transformers

    data = WholeScenes(rows, root=root, layout="rows", max_length=1024)
    data.setup("fit")
    torch.manual_seed(0)
    network = transformers.AutoModelForSequenceClassification.from_config(backbone_config(data, num_labels=2))
    tokens = Tokens(network.base_model)
    ends: list[float] = []

    class StepEnds(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            network,
            transformers.TrainingArguments(
                folder,
                use_cpu=True,
                num_train_epochs=1,
                per_device_train_batch_size=rows_at_once,
                gradient_accumulation_steps=32 // rows_at_once,
                per_device_eval_batch_size=rows_at_once,
                # Scoring takes rows as they come, which is sorted by length.
                train_sampling_strategy="group_by_length" if task == "train" else "sequential",
                optim="adamw_torch_fused",
                learning_rate=1e-3,
                dataloader_pin_memory=False,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
            ),
            train_dataset=list(_examples(data, "train")),
            data_collator=transformers.DataCollatorWithPadding(data.tokenizer),
            callbacks=[StepEnds()],
        )
        if task == "train":
            trainer.train()
            total = len(data.split.train)
            done = total - WARM_UP_STEPS * 32
            return figures_of(done / (ends[-1] - ends[WARM_UP_STEPS - 1]), tokens.count / total)
        examples = sorted(_examples(data, "test"), key=lambda example: len(example["input_ids"]))  # pads least
        begin = time.perf_counter()
        trainer.predict(examples)
        return figures_of(len(examples) / (time.perf_counter() - begin), tokens.count / len(examples))


def _examples(data: RewardDataModule, stage: Literal["train", "test"]) -> Iterator[dict[str, Any]]:
    for row, ids in zip(getattr(data.split, stage), data.encoded[stage].input_ids, strict=True):
        yield {"input_ids": list(map(int, ids)), "labels": int(row.accepted)}


def figures_of(rate: float, tokens: float) -> dict[str, float]:
    """Rows (or pairs) a second, tokens of each, and the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"rate": rate, "tokens": tokens, "peak_gib": peak}


WAYS: dict[Task, dict[str, str]] = {
    "train": {
        "tree, 1 scene a step": "ours('train', 'tree', 1, {root!r}, {rows})",
        "tree, 4 scenes a step": "ours('train', 'tree', 4, {root!r}, {rows})",
        "rows, padded, by length": "ours('train', 'rows', None, {root!r}, {rows})",
        "Trainer, 8 rows at once": "hugging_face('train', 8, {root!r}, {rows})",
        "Trainer, 32 rows at once": "hugging_face('train', 32, {root!r}, {rows})",
    },
    "score": {
        "tree": "ours('score', 'tree', 1, {root!r}, {rows})",
        "Trainer, 8 rows at once": "hugging_face('score', 8, {root!r}, {rows})",
    },
}


def main(root: str, rows: int = 320, tasks: list[Task] = ["train", "score"], only: str = "") -> None:  # noqa: B006
    """Run every way and print the tables.

    Args:
        root: A directory in the published layout.
        rows: Rows to train on, rounded up to whole scenes.
        tasks: What to do: train and score.
        only: Only the ways whose name contains this.
    """
    for task in tasks:
        found = {}
        for name, call in WAYS[task].items():
            if only in name:
                Console(stderr=True).print(f"{task}: {name} ...")
                found[name] = in_a_process(call.format(root=str(Path(root).resolve()), rows=rows))
        show(f"{task}, {torch.get_num_threads()} threads", "row", "Trainer", found)


def show(title: str, unit: str, peer: str, found: dict[str, dict[str, float]]) -> None:
    """Print the figures of each way, beside the fastest of those whose name starts with `peer`."""
    peers = [figures["rate"] for name, figures in found.items() if name.startswith(peer)]
    table = Table(title=title)
    for column in ("way", f"{unit}s/s", f"over the faster {peer}", f"tokens a {unit}", "peak memory, GiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, figures in found.items():
        ratio = f"{figures['rate'] / max(peers):.2f}" if peers else ""
        numbers = (f"{figures['rate']:.2f}", ratio, f"{figures['tokens']:.1f}", f"{figures['peak_gib']:.2f}")
        table.add_row(name, *numbers)
    Console(width=120).print(table)


def in_a_process(call: str, module: str = "tree_batches") -> dict[str, Any]:
    """What a call in a benchmark returns, made in a process of its own."""
    code = f"import {module}, json; print(json.dumps({module}.{call}))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=None,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    auto_cli(main, as_positional=False)
