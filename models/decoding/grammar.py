"""Constrains answers to valid JSON: masks tokens, and closes answers that were cut off.

Shape legend: N answers, V vocabulary size.
"""

import json
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

# JSON as `write_answer` writes it. Without extra whitespace, a model cannot generate whitespace forever.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Suffixes that complete the start of an answer. The last one completes an empty start, so one always fits.
NO_PROPOSAL = '"proposal": null}'
CLOSINGS = ("", "}", '"}', f'", {NO_PROPOSAL}', f", {NO_PROPOSAL}", NO_PROPOSAL, "null}", f"{{{NO_PROPOSAL}")


class AnswerGrammar:
    """The JSON schema of answers over the tokens of one tokenizer.

    Each unfinished answer has a matcher, which tracks what was generated and what may follow.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", end_id: int, lead: str = "") -> None:
        """Prepare the vocabulary, which takes seconds for a large one; reuse the grammar.

        Args:
            tokenizer: A fast tokenizer, byte-level or with byte fallback.
            end_id: The token that ends an answer.
            lead: White space that an answer begins with.

        Raises:
            UserError: The tokenizer's tokens cannot be converted to bytes.
        """
        from llguidance import LLExecutor, LLMatcher
        from llguidance.hf import from_tokenizer

        grammar = LLMatcher.grammar_from_json_schema(ANSWER_SCHEMA, overrides=STYLE)
        if lead:
            schema = json.dumps({**ANSWER_SCHEMA, "x-guidance": STYLE})
            grammar = LLMatcher.grammar_from_lark(f"start: {json.dumps(lead)} answer\nanswer: %json {schema}")
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
        self._closings = [self._tokenizer.tokenize_str(closing) for closing in (*CLOSINGS, lead + CLOSINGS[-1])]

    def start(self) -> "LLMatcher":
        """Return the matcher of a new answer."""
        return self._blank.deep_copy()

    def allowed(self, matchers: Sequence["LLMatcher"], width: int, device: torch.device | None = None) -> Tensor:
        """The mask of the tokens that may come next in each answer.

        Args:
            matchers: One for each answer.
            width: The network's vocabulary size, which may be larger than the tokenizer's.
            device: The device of the mask; the CPU if None. A GPU receives one bit per token and unpacks it there.

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
        """Consume an allowed token; return whether the answer is complete and only its end may follow."""
        if not matcher.consume_token(token):
            raise RuntimeError(f"token {token} does not follow: {matcher.get_error()}")
        return matcher.is_stopped() and matcher.is_accepting()

    def close(self, token_ids: Sequence[int]) -> list[int]:
        """Complete an answer that was cut off: keep as many tokens as possible, and append the shortest closing.

        An open string ends where it was cut. A missing proposal becomes null.
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
    """As numpy's `unpackbits` with bitorder little; (N, count) bool."""
    bits_NB8 = bytes_NB[:, :, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=bytes_NB.device))
    return bits_NB8.bitwise_and(1).bool().flatten(1)[:, :count]
