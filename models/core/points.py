"""Which hook points a model has, which names a call has, and which hooks would never be reached.

A model has hundreds of hook points, and most runs use few of them. So a point is made where a hook
is attached, and all of them where somebody looks at the model's tree of points.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint, LensHandle

from loopscope.models.basis.names import NamesFilter, is_pattern, loop_of, resolve
from loopscope.models.core.hooks import HookWatch, PointTree, add_point, is_hooked, new_point
from loopscope.models.core.state import Slot, checked_loops

_WALK = threading.local()  # whether this thread looks only for weights
_MAKING = threading.RLock()  # one for all models, since a lock of its own could not be copied
SHOWN = 64  # iterations; hook points of later ones are made only where a hook is attached


class HookPoints:
    """The hook points of a model, which grow with the longest call and never go away.

    Args:
        root: The model, in whose tree of modules the points hang.
        plan: The slots of a call by its number of iterations.
        edges: Hook names before the first visit, and after the last.
        aside: Slots of passes that no plain call makes.
    """

    def __init__(
        self,
        root: nn.Module,
        plan: Callable[[int], Sequence[Slot]],
        edges: Callable[[], tuple[tuple[str, ...], tuple[str, ...]]],
        aside: Callable[[], Sequence[Slot]],
    ) -> None:
        self._root, self._plan, self._edges, self._aside = root, plan, edges, aside
        self._places: dict[str, dict[str, HookPoint]] = {}
        self._names: dict[int, dict[str, str]] = {}
        self._made: dict[str, HookPoint] = {}
        self._hung: dict[str, HookPoint] = {}
        self._shown: int | None = None
        self._planted = False
        self.longest = 0
        self.watch = HookWatch()
        self._by_loop: list[tuple[int, HookPoint]] = []
        self._by_pattern: list[tuple[int, object, list[RemovableHandle]]] = []
        self._edited: tuple[int, dict[str, str]] | None = None
        self._foreign: set[str] = set()  # names of points that were asked for during an edit

    # Names

    def names(self, n_loops: int) -> dict[str, str]:
        """The hook names of a call in order of execution, each with the prefix of its place."""
        if self._edited is None:
            return self._own_names(n_loops)
        refuse_other_length(n_loops, self._edited[0])
        return self._edited[1]

    def _own_names(self, n_loops: int) -> dict[str, str]:
        """The hook names of a call by the model's own schedule."""
        if n_loops not in self._names:
            self._names[n_loops] = self._call(self._plan(n_loops))
            self.grow(n_loops)
        return self._names[n_loops]

    def _call(self, slots: Sequence[Slot]) -> dict[str, str]:
        """The hook names of a call that visits these slots."""
        before, after = (dict.fromkeys(names, "") for names in self._edges())
        return {**before, **_names_of(slots), **after}

    def aside(self) -> dict[str, str]:
        """The hook names of passes that no plain call makes, each with the prefix of its place."""
        return _names_of(self._aside())

    def resolve(self, names: NamesFilter, n_loops: int | None, recorded: int | None) -> list[str]:
        """The hook names that a filter means in a call; see `models.basis.names.resolve`.

        Names of passes that no plain call makes must be written out from their first segment.

        Args:
            n_loops: Iterations of the call. None means what the checkpoint records for a pattern or
                a predicate; an exact name may then lie beyond it.
            recorded: Iterations that the checkpoint records.
        """
        if callable(names) or names is None:
            n_loops = checked_loops(n_loops, recorded)
            return resolve(names, self.names(n_loops), n_loops)
        entries = [names] if isinstance(names, str) else list(names)
        aside = self.aside()
        stages = {name.partition(".")[0] for name in aside}
        beside = [entry for entry in entries if entry.partition(".")[0] in stages]
        others = [entry for entry in entries if entry not in beside]
        found = resolve(beside, aside, n_loops or 1) if beside else []
        if others or not beside:
            n_loops = self._loops_for(others, n_loops, recorded)
            found = resolve(others, self.names(n_loops), n_loops) + found
        return found

    def _loops_for(self, entries: list[str], n_loops: int | None, recorded: int | None) -> int:
        """The length of the call that entries belong to; exact names may lie beyond what the
        checkpoint records.
        """
        if n_loops is None and self._edited is not None:
            return self._edited[0]
        if n_loops is None and not is_pattern(entries):
            furthest = max((loop_of(entry + ".") or 0 for entry in entries), default=0) + 1
            n_loops = max(furthest, recorded or 1, self.longest)
        return checked_loops(n_loops, recorded)

    # Points

    def place(self, prefix: str) -> dict[str, HookPoint]:
        """The points that were made at one place so far, by site; the dictionary is live."""
        return self._places.setdefault(prefix, {})

    def grow(self, n_loops: int) -> None:
        """Let the model have the points of calls of up to `n_loops` iterations."""
        if not self._planted:
            self._planted = True
            self._plant()
        if self._edited is not None:
            return
        self.longest = max(self.longest, n_loops)
        if self._shown is not None and self._shown < min(self.longest, SHOWN):
            self.all()

    def begin_edit(self, n_loops: int, slots: Sequence[Slot]) -> None:
        """Let a call have the names of these slots alone."""
        self._edited = (n_loops, self._call(slots))
        if self._shown is not None:
            self._shown = 0
        self.watch.begin_edit()

    def end_edit(self) -> None:
        """Let calls have the names of the model's own schedule again."""
        self._edited = None
        self.watch.end_edit()

    def replan(self) -> None:
        """Forget the names of all calls, because the schedule has changed."""
        self._names.clear()
        if self._shown is not None:
            self._shown = 0
        self.grow(self.longest)

    def point(self, name: str) -> HookPoint:
        """The point with a full name.

        Raises:
            KeyError: No call so far has this name; `resolve` has more to say about names.
        """
        if self._edited is not None:
            self._foreign.add(name)
        with _MAKING:
            if name not in self._made:
                self._make(name, self._place_of(name))
                if self._shown is not None:
                    self._hang(name)
        return self._made[name]

    def _place_of(self, name: str) -> str:
        edited = {} if self._edited is None else self._edited[1]
        own = self._own_names(self.longest)
        for names in (edited, *self._names.values(), own, self.aside()):
            if name in names:
                return names[name]
        raise KeyError(f"{name!r} is no hook point of a call with n_loops={self.longest}")

    def all(self) -> dict[str, HookPoint]:
        """Every point by name, hung in the model's tree; of the iterations from `SHOWN` on, those
        that were made.
        """
        length = min(self.longest, SHOWN)
        with _MAKING:
            if self._shown is None or self._shown < length:
                self._shown = length
                edited = {} if self._edited is None else self._edited[1]
                names = {**self._own_names(length), **edited, **self.aside()}
                for name, prefix in names.items():
                    if name not in self._made:
                        self._make(name, prefix)
                for name in self._made:
                    self._hang(name)
        return self._hung

    def show(self) -> bool:
        """Hang all points in the model's tree; False where only weights are looked for there."""
        if getattr(_WALK, "hidden", False):
            return False
        self.all()
        return True

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside the `with` block no walk of this thread through a tree makes points."""
        before, _WALK.hidden = getattr(_WALK, "hidden", False), True
        try:
            yield
        finally:
            _WALK.hidden = before

    def _plant(self) -> None:
        """Open a tree for each stage of the schedule that has no modules of its own, and make the
        points that have their place elsewhere.
        """
        names = {**self._own_names(1), **self.aside()}
        for name, prefix in names.items():
            stage, dot, _ = name.partition(".")
            if dot and stage not in self._root._modules:
                self._root.add_module(stage, PointTree(stage, self._root.training, self.show))
            elif not isinstance(self._root._modules.get(stage), PointTree):
                self._make(name, prefix)
                self._hang(name)

    def _make(self, name: str, prefix: str) -> None:
        point = new_point(name, self._root.training)
        self._made[name] = point
        self.place(prefix)[name[len(prefix) + 1 :] if prefix else name] = point
        loop = loop_of(name)
        if loop is not None:
            self._by_loop.append((loop, point))
        self.watch.add(point)

    def _hang(self, name: str) -> None:
        """Give a point its place in the model's tree."""
        if name not in self._hung:
            point = self._hung[name] = self._made[name]
            point.training = self._root.training
            add_point(self._root, point)

    # Hooks

    def hooked(self) -> dict[str, HookPoint]:
        """The points that hold a hook now, by name."""
        return {name: point for name, point in self._made.items() if is_hooked(point)}

    def hooked_aside(self) -> list[str]:
        """The points that hold a hook in passes that no plain call makes."""
        aside = self.aside()
        return [name for name in self.hooked() if name in aside]

    def belongs_to(self, n_loops: int, handles: list[LensHandle]) -> None:
        """Note that hooks were chosen by a pattern for calls of `n_loops` iterations.

        The functions are not kept: what they hold is free as soon as they are taken off.
        """
        self._by_pattern.append((n_loops, self._edited, [handle.hook for handle in handles]))

    def refuse_late(self, n_loops: int) -> None:
        """Raise if one of the hooks would silently never fire in a call of `n_loops` iterations.

        Raises:
            ValueError: A hook is at a later iteration, or was given by a pattern for a call of
                another length.
        """
        for loop, point in self._by_loop:
            if loop >= n_loops and is_hooked(point):
                raise ValueError(
                    f"a hook is attached at {point.name!r}, but a call with n_loops={n_loops} has"
                    f" only the iterations 0 to {n_loops - 1}"
                )
        self._refuse_absent(n_loops)
        self._by_pattern = [given for given in self._by_pattern if any(map(is_attached, given[2]))]
        for resolved_for, edited, _ in self._by_pattern:
            if edited is not self._edited:
                raise ValueError(
                    "hooks given by a pattern were attached for another schedule than the one that"
                    " is on (schedule_edit); add them inside its context, and leave theirs first"
                )
            if resolved_for != n_loops:
                raise ValueError(
                    f"hooks given by a pattern were attached for n_loops={resolved_for}, but this"
                    f" call runs n_loops={n_loops}; pass n_loops={n_loops} where they are added"
                )

    def _refuse_absent(self, n_loops: int) -> None:
        """Raise if a hook is at a point that the schedule that is on does not have."""
        asked = self._foreign if self._edited is None else self._made
        hooked = [name for name in asked if name in self._made and is_hooked(self._made[name])]
        known = {**self.names(n_loops), **self.aside()} if hooked else {}
        absent = [name for name in hooked if name not in known]
        if absent:
            raise ValueError(
                f"a hook is attached at {absent[0]!r}, which the schedule that is on does not have"
                " (schedule_edit); attach it and take it off inside one context"
            )


def refuse_other_length(n_loops: int, edited: int) -> None:
    """Raise where a call has another number of iterations than the edited schedule that is on."""
    if n_loops != edited:
        raise ValueError(
            f"the schedule of this model is edited (schedule_edit) and has {edited} iterations, got"
            f" n_loops={n_loops}; pass n_loops={edited}, or leave the context"
        )


def is_attached(handle: RemovableHandle) -> bool:
    """Whether a hook is still where it was attached."""
    return handle.id in (handle.hooks_dict_ref() or ())


def _names_of(slots: Sequence[Slot]) -> dict[str, str]:
    """The hook names of slots in order of execution, each with the prefix of its place."""
    return {name: prefix for slot in slots for name, prefix in slot.places_of_names()}
