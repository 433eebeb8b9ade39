"""Interventions in time: another order of iterations and layers, some of them skipped, repeated or
frozen.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from loopscope.interp.common.modes import evaluating
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.schedule import UnrunnableSchedule
from loopscope.models.core.state import State, Visit, checked_loops

_FROZEN_SITES = ("hook_resid_pre", "hook_resid_post")


@dataclass(frozen=True)
class Freeze:
    """An entry of `schedule_edit`: blocks do not run, but their outputs at an earlier iteration are
    added to the residual stream again.

    Attributes:
        visit: The visit or the iteration that does not run, such as "loops.3.blocks.0" or
            "loops.3".
        at: The earlier visit or iteration of the list whose outputs are added, such as
            "loops.2.blocks.0" or "loops.2". If several entries repeat it, the last one before this
            entry counts.
    """

    visit: str
    at: str


@dataclass(frozen=True)
class _Entry:
    """One visit of the list.

    Attributes:
        own: The visit of the model's own schedule.
        frozen: What it is frozen at; empty where it is run.
        begins: Whether it begins an iteration that was named as a whole.
    """

    own: Visit
    frozen: str
    begins: bool


@contextmanager
def schedule_edit(
    model: LoopedModel, order: Sequence[str | Freeze], n_loops: int | None = None
) -> Iterator[LoopedModel]:
    """Edit the schedule: inside the `with` block every run goes through another list of iterations
    and blocks, so that some are skipped, repeated, reordered or frozen.

    Each visit of the list keeps what it has in the model's own schedule: its weights, its injection
    and all that depends on its iteration. The parts before and after the loop stay. After the
    block, also after an error, the model is as before.

    Inside, the iterations of the list are numbered anew, in the order in which they run, so that
    every visit has a name of its own. After `["loops.0", "loops.1", "loops.1"]` the names are
    loops.0, loops.1 and loops.2, and `model.schedule(3)[-1].acts_as.name` says which visit the last
    one repeats. Successive visits of one iteration stay one iteration, until one of them comes
    again or a whole iteration is named. An iteration opens before its first visit and closes after
    its last one, whichever visits these are.

    Runs inside must have as many iterations as the list. A state that was begun under another
    schedule is refused, and so are hooks that were given by a pattern under another schedule.
    Compiled models run without compilation inside.

    Args:
        order: The names of iterations ("loops.2") and of visits ("loops.2.blocks.0"), and `Freeze`
            entries, in the order in which they run. Names that are left out are skipped.
        n_loops: The number of iterations of the call in which the names are looked up; None means
            the number that the checkpoint records.

    Yields:
        The model.

    Raises:
        KeyError: A name is not a visit or an iteration of the loop.
        UnrunnableSchedule: The list is empty, or the family cannot run it. It is a ValueError.
        ValueError: A `Freeze` has no earlier visit, the model calls its blocks by itself (`wrap`),
            or another edit is on.
    """
    if not model.runs_visits:
        raise ValueError(
            f"the blocks of a {type(model).__name__} are called by its own code in its own order,"
            " so its schedule cannot be edited; register the module as a family"
        )
    if model.edited is not None:
        raise ValueError(
            "the schedule of this model is edited already; leave that schedule_edit first, or give"
            " one list for both"
        )
    visits = _visits(model, order, checked_loops(n_loops, model.cfg.n_loops))
    with evaluating(model):  # dropout would draw from the caller's generator
        _try(model, visits)
    with model.scheduled(visits):
        yield model


def _visits(model: LoopedModel, order: Sequence[str | Freeze], n_loops: int) -> list[Visit]:
    """The visits of the edited call."""
    schedule = model.schedule(n_loops)
    listed = [order] if isinstance(order, str) else order
    entries = [each for entry in listed for each in _expanded(schedule, entry, n_loops)]
    if not entries:
        raise UnrunnableSchedule(
            "a schedule needs at least one visit of the loop, got an empty list"
        )
    inside = [visit.index for visit in schedule if visit.loop is not None]
    made: list[Visit] = []
    for loop, entries_of_loop in enumerate(_iterations(entries)):
        _check_end(schedule, entries_of_loop, loop)
        for _, run in groupby(entries_of_loop, key=lambda entry: entry.own.scope):
            made += _run(schedule, list(run), loop)
    made = _frozen(made, entries)
    outside = [replace(visit, acts_as=visit) for visit in schedule]
    return [*outside[: inside[0]], *made, *outside[inside[-1] + 1 :]]


def _expanded(schedule: list[Visit], entry: str | Freeze, n_loops: int) -> Iterator[_Entry]:
    """The visits that an entry means, in the order of the schedule."""
    name = entry.visit if isinstance(entry, Freeze) else entry
    if not isinstance(name, str):
        raise TypeError(f"order must hold names and Freeze entries, got {entry!r}")
    for i, visit in enumerate(_named(schedule, name, n_loops)):
        at = entry.at + visit.name.removeprefix(name) if isinstance(entry, Freeze) else ""
        yield _Entry(visit, at, i == 0 and name == f"loops.{visit.loop}")


def _named(schedule: list[Visit], name: str, n_loops: int) -> list[Visit]:
    """The visits that a name means, all of them in the loop."""
    found = [visit for visit in schedule if f"{visit.name}.".startswith(f"{name}.")]
    if not found:
        inside = [visit for visit in schedule if visit.loop is not None]
        known = dict.fromkeys([f"loops.{v.loop}" for v in inside] + [v.name for v in inside])
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)[:3]
        raise KeyError(
            f"{name!r} is no visit of the loop of a call with n_loops={n_loops}; nearest:"
            f" {', '.join(nearest)}"
        )
    if found[0].loop is None:
        raise ValueError(f"visits outside the loop stay where they are; leave {name!r} out")
    return found


def _iterations(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """The visits of each iteration of the edited call."""
    found: list[list[_Entry]] = []
    for entry in entries:
        here = found[-1] if found else []
        again = entry.own.name in {other.own.name for other in here}
        if not here or entry.begins or again or entry.own.loop != here[-1].own.loop:
            found.append([])
        found[-1].append(entry)
    return found


def _check_end(schedule: list[Visit], entries: list[_Entry], loop: int) -> None:
    """Refuse an iteration that ends in another stack than the model's own, where the family has
    several: its last state would be another one.
    """
    own = entries[-1].own
    end = [visit.scope for visit in schedule if visit.loop == own.loop][-1]
    if re.sub("[0-9]+", "*", end) != re.sub("[0-9]+", "*", own.scope):
        raise UnrunnableSchedule(
            f"an iteration must end with {end.partition('.')[2].partition('.')[2]!r} as the model's"
            f" own does, but iteration {loop} of this list ends with {own.name!r}"
        )


def _run(schedule: list[Visit], entries: list[_Entry], loop: int) -> list[Visit]:
    """The visits of one run of a stack, which opens before the first and closes after the last."""
    scope = [visit for visit in schedule if visit.scope == entries[0].own.scope]
    opening = max((visit.opening for visit in scope), key=len)
    closing = max((visit.closing for visit in scope), key=len)
    last = len(entries) - 1
    owns = [
        replace(entry.own, opening=opening * (i == 0), closing=closing * (i == last))
        for i, entry in enumerate(entries)
    ]
    return [
        replace(
            own,
            name=_renamed(own.name, loop),
            scope=_renamed(own.scope, loop),
            loop=loop,
            acts_as=own,
        )
        for own in owns
    ]


def _renamed(name: str, loop: int) -> str:
    """A name inside an iteration, for another iteration."""
    return re.sub("^loops[.][0-9]+", f"loops.{loop}", name)


def _frozen(visits: list[Visit], entries: Sequence[_Entry]) -> list[Visit]:
    """The visits, of which some keep what their blocks add and some add it again."""
    made: list[Visit] = []
    for visit, entry in zip(visits, entries, strict=True):
        if not entry.frozen:
            made.append(visit)
            continue
        earlier = [i for i, each in enumerate(made) if entries[i].own.name == entry.frozen]
        if not earlier or made[earlier[-1]].frozen:
            raise ValueError(
                f"{entry.own.name!r} is frozen at {entry.frozen!r}, which must come before it in"
                " the list and must not be frozen itself"
            )
        kept = replace(made[earlier[-1]], keeps=f"added.{made[earlier[-1]].name}")
        made[earlier[-1]] = kept
        sites = tuple(site for site in visit.sites if site in _FROZEN_SITES)
        made.append(replace(visit, frozen=kept.keeps, sites=sites))
    return made


@torch.no_grad()
def _try(model: LoopedModel, visits: Sequence[Visit]) -> None:
    """Run the shortest input through the visits, without hooks, to see that the family can."""
    length = (model.cfg.n_ctx or 1) if model.fixed_length else 1
    positions = torch.arange(length, device=model.device)[None]
    tokens = torch.ones_like(positions)
    resid, parts = model.embed(tokens, positions, NO_TAPS)
    rows = Rows.make(State(0, 1, resid, positions, tokens.bool(), parts), type(model).visible)
    for visit in visits:
        try:
            resid, parts = model.run_visit(visit, resid, parts, rows, hooked=False)
        except KeyError as missing:
            raise UnrunnableSchedule(
                f"this {type(model).__name__} cannot run the list: {visit.name} (which is"
                f" {(visit.acts_as or visit).name}) needs the part {missing} of the state, which"
                " no visit before it leaves there"
            ) from None
