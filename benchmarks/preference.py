"""Preference training on prefix trees beside TRL's DPOTrainer: pairs a second, tokens, memory.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/preference.py --root DIR

Each way runs in a process of its own, one after the other: the same backbone from scratch (about 30 million
parameters), the same token ids of the pairs of annotated rows, 16 pairs a step, DPO with beta 0.1, AdamW, float32. All
compute the log-probabilities of the reference before the first step, which is not timed. Pairs a second leave out the
first two steps. TRL's trainer is given 4 and 16 pairs at once.
"""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from tree_batches import (
    BACKBONE,
    WARM_UP_STEPS,
    Clock,
    Tokens,
    backbone_config,
    figures_of,
    in_a_process,
    show,
    timing_trainer,
)

from datamodules.batching.preference_rows import PreferenceDataModule
from datamodules.corpus.sources import Corpus
from datamodules.corpus.splits import Split
from models.learning.preference_agent import PreferenceAgent

PAIRS = 16  # a step


class AllRows(PreferenceDataModule):
    """All annotated rows of a root for training, and those of one scene to validate and test."""

    def divide(self, corpus: Corpus) -> Split:
        scene = [row for row in corpus.rows if row.scene == corpus.rows[0].scene]
        return Split(corpus.rows, scene, scene)


def _data(root: str, **options: Any) -> AllRows:
    return AllRows(root=root, max_length=1024, batch_size=PAIRS, **options)


def ours(scenes_per_step: int | None, root: str, steps: int) -> dict[str, float]:
    """Train some steps with this project."""
    data = _data(root, layout="tree", scenes_per_step=scenes_per_step)
    torch.manual_seed(0)
    model = PreferenceAgent(scratch=BACKBONE, sampled_answers=0)
    clock = Clock()
    counted: list[Tokens] = []
    begin_training = model.on_train_start

    def on_train_start() -> None:
        begin_training()
        assert model.network is not None
        counted.append(Tokens(model.network.base_model))

    model.on_train_start = on_train_start  # type: ignore[method-assign]
    trainer = timing_trainer(clock, max_steps=steps)
    trainer.fit(model, data)
    seconds = clock.ends[steps] - clock.ends[WARM_UP_STEPS]
    return figures_of((steps - WARM_UP_STEPS) * PAIRS / seconds, counted[0].count / (steps * PAIRS))


def trl(pairs_at_once: int, root: str, steps: int) -> dict[str, float]:
    """The same with TRL."""
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

    data = _data(root, layout="rows")
    data.setup("fit")
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(backbone_config(data))
    ends: list[float] = []
    counted: list[Tokens] = []

    class StepEnds(transformers.TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            counted.append(Tokens(network.base_model))

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

    encoded = data.encoded["train"]
    assert encoded.answers is not None

    def parts(row: int) -> tuple[list[int], list[int]]:
        ids, start = list(map(int, encoded.input_ids[row])), int(encoded.answers[row][0])  # type: ignore[index]
        return ids[:start], ids[start:]

    chosen = torch.randperm(len(data.groups("train").rows))[: steps * PAIRS]
    examples = [
        {"prompt_ids": parts(a)[0], "chosen_ids": parts(a)[1], "rejected_ids": parts(b)[1]}
        for a, b in data.groups("train").rows[chosen].tolist()
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Tokenized(
            network,
            args=DPOConfig(
                folder,
                use_cpu=True,
                bf16=False,
                max_steps=steps,
                per_device_train_batch_size=pairs_at_once,
                gradient_accumulation_steps=PAIRS // pairs_at_once,
                gradient_checkpointing=False,
                precompute_ref_log_probs=True,
                max_length=None,
                beta=0.1,
                optim="adamw_torch_fused",
                learning_rate=1e-3,
                dataloader_pin_memory=False,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=data.tokenizer,
            callbacks=[StepEnds()],
        )
        trainer.train()
    seconds = ends[-1] - ends[WARM_UP_STEPS - 1]
    return figures_of((steps - WARM_UP_STEPS) * PAIRS / seconds, counted[0].count / (steps * PAIRS))


WAYS = {
    "tree, 1 scene a step": "ours(1, {root!r}, {steps})",
    "tree, 4 scenes a step": "ours(4, {root!r}, {steps})",
    "TRL, 4 pairs at once": "trl(4, {root!r}, {steps})",
    "TRL, 16 pairs at once": "trl(16, {root!r}, {steps})",
}


def main(root: str, steps: int = 10, only: str = "") -> None:
    """Run every way and print the table.

    Args:
        root: A directory in the published layout.
        steps: Steps of each way; the first two are not timed.
        only: Only the ways whose name contains this.
    """
    found = {}
    for name, call in WAYS.items():
        if only in name:
            Console(stderr=True).print(f"{name} ...")
            found[name] = in_a_process(call.format(root=str(Path(root).resolve()), steps=steps), "preference")
    show(f"DPO, {torch.get_num_threads()} threads", "pair", "TRL", found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    auto_cli(main, as_positional=False)
