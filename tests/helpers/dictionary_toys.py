"""Small dictionaries of toy models."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from loopscope.interp.dictionaries.coder import Coder
from loopscope.interp.dictionaries.dictionary import Dictionary, Kind
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import D_MODEL, LOOPS, padded, toy

FEATURES, K = 17, 5
MLP_IN, MLP_OUT = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


@cache
def model() -> RecurrentDepth:
    """One toy for all tests of dictionaries, which leave it as it is."""
    return toy()


@cache
def states(hook: str | None = None) -> Tensor:
    """The states of the toy's padded batch, "read loop d_model"."""
    return loop_states(model(), padded(), LOOPS, hook=hook)


def coder(width: int, seed: int, k: int | None = K, centred: bool = True) -> Coder:
    """A coder of random weights, by k or by a threshold."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    weights = (drawn(width, FEATURES), drawn(FEATURES), drawn(FEATURES, width), drawn(width))
    threshold = drawn(FEATURES).abs() if k is None else None
    return Coder(*weights, k=k, threshold=threshold, centred=centred)


@cache
def dictionary(kind: Kind, k: int | None = K) -> Dictionary:
    """A dictionary of random weights for the toy."""
    width = D_MODEL * LOOPS if kind == "crosscoder" else D_MODEL
    count = LOOPS if kind == "per_iteration" else 1
    sites = (MLP_IN, MLP_OUT) if kind == "transcoder" else (None, None)
    reading = Reading.of(model(), LOOPS, *sites)
    coders = tuple(coder(width, seed, k, kind != "transcoder") for seed in range(count))
    return Dictionary(kind, coders, reading, torch.zeros(count, 0))
