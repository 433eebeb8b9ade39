"""Realignment: put a token's embedding in the place of the state from which the lens reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.columns import at_columns_of, checked_columns
from loopscope.interp.common.inputs import LOGITS_AT_ONCE
from loopscope.interp.common.places import Picked, in_range, one_in_range
from loopscope.interp.common.precision import widened
from loopscope.interp.common.ranking import top_tokens
from loopscope.models.basis.numbers import checked_number, given_tensor
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import by_rows
from loopscope.models.core.state import checked_loops

Realigned = Literal["replace", "rescale", "blend"]


@contextmanager
def realign(
    model: LoopedModel,
    at: int,
    positions: Picked | int = "all",
    how: Realigned = "replace",
    *,
    rank: int = 0,
    tokens: Int[Tensor, " batch"] | Sequence[int] | None = None,
    weight: float = 0.5,
    n_loops: int | None = None,
) -> Iterator[LoopedModel]:
    """Replace the state by a token's embedding: inside the `with` block the state after one
    iteration is moved to the embedding of the token that the logit lens reads from it.

    The state is the residual stream after the iteration's last visit. The embedding is the token's
    row of `W_E`, without position and without a scale factor. After the block, also after an error,
    the model is as before.

    Args:
        at: The iteration, from 0, after which the state is moved.
        positions: The columns of the text to change; "all" for every one.
        how: "replace" writes the embedding, "rescale" gives the state the length of the embedding
            but keeps its direction, "blend" writes weight * embedding + (1 - weight) * state.
        rank: Which token of the lens to take; 0 is the top token.
        tokens: One token id per row to take instead of the lens's, such as random ones as a
            control.
        weight: The weight of the embedding in "blend", from 0 to 1.
        n_loops: The number of iterations of the runs inside; None means the number that the
            checkpoint records.

    Yields:
        The model.

    Raises:
        ValueError: The iteration, the rank or the weight is out of range, or `how` is unknown. Runs
            inside raise it for another `n_loops`, for another number of rows than `tokens` has, and
            for logits that are not finite.

    Source:
        DiscoLoop, arXiv 2607.00341.
    """
    n_loops, columns = checked_loops(n_loops, model.cfg.n_loops), checked_columns(positions)
    loop = one_in_range("at", at, n_loops)
    d_vocab = model.cfg.d_vocab
    if how not in ("replace", "rescale", "blend"):
        raise ValueError(f"how must be 'replace', 'rescale' or 'blend', got {how!r}")
    checked_number(weight, "weight", least=0, most=1)
    rank = one_in_range("rank", rank, d_vocab)
    given = None if tokens is None else given_tensor(tokens)
    if given is not None:
        in_range("tokens", given.flatten().tolist(), d_vocab)
    last = model.schedule(n_loops)[model.iteration_ends(n_loops)[loop] - 1]
    name = f"{last.name}.{model.lens_site}"

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        own = _lens_tokens(model, value, rank) if given is None else _for_rows(given, value)
        new = _moved(value, model.W_E[own].to(value), how, weight)
        return at_columns_of(value, new, columns)

    hook = by_rows(write) if given is None else write
    with model.hooks([(name.__eq__, hook)], n_loops=n_loops):
        yield model


def _moved(
    state: Float[Tensor, "batch pos d_model"],
    embedding: Float[Tensor, "batch pos d_model"],
    how: Realigned,
    weight: float,
) -> Float[Tensor, "batch pos d_model"]:
    """The state moved to an embedding."""
    if how == "blend":
        return weight * embedding + (1 - weight) * state
    if how == "replace":
        return embedding
    lengths = [widened(x).norm(dim=-1, keepdim=True) for x in (embedding, state)]
    ratio: Tensor = (lengths[0] / lengths[1]).to(state)
    return state * ratio


def _for_rows(tokens: Int[Tensor, " batch"], value: Tensor) -> Int[Tensor, "batch pos"]:
    if tokens.shape != value.shape[:1]:
        raise ValueError(
            f"one token per row is needed: the run has {value.shape[0]} rows, got the shape"
            f" {list(tokens.shape)}"
        )
    return tokens.to(value.device)[:, None].expand(value.shape[:2])


@torch.no_grad()
def _lens_tokens(
    model: LoopedModel, state: Float[Tensor, "batch pos d_model"], rank: int
) -> Int[Tensor, "batch pos"]:
    """The token of a rank that the logit lens reads in every state, a few rows at a time."""
    rows = max(1, LOGITS_AT_ONCE // (state.shape[1] * model.cfg.d_vocab))
    parts = [
        top_tokens(widened(model.unembed(model.normalize(part))), rank + 1)[..., rank]
        for part in state.split(rows)
    ]
    return torch.cat(parts)
