"""Logistic regressions on a frozen backbone's states: what helps a small model on few scenes.

    python benchmarks/frozen_states.py --root DIR --backbone minilm
    python benchmarks/frozen_states.py --root DIR --backbone smollm2

The states are those that a classifier's head reads: of a decoder at the last token of each row, in prefix trees; of an
encoder the mean over the row's tokens. They are computed once, in bfloat16, and kept in the file --states if it is
given. For each fold of the scenes, logistic regressions are fitted on the training rows, and the validation rows choose
one of `SETTINGS` by AUROC. The test rows of all folds are pooled as `proactive.compare` does: AUROC compares rows of
the same fold, and intervals resample scenes. The bar is a bag of words of the same rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from datamodules.batching.bag_of_words import bag_of_words
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.splits import Split, split_by_scene
from models.learning.calibration import DECISION, calibrated, fit_temperature
from models.learning.pooling import DecidedRows, joined, metric_differences, outcomes, pooled_metrics
from models.networks.attention import BLOCKWISE, register
from models.networks.building import build_network
from models.networks.heads import reads_last_token
from models.networks.network_options import NetworkOptions
from models.networks.tree_reading import read_tree

FOLDS = 5
# Inverse strength of the regularisation, whether both classes weigh the same, and the number of principal components of
# the states, or None for the states themselves.
SETTINGS = list(product((1e-4, 1e-3, 1e-2, 1e-1), (False, True), (None, 32)))
Numbers = npt.NDArray[Any]
Scorer = Callable[[Numbers], Numbers]  # from row numbers to P(accepted)


@torch.no_grad()
def states_of(backbone: str, corpus: Corpus, max_length: int) -> Numbers:
    """The frozen states (N, D) of the rows of a root, in the order of its files."""
    data = RewardDataModule(
        root=corpus.root, tokenizer=backbone, format="plain", max_length=max_length, token_budget=4096, cache=False
    )
    data._split = Split(train=[], validation=corpus.rows, test=[])
    data.setup("validate")
    network = build_network(NetworkOptions("classifier", backbone), data.tokenizer).eval()
    is_decoder = reads_last_token(network)
    data.layout = "tree" if is_decoder else "rows"
    if is_decoder:
        register()
        network.set_attn_implementation(BLOCKWISE)
    states: dict[int, Tensor] = {}
    for (batch,) in track(list(data.evaluation_loader("validation")), f"states of {backbone}"):
        inputs = batch["inputs"]
        with torch.autocast("cpu", torch.bfloat16):
            found_RD = read_tree(network, inputs) if is_decoder else mean_state(network, inputs)
        states |= dict(zip(batch["row"].tolist(), found_RD.float(), strict=True))
    return torch.stack([states[number] for number in range(len(corpus.rows))]).numpy()


def mean_state(network: Any, inputs: Any) -> Tensor:
    """The mean of the hidden states (R, D) over the tokens of padded rows."""
    hidden_RTD = network.base_model(**inputs).last_hidden_state.float()
    weight_RT1 = inputs["attention_mask"].unsqueeze(-1)
    return (hidden_RTD * weight_RT1).sum(1) / weight_RT1.sum(1)


@dataclass(frozen=True)
class Rows:
    """The rows of a root as arrays: states (N, D), labels (N,), scenes (N,), and the words of each row."""

    states: Numbers
    labels: Numbers
    scenes: Numbers
    words: Sequence[str]

    def regression(self, setting: tuple[float, bool, int | None], train: Numbers) -> Scorer:
        """A logistic regression on states."""
        strength, balanced, components = setting
        parts = [StandardScaler()] + ([PCA(components, random_state=0)] if components else [])
        model = LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=1000)
        fitted = make_pipeline(*parts, model).fit(self.states[train], self.labels[train])
        return lambda rows: fitted.predict_proba(self.states[rows])[:, 1]

    def bag(self, train: Numbers) -> Scorer:
        """The bag of words."""
        score = bag_of_words([self.words[row] for row in train], self.labels[train].astype(bool).tolist())
        return lambda rows: score([self.words[row] for row in rows]).numpy()

    def auroc(self, score: Scorer, rows: Numbers) -> float:
        return float(roc_auc_score(self.labels[rows], score(rows)))


def log_odds(probability: Numbers) -> Numbers:
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def mean_score(*scores: Scorer) -> Scorer:
    """The mean of several scorers' log-odds, as a probability."""
    return lambda rows: 1 / (1 + np.exp(-np.mean([log_odds(score(rows)) for score in scores], axis=0)))


