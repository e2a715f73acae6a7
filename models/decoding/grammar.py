"""Answers that are valid by construction: which tokens may come next, and how an answer that was cut off is closed.

Shape legend: N answers, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datamodules.corpus.answers import ANSWER_SCHEMA
from datamodules.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerFast

# JSON as `write_answer` writes it: no other blanks, so a model cannot go on with blanks for ever.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What may follow the beginning of an answer to make it a whole one. The last follows nothing, so one always fits.
NO_PROPOSAL = '"proposal": null}'
CLOSINGS = ("", "}", '"}', f'", {NO_PROPOSAL}', f", {NO_PROPOSAL}", NO_PROPOSAL, "null}", f"{{{NO_PROPOSAL}")


class AnswerGrammar:
    """The answer's JSON schema in the tokens of one tokenizer.

    Each answer under way has a matcher, which knows what has been written and what may follow.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", end_id: int) -> None:
        """Prepare the vocabulary; takes seconds for a large one, so make one grammar and keep it.

        Args:
            tokenizer: Of the `tokenizers` kind, byte-level or with a fallback to bytes.
            end_id: The token that ends an answer.

        Raises:
            UserError: The tokenizer's tokens cannot be spelt out as bytes.
        """
        from llguidance import LLExecutor, LLMatcher
        from llguidance.hf import from_tokenizer

        grammar = LLMatcher.grammar_from_json_schema(ANSWER_SCHEMA, overrides=STYLE)
        try:
            self._tokenizer = from_tokenizer(tokenizer, eos_token=end_id)
        except ValueError as error:
            raise UserError(
                f"answers cannot be held to JSON with this tokenizer: {' '.join(str(error).split())[:200]}",
                "Use a backbone with a byte-level tokenizer, or generate without a grammar.",
            ) from error
        self._executor = LLExecutor()
        self._blank = LLMatcher(self._tokenizer, grammar, log_level=0)
        if self._blank.is_error():
            raise RuntimeError(self._blank.get_error())
        self._closings = [self._tokenizer.tokenize_str(closing) for closing in CLOSINGS]

    def start(self) -> "LLMatcher":
        """The matcher of a new answer."""
        return self._blank.deep_copy()

    def allowed(self, matchers: Sequence["LLMatcher"], width: int, device: torch.device | None = None) -> Tensor:
        """Which tokens may come next in each answer.

        Args:
            matchers: One for each answer.
            width: How many tokens the network tells apart, which may be more than the tokenizer has.
            device: Where the answer is wanted; the CPU if None. A GPU gets a bit a token, and makes bools of them.

        Returns:
            (N, V) bool.
        """
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        known = self._tokenizer.vocab_size
        bits = allocate_token_bitmask(len(matchers), known)
        fill_next_token_bitmask_par(self._executor, list(zip(matchers, range(len(matchers)), strict=True)), bits)
        if device is None or device.type == "cpu":
            allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=known, bitorder="little")
            allowed_NV = torch.from_numpy(allowed.view(bool))
        else:
            allowed_NV = _unpacked(torch.from_numpy(bits.view(np.uint8)).to(device), known)
        return allowed_NV if width == known else torch.nn.functional.pad(allowed_NV, (0, width - known))

    def advance(self, matcher: "LLMatcher", token: int) -> bool:
        """Go on by a token that was allowed; whether the answer is whole and nothing may follow but its end."""
        if not matcher.consume_token(token):
            raise RuntimeError(f"token {token} does not follow: {matcher.get_error()}")
        return matcher.is_stopped() and matcher.is_accepting()

    def close(self, token_ids: Sequence[int]) -> list[int]:
        """Make a whole answer of one that was cut off: as much of it as can be kept, then the shortest closing.

        A text that is open is ended where it was cut, and a proposal that was not reached is null.
        """
        for kept in range(len(token_ids), -1, -1):
            for closing in self._closings:
                whole = [*token_ids[:kept], *closing]
                if self._is_answer(whole):
                    return whole
        raise RuntimeError("the tokenizer cannot write an answer without a proposal")

    def _is_answer(self, token_ids: Sequence[int]) -> bool:
        matcher = self.start()
        return matcher.try_consume_tokens(list(token_ids)) == len(token_ids) and matcher.is_accepting()


def _unpacked(bytes_NB: Tensor, count: int) -> Tensor:
    """What numpy's `unpackbits` makes of bytes, the least bit first; (N, count) bool."""
    bits_NB8 = bytes_NB[:, :, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=bytes_NB.device))
    return bits_NB8.bitwise_and(1).bool().flatten(1)[:, :count]
