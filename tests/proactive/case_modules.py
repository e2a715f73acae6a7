"""The module names that the scripts of the cases import: they were written for an earlier layout of the modules."""

from types import ModuleType
from typing import Any

from datamodules.batching.answer_rows import AgentDataModule
from datamodules.batching.layouts import TreeLayout
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus.answers import read_answer
from datamodules.corpus.conversations import Conversation
from datamodules.corpus.json_records import read_jsonl, validate
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.traces import Pair
from datamodules.prompting.chat_prompts import read_verdict
from datamodules.prompting.conversation_tokenizer import ConversationTokenizer
from datamodules.prompting.templates import render
from datamodules.prompting.tokenizers import load_tokenizer
from models.judging.scorer import Scorer
from models.judging.weights import Weights
from models.learning.checkpoint_files import load_trained
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.networks.adapters import AdapterOptions, add_adapter
from models.networks.building import build_network
from models.networks.heads import classify
from models.networks.network_options import Head, NetworkOptions
from models.networks.tree_reading import choose_attention, tree_problem


class _AgentDataModule(AgentDataModule):
    @property
    def _encoded(self) -> Any:
        return self.encoded


def _build_network(head: Head, backbone: str, tokenizer: Any) -> Any:
    return build_network(NetworkOptions(head, backbone), tokenizer)


def _load_trained(kind: type[Any], *arguments: Any) -> Any:
    return load_trained((kind,), *arguments)


def _weights(model: Any, state: Any, source: str, digest: str) -> Weights[Any]:
    return Weights(model, state, source)


def _score(weights: Weights[Any], rows: list[AnnotatedRow]) -> tuple[list[float], int]:
    scorer = Scorer(weights)
    return scorer.score([Pair(row.history, row.proposal) for row in rows]), scorer.truncated


NAMES: dict[str, dict[str, Any]] = {
    "callbacks.checkpoints": {"load_trained": _load_trained},
    "datamodules.agent": {"AgentDataModule": _AgentDataModule},
    "datamodules.answers": {"read_answer": read_answer},
    "datamodules.batches": {"TreeLayout": TreeLayout},
    "datamodules.chat": {"read_verdict": read_verdict},
    "datamodules.conversations": {"Conversation": Conversation, "ConversationTokenizer": ConversationTokenizer},
    "datamodules.prompts": {"render": render},
    "datamodules.records": {"AnnotatedRow": AnnotatedRow, "read_jsonl": read_jsonl, "validate": validate},
    "datamodules.reward": {"RewardDataModule": RewardDataModule},
    "datamodules.tokenizer": {"load_tokenizer": load_tokenizer},
    "models.adapters": {"AdapterOptions": AdapterOptions, "add_adapter": add_adapter},
    "models.agent": {"ProactiveAgent": ProactiveAgent},
    "models.backbone": {"build_network": _build_network, "classify": classify},
    "models.judges": {"score": _score},
    "models.reward": {"RewardClassifier": RewardClassifier},
    "models.tree": {"choose_attention": choose_attention, "tree_problem": tree_problem},
    "models.weights": {"Weights": _weights},
}


def case_modules() -> dict[str, ModuleType]:
    """The modules by the names that the scripts import."""
    modules = {}
    for name, content in NAMES.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    return modules
