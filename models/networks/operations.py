"""The operations of a step, counted from shapes, and the peak rates and memory of devices."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from models.networks.freezing import lowest_frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device, according to its data sheet."""

    peak: float  # dense operations per second in 16 bits; some data sheets give twice this, for sparse matrices
    memory: int  # bytes
    family: str = ""  # its architecture, the key of MEASURED_UTILIZATION


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

# Model FLOPs utilization (share of the peak, 0 to 1) of a run on one card, by family and trained weights; see
# docs/results.md.
MEASURED_UTILIZATION = {
    ("hopper", "all weights"): 0.36,  # 8B on an H200: trees of 2,200 tokens per step, compiled blocks
}
ASSUMED_UTILIZATION = 0.4  # without a measurement


def find_device(name: str) -> Device | None:
    """The device with a name such as "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    words = name.lower().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if set(key.split()) <= set(words)), None)


def weight_count(module: nn.Module) -> int:
    """The number of a module's weights. NF4 packs two weights into a byte."""
    return sum(_numel(parameter) for parameter in module.parameters())


def trained_count(module: nn.Module) -> int:
    """The number of a module's trained weights."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes'
    return parameter.numel() if state is None else state.shape.numel()


def embedding_count(model: "PreTrainedModel") -> int:
    """The number of weights in embeddings. They are looked up, not multiplied."""
    return sum(weight_count(module) for module in model.modules() if isinstance(module, nn.Embedding))


@dataclass(frozen=True)
class Operations:
    """The operations of a forward and a backward pass, or of a forward pass alone.

    A weight takes 2 operations per token in the forward pass. In the backward pass it takes 2 for the gradient of its
    input and, if it is trained, 2 for its own. Attention takes 12 D operations per layer and visible pair of tokens,
    4 D of them in the forward pass. The lowest layers take none in the backward pass if nothing is trained in them.
    The recomputation of gradient checkpointing is not counted, as usual for model FLOPs.
    """

    token: int  # operations per token that the layers read
    pair: int  # operations per visible pair of tokens
    target: int  # operations per token to predict, in a language model's head

    @classmethod
    def of(cls, model: "PreTrainedModel", backward: bool = True) -> "Operations":
        """The operations of a network of transformers, with those of the backward pass if `backward`."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        layers = model.base_model
        looked_up = {id(p) for m in layers.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        frozen = lowest_frozen(model)
        forward_only = {id(p) for layer in frozen for p in layer.parameters()}
        costs = ((p, _cost(p, backward and id(p) not in forward_only)) for p in layers.parameters())
        token = sum(cost for p, cost in costs if id(p) not in looked_up)
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(
            token,
            (12 * config.num_hidden_layers - 8 * len(frozen) if backward else 4 * config.num_hidden_layers) * width,
            0 if head is None else sum(_cost(p, backward) for p in head.parameters()),
        )

    def count(self, tokens: int, pairs: int, targets: int = 0) -> int:
        """The operations for some numbers of tokens read, visible pairs, and tokens predicted."""
        return self.token * tokens + self.pair * pairs + self.target * targets


def _cost(parameter: nn.Parameter, backward: bool) -> int:
    return (2 if not backward else 6 if parameter.requires_grad else 4) * _numel(parameter)
