"""What a step takes, in operations and against a device's peak: counted from shapes, not measured."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device as its data sheet has it."""

    peak: float  # operations a second on 16-bit numbers; dense, where data sheets double it for sparse matrices
    memory: int  # bytes
    family: str = ""  # of its architecture, where something was measured on one of them


DEVICES = {
    "b200": Device(2250e12, 180 * GIB),
    "h200": Device(989e12, 141 * GIB, "hopper"),
    "h100 pcie": Device(756e12, 80 * GIB, "hopper"),
    "h100 nvl": Device(835e12, 94 * GIB, "hopper"),
    "h100": Device(989e12, 80 * GIB, "hopper"),
    "a100": Device(312e12, 80 * GIB),
    "l40s": Device(362e12, 48 * GIB),
    "l4": Device(121e12, 24 * GIB),
    "a10g": Device(70e12, 24 * GIB),
    "a10": Device(125e12, 24 * GIB),
    "rtx 4090": Device(165e12, 24 * GIB),
    "rtx 3090": Device(71e12, 24 * GIB),
}

# The share of the peak that a run reaches on one card, by family and by what is trained, from docs/results.md.
MEASURED_UTILIZATION = {
    ("hopper", "all weights"): 0.36,  # 8B, trees of 2,200 tokens a step, blocks compiled, on an H200
}
ASSUMED_UTILIZATION = 0.4  # where nothing was measured


def find_device(name: str) -> Device | None:
    """The device of a name such as "NVIDIA H100 80GB HBM3"; None if it is none of those known."""
    words = name.lower().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if set(key.split()) <= set(words)), None)


def weight_count(module: nn.Module) -> int:
    """How many weights a module's parameters hold; NF4 packs two of them into a byte."""
    return sum(_numel(parameter) for parameter in module.parameters())


def trained_count(module: nn.Module) -> int:
    """How many of a module's weights are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes'
    return parameter.numel() if state is None else state.shape.numel()


def embedding_count(model: "PreTrainedModel") -> int:
    """How many weights are only looked up: a token takes no product with them."""
    return sum(weight_count(module) for module in model.modules() if isinstance(module, nn.Embedding))


@dataclass(frozen=True)
class Operations:
    """What a network takes for a forward and a backward pass.

    A product with a weight takes 2 operations a token, and in the backward pass 2 for the gradient of its input and,
    if it is trained, 2 for its own. Attention takes 12 D a layer and pair of tokens of which one sees the other. What
    gradient checkpointing computes again is no work that the model takes, and is not in here.
    """

    token: int  # operations a token that the layers read
    pair: int  # operations a pair of tokens, of which one sees the other
    target: int  # operations a token to predict, by a language model's head

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Operations":
        """Count the operations of a network of transformers."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        layers = model.base_model
        looked_up = {id(p) for m in layers.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        token = sum(_cost(p) for p in layers.parameters() if id(p) not in looked_up)
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(
            token,
            12 * config.num_hidden_layers * width,
            0 if head is None else sum(_cost(p) for p in head.parameters()),
        )

    def count(self, tokens: int, pairs: int, targets: int = 0) -> int:
        """The operations of some tokens read, pairs that see each other, and tokens predicted."""
        return self.token * tokens + self.pair * pairs + self.target * targets


def _cost(parameter: nn.Parameter) -> int:
    return (6 if parameter.requires_grad else 4) * _numel(parameter)
