"""A bag of words: what counting words comes to, so that a model's figures can be seen beside it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from datamodules.corpus.records import Event

Scorer = Callable[[Sequence[str]], Tensor]


def marked_words(history: Sequence[Event], proposal: str | None = None) -> str:
    """Every word of a history and a proposal; those of the last event and of the proposal are told apart."""
    parts = {
        "history": " ".join(event.event for event in history),
        "last": history[-1].event if history else "",
        "offer": proposal or "nothing",
    }
    return " ".join(f"{name}_{word}" for name, text in parts.items() for word in text.lower().split())


def bag_of_words(texts: Sequence[str], labels: Sequence[bool]) -> Scorer:
    """Fit a logistic regression on TF-IDF weights of words.

    Args:
        texts: As `marked_words` gives them, at least one.
        labels: Whether each is of the positive class.

    Returns:
        What gives P(positive class) of texts, (N,) float64; the share of positive labels where all are alike.
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
