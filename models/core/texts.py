"""Texts to tokens and back, given a model's vocabulary and where its answers are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopscope.models.core.tokens import Batch, Readout, Words, pad_right


def encoded(
    texts: str | Sequence[str],
    vocab: Words | None,
    read_at: Readout | None,
    n_ctx: int | None,
    positional: bool,
) -> Batch:
    """Right-padded tokens, mask and readout column of some texts; see `LoopedModel.encode`."""
    if read_at is None:
        raise ValueError(
            "this checkpoint does not say where its answers are read; load it with"
            " readout='last_real', 'first_pad' or 'column:K'"
        )
    rows = ids_of(texts, vocab)
    columns, width = read_at.place([len(row) for row in rows], n_ctx, positional)
    tokens, mask = pad_right(rows, width)
    return Batch(tokens, mask, torch.tensor(columns))


def ids_of(texts: str | Sequence[str], vocab: Words | None) -> list[list[int]]:
    """Token ids of each text."""
    words = required(vocab)
    rows = [words.ids(text) for text in ([texts] if isinstance(texts, str) else texts)]
    if not rows:
        raise ValueError("at least one text is needed, got an empty list")
    return rows


def single_id(text: str, vocab: Words | None) -> int:
    """The id of a text that is one token."""
    ids = required(vocab).ids(text)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens, not one")
    return ids[0]


def words_of(tokens: str | Tensor, vocab: Words | None) -> list[str]:
    """The tokens of one text, or of one row of ids, as strings."""
    words = required(vocab)
    ids = words.ids(tokens) if isinstance(tokens, str) else tokens.reshape(-1).tolist()
    return [words.words[i] for i in ids]


def required(vocab: Words | None) -> Words:
    """The vocabulary, or a sentence that there is none."""
    if vocab is None:
        raise ValueError(
            "this checkpoint has no vocabulary; load it with vocab='path/to/vocab.json'"
        )
    return vocab
