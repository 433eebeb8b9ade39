"""Keys and values that training-free looping leaves for later tokens: one entry per layer, whatever
the number of passes.

The cache has the form of an ordinary model's run: keys and values by the visits of a call with
n_loops = 1. Those of the window come from a stash pass over the state before the looped passes
("first") or after them ("last"), whose result is dropped. Passes of the prompt see the keys of
their own state; passes of a later token see the cache, and their own rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.models.core.attention import KeyValues, KeyValueStore
from loopscope.models.core.hooks import NO_TAPS, live
from loopscope.models.core.state import State, checked_loops
from loopscope.models.families.training_free.model import (
    WindowLoops,
    advance_stashing,
    refuse_edited,
)


def prefill(
    model: WindowLoops,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    n_loops: int | None = None,
    source: str = "last",
) -> tuple[State, KeyValueStore]:
    """Run a looped prompt and make the cache that later tokens read.

    Args:
        tokens, mask, n_loops: As in `begin`.
        source: Where the window's entries come from: "last", the state after its passes, or
            "first", the one before them.

    Returns:
        The state at the end, which `model.readout` reads, and the cache.
    """
    cache: KeyValueStore = {}
    return (
        advance_stashing(model, model.begin(tokens, mask, n_loops=n_loops), cache, source=source),
        cache,
    )


def decode_bypass(
    model: WindowLoops, tokens: Int[Tensor, "batch new"], cache: KeyValueStore
) -> tuple[State, KeyValueStore]:
    """Run the next tokens without looping.

    Args:
        tokens: What follows the real tokens of each row.
        cache: From `prefill` or an earlier step; it is not changed.

    Returns:
        The state of the new tokens at the end, and the cache with their entries.
    """
    new: KeyValueStore = {}
    state = model.advance(_begin_after(model, tokens, cache, 1), supplied=cache, store=new)
    return state, joined(cache, new)


def decode_looped(
    model: WindowLoops,
    tokens: Int[Tensor, "batch new"],
    cache: KeyValueStore,
    *,
    n_loops: int | None = None,
    source: str = "last",
) -> tuple[State, KeyValueStore]:
    """Run the next tokens with n_loops passes of the window, each of which reads the cache; they
    append what a stash pass makes.

    Args and returns are those of `decode_bypass` and `prefill`.
    """
    new: KeyValueStore = {}
    state = _begin_after(model, tokens, cache, checked_loops(n_loops, model.cfg.n_loops))
    return advance_stashing(model, state, new, source=source, supplied=cache), joined(cache, new)


def joined(cache: Mapping[str, KeyValues], new: Mapping[str, KeyValues]) -> dict[str, KeyValues]:
    """The entries of earlier and later rows, one after the other."""
    return {visit: cache[visit].followed_by(new[visit]) for visit in cache}


def _begin_after(model: WindowLoops, tokens: Tensor, cache: KeyValueStore, n_loops: int) -> State:
    """The state of tokens that follow the cached ones."""
    refuse_edited(model)
    tokens, real, n_loops = model.checked_inputs(tokens, None, n_loops)
    model.refuse_late_hooks(n_loops)
    past = next(iter(cache.values())).mask.sum(1, keepdim=True)
    positions = past + torch.arange(tokens.shape[1], device=tokens.device)
    if model.cfg.n_ctx is not None and int(positions.max()) >= model.cfg.n_ctx:
        raise ValueError(
            f"inputs may have at most n_ctx={model.cfg.n_ctx} positions in this model, got"
            f" {int(positions.max()) + 1}"
        )
    taps = live(model.edge_points()) if model.any_hook() else NO_TAPS
    resid, parts = model.embed(tokens, positions, taps)
    return State(0, n_loops, resid, positions, real, parts)
