"""Steering: add a vector to activations at chosen iterations, or put it in their place.

Axes: batch pos d_model head d_head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.collecting import recorded
from loopscope.interp.common.columns import at_columns_of, checked_columns
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import (
    Picked,
    Place,
    VisitNames,
    Where,
    at_site,
    places_of,
)
from loopscope.interp.common.precision import widened
from loopscope.models.basis.numbers import checked_factor, factor_like, given_tensor
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.cache import position_axis
from loopscope.models.core.hooks import by_rows
from loopscope.models.core.state import checked_loops

_CHUNK = 512  # rows run at a time


@contextmanager
def steer(
    model: LoopedModel,
    vectors: Float[Tensor, "*shape"] | Sequence[float],
    *,
    site: str = "resid_pre",
    loops: Picked | int | None = None,
    layers: Picked | int | None = None,
    visits: VisitNames | None = None,
    positions: Picked | int = "all",
    scale: float | int | Tensor = 1.0,
    n_loops: int | None = None,
) -> Iterator[LoopedModel]:
    """Inside the `with` block a vector is added at some iterations; afterwards, also after an
    error, it is not.

    Gradients reach `vectors`. Runs inside must have `n_loops` iterations.

    Args:
        vectors: One for all rows, in the shape of the site without batch and pos (Float[Tensor, "
            d_model"], at q, k, v and z Float[Tensor, "head d_head"]), or one for each row
            (Float[Tensor, "batch d_model"], ...).
        site: e.g. "resid_pre", "mlp_out", "z"; or an iteration's own site, e.g. "state_in".
        loops: Iterations, from 0; "all" for every one.
        layers: Blocks within an iteration, "all" for every one; None for an iteration's own site.
            Where several visits share iteration and layer, the vector is added at each of them.
        visits: Visits by name or pattern, such as "loops.0.low.1.blocks.0" or "prelude.0"; for an
            iteration's own site the runs of stacks, such as "loops.0.low.1". Given together with
            loops or layers, it narrows them further.
        positions: Columns of the text that are written, "all" for every one. They count from the
            beginning of the text in every step of a generation too.
        scale: Multiplies the vectors; a tensor [batch, 1, 1] gives each row its own dose.
        n_loops: Iterations of the runs inside; None means what the checkpoint records.

    Raises:
        KeyError: A site or a visit that this model does not have.
        ValueError: No place or one out of range, a site whose second axis is not pos, and from the
            runs inside: vectors that do not have the site's shape, or another n_loops.

    Source:
        Turner et al. 2023 (arXiv 2308.10248), activation addition.
    """
    checked_factor(scale, "scale")
    with _writing(
        model,
        lambda value, name: value + factor_like(scale, value) * _fitted(vectors, value, name),
        given_tensor(vectors).ndim == 1 and given_tensor(scale).ndim == 0,
        site,
        Where(loops, layers, visits),
        positions,
        n_loops,
    ) as inside:
        yield inside


@contextmanager
def set_to(
    model: LoopedModel,
    vectors: Float[Tensor, "*shape"] | Sequence[float],
    *,
    site: str = "resid_pre",
    loops: Picked | int | None = None,
    layers: Picked | int | None = None,
    visits: VisitNames | None = None,
    positions: Picked | int = "all",
    n_loops: int | None = None,
) -> Iterator[LoopedModel]:
    """As `steer`, but the vector takes the activation's place instead of being added to it."""
    with _writing(
        model,
        lambda value, name: _fitted(vectors, value, name).expand_as(value),
        given_tensor(vectors).ndim == 1,
        site,
        Where(loops, layers, visits),
        positions,
        n_loops,
    ) as inside:
        yield inside


@torch.no_grad()
@evaluated
def steering_vector(
    model: LoopedModel,
    positive: Inputs,
    negative: Inputs,
    site: str,
    loop: int | None = None,
    layer: int | None = None,
    n_loops: int | None = None,
    readout: ReadoutColumn = None,
    *,
    visit: str | None = None,
) -> Float[Tensor, "*shape"]:
    """Mean activation at the readout of one set of inputs, minus that of another.

    Args:
        positive, negative: Batches, texts, or tokens with `readout`; they need not be equally many.
        site, loop, layer: One place; layer is None for an iteration's own site.
        visit: The visit by its name, in place of loop and layer; it must be given where several
            visits share both.
        n_loops: Iterations; None means what the checkpoint records.

    Returns:
        The site's shape without batch and pos, e.g. Float[Tensor, " d_model"]; what `steer` takes.

    Raises:
        KeyError, ValueError: As for `steer`.

    Source:
        Rimsky et al. 2024 (arXiv 2312.06681), contrastive activation addition.
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    where = Where(loop, layer, visit)
    names = _points(model, site, where, n_loops)
    if len(names) != 1:
        raise ValueError(
            f"one place is needed, but {site!r} at loop={loop}, layer={layer} is"
            f" {', '.join(names)}; name one of them with visit="
        )
    return _mean_at_readout(model, positive, names[0], n_loops, readout) - _mean_at_readout(
        model, negative, names[0], n_loops, readout
    )


@contextmanager
def _writing(
    model: LoopedModel,
    new: Callable[[Tensor, str], Tensor],
    shared: bool,
    site: str,
    where: Where,
    positions: Picked | int,
    n_loops: int | None,
) -> Iterator[LoopedModel]:
    n_loops, columns = checked_loops(n_loops, model.cfg.n_loops), checked_columns(positions)
    names = set(_points(model, site, where, n_loops))

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        return at_columns_of(value, new(value, str(hook.name)), columns)

    with model.hooks(
        [(names.__contains__, by_rows(write) if shared else write)], n_loops=n_loops
    ):  # a predicate, so that another n_loops is refused
        yield model


def _fitted(vectors: Tensor | Sequence[float], value: Tensor, name: str) -> Tensor:
    """The vectors with the axes of a site's value."""
    vectors = given_tensor(vectors).to(value)
    shared, each = value.shape[2:], (value.shape[0], *value.shape[2:])
    if vectors.shape == shared:
        return vectors
    if vectors.shape == each:
        return vectors[:, None]
    raise ValueError(
        f"vectors at {name!r} must have the shape {list(shared)}, or {list(each)} for one per row,"
        f" got {list(vectors.shape)}"
    )


def _points(model: LoopedModel, site: str, where: Where, n_loops: int) -> list[str]:
    """The hook points of a site at the chosen visits."""
    here = at_site(places_of(model, n_loops), site)
    meant = sorted({place.site for place in here})
    if len(meant) > 1:
        raise ValueError(f"{site!r} could be {' or '.join(meant)}; name the site in full")
    if position_axis(here[0].name) != 1:
        raise ValueError(
            f"{site!r} has a head axis before its positions, so no vector can be added there"
        )
    if where.visits is None:
        here = _with_coordinates(site, where, here)
    chosen = where.among(here, n_loops)
    if not chosen:
        raise ValueError(f"{site!r} does not occur at {where}")
    return [place.name for place in chosen]


def _with_coordinates(site: str, where: Where, here: Sequence[Place]) -> list[Place]:
    """The places inside the loop, which iterations and layers can name."""
    inside = [place for place in here if place.loop is not None]
    if not inside:
        raise ValueError(f"{site!r} lies outside the loop, so it has no iteration; pass visits=")
    if where.loops is None:
        raise ValueError(f"{site!r} needs loops= (iterations, or 'all') or visits=")
    layered = any(place.layer is not None for place in inside)
    if layered == (where.layers is None):
        rule = "needs layers= (blocks, or all)" if layered else "has no layer, so pass layers=None"
        raise ValueError(f"{site!r} {rule}")
    return inside


def _mean_at_readout(
    model: LoopedModel, inputs: Inputs, name: str, n_loops: int, readout: ReadoutColumn
) -> Tensor:
    batch = as_batch(model, inputs, readout)
    parts = in_chunks(batch, rows_at_once(model, batch, _CHUNK), "activations")
    total = sum(
        widened(at_columns(recorded(model, part, [name], n_loops)[name], part.readout)).sum(0)
        for part in parts
    )
    assert isinstance(total, Tensor), "a batch has rows"
    return total / len(batch)
