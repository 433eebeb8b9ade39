"""The visits of a call: made once per number of iterations, and again when the model is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from torch import nn
from transformer_lens.hook_points import HookPoint

from loopscope.models.basis.numbers import checked_integer
from loopscope.models.core.hooks import PointTree
from loopscope.models.core.points import HookPoints, refuse_other_length
from loopscope.models.core.state import Slot, State, Visit

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class UnrunnableSchedule(ValueError):
    """A list of visits that a family cannot run."""


@dataclass(frozen=True)
class EditedSchedule:
    """The schedule of all calls while it is on.

    Attributes:
        visits: In order, each with the visit that it acts as.
        n_loops: Iterations of a call.
    """

    visits: tuple[Visit, ...]
    n_loops: int

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Each visit with what it runs, as `State.order` has it."""
        return tuple(f"{v.name} {(v.acts_as or v).name} {v.frozen}" for v in self.visits)

    def of(self, n_loops: int) -> list[Visit]:
        """The visits of a call; ValueError for a call of another number of iterations."""
        refuse_other_length(n_loops, self.n_loops)
        return list(self.visits)


class Schedules:
    """The schedules of a model by number of iterations.

    A schedule holds modules and is made by a config. So the model's lists of modules and its config
    are compared with those of last time before each use.

    Args:
        root: The model.
        plan: The slots of a call by its number of iterations.
        points: Where the visits find their hook points.
    """

    def __init__(
        self, root: nn.Module, plan: Callable[[int], Sequence[Slot]], points: HookPoints
    ) -> None:
        self._root, self._plan, self._points = root, plan, points
        self.made: dict[int, list[Visit]] = {}
        self._lists: list[tuple[nn.Module, list[nn.Module]]] = []
        self._cfg: object = None
        self.edit: EditedSchedule | None = None

    def refresh(self) -> None:
        """Forget all schedules and names of hooks if the model's blocks or its config were
        replaced.
        """
        cfg = getattr(self._root, "cfg", None)
        if cfg is self._cfg and all(_parts(owner) == parts for owner, parts in self._lists):
            return
        if self.edit is not None:
            raise ValueError(
                "the blocks or the config of this model were replaced while its schedule was"
                " edited; leave schedule_edit first"
            )
        self._cfg = cfg
        self._lists = [(owner, _parts(owner)) for owner in _owners(self._root)]
        self.made.clear()
        self._points.replan()

    def of(self, n_loops: int) -> list[Visit]:
        """The visits of a call in order."""
        self.refresh()
        if self.edit is not None:
            return self.edit.of(n_loops)
        if n_loops not in self.made:
            self._points.grow(n_loops)
            visits = [self.visit(i, slot, n_loops) for i, slot in enumerate(self._plan(n_loops))]
            self.made[n_loops] = self._with_own_blocks(visits, n_loops)
        return self.made[n_loops]

    def visit(self, index: int, slot: Slot, n_loops: int = 1) -> Visit:
        """A slot at its place in a schedule, with its hook points."""
        own = {f.name: getattr(slot, f.name) for f in fields(Slot)}
        return Visit(
            **own,
            index=index,
            n_loops=n_loops,
            points=self._points.place(slot.name),
            boundary=self._points.place(slot.scope) if slot.scope else {},
        )

    def begin_edit(self, visits: Sequence[Visit]) -> None:
        """Put other visits in the place of the model's own; they are given their hook points, and
        their places in the schedule, here.
        """
        assert self.edit is None, "schedule_edit refuses an edit inside another"
        n_loops = 1 + max(visit.loop for visit in visits if visit.loop is not None)
        self._points.begin_edit(n_loops, visits)
        placed = (
            replace(
                self.visit(i, visit, n_loops),
                acts_as=visit.acts_as,
                keeps=visit.keeps,
                frozen=visit.frozen,
            )
            for i, visit in enumerate(visits)
        )
        self.edit = EditedSchedule(tuple(placed), n_loops)

    def end_edit(self) -> None:
        """Put the model's own schedule back."""
        self.edit = None
        self._points.end_edit()

    def check(self, state: State) -> None:
        """Refuse a state of another schedule than the one that is on."""
        order = None if self.edit is None else self.edit.order
        if state.order != order:
            of = "the model's own schedule" if state.order is None else "an edited schedule"
            raise ValueError(
                f"a state is run by the schedule in which it was begun: this one is of {of}, which"
                " is not on; begin it again"
            )

    def index_of(self, until: int | str | None, state: State) -> int:
        """The index of the visit that a state is to be run to; `until` is as in `advance`."""
        self.check(state)
        schedule = self.of(state.n_loops)
        if until is None:
            return len(schedule)
        if isinstance(until, str):
            found = [v.index for v in schedule if v.name == until or v.name.startswith(until + ".")]
            if not found:
                raise KeyError(
                    f"{until!r} is no visit of a schedule with n_loops={state.n_loops}; it starts"
                    f" with {schedule[0].name!r}"
                )
            until = found[0]
        until = checked_integer(until, "until, where it is no visit's name,")
        if not state.visit <= until <= len(schedule):
            raise ValueError(
                f"the state stands before visit {state.visit} of {len(schedule)}, so it cannot be"
                f" run to visit {until}"
            )
        return until

    def _with_own_blocks(self, visits: list[Visit], n_loops: int) -> list[Visit]:
        """The visits with the blocks of an untied copy, where the model is one."""
        copies = getattr(self._root, "visit_blocks", None)
        if copies is None:
            return visits
        if len(visits) != len(copies):
            made_for = getattr(self._cfg, "n_loops", None)
            raise ValueError(
                f"an untied copy runs only the n_loops={made_for} that it was made for, got"
                f" {n_loops}"
            )
        return [replace(v, block=block) for v, block in zip(visits, copies, strict=True)]


def _parts(owner: nn.Module) -> list[nn.Module]:
    """The modules that one holds directly, without hook points."""
    return [
        part
        for part in owner._modules.values()
        if part is not None and not isinstance(part, PointTree | HookPoint)
    ]


def _owners(module: nn.Module, outermost: bool = True) -> Iterator[nn.Module]:
    """The modules below one in which blocks may stand: lists, what holds lists, and the first."""
    parts = _parts(module)
    if outermost or any(isinstance(owner, LISTS) for owner in (module, *parts)):
        yield module
    for part in parts:
        yield from _owners(part, outermost=False)
