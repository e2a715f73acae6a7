"""Logistic regressions on a frozen backbone's states: what helps a small model on few scenes.

    python benchmarks/frozen_states.py --root DIR --backbone minilm
    python benchmarks/frozen_states.py --root DIR --backbone smollm2 --max_length 1024

The states are those that a classifier's head reads: of a decoder at the last token of each row, in prefix trees; of an
encoder the mean over the row's tokens. They are taken after each quarter of the layers. For each fold of the scenes,
logistic regressions are fitted on the training rows, and the validation rows choose one of `SETTINGS` by AUROC. The
rows of another root, --more, are added to the training rows of some. The test rows of all folds are pooled as
`proactive.compare` does: AUROC compares rows of the same fold, and intervals resample scenes. The bar is a bag of words
of the same rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
from models.networks.sharding import blocks
from models.networks.tree_reading import read_tree

FOLDS = 5
QUARTERS = 4
BAG_OF_WORDS = "bag of words"
# Inverse strength of the regularisation, whether both classes weigh the same, the number of principal components of the
# states, or None for the states themselves, and the quarter of the layers that they are taken after.
Setting = tuple[float, bool, int | None, int]
SETTINGS: list[Setting] = list(product((1e-4, 1e-3, 1e-2, 1e-1), (False, True), (None, 32), range(1, QUARTERS + 1)))
Numbers = npt.NDArray[Any]
Scorer = Callable[[Numbers], Numbers]  # from row numbers to P(accepted)
Validated = tuple[Scorer, float]  # with its AUROC on validation rows


@torch.no_grad()
def states_of(backbone: str, corpus: Corpus, max_length: int) -> Numbers:
    """The frozen states (Q, N, D) of a root's rows, in the order of its files, after each quarter of the layers."""
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
    layers = blocks(network.base_model)
    kept: list[Tensor] = []
    for quarter in range(1, QUARTERS):
        layers[quarter * len(layers) // QUARTERS - 1].register_forward_hook(lambda *call: kept.append(hidden(call[-1])))
    states: dict[int, Tensor] = {}
    for (batch,) in track(list(data.evaluation_loader("validation")), f"states of {backbone}"):
        inputs = batch["inputs"]
        kept.clear()
        if is_decoder:
            last_RD = read_tree(network, inputs)
            found = [*(state_1TD[0, inputs["read_out"]] for state_1TD in kept), last_RD]
        else:
            last_RTD = network.base_model(**inputs).last_hidden_state
            found = [mean_state(state_RTD, inputs["attention_mask"]) for state_RTD in (*kept, last_RTD)]
        states |= dict(zip(batch["row"].tolist(), torch.stack(found, 1), strict=True))
    return torch.stack([states[number] for number in range(len(corpus.rows))], 1).numpy()


def hidden(output: Any) -> Tensor:
    """The hidden states among the outputs of a layer."""
    return output if isinstance(output, Tensor) else output[0]


def mean_state(hidden_RTD: Tensor, attention_mask_RT: Tensor) -> Tensor:
    """The mean of the hidden states (R, D) over the tokens of padded rows."""
    weight_RT1 = attention_mask_RT.unsqueeze(-1)
    return (hidden_RTD * weight_RT1).sum(1) / weight_RT1.sum(1)


@dataclass(frozen=True)
class Rows:
    """Rows as arrays: states (Q, N, D) after each quarter, labels (N,), scenes (N,), and the words of each row."""

    states: Numbers
    labels: Numbers
    scenes: Numbers
    words: Sequence[str]

    def regression(self, setting: Setting, train: Numbers) -> Scorer:
        """A logistic regression on states."""
        strength, balanced, components, quarter = setting
        states_ND = self.states[quarter - 1]
        parts = [StandardScaler()] + ([PCA(components, random_state=0)] if components else [])
        model = LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=1000)
        fitted = make_pipeline(*parts, model).fit(states_ND[train], self.labels[train])
        return lambda rows: fitted.predict_proba(states_ND[rows])[:, 1]

    def regressions(self, settings: Sequence[Setting], train: Numbers, validation: Numbers) -> dict[Setting, Validated]:
        """The regression with each setting, and its AUROC on validation rows."""
        scores = {setting: self.regression(setting, train) for setting in settings}
        return {setting: (score, self.auroc(score, validation)) for setting, score in scores.items()}

    def bag(self, train: Numbers) -> Scorer:
        """The bag of words."""
        score = bag_of_words([self.words[row] for row in train], self.labels[train].astype(bool).tolist())
        return lambda rows: score([self.words[row] for row in rows]).numpy()

    def with_rows(self, more: "Rows") -> "Rows":
        """These rows, then those of another root."""
        return Rows(
            np.concatenate([self.states, more.states], 1),
            np.concatenate([self.labels, more.labels]),
            np.concatenate([self.scenes, more.scenes]),
            [*self.words, *more.words],
        )

    def auroc(self, score: Scorer, rows: Numbers) -> float:
        return float(roc_auc_score(self.labels[rows], score(rows)))


def best(found: Mapping[Setting, Validated]) -> Scorer:
    """The scorer with the greatest AUROC on validation rows, the first of equal ones."""
    return max(found.values(), key=lambda one: one[1])[0]


