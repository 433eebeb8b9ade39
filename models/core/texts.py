"""Texts in and out of a model: its vocabulary, and where its answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.models.basis.tokens import Batch, Readout, Words, pad_right
from loopscope.models.core.state import integers


@dataclass(frozen=True)
class TextInputs:
    """How texts become a model's inputs.

    Attributes:
        vocab: None where the checkpoint has no vocabulary.
        read_at: Where answers are read; None where the checkpoint does not say.
        n_ctx: The longest input in tokens; None for no limit.
        positional: Whether a token's position changes what the model computes for the token.
        device: Where tensors are put.
    """

    vocab: Words | None
    read_at: Readout | None
    n_ctx: int | None
    positional: bool
    device: torch.device

    def encode(self, texts: str | Sequence[str]) -> Batch:
        """Right-padded tokens, mask and readout column of some texts; see `LoopedModel.encode`."""
        if self.read_at is None:
            raise ValueError(
                "this checkpoint does not say where its answers are read; load it with"
                " readout='last_real', 'first_pad' or 'column:K'"
            )
        rows = self._ids(texts)
        columns, width = self.read_at.place([len(row) for row in rows], self.n_ctx, self.positional)
        tokens, mask = pad_right(rows, width)
        return Batch(tokens, mask, torch.tensor(columns)).to(self.device)

    def to_tokens(self, texts: str | Sequence[str]) -> Int[Tensor, "batch pos"]:
        """Token ids of some texts, padded on the right with id 0."""
        rows = self._ids(texts)
        return pad_right(rows, max(map(len, rows)))[0].to(self.device)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        ids = self._words().ids(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one")
        return ids[0]

    def to_str_tokens(self, tokens: str | Sequence[int] | Tensor) -> list[str]:
        """The tokens of one text, or of one row of ids, as strings."""
        words = self._words().words
        if isinstance(tokens, str):
            return [words[i] for i in self._words().ids(tokens)]
        ids = integers(tokens)
        if ids is None or sum(size != 1 for size in ids.shape) > 1:
            raise ValueError(
                f"tokens must be a text or one row of integer ids, got {_described(tokens)}"
            )
        row: list[int] = ids.reshape(-1).tolist()
        wrong = [i for i in row if not 0 <= i < len(words)]
        if wrong:
            raise ValueError(f"token ids must be in 0..{len(words) - 1}, got {wrong[0]}")
        return [words[i] for i in row]

    def _ids(self, texts: str | Sequence[str]) -> list[list[int]]:
        words = self._words()
        rows = [words.ids(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows:
            raise ValueError("at least one text is needed, got an empty list")
        return rows

    def _words(self) -> Words:
        if self.vocab is None:
            raise ValueError(
                "this checkpoint has no vocabulary; load it with vocab='path/to/vocab.json'"
            )
        return self.vocab


def _described(tokens: object) -> str:
    if isinstance(tokens, Tensor):
        return f"a tensor {list(tokens.shape)} of {tokens.dtype}"
    return f"{tokens!r:.60}"
