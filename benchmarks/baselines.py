"""What a split gives away to judges that do not read: the majority class, and a bag of words.

    python benchmarks/baselines.py [--root DIR] [--split by_scene] [--folds 5] [--fold 0]

Prints the figures on the split's test rows, as `python -m proactive.fit` gives them for a trained classifier on
the same rows; the bag of words has its threshold fitted on the validation rows as well.
"""

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from datamodules.records import AnnotatedRow
from datamodules.reward import RewardDataModule
from datamodules.splits import SplitName
from models.calibration import fit_threshold
from models.metrics import reward_figures

SHOWN = ("accuracy", "precision", "recall", "f1", "auroc", "calibration_error")


def words(row: AnnotatedRow) -> str:
    """Every word of a row; those of the last event and of the proposal are told apart from those of the history."""
    parts = {
        "history": " ".join(event.event for event in row.history),
        "last": row.history[-1].event if row.history else "",
        "offer": row.proposal or "nothing",
    }
    return " ".join(f"{name}_{word}" for name, text in parts.items() for word in text.lower().split())


def baselines(root: str = "embedded", split: SplitName = "by_scene", folds: int = 5, fold: int = 0) -> None:
    """Print the figures of both baselines.

    Args:
        root: Where the data is: embedded, published, or a directory in the published layout.
        split: Which rows test: published or by_scene.
        folds: For by_scene: into how many parts the scenes are divided.
        fold: For by_scene: which part tests.
    """
    data = RewardDataModule(root=root, split=split, folds=folds, fold=fold)
    data.setup("test")
    parts = (data.split.train, data.split.validation, data.split.test)
    train, validation, test = parts
    target = [torch.tensor([int(row.accepted) for row in rows]) for rows in parts]
    category = torch.tensor([row.category.number for row in test])

    vectorizer = TfidfVectorizer(token_pattern=r"\S+", sublinear_tf=True)
    model = LogisticRegression(max_iter=2000, C=10.0)
    model.fit(vectorizer.fit_transform(map(words, train)), target[0].numpy())

    def probability(rows: list[AnnotatedRow]) -> torch.Tensor:
        return torch.from_numpy(model.predict_proba(vectorizer.transform(map(words, rows)))[:, 1])

    majority = float(np.round(target[0].double().mean()))
    judges = {
        f"majority class ({'accepted' if majority else 'rejected'})": (torch.full((len(test),), majority), 0.5),
        "every proposal accepted": (torch.ones(len(test)), 0.5),
        "bag of words, raw": (probability(test), 0.5),
        "bag of words, fitted threshold": (
            probability(test),
            fit_threshold(probability(validation), target[1]),
        ),
    }
    table = Table(title=f"{data.description}: {len(test)} test rows; {data.contamination}")
    table.add_column("judge")
    for name in SHOWN:
        table.add_column(name.replace("_", " "), justify="right")
    for judge, (score, threshold) in judges.items():
        figures = reward_figures(score.double(), target[2], category, threshold)
        table.add_row(judge, *(f"{float(figures[name]):.4f}" for name in SHOWN))
    Console(width=140).print(table)


if __name__ == "__main__":
    auto_cli(baselines)
