"""NetworkOptions: everything that determines how a network is built, as one value."""

from dataclasses import dataclass
from typing import Any, Literal

from datamodules.prompting.tokenizers import SCRATCH

Head = Literal["classifier", "language model"]
DtypeName = Literal["float32", "bfloat16", "float16"]
ExportDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class NetworkOptions:
    """The options of a network.

    Attributes:
        head: What follows the backbone: a head with two classes, or a language model's head.
        backbone: Hub id or local path, or "scratch" for random weights.
        scratch: For "scratch": a transformers configuration as a mapping, with its `model_type`.
        dtype: The dtype in which weights are stored.
        attn_implementation: Any attention of transformers; transformers' default if None.
        dropout: Value for each dropout in the configuration, 0 to 1; the configuration's own values if None.
        trust_remote_code: Whether a backbone from the hub may run its own code.
    """

    head: Head
    backbone: str = SCRATCH
    scratch: dict[str, Any] | None = None
    dtype: DtypeName = "float32"
    attn_implementation: str | None = None
    dropout: float | None = None
    trust_remote_code: bool = False

    @property
    def for_transformers(self) -> dict[str, Any]:
        """The keyword arguments that `from_config` and `from_pretrained` of transformers share."""
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
