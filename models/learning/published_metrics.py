"""The metrics that ProactiveBench has published, for reports on the same rows or traces."""

import torch

from models.learning.metrics import confusion_metrics

# Reward models on the 120 rows of reward_data/test_data.jsonl, from the paper's table of reward model agreement (arXiv
# 2410.12361). The last row follows from the published model's confusion counts.
PUBLISHED_REWARD_ROWS: dict[str, dict[str, float]] = {
    "GPT-4o": {"f1": 0.6704, "accuracy": 0.5083},
    "GPT-4o-mini": {"f1": 0.6324, "accuracy": 0.5833},
    "Llama-3.1-8B": {"f1": 0.5846, "accuracy": 0.5500},
    "Llama-3.1-70B": {"f1": 0.6748, "accuracy": 0.5583},
    "published 8B reward model": {"f1": 0.9180, "accuracy": 0.9167, "precision": 0.9032, "recall": 0.9333},
}

# Agents on 227 events of the 12 test traces, judged by the published 8B reward model: true positives, false positives,
# true negatives, false negatives. The counts are derived from the row real_average of each file in eval/results of
# thunlp/ProactiveAgent (commit 50940be). Each row has exactly one solution.
_PUBLISHED_AGENT_COUNTS: dict[str, tuple[int, int, int, int]] = {
    "Qwen2-7B-Proactive": (111, 112, 4, 0),
    "LLaMA-3.1-8B-Proactive": (96, 115, 12, 4),
    "Qwen2-72B-Instruct": (95, 67, 50, 15),
    "Qwen2-7B-Instruct": (99, 128, 0, 0),
    "GPT-4o": (112, 114, 1, 0),
    "GPT-4o-mini": (78, 147, 2, 0),
    "GPT-3.5-Turbo": (90, 132, 3, 2),
    "Claude-3.5-Sonnet": (86, 119, 19, 3),
    "Claude-3-Sonnet": (67, 67, 54, 39),
    "LLaMA-3.1-8B": (80, 144, 2, 1),
    "LLaMA-3.1-70B": (61, 103, 38, 25),
    "LLaMA-3-8B": (62, 97, 38, 30),
    "LLaMA-3-70B": (61, 135, 19, 12),
    "DeepSeek-7B-Chat": (80, 108, 28, 11),
}

PUBLISHED_AGENT_ROWS: dict[str, dict[str, float]] = {
    name: dict(zip(("tp", "fp", "tn", "fn", "events"), (*counts, sum(counts)), strict=True))
    | {metric: float(value) for metric, value in confusion_metrics(torch.tensor(counts)).items()}
    for name, counts in _PUBLISHED_AGENT_COUNTS.items()
}
