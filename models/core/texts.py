"""Texts in and out of a model: its vocabulary, and where its answers are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.models.core.intervene import HookedLoops
from loopscope.models.core.tokens import Batch, Readout, Words, pad_right


class TextInputs(HookedLoops):
    """A hooked model that may have a vocabulary and may know where its answers are read."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab: Words | None = None
        self.read_at: Readout | None = None

    @property
    def positional(self) -> bool:
        """Whether a token's position changes what the model computes for it."""
        return True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode(self, texts: str | Sequence[str]) -> Batch:
        """Right-padded tokens, mask and readout column of some texts, with the padding that the
        readout needs.

        Raises:
            ValueError: The checkpoint has no vocabulary, or does not say where answers are read.
        """
        if self.read_at is None:
            raise ValueError(
                "this checkpoint does not say where its answers are read; load it with"
                " readout='last_real', 'first_pad' or 'column:K'"
            )
        rows = self._ids(texts)
        columns, width = self.read_at.place(
            [len(row) for row in rows], self.cfg.n_ctx, self.positional
        )
        tokens, mask = pad_right(rows, width)
        return Batch(tokens, mask, torch.tensor(columns)).to(self.device)

    def to_tokens(self, texts: str | Sequence[str]) -> Int[Tensor, "batch pos"]:
        """Token ids of some texts, padded on the right with id 0."""
        rows = self._ids(texts)
        return pad_right(rows, max(map(len, rows)))[0].to(self.device)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        ids = self._vocabulary().ids(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one")
        return ids[0]

    def to_str_tokens(self, tokens: str | Int[Tensor, " pos"]) -> list[str]:
        """The tokens of one text, or of one row of ids, as strings."""
        ids = (
            self._vocabulary().ids(tokens)
            if isinstance(tokens, str)
            else tokens.reshape(-1).tolist()
        )
        return [self._vocabulary().words[i] for i in ids]

    def _ids(self, texts: str | Sequence[str]) -> list[list[int]]:
        rows = [
            self._vocabulary().ids(text) for text in ([texts] if isinstance(texts, str) else texts)
        ]
        if not rows:
            raise ValueError("at least one text is needed, got an empty list")
        return rows

    def _vocabulary(self) -> Words:
        if self.vocab is None:
            raise ValueError(
                "this checkpoint has no vocabulary; load it with vocab='path/to/vocab.json'"
            )
        return self.vocab
