"""Texts in and out of a model: its vocabulary, and where its answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.models.basis.arguments import Argument, ArgumentError
from loopscope.models.basis.numbers import given_tensor
from loopscope.models.basis.tokens import Batch, Readout, Words, pad_right
from loopscope.models.core.state import integers

Texts = str | Sequence[str]
ReturnType = Literal["logits", "loss", "both"] | None


@dataclass(frozen=True)
class Given:
    """The arguments of `begin` for one call.

    Attributes:
        tokens, mask: As in `Batch`; the mask is None for no padding.
        options: What the family's `embed` takes besides.
    """

    tokens: Any
    mask: Any
    options: dict[str, Any]

    def loss(self, logits: Float[Tensor, "batch pos d_vocab"], causal: bool) -> Float[Tensor, ""]:
        """The mean cross-entropy of each real token after the first one, in nats.

        Raises:
            ValueError: A model that sees later tokens, or inputs of one token.
        """
        if not causal:
            raise ValueError(
                "the loss is that of foretelling the next token, but this model is not causal"
            )
        targets = torch.as_tensor(self.tokens, device=logits.device).reshape(logits.shape[:2])
        real = torch.ones_like(targets) if self.mask is None else given_tensor(self.mask)
        counted = real.reshape(targets.shape)[:, 1:].bool()
        if not bool(counted.any()):
            raise ValueError("a loss needs inputs of at least two tokens")
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide[:, :-1][counted], targets[:, 1:][counted].long())


def is_texts(inputs: object) -> bool:
    """Whether inputs are a text or a list of texts."""
    several = isinstance(inputs, list | tuple) and len(inputs) > 0
    return isinstance(inputs, str) or (
        several and all(isinstance(each, str) for each in inputs)  # type: ignore[attr-defined]
    )


@dataclass(frozen=True)
class TextInputs:
    """The converter of texts to a model's inputs.

    Attributes:
        vocab: The vocabulary or tokenizer; None if the checkpoint has none.
        read_at: The column at which answers are read; None if the checkpoint does not say it.
        n_ctx: The longest input in tokens; None for no limit.
        positional: Whether a token's position changes the computation.
        device: The device of the tensors.
    """

    vocab: Words | None
    read_at: Readout | None
    n_ctx: int | None
    positional: bool
    device: torch.device

    def given(
        self, inputs: object, mask: object, options: dict[str, Any], prepend_bos: bool | None
    ) -> Given:
        """The arguments of `begin` from those of a call: tokens, a `Batch`, or texts.

        Raises:
            ValueError: A mask beside a `Batch` or texts, which have their own, or `prepend_bos`
                beside tokens.
        """
        texts = is_texts(inputs)
        if prepend_bos is not None and not texts:
            raise ValueError("prepend_bos goes with texts only; these inputs are tokens already")
        if not texts and not isinstance(inputs, Batch):
            return Given(inputs, mask, options)
        if mask is not None:
            raise ValueError("a Batch and texts have a mask of their own; leave mask out")
        if isinstance(inputs, Batch):
            return Given(inputs.tokens, inputs.mask, {**inputs.options, **options})
        batch = self.padded(self.ids(inputs, prepend_bos))  # type: ignore[arg-type]
        return Given(batch.tokens, batch.mask, options)

    def encode(self, texts: Texts, prepend_bos: bool | None = None) -> Batch:
        """Right-padded tokens, mask and readout column of some texts; see `LoopedModel.encode`."""
        if self.read_at is None:
            raise ArgumentError(
                "this checkpoint does not say where its answers are read; load it with ",
                Argument("readout", "last_real"),
                ", 'first_pad' or 'column:K'",
            )
        return self.padded(self.ids(texts, prepend_bos))

    def padded(self, rows: list[list[int]]) -> Batch:
        """Rows of ids with the padding that the readout needs; where the checkpoint does not say
        where answers are read, the column is that of the last token.
        """
        read_at = self.read_at or Readout("last_real")
        columns, width = read_at.place([len(row) for row in rows], self.n_ctx, self.positional)
        tokens, mask = pad_right(rows, width)
        return Batch(tokens, mask, torch.tensor(columns, device="cpu")).to(self.device)

    def to_tokens(self, texts: Texts, prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Token ids of some texts, padded on the right with id 0."""
        rows = self.ids(texts, prepend_bos)
        return pad_right(rows, max(map(len, rows)))[0].to(self.device)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        ids = self._words().ids(text, prepend_bos=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one")
        return ids[0]

    def to_str_tokens(
        self, tokens: str | Sequence[int] | Tensor, prepend_bos: bool | None = None
    ) -> list[str]:
        """The tokens of one text, or of one row of ids, each as a string."""
        words = self._words().words
        if isinstance(tokens, str):
            return [words[i] for i in self._words().ids(tokens, prepend_bos)]
        return [words[i] for i in self._row(tokens)]

    def to_string(self, tokens: Sequence[Any] | Tensor) -> str | list[str]:
        """The text of one row of ids, or the texts of several rows."""
        ids = integers(tokens)
        several = ids is not None and ids.ndim == 2
        return list(map(self.to_text, ids)) if several else self.to_text(tokens)  # type: ignore[arg-type]

    def to_text(self, tokens: Sequence[int] | Tensor) -> str:
        """The text of one row of ids."""
        return self._words().text(self._row(tokens))

    def _row(self, tokens: object) -> list[int]:
        """One row of ids that the vocabulary has."""
        ids, size = integers(tokens), len(self._words().words)
        if ids is None or sum(size != 1 for size in ids.shape) > 1:
            raise ValueError(
                f"tokens must be a text or one row of integer ids, got {_described(tokens)}"
            )
        row: list[int] = ids.reshape(-1).tolist()
        wrong = [i for i in row if not 0 <= i < size]
        if wrong:
            raise ValueError(f"token ids must be in 0..{size - 1}, got {wrong[0]}")
        return row

    def ids(self, texts: Texts, prepend_bos: bool | None = None) -> list[list[int]]:
        """Token ids of some texts; `prepend_bos` as in `LoopedModel.encode`."""
        words = self._words()
        several = [texts] if isinstance(texts, str) else texts
        rows = [words.ids(text, prepend_bos) for text in several]
        if not rows:
            raise ValueError("at least one text is needed, got an empty list")
        return rows

    def _words(self) -> Words:
        if self.vocab is None:
            raise ArgumentError(
                "this checkpoint has no vocabulary; load it with ",
                Argument("vocab", "path/to/vocab.json"),
            )
        return self.vocab


def _described(tokens: object) -> str:
    if isinstance(tokens, Tensor):
        return f"a tensor {list(tokens.shape)} of {tokens.dtype}"
    return f"{tokens!r:.60}"
