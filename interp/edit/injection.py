"""Interventions on the input that iterations are injected: weaken it, or inject that of another
question.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.collecting import recorded
from loopscope.interp.common.inputs import Inputs, reference_batch
from loopscope.interp.common.places import Picked, VisitNames, Where, in_range, places_of
from loopscope.models.basis.numbers import checked_number
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import by_rows
from loopscope.models.core.state import checked_loops


@contextmanager
def attenuate_input(
    model: LoopedModel,
    factor: float | int,
    loops: Picked | int = "all",
    n_loops: int | None = None,
    *,
    visits: VisitNames | None = None,
) -> Iterator[LoopedModel]:
    """Weaken the input injection: inside the `with` block the input that some iterations receive is
    multiplied by a factor.

    After the block, also after an error, the model is as before.

    Args:
        factor: The factor: 1 changes nothing, 0 injects zeros.
        loops: The iterations to change, from 0; "all" for every one that has an injection. If an
            iteration has several, as in nested cycles, all of them are changed.
        n_loops: The number of iterations of the runs inside; None means the number that the
            checkpoint records.
        visits: Runs of blocks by name or pattern, such as "loops.0.low.1", to which the change is
            limited; None means no limit.

    Yields:
        The model.

    Raises:
        ValueError: The model or a chosen iteration has no injection. Runs inside raise it for
            another `n_loops`.
    """
    checked_number(factor, "factor")
    names = _injections(model, loops, visits, checked_loops(n_loops, model.cfg.n_loops))

    @by_rows
    def weaken(value: Tensor, hook: HookPoint) -> Tensor:
        return factor * value

    with model.hooks([(set(names).__contains__, weaken)], n_loops=n_loops):
        yield model


@contextmanager
def swap_input(
    model: LoopedModel,
    other: Inputs,
    loops: Picked | int = "all",
    n_loops: int | None = None,
    *,
    visits: VisitNames | None = None,
) -> Iterator[LoopedModel]:
    """Exchange the input injection: inside the `with` block some iterations receive the input of
    another question, while the state that was computed before stays.

    After the block, also after an error, the model is as before.

    Args:
        other: The other question: a `Batch`, texts or token ids of the same shape as the runs
            inside. It is run once at the start of the block.
        loops, n_loops, visits: The injections to change, as `attenuate_input` describes them.

    Yields:
        The model.

    Raises:
        ValueError: `attenuate_input` would refuse the call. Runs inside raise it for another shape.
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    names = _injections(model, loops, visits, n_loops)
    injected = recorded(model, reference_batch(model, other), names, n_loops)

    def swap(value: Tensor, hook: HookPoint) -> Tensor:
        new = injected[str(hook.name)]
        if new.shape != value.shape:
            raise ValueError(
                f"the other input must have the shape of the run, {list(value.shape[:2])} (batch,"
                f" pos), got {list(new.shape[:2])}"
            )
        return new

    with model.hooks([(injected.__contains__, swap)], n_loops=n_loops):
        yield model


def _injections(
    model: LoopedModel, loops: Picked | int, visits: VisitNames | None, n_loops: int
) -> list[str]:
    """The points of what is injected at some iterations, in the order of the schedule."""
    places = [place for place in places_of(model, n_loops) if place.site == "hook_input"]
    injected = sorted({place.loop for place in places if place.loop is not None})
    if not injected:
        raise ValueError(
            "nothing is injected into this model's iterations in such a call: it has no"
            " 'hook_input'"
        )
    wanted = injected if isinstance(loops, str) else in_range("loops", loops, n_loops)
    missing = [f"at iteration {loop}" for loop in sorted(set(wanted) - set(injected))]
    if missing or not wanted:
        where = missing[0] if missing else "at loops=[]"
        raise ValueError(
            f"nothing is injected {where}; this model injects at the iterations {injected}"
        )
    return [place.name for place in Where(wanted, None, visits).among(places, n_loops)]
