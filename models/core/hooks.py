"""Hook points that exist once per iteration, and the one resolver that finds them by name.

A `PointTree` holds the points of one place in the schedule under TransformerLens's site names.
While a model runs, each place is given its `Taps`: only the points that hold a hook at that moment,
so that an idle site costs a dictionary look-up and no module call.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Taps = Mapping[str, HookPoint]
NO_TAPS: Taps = {}


class LoopHookPoint(HookPoint):
    """A TransformerLens HookPoint that knows its iteration: `hook.loop()` and `hook.layer()`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # TransformerLens leaves it unannotated

    def loop(self) -> int | None:
        """The iteration in this point's name, counted from 0; None outside the loop."""
        return _number_after("loops", self.name)

    def layer(self) -> int:
        """The block's number in this point's name; ValueError for a point that is in no block."""
        for stack in ("blocks", "prelude", "coda"):
            number = _number_after(stack, self.name)
            if number is not None:
                return number
        raise ValueError(f"hook point {self.name!r} is in no block, so it has no layer")


def loop_of(name: str) -> int | None:
    """The iteration in a hook name, from 0; None outside the loop."""
    return _number_after("loops", name)


def _number_after(word: str, name: str | None) -> int | None:
    found = re.search(rf"(?:^|\.){word}\.(\d+)\.", name or "")
    return int(found.group(1)) if found else None


class PointTree(nn.Module):
    """A place in a tree of hook points, reachable as `model.loops[3].blocks[0].attn.hook_q`."""

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))


def add_point(root: nn.Module, name: str, training: bool) -> HookPoint:
    """Make the hook point with this full name, and the places above it that do not exist yet."""
    node = root
    *path, last = name.split(".")
    for depth, step in enumerate(path, start=1):
        child = node._modules.get(step)
        if child is None:
            child = PointTree()
            child.name = ".".join(path[:depth])  # type: ignore[assignment]  # TransformerLens names every module
            child.train(training)
            node.add_module(step, child)
        node = child
    point = LoopHookPoint()
    point.name = name
    point.train(training)
    node.add_module(last, point)
    return point


def _hook_dicts(point: HookPoint) -> tuple[Mapping[int, object], ...]:
    """Where PyTorch keeps what is attached to a module."""
    return (
        point._forward_hooks,
        point._backward_hooks,
        point._forward_pre_hooks,
        point._backward_pre_hooks,
    )


class HookWatch:
    """Tells at the cost of a few nanoseconds per point whether any of many points holds a hook.

    It looks at PyTorch's own dictionaries, so no way of attaching a hook escapes it.
    """

    def __init__(self) -> None:
        self._dicts: list[Mapping[int, object]] = []

    def add(self, point: HookPoint) -> None:
        """Watch a point."""
        self._dicts += _hook_dicts(point)

    def __bool__(self) -> bool:
        return any(self._dicts)


def is_hooked(point: HookPoint) -> bool:
    """Whether anything, TransformerLens's or PyTorch's own, is attached to the point."""
    return any(_hook_dicts(point))


def live(points: Mapping[str, HookPoint]) -> Taps:
    """The points that hold a hook now."""
    return {site: point for site, point in points.items() if is_hooked(point)}


def tap(taps: Taps, site: str, value: Tensor) -> Tensor:
    """Pass a value through its hook point if that point holds a hook."""
    point = taps.get(site)
    return value if point is None else point(value)


def is_pattern(names: NamesFilter) -> bool:
    """Whether the filter can match different names in calls of different length."""
    if isinstance(names, str):
        return "*" in names
    if isinstance(names, Sequence):
        return any("*" in name for name in names)
    return True


def resolve(names: NamesFilter, available: Mapping[str, None], n_loops: int) -> list[str]:
    """The hook names, in order of execution, that a filter means in a call of `n_loops` iterations.

    Args:
        names: A name, a pattern (`*` stays inside one segment, `**` is any number of segments), a
            list of those, a predicate, or None for all.
        available: The names of the call, in order of execution.
        n_loops: Iterations of the call, for the message.

    Raises:
        KeyError: The filter, or one entry of the list, matches nothing in this call; the message
            gives the nearest names.
    """
    if names is None:
        return list(available)
    if isinstance(names, str) and names in available:
        return [names]
    if callable(names):
        chosen = {name for name in available if names(name)}
    else:
        entries = [names] if isinstance(names, str) else names
        chosen = set().union(*(_matches(entry, available, n_loops) for entry in entries))
    if not chosen:
        what = "predicate matches none" if callable(names) else "list is empty and so matches none"
        raise KeyError(
            f"the {what} of the {len(available)} hook names of a call with n_loops={n_loops}"
        )
    return [name for name in available if name in chosen]


def _matches(entry: str, available: Mapping[str, None], n_loops: int) -> set[str]:
    if entry in available:
        return {entry}
    matcher = _compile(entry)
    found = {name for name in available if matcher.fullmatch(name + ".")} if "*" in entry else set()
    if not found:
        raise KeyError(_nothing_matches(entry, available, n_loops))
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    """A regular expression over a name with a dot put behind it."""
    parts = []
    for segment in pattern.split("."):
        inside = "[^.]*".join(re.escape(piece) for piece in segment.split("*"))
        parts.append(r"(?:[^.]+\.)*" if segment == "**" else inside + r"\.")
    return re.compile("".join(parts))


def _nothing_matches(entry: str, available: Mapping[str, None], n_loops: int) -> str:
    loop = loop_of(entry + ".")
    if loop is not None and loop >= n_loops:
        return (
            f"{entry!r} is not in this call: with n_loops={n_loops} the iterations are loops.0 to"
            f" loops.{n_loops - 1}"
        )
    inside = [name for name in available if name.endswith("." + entry)]
    nearest = inside[:3] or difflib.get_close_matches(entry, available, n=3, cutoff=0.3)
    hint = f"nearest: {', '.join(nearest)}" if nearest else "model.hook_names(n_loops) lists them"
    if inside:
        hint += (
            "; for every iteration write"
            f" {re.sub(r'loops[.][0-9]+', 'loops.*', inside[0], count=1)!r}"
        )
    return f"{entry!r} matches no hook point of a call with n_loops={n_loops}; {hint}"
