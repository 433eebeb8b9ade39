"""A small model of every family, in float64, with an input for it: the golden cases' folders, or a config where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from checkpoints.load import load
from golden_cases import GOLDEN
from models.base import LoopedModel
from models.tokens import Batch

BATCH, POS, POSITION, HEAD, LOOPS, LENGTHS = 3, 7, 2, 1, 3, (7, 4, 5)


@dataclass(frozen=True)
class Toy:
    """How to make a family's model.

    Attributes:
        make: The model in float64.
        begin: What its `begin` takes besides tokens, by the inputs' tokens.
        unread: Sites whose value nothing downstream reads.
    """

    make: Callable[[], LoopedModel]
    begin: Callable[[Tensor], Mapping[str, Any]] = field(default=lambda tokens: {})
    unread: tuple[str, ...] = ()


def golden(name: str, **options: Any) -> Callable[[], LoopedModel]:
    return lambda: load(GOLDEN / name, **options).double()


TOYS: dict[str, Toy] = {
    "ouro": Toy(golden("ouro"), unread=("hook_exit_logit",)),
}


def random_tokens(model: LoopedModel, seed: int = 0, pos: int = POS) -> Tensor:
    return torch.randint(1, model.cfg.d_vocab, (BATCH, pos), generator=torch.Generator().manual_seed(seed))


def full(toy: Toy, model: LoopedModel, seed: int = 0) -> Batch:
    """A batch without padding, read at its last column."""
    tokens = random_tokens(model, seed)
    return Batch(tokens, torch.ones_like(tokens), torch.full((BATCH,), POS - 1), toy.begin(tokens))


def padded(toy: Toy, model: LoopedModel, seed: int = 0) -> Batch:
    """A right-padded batch, read at the last real token of each row."""
    mask = (torch.arange(POS) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = random_tokens(model, seed) * mask
    return Batch(tokens, mask, torch.tensor(LENGTHS) - 1, toy.begin(tokens))
