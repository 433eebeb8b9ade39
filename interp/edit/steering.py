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

from loopscope.interp.common.cells import HEAD_AXIS
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
from loopscope.interp.exits.exit_gate import GATE
from loopscope.models.basis.numbers import checked_factor, factor_like, given_tensor
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.cache import position_axis, site_of
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
    """Add a vector to activations: inside the `with` block every run is steered at the chosen
    places.

    After the block, also after an error, the model is as before. Runs inside must have `n_loops`
    iterations. Gradients reach `vectors`.

    Args:
        vectors: One vector for all rows, in the shape of the site without batch and pos:
            Float[Tensor, " d_model"], or Float[Tensor, "head d_head"] at q, k, v and z. Or one
            vector for each row, such as Float[Tensor, "batch d_model"].
        site: A site of the blocks, such as "resid_pre", "mlp_out" or "z", or of a whole iteration,
            such as "state_in".
        loops: The iterations, from 0; "all" for every one.
        layers: The blocks within an iteration, "all" for every one; None for a site of a whole
            iteration. If several visits share iteration and block, each of them is steered.
        visits: Visits by name or pattern, such as "loops.0.low.1.blocks.0" or "prelude.0"; for a
            site of a whole iteration runs of blocks, such as "loops.0.low.1". If loops or layers
            are given too, only visits that fit all of them are steered.
        positions: The columns of the text to change; "all" for every one. During generation columns
            still count from the beginning of the text.
        scale: A factor of the vectors; a tensor [batch, 1, 1] gives each row a factor of its own.
        n_loops: The number of iterations of the runs inside; None means the number that the
            checkpoint records.

    Yields:
        The model.

    Raises:
        KeyError: The model does not have the site or a visit.
        ValueError: No place is chosen, a place is out of range, or the second axis of the site is
            not pos. Runs inside raise it for another `n_loops`, and if the vectors do not have the
            shape of the site.

    Source:
        Turner et al. 2023 (arXiv 2308.10248), activation addition.
    """
    checked_factor(scale, "scale")
    with _writing(
        model,
        lambda value, name: value + factor_like(scale, value) * _fitted(vectors, value, name),
        given_tensor(vectors).ndim if given_tensor(scale).ndim < 2 else None,
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
    """Replace activations by a vector inside the `with` block.

    Args:
        vectors, site, loops, layers, visits, positions, n_loops: The vector and the places, as
            `steer` describes them. The vector is written instead of being added.

    Yields:
        The model.

    Raises:
        KeyError, ValueError: `steer` would refuse the call.
    """
    with _writing(
        model,
        lambda value, name: _fitted(vectors, value, name).expand_as(value),
        given_tensor(vectors).ndim,
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
    """Compute a vector for `steer`: the mean activation over one set of inputs, minus the mean over
    another.

    Args:
        positive, negative: The two sets of inputs: batches, texts, or token ids. Their sizes may
            differ. Activations are taken at the answer position.
        readout: For token ids, the column at which answers are read.
        site: The site, such as "resid_pre".
        loop, layer: The iteration and the block, from 0; `layer` is None for a site of a whole
            iteration.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        visit: The name of the visit instead of loop and layer. It must be given if several visits
            share both.

    Returns:
        The vector, in the shape of the site without batch and pos, e.g. Float[Tensor, " d_model"].

    Raises:
        KeyError: The model does not have the site or the visit.
        ValueError: The place is missing or out of range, or the second axis of the site is not pos.

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
    axes: int | None,
    site: str,
    where: Where,
    positions: Picked | int,
    n_loops: int | None,
) -> Iterator[LoopedModel]:
    n_loops, columns = checked_loops(n_loops, model.cfg.n_loops), checked_columns(positions)
    names = set(_points(model, site, where, n_loops))

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        return at_columns_of(value, new(value, str(hook.name)), columns)

    hook = by_rows(write) if all(_axes(name) == axes for name in names) else write
    # a predicate, so that another n_loops is refused
    with model.hooks([(names.__contains__, hook)], n_loops=n_loops):
        yield model


def _axes(name: str) -> int:
    """How many axes a vector has that all rows are given at a hook point."""
    site = site_of(name)
    return 2 if HEAD_AXIS.get(site) == 2 else 0 if site == GATE else 1


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
