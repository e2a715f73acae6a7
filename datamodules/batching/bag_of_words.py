"""A bag-of-words classifier: a baseline for the metrics of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.corpus.records import Event

Decision = tuple[str, bool]  # the words that a decision is based on, see `marked_words`, and the correct decision
Scorer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class WordScores:
    """Scores of a bag of words that was fitted on the training rows.

    Attributes:
        majority: The more frequent class of the training rows.
        validation: (N,) float64, P(positive class) of the validation rows.
        validation_target: (N,) int64, 1 for the positive class.
        test: (N,) float64, P(positive class) of the test rows.
    """

    majority: bool
    validation: Tensor
    validation_target: Tensor
    test: Tensor


def word_scores(
    train: Sequence[Decision], validation: Sequence[Decision], test: Sequence[Decision]
) -> WordScores | None:
    """Fit a bag of words on training rows and score the others; None if there are no training rows."""
    if not train:
        return None
    texts, labels = zip(*train, strict=True)
    score = bag_of_words(texts, labels)
    return WordScores(
        majority=sum(labels) * 2 > len(labels),
        validation=score([text for text, _ in validation]),
        validation_target=torch.tensor([int(label) for _, label in validation], dtype=torch.int64),
        test=score([text for text, _ in test]),
    )


def marked_words(history: Sequence[Event], proposal: str | None = None) -> str:
    """All words of a history and a proposal, each with a prefix: history_, last_ (of the last event) or offer_."""
    parts = {
        "history": " ".join(event.event for event in history),
        "last": history[-1].event if history else "",
        "offer": proposal or "nothing",
    }
    return " ".join(f"{name}_{word}" for name, text in parts.items() for word in text.lower().split())


def bag_of_words(texts: Sequence[str], labels: Sequence[bool]) -> Scorer:
    """Fit a logistic regression on TF-IDF weights of words.

    Args:
        texts: Texts from `marked_words`, at least one.
        labels: Whether each text belongs to the positive class.

    Returns:
        A function that maps texts to P(positive class), (N,) float64. If all labels are equal, it returns their value.
    """
    if len(set(labels)) < 2:
        return lambda scored: torch.full((len(scored),), float(labels[0]), dtype=torch.float64)
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(token_pattern=r"\S+", sublinear_tf=True)  # noqa: S106 - no password
    model = LogisticRegression(max_iter=2000, C=10.0)
    model.fit(vectorizer.fit_transform(texts), list(map(int, labels)))

    def score(scored: Sequence[str]) -> Tensor:
        if not scored:
            return torch.zeros(0, dtype=torch.float64)
        return torch.from_numpy(model.predict_proba(vectorizer.transform(scored))[:, 1]).double()

    return score
