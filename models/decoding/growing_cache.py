"""A KV cache layer with spare capacity, and how transformers' models take a cache."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

GROWTH = 1.25  # a full cache grows by this factor


def cache_option(network: torch.nn.Module) -> str:
    """The name of the forward argument for the cache, which transformers has renamed."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


class GrowingLayer(DynamicLayer):
    """A layer's keys and values with spare capacity, so that one more token does not copy all previous ones."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without capacity."""
        super().lazy_initialization(key_states, value_states)
        self._allocated = [key_states[..., :0, :], value_states[..., :0, :]]
        self._write_at: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._write_at is not None:
            for allocated, states in zip(self._allocated, (key_states, value_states), strict=True):
                allocated.index_copy_(2, self._write_at, states)
            return self._allocated[0], self._allocated[1]
        used = self.get_seq_length()
        needed = used + key_states.shape[-2]
        for part, states in enumerate((key_states, value_states)):
            if self._allocated[part].shape[-2] < needed:
                larger = states.new_empty(*states.shape[:-2], int(needed * GROWTH), states.shape[-1])
                larger[..., :used, :] = self._allocated[part][..., :used, :]
                self._allocated[part] = larger
            self._allocated[part][..., used:needed, :] = states
        self.keys, self.values = (states[..., :needed, :] for states in self._allocated)
        return self.keys, self.values

    def keep(self, row_B: Tensor, token_BK: Tensor) -> None:
        """Keep only some rows of the batch, and some tokens of each row, in the given order.

        Args:
            row_B: (B,) int64, the batch rows to keep.
            token_BK: (B, K) int64, the tokens to keep of each of them.
        """
        at = row_B[:, None], slice(None), token_BK
        self._allocated = [states[at].transpose(1, 2) for states in (self.keys, self.values)]
        self.keys, self.values = self._allocated
        self._write_at = None

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens."""
        self.keys, self.values = self.keys[..., :max_length, :], self.values[..., :max_length, :]
        self._write_at = None

    def reserve(self, tokens: int, write_at: Tensor) -> None:
        """Allocate a fixed number of tokens, and write new tokens at the indices `write_at` instead of appending them.

        All allocated tokens count as keys and values. Those not written yet are 0, and the mask must hide them.
        """
        used = self.get_seq_length()
        for part, states in enumerate((self.keys, self.values)):
            self._allocated[part] = states.new_zeros(*states.shape[:-2], tokens, states.shape[-1])
            self._allocated[part][..., :used, :] = states
        self.keys, self.values = self._allocated
        self._write_at = write_at
