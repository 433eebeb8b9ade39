"""Logit lenses: the answers of a model after every visit, or after every iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.collecting import Collected, collect
from loopscope.interp.common.columns import at_positions, read_columns
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch, begin_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.lens.kept import LensJob
from loopscope.interp.lens.record import Lens, ReadVisit, visits_of
from loopscope.interp.shards.share import Shard
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State, checked_loops


@torch.no_grad()
@evaluated
def logit_lens(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Literal["all"] | Sequence[int] | None = None,
    keep_logits: bool = False,
    batch_size: int = 512,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> Lens:
    """Read a prediction from the residual stream after every visit, through the final norm and the
    unembedding alone.

    Under `accelerate launch` the processes share the examples, and each returns the whole lens.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns to read instead of the answer position; "all" for every one.
        keep_logits: Whether the record keeps all logits.
        batch_size: How many rows run at a time.
        save_to: A folder that keeps results. If the call was interrupted, the same call goes on
            from there. `merge` joins the results of all shards.
        shard: (i, n) computes the i-th of n shares of the examples, cut into pieces of
            `batch_size`; None computes all.

    Returns:
        A `Lens` with one entry per visit.

    Source:
        nostalgebraist, "interpreting GPT: the logit lens", 2020; figure 4 of arXiv 2604.07822.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)

    def heads_input(part: Batch) -> Float[Tensor, "visit read d_model"]:
        run = residuals(model, part, read_columns(part, positions), n_loops)
        return model.normalize(torch.stack(list(run.values.values())))

    places = visits_of(model, n_loops)
    return LensJob(
        "logit_lens",
        model,
        batch,
        n_loops,
        places,
        positions,
        batch_size,
        heads_input,
        save_to,
        shard,
    ).lens(keep_logits)


def residuals(
    model: LoopedModel, batch: Batch, columns: Int[Tensor, "batch k"], n_loops: int
) -> Collected:
    """The residual after every visit (at the family's `lens_site`), "read d_model" at some columns,
    by hook name; and the state at the end.
    """
    names = [f"{visit.name}.{model.lens_site}" for visit in model.schedule(n_loops)]
    return collect(
        model, batch, names, n_loops, reduce=lambda x, name: at_positions(x, columns).flatten(0, 1)
    )


@torch.no_grad()
@evaluated
def readout_lens(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Literal["all"] | Sequence[int] | None = None,
    keep_logits: bool = False,
    batch_size: int = 512,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> Lens:
    """Read the model's own answer after every iteration, as if it stopped there, in one run.

    After each iteration the state goes through all that follows the loop: coda, final norm and
    unembedding. If the family declares `prefix_readout`, the entry of loop t is the answer of a
    call with n_loops=t+1.

    Under `accelerate launch` the processes share the examples, and each returns the whole lens.

    Args:
        inputs, n_loops, readout, positions, keep_logits, batch_size, save_to, shard: The run and
            the reads, as `logit_lens` describes them.

    Returns:
        A `Lens` with one entry per iteration.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    stops = dict(zip(model.iteration_ends(n_loops), iterations_of(n_loops), strict=True))
    return LensJob(
        "readout_lens",
        model,
        batch,
        n_loops,
        list(stops.values()),
        positions,
        batch_size,
        _through(model, n_loops, stops, positions),
        save_to,
        shard,
    ).lens(keep_logits)


@torch.no_grad()
@evaluated
def coda_lens(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Literal["all"] | Sequence[int] | None = None,
    keep_logits: bool = False,
    batch_size: int = 512,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> Lens:
    """Read a prediction from the state after every visit of the loop, through the coda, the final
    norm and the unembedding.

    After the last visit of an iteration it is the same as `readout_lens`. In a model without a coda
    it is the `logit_lens` of the state that the iteration hands on.

    Args:
        inputs, n_loops, readout, positions, keep_logits, batch_size, save_to, shard: The run and
            the reads, as `logit_lens` describes them.

    Returns:
        A `Lens` with one entry per visit of the loop.

    Source:
        The coda lens of arXiv 2507.02199.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    inside = [visit for visit in model.schedule(n_loops) if visit.loop is not None]
    stops = {visit.index + 1: (visit.loop, visit.layer, visit.name) for visit in inside}
    return LensJob(
        "coda_lens",
        model,
        batch,
        n_loops,
        list(stops.values()),
        positions,
        batch_size,
        _through(model, n_loops, stops, positions),
        save_to,
        shard,
    ).lens(keep_logits)


def iterations_of(n_loops: int) -> list[ReadVisit]:
    """The entries of a lens after every iteration."""
    return [(loop, None, f"loops.{loop}") for loop in range(n_loops)]


def _through(
    model: LoopedModel,
    n_loops: int,
    stops: Mapping[int, ReadVisit],
    positions: Literal["all"] | Sequence[int] | None,
) -> Callable[[Batch], Float[Tensor, "visit read d_model"]]:
    """The head's input of a run that stops at some visits, each of them read through what follows
    the loop.

    Args:
        stops: What is read before each visit's index, in order.
    """

    def heads_input(part: Batch) -> Float[Tensor, "visit read d_model"]:
        state = begin_batch(model, part, n_loops)
        seen = []
        for stop in stops:
            state = model.advance(state, stop)
            seen.append(heads_input_of(model, state, part, positions))
        return torch.stack(seen)

    return heads_input


def heads_input_of(
    model: LoopedModel,
    state: State,
    part: Batch,
    positions: Literal["all"] | Sequence[int] | None = None,
) -> Float[Tensor, "read d_model"]:
    """The head's input of a state, run through what follows the loop, at the readout of each row or
    at some columns.
    """
    state = model.finish(state)
    if positions is None:
        return model.read_state(state, part.readout)[:, 0]
    return at_positions(model.read_state(state), read_columns(part, positions)).flatten(0, 1)