def log_odds(probability: Numbers) -> Numbers:
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def mean_score(*scores: Scorer) -> Scorer:
    """The mean of several scorers' log-odds, as a probability."""
    return lambda rows: 1 / (1 + np.exp(-np.mean([log_odds(score(rows)) for score in scores], axis=0)))


def of_fold(rows: Rows, folds: Sequence[Numbers], fold: int, more: Numbers) -> dict[str, tuple[Scorer, Numbers | None]]:
    """The scorers of a fold, each with its validation rows; the next fold validates, as in by_scene.

    The mean of models that were validated on different folds has no validation rows: each is trained on the others'.
    `more` are rows that some scorers are trained on too.
    """
    others = [part for number, part in enumerate(folds) if number != fold]
    validation = folds[(fold + 1) % len(folds)]
    train = np.concatenate([part for part in others if part is not validation])

    of_last = [setting for setting in SETTINGS if setting[3] == QUARTERS]
    fitted = rows.regressions(SETTINGS, train, validation)

    def chosen(test: Callable[[Setting], bool]) -> Scorer:
        return best({setting: found for setting, found in fitted.items() if test(setting)})

    bag = rows.bag(train)
    last, of_any_layer = chosen(lambda s: s in of_last), best(fitted)
    found = {
        BAG_OF_WORDS: bag,
        "states, C 0.1": chosen(lambda s: s == (1e-1, False, None, QUARTERS)),
        "states, C chosen": chosen(lambda s: s[1:] == (False, None, QUARTERS)),
        "states, C chosen, class weights": chosen(lambda s: s[1:] == (True, None, QUARTERS)),
        "states, C chosen, 32 components": chosen(lambda s: s[1:] == (False, 32, QUARTERS)),
        "states, all chosen": last,
    }
    for quarter in range(1, QUARTERS):
        found[f"states after {quarter}/{QUARTERS} of the layers, all chosen"] = chosen(lambda s, q=quarter: s[3] == q)  # type: ignore[misc]
    found |= {
        "states, all and the layer chosen": of_any_layer,
        "mean of states, all chosen, and bag of words": mean_score(last, bag),
        "mean of states, all and the layer chosen, and bag of words": mean_score(of_any_layer, bag),
    }
    if len(more):
        both = np.concatenate([train, more])
        found["bag of words, more rows"] = rows.bag(both)
        found["states, all chosen, more rows"] = best(rows.regressions(of_last, both, validation))
    rest = [np.concatenate([other for other in others if other is not part]) for part in others]
    each = [best(rows.regressions(of_last, *parts)) for parts in zip(rest, others, strict=True)]
    scorers: dict[str, tuple[Scorer, Numbers | None]] = {name: (score, validation) for name, score in found.items()}
    scorers["mean of four of these, each validated on another fold"] = mean_score(*each), None
    return scorers


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


def read_rows(corpus: Corpus, backbone: str, max_length: int) -> Rows:
    """The rows of a root, and their states."""
    data = RewardDataModule(root=corpus.root)
    words, labels = zip(*data.decisions(corpus.rows), strict=True)
    scenes = np.array([row.scene for row in corpus.rows])
    return Rows(states_of(backbone, corpus, max_length), np.array(labels, int), scenes, words)


def main(
    root: str = "embedded", backbone: str = "minilm", max_length: int = 512, more: str | None = None, seed: int = 0
) -> None:
    """Print a table of the pooled test rows.

    Args:
        root: A folder in the published layout, or embedded.
        backbone: As in model.backbone.
        max_length: As in data.max_length.
        more: Another root, whose rows are trained on too.
        seed: Of the folds and of embedded rows.
    """
    corpus = load_corpus(root, seed)
    rows = read_rows(corpus, backbone, max_length)
    number_of = {id(row): number for number, row in enumerate(corpus.rows)}
    splits = (split_by_scene(corpus, FOLDS, fold, seed) for fold in range(FOLDS))
    folds = [np.array([number_of[id(row)] for row in split.test]) for split in splits]
    tested_rows = np.concatenate(folds)
    if more is not None:
        rows = rows.with_rows(read_rows(load_corpus(more, seed), backbone, max_length))
    added = np.arange(len(tested_rows), len(rows.labels))

    validated: dict[str, list[float]] = {}
    tested: dict[str, list[DecidedRows]] = {}
    losses: dict[str, list[tuple[float, float]]] = {}
    for fold, test in enumerate(folds):
        for name, (score, validation) in of_fold(rows, folds, fold, added).items():
            temperature = 1.0
            if validation is not None:
                validated.setdefault(name, []).append(rows.auroc(score, validation))
                temperature = fit_temperature(*map(torch.tensor, (score(validation), rows.labels[validation])))
            raw = score(test)
            given = calibrated(torch.tensor(raw), temperature).numpy()
            tested.setdefault(name, []).append(decided(rows, test, given))
            weight = len(test) / len(tested_rows)
            losses.setdefault(name, []).append(
                (weight * log_loss(rows.labels[test], raw), weight * log_loss(rows.labels[test], given))
            )
    title = f"{backbone}: {len(tested_rows)} test rows of {len(set(rows.scenes[tested_rows]))} scenes in {FOLDS} folds"
    if more is not None:
        title += f"; {len(added)} more rows of {more}"
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
        difference = metric_differences([decisions], [tested[BAG_OF_WORDS]])["auroc"]
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
