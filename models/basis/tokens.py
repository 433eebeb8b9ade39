"""Text to tokens and back: the vocabulary, where an answer is read, and the batch a model is
given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.models.basis.numbers import checked_count, checked_integer

PAD = "<pad>"


@runtime_checkable
class Words(Protocol):
    """Text to token ids and back.

    Attributes:
        words: The tokens in the order of their ids.
    """

    @property
    def words(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def ids(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            prepend_bos: True puts the token that begins a text in front, False puts no special
                token anywhere, None does what the tokenizer does by default.
        """
        ...

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...


class Vocabulary:
    """A vocabulary of whole-word tokens of the form `<...>`, written one after another without
    spaces.

    Args:
        words: The tokens in the order of their ids. `<pad>` is put in front (id 0) if it is
            missing, as the releases do.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words: tuple[str, ...] = tuple(words) if PAD in words else (PAD, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = sorted({w for w in self.words if self.words.count(w) > 1})
            raise ValueError(
                f"a vocabulary must hold each token once, but {twice[0]!r} occurs more often"
            )
        if self._ids[PAD] != 0:
            raise ValueError(f"{PAD!r} must have id 0, got {self._ids[PAD]}")

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids of a text; ValueError names the first piece that is not in the vocabulary, or
        says that no token of the vocabulary begins a text.
        """
        if prepend_bos:
            raise ValueError("no token of this vocabulary begins a text; leave prepend_bos out")
        pieces = re.findall(r"<[^<>]*>|[^<\s]+|<", text)
        for piece in pieces:
            if piece not in self._ids:
                raise ValueError(
                    f"{piece!r} is not one of the {len(self)} tokens of this vocabulary (such as"
                    f" {', '.join(self.words[1:4])}); tokens are written without spaces, as in"
                    " '<e_12><r_3>'"
                )
        if not pieces:
            raise ValueError("a text must hold at least one token, got an empty one")
        return [self._ids[piece] for piece in pieces]

    def text(self, ids: Sequence[int]) -> str:
        """The tokens one after another."""
        return "".join(self.words[i] for i in ids)


@dataclass(frozen=True)
class Readout:
    """The rule that says at which column of an input the answer is read.

    Attributes:
        kind: "last_real" (the last token that is not padding), "first_pad" (the column after it,
            but at most the last column that positions allow), or "column" (one fixed column of the
            padded input).
        column: The fixed column, from 0; None for the other kinds.
    """

    kind: Literal["last_real", "first_pad", "column"]
    column: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("last_real", "first_pad", "column"):
            raise ValueError(
                f"readout must be 'last_real', 'first_pad' or 'column:K', got {self.kind!r}"
            )
        if self.column is not None:
            checked_integer(self.column, "column")
        if (self.column is None) != (self.kind != "column") or (
            self.column is not None and self.column < 0
        ):
            raise ValueError(
                "a fixed readout column must be given with kind 'column' only and be >= 0, got"
                f" {self}"
            )

    @classmethod
    def parse(cls, text: str) -> Readout:
        """Make the rule from a text: "last_real", "first_pad" or "column:49"."""
        column = re.fullmatch(r"column:([0-9]+)", text)
        if column:
            return cls("column", int(column.group(1)))
        if text == "last_real":
            return cls("last_real")
        if text == "first_pad":
            return cls("first_pad")
        raise ValueError(f"readout must be 'last_real', 'first_pad' or 'column:K', got {text!r}")

    def __str__(self) -> str:
        return self.kind if self.column is None else f"{self.kind}:{self.column}"

    def place(
        self, lengths: Sequence[int], n_ctx: int | None, positional: bool
    ) -> tuple[list[int], int]:
        """Find the column that is read in each row, and the padded width that holds it.

        A model without positions has the same state at every padding column. So a fixed column far
        to the right is read at the first column after the longest input. With positions the padded
        width is that of the training.

        Args:
            lengths: The number of tokens of each row.
            n_ctx: The largest number of positions of the model; None means no limit.
            positional: Whether the model has positions.
        """
        longest = max(lengths)
        if self.kind == "last_real":
            return [n - 1 for n in lengths], longest
        if self.kind == "first_pad":
            last = longest if n_ctx is None else min(longest, n_ctx - 1)
            return [min(n, last) for n in lengths], last + 1 if last >= longest else longest
        assert self.column is not None, "kind 'column' always has a column"
        if longest > self.column + 1:
            raise ValueError(
                f"answers are read at column {self.column}, so inputs have at most"
                f" {self.column + 1} tokens, got {longest}"
            )
        column = self.column if positional else min(self.column, longest)
        return [column] * len(lengths), column + 1


@dataclass(frozen=True)
class Batch:
    """Inputs that are padded on the right, with the column at which each answer is read.

    Attributes:
        tokens: Int[Tensor, "batch pos"], the token ids.
        mask: Int[Tensor, "batch pos"], ones for real tokens, then zeros for padding.
        readout: Int[Tensor, " batch"], the column at which the answer of each row is read, from 0.
        options: Further inputs that the family takes, by name: a seed or state of the latent, token
            types. A tensor has one row per input.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    readout: Int[Tensor, " batch"]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return self._map(lambda x: x.to(device))

    def repeat(self, times: int) -> Batch:
        """The rows of the batch, repeated so many times."""
        times = checked_count(times, "times", least=0)
        return self._map(lambda x: x.repeat(times, *[1] * (x.ndim - 1)))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        options = {
            name: fn(value) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Batch(fn(self.tokens), fn(self.mask), fn(self.readout), options)


def pad_right(rows: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Token and mask matrices of a given width; padding has id 0."""
    tokens = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
    mask = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, device="cpu")
        mask[i, : len(row)] = 1
    return tokens, mask


def checked_token_types(
    token_types: Tensor, tokens: Int[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"]:
    """Token types as integers beside the tokens.

    Args:
        token_types: [batch, pos], or [pos] for a single input.
        tokens: The tokens that the types belong to.

    Raises:
        TypeError: Token types that are no integers.
        ValueError: Token types of another shape than the tokens.
    """
    if token_types.is_floating_point() or token_types.is_complex():
        raise TypeError(f"token types must be integers, got {token_types.dtype}")
    types = token_types[None] if token_types.ndim == 1 else token_types
    if types.shape != tokens.shape:
        raise ValueError(
            f"there must be one token type for each of the tokens {list(tokens.shape)}, got"
            f" {list(types.shape)}"
        )
    return types.to(tokens)