def of_fold(rows: Rows, folds: Sequence[Numbers], fold: int) -> dict[str, tuple[Scorer, Numbers | None]]:
    """The scorers of a fold, each with its validation rows; the next fold validates, as in by_scene.

    The mean of models that were validated on different folds has no validation rows: each is trained on the others'.
    """
    others = [part for number, part in enumerate(folds) if number != fold]
    validation = folds[(fold + 1) % len(folds)]
    train = np.concatenate([part for part in others if part is not validation])

    def chosen(settings: Sequence[Any], train: Numbers, validation: Numbers) -> Scorer:
        return max((rows.regression(s, train) for s in settings), key=lambda score: rows.auroc(score, validation))

    def choices(test: Callable[[tuple[float, bool, int | None]], bool]) -> list[Any]:
        return [setting for setting in SETTINGS if test(setting)]

    bag = rows.bag(train)
    best = chosen(SETTINGS, train, validation)
    each = [chosen(SETTINGS, np.concatenate([o for o in others if o is not part]), part) for part in others]
    found = {
        "bag of words": bag,
        "states, weak regularisation (C 0.1)": chosen([(1e-1, False, None)], train, validation),
        "states, C chosen": chosen(choices(lambda s: not s[1] and s[2] is None), train, validation),
        "states, C chosen, class weights": chosen(choices(lambda s: s[1] and s[2] is None), train, validation),
        "states, C chosen, 32 components": chosen(choices(lambda s: not s[1] and s[2] == 32), train, validation),
        "states, all of it chosen": best,
        "states and bag of words": mean_score(best, bag),
    }
    averaged = {"four of these, validated on different folds": (mean_score(*each), None)}
    return {name: (score, validation) for name, score in found.items()} | averaged


def decided(rows: Rows, tested: Numbers, scores: Numbers) -> DecidedRows:
    """The decisions on the test rows of a fold."""
    score_N, positive_N = torch.tensor(scores), torch.tensor(rows.labels[tested], dtype=torch.bool)
    return DecidedRows(
        tuple(map(str, tested)),
        tuple(rows.scenes[tested]),
        outcomes(score_N > DECISION, positive_N),
        score_N,
        positive_N,
        torch.zeros(len(tested), dtype=torch.int64),
    )


def main(
    root: str = "embedded", backbone: str = "minilm", max_length: int = 512, states: Path | None = None, seed: int = 0
) -> None:
    """Print a table of the pooled test rows.

    Args:
        root: A folder in the published layout, or embedded.
        backbone: As in model.backbone.
        max_length: As in data.max_length.
        states: A .npy file that keeps the states for the next call.
        seed: Of the folds.
    """
    corpus = load_corpus(root, seed)
    if states is not None and states.exists():
        states_ND = np.load(states)
    else:
        states_ND = states_of(backbone, corpus, max_length)
        if states is not None:
            np.save(states, states_ND)
    data = RewardDataModule(root=root)
    words, labels = zip(*data.decisions(corpus.rows), strict=True)
    rows = Rows(states_ND, np.array(labels, int), np.array([row.scene for row in corpus.rows]), words)
    number_of = {id(row): number for number, row in enumerate(corpus.rows)}
    splits = (split_by_scene(corpus, FOLDS, fold, seed) for fold in range(FOLDS))
    folds = [np.array([number_of[id(row)] for row in split.test]) for split in splits]

    validated: dict[str, list[float]] = {}
    tested: dict[str, list[DecidedRows]] = {}
    losses: dict[str, list[tuple[float, float]]] = {}
    for fold, test in enumerate(folds):
        for name, (score, validation) in of_fold(rows, folds, fold).items():
            temperature = 1.0
            if validation is not None:
                validated.setdefault(name, []).append(rows.auroc(score, validation))
                temperature = fit_temperature(*map(torch.tensor, (score(validation), rows.labels[validation])))
            raw = score(test)
            given = calibrated(torch.tensor(raw), temperature).numpy()
            tested.setdefault(name, []).append(decided(rows, test, given))
            weight = len(test) / len(rows.labels)
            losses.setdefault(name, []).append(
                (weight * log_loss(rows.labels[test], raw), weight * log_loss(rows.labels[test], given))
            )
    title = f"{backbone}: {len(rows.labels)} test rows of {len(set(rows.scenes))} scenes in {FOLDS} folds"
    show(title, validated, {name: joined(parts) for name, parts in tested.items()}, losses)


def show(
    title: str,
    validated: dict[str, list[float]],
    tested: dict[str, DecidedRows],
    losses: dict[str, list[tuple[float, float]]],
) -> None:
    """Print the table; `losses` has the raw and the calibrated log loss of each fold, weighted by its rows."""
    table = Table(title=title)
    for column in (
        "",
        "validation AUROC",
        "AUROC (95%)",
        "minus bag of words (95%)",
        "accuracy",
        "F1",
        "log loss raw, cal.",
    ):
        table.add_column(column)
    for name, decisions in tested.items():
        found = pooled_metrics([decisions])
        difference = metric_differences([decisions], [tested["bag of words"]])["auroc"]
        before, after = map(sum, zip(*losses[name], strict=True))
        table.add_row(
            name,
            f"{np.mean(validated[name]):.3f}" if name in validated else "",
            f"{found['auroc'].value:.3f} ({found['auroc'].low:.3f} to {found['auroc'].high:.3f})",
            f"{difference.value:+.3f} ({difference.low:.3f} to {difference.high:.3f})",
            f"{found['accuracy'].value:.3f}",
            f"{found['f1'].value:.3f}",
            f"{before:.3f}, {after:.3f}",
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    auto_cli(main)
