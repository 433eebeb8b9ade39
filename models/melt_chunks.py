"""MELT a few positions at a time: token by token, which is its exact form, or in chunks as it is trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from models.attention import KeyValues, KeyValueStore
from models.melt import Melt, checked_chunk
from models.state import State


def advance_in_chunks(
    model: Melt, state: State, chunk: int | None = None, *, supplied: KeyValueStore | None = None, store: KeyValueStore | None = None
) -> State:
    """Run a state to the end some positions at a time; each chunk sees those before it as their last iteration left them.

    Hook points see one chunk at a time, "batch chunk ..."; every point of the loop is called once for each chunk.

    Args:
        state: Before the first visit; from `begin`, or rows of such a state.
        chunk: How many positions; 1 is the exact form. None means the config's prefill_chunk, and all of them where that is None.
        supplied: What an earlier call put in `store`, for a state that holds later rows.
        store: Is given what later tokens see of these rows, by visit.

    Returns:
        The state of all its rows at the end, which `model.readout` reads.

    Raises:
        ValueError: No number of positions, or a state that stands behind the first visit.
    """
    chunk = model.cfg.prefill_chunk if chunk is None else checked_chunk(chunk, "chunk")
    if state.visit != 0:
        raise ValueError(
            f"chunks run from the first visit to the last, one after another, but this state stands before visit {state.visit}"
        )
    width, n_loops = state.resid.shape[1], state.n_loops
    seen = None if supplied is None else model.last_rows(supplied, n_loops)
    ends: list[State] = []
    made: list[dict[int, KeyValues]] = []
    for start in range(0, width, chunk or width):
        new: KeyValueStore = {}
        piece = state.rows(pos=slice(start, start + (chunk or width)))
        ends.append(model.advance(piece, supplied=None if seen is None else model.everywhere(seen, n_loops), store=new))
        made.append(model.last_rows(new, n_loops))
        seen = made[-1] if seen is None else _side_by_side([seen, made[-1]])
    if store is not None:
        store.update(model.everywhere(_side_by_side(made), n_loops))
    return _one_state(ends)


def exact_logits(model: Melt, tokens: Tensor, n_loops: int | None = None, mask: Tensor | None = None) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at all positions, token by token as in generation; the arguments are those of a plain call."""
    return model.readout(advance_in_chunks(model, model.begin(tokens, mask, n_loops=n_loops), 1))


def _side_by_side(pieces: list[dict[int, KeyValues]]) -> dict[int, KeyValues]:
    """Rows of each layer of several pieces of the sequences, in their order."""

    def joined(layer: int, part: str) -> Tensor:
        return torch.cat([getattr(piece[layer], part) for piece in pieces], dim=1)

    return {layer: KeyValues(**{part: joined(layer, part) for part in ("k", "v", "positions", "mask")}) for layer in pieces[0]}


def _one_state(pieces: list[State]) -> State:
    """States of several pieces of the sequences as one."""

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)

    return replace(
        pieces[0],
        resid=joined([piece.resid for piece in pieces]),
        positions=joined([piece.positions for piece in pieces]),
        mask=joined([piece.mask for piece in pieces]),
        parts={name: joined([piece.parts[name] for piece in pieces]) for name in pieces[0].parts},
    )
