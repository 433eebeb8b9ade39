"""Hook points that exist once per iteration, and the one resolver that finds them by name.

A `PointTree` holds the points of one place in the schedule under TransformerLens's site names.
While a model runs, each place is given its `Taps`: only the points that hold a hook at that moment,
so that an idle site costs a dictionary look-up and no module call. A hook is given a copy of the
value, and its result must have the value's shape, dtype and device.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint, LensHandle

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Taps = Mapping[str, HookPoint]
NO_TAPS: Taps = {}


Fn = TypeVar("Fn", bound=Callable[..., Any])


def only_reads(hook: Fn) -> Fn:
    """Mark a hook that neither changes its value in place nor returns another, so that the hook is
    given the value and no copy.
    """
    hook.only_reads = True  # type: ignore[attr-defined]  # a function may carry a mark
    return hook


class LoopHookPoint(HookPoint):
    """A TransformerLens HookPoint that knows its iteration: `hook.loop()` and `hook.layer()`.

    A hook is given a copy of the value, so that a hook that writes into the value changes nothing
    that was cached or handed in. The run goes on with what the hook returns, or with the copy where
    the hook returns None.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # TransformerLens leaves it unannotated

    def add_hook(self, hook: Callable[..., Any], dir: str = "fwd", **options: Any) -> LensHandle:
        """Attach a hook `fn(value, hook)`, as TransformerLens does."""
        if not callable(hook):
            raise TypeError(f"a hook must be a function, got {type(hook).__name__}")
        handle: LensHandle = super().add_hook(hook, dir=dir, **options)
        if dir == "fwd" and getattr(hook, "only_reads", False):
            hooks = self._forward_hooks
            hooks[handle.hook.id] = hooks[handle.hook.id].__wrapped__
        return handle

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """Attach PyTorch's own hook `fn(module, inputs, output)`."""
        return super().register_forward_hook(_on_copies(hook), **options)

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], **options: Any
    ) -> RemovableHandle:
        """Attach PyTorch's own hook `fn(module, inputs)`."""
        return super().register_forward_pre_hook(_on_copies(hook), **options)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], **options: Any
    ) -> RemovableHandle:
        """Attach PyTorch's own hook `fn(module, grad_input, grad_output)`."""
        return super().register_full_backward_hook(_on_copies(hook), **options)

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


def _on_copies(hook: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's hook, given copies of all that it may write into."""

    @wraps(hook)
    def on_copies(point: HookPoint, *values: Any) -> Any:
        *others, last = values
        old = last[0] if isinstance(last, tuple) else last
        if old is None:
            return hook(point, *values)
        new = old.clone()
        own = (new,) if isinstance(last, tuple) else new
        result = hook(
            point, *((new,) if isinstance(other, tuple) else other for other in others), own
        )
        if result is None:
            return own
        _require_like(result[0] if isinstance(result, tuple) else result, old, point)
        return result

    return on_copies


def _require_like(result: object, value: Tensor, point: HookPoint) -> None:
    """A hook's result must be able to stand for the value.

    Raises:
        TypeError: The result is no tensor.
        ValueError: The result has another shape, dtype or device.
    """
    if not isinstance(result, Tensor):
        raise TypeError(
            f"a hook at {point.name!r} must return a tensor or None, got {type(result).__name__}"
        )
    for fact in ("shape", "dtype", "device"):
        got, wanted = getattr(result, fact), getattr(value, fact)
        if got != wanted:
            shown = [list(x) if fact == "shape" else x for x in (wanted, got)]
            raise ValueError(
                f"a hook at {point.name!r} must return a tensor of the value's {fact} {shown[0]},"
                f" got {shown[1]}"
            )


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


class SitePoints(Mapping[str, HookPoint]):
    """The points of one place in the schedule by site, e.g. `attn.hook_z` of `loops.3.blocks.0`.

    Args:
        place: Prefix of the points' names; empty for the points outside every visit.
        sites: In order of execution.
        points: All points by full name; a point is made when it is asked for.
        made: Those that are made.
    """

    __slots__ = ("_made", "_points", "_prefix", "sites")

    def __init__(
        self,
        place: str,
        sites: tuple[str, ...],
        points: Mapping[str, HookPoint],
        made: Mapping[str, HookPoint],
    ) -> None:
        self._prefix = f"{place}." if place else ""
        self.sites, self._points, self._made = sites, points, made

    def __getitem__(self, site: str) -> HookPoint:
        if site not in self.sites:
            raise KeyError(site)
        return self._points[self._prefix + site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def made(self) -> dict[str, HookPoint]:
        """The points that something has asked for; no other can hold a hook."""
        found = {site: self._made.get(self._prefix + site) for site in self.sites}
        return {site: point for site, point in found.items() if point is not None}


def live(points: Mapping[str, HookPoint]) -> Taps:
    """The points that hold a hook now."""
    made = points.made() if isinstance(points, SitePoints) else points
    return {site: point for site, point in made.items() if is_hooked(point)}


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
        raise KeyError(nothing_matches(entry, available, n_loops))
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    """A regular expression over a name with a dot put behind it."""
    parts = []
    for segment in pattern.split("."):
        inside = "[^.]*".join(re.escape(piece) for piece in segment.split("*"))
        parts.append(r"(?:[^.]+\.)*" if segment == "**" else inside + r"\.")
    return re.compile("".join(parts))


def nothing_matches(entry: str, available: Mapping[str, None], n_loops: int) -> str:
    """The sentence that a name or pattern matches nothing in a call, with the nearest names."""
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
