"""The hook points of a model: which names exist, the points behind them, and what is attached.

`HookedRootModule` was made for a fixed set of points and fails silently on a growing one. Here a
name exists as soon as a call is long enough to have the name. The point behind the name is made
when something asks for the point, takes the model's mode, and never goes away. One resolver serves
every way of attaching a hook: a name that matches nothing raises, and so does a hook that a call
would never reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformer_lens.hook_points import HookPoint, LensHandle

from loopscope.models.core.hooks import (
    HookWatch,
    NamesFilter,
    SitePoints,
    add_point,
    is_hooked,
    is_pattern,
    loop_of,
    nothing_matches,
    resolve,
)
from loopscope.models.core.state import checked_loops

Hook = Callable[..., Any]
Direction = Literal["fwd", "bwd"]


@dataclass(frozen=True)
class Attached:
    """One hook on one point, which can be taken away without touching any other hook."""

    point: HookPoint
    handle: LensHandle

    @property
    def alive(self) -> bool:
        """Whether the hook is still on its point."""
        return any(self.handle is other for other in self.point.fwd_hooks + self.point.bwd_hooks)

    def remove(self) -> None:
        """Take the hook away; nothing happens where it is gone already."""
        self.handle.hook.remove()
        for handles in (self.point.fwd_hooks, self.point.bwd_hooks):
            handles[:] = [other for other in handles if other is not self.handle]


class HookPoints(Mapping[str, HookPoint]):
    """Points by full name, for all calls up to the longest so far.

    Args:
        root: The module below which the points stand.
        names_of_call: Every hook name of a call with so many iterations, in order of execution.
        spare_names: Names of points that no plain call has.
        recorded: Iterations that the checkpoint records; None where it records none.
    """

    def __init__(
        self,
        root: nn.Module,
        names_of_call: Callable[[int], list[str]],
        spare_names: Callable[[], list[str]],
        recorded: int | None,
    ) -> None:
        self.longest = 0
        self.made: dict[str, HookPoint] = {}
        self.watch = HookWatch()
        self._root = root
        self._names_of_call = names_of_call
        self._spare_names = spare_names
        self._recorded = recorded
        self._names: dict[int, dict[str, None]] = {}
        self._loop_names: list[tuple[int, str]] = []
        self._by_pattern: list[tuple[int, list[Attached]]] = []

    # Names, and the points behind them

    def __getitem__(self, name: str) -> HookPoint:
        if name not in self.made:
            if name not in self._every():
                raise KeyError(nothing_matches(name, self._every(), self.longest))
            point = add_point(self._root, name, self._root.training)
            self.made[name] = point
            self.watch.add(point)
            loop = loop_of(name)
            if loop is not None:
                self._loop_names.append((loop, name))
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._every())

    def __len__(self) -> int:
        return len(self._every())

    def __contains__(self, name: object) -> bool:
        return name in self._every()

    def grow(self, n_loops: int) -> None:
        """Let the points of calls of up to `n_loops` iterations exist; they never go away."""
        self.longest = max(self.longest, n_loops)

    def names(self, n_loops: int) -> dict[str, None]:
        """The names of a call in order of execution, quick to look one up in."""
        self.grow(n_loops)
        if n_loops not in self._names:
            self._names[n_loops] = dict.fromkeys(self._names_of_call(n_loops))
        return self._names[n_loops]

    def at(self, place: str, sites: Sequence[str]) -> SitePoints:
        """The points of one place, by site."""
        return SitePoints(place, tuple(sites), self, self.made)

    def forget_names(self) -> None:
        """Ask the model for its names anew, after its blocks were changed."""
        self._names.clear()

    def _every(self) -> dict[str, None]:
        """The names of the longest call, and the spare ones."""
        key = -self.longest
        if key not in self._names:
            spare = dict.fromkeys(self._spare_names())
            self._names[key] = {**self.names(self.longest), **spare} if self.longest else spare
        return self._names[key]

    def resolve(self, names: NamesFilter, n_loops: int | None) -> list[str]:
        """The hook names that a filter means in a call; see `hooks.resolve`.

        An exact name may lie beyond the call of `n_loops=None`. A pattern or a predicate needs the
        call's length.
        """
        if n_loops is None and not is_pattern(names):
            assert not callable(names), "a predicate counts as a pattern"
            entries = [names] if isinstance(names, str) else list(names or ())
            furthest = max((loop_of(entry + ".") or 0 for entry in entries), default=0) + 1
            n_loops = max(furthest, self._recorded or 1, self.longest)
        n_loops = checked_loops(n_loops, self._recorded)
        return resolve(names, self.names(n_loops), n_loops)

    # Hooks

    def attach(
        self,
        names: Sequence[str],
        hook: Hook,
        direction: Direction = "fwd",
        only_for: int | None = None,
        **options: Any,
    ) -> list[Attached]:
        """Attach a hook to some points, to all of them or to none.

        Args:
            names: Full names, from `resolve`.
            only_for: Iterations of the only calls that the hook may meet, where a pattern chose
                the names.
            options: As TransformerLens's `HookPoint.add_hook` takes them.
        """
        attached: list[Attached] = []
        try:
            for name in names:
                point = self[name]
                attached.append(Attached(point, point.add_hook(hook, dir=direction, **options)))
        except BaseException:
            for one in attached:
                one.remove()
            raise
        if only_for is not None:
            self._by_pattern.append((only_for, attached))
        return attached

    def refuse_late(self, n_loops: int) -> None:
        """Raise if a hook would silently never fire in a call of `n_loops` iterations.

        Raises:
            ValueError: A hook is at a later iteration, or was given by a pattern for a call of
                another length.
        """
        self.grow(n_loops)
        if not self.watch:
            return
        for loop, name in self._loop_names:
            if loop >= n_loops and is_hooked(self.made[name]):
                raise ValueError(
                    f"a hook is attached at {name!r}, but a call with n_loops={n_loops} has"
                    f" only the iterations 0 to {n_loops - 1}"
                )
        self._by_pattern = [
            (loops, attached)
            for loops, attached in self._by_pattern
            if any(one.alive for one in attached)
        ]
        for only_for, _ in self._by_pattern:
            if only_for != n_loops:
                raise ValueError(
                    f"hooks given by a pattern were attached for n_loops={only_for}, but this call"
                    f" runs n_loops={n_loops}; pass n_loops={n_loops} where they are added"
                )
