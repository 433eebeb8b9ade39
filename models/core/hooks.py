"""Hook points, and the two ways in which a value passes through one.

While a model runs, each place in the schedule is given its `Taps`: only the points that hold a hook
at that moment, so that an idle site costs a dictionary look-up and no module call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from loopscope.models.basis.names import number_after

Hook = Callable[..., Any]
AnyHook = TypeVar("AnyHook", bound=Hook)
Taps = Mapping[str, HookPoint]
NO_TAPS: Taps = {}


def _hook_dicts(point: HookPoint) -> tuple[Mapping[int, object], ...]:
    """Where PyTorch keeps what is attached to a module."""
    return (
        point._forward_hooks,
        point._backward_hooks,
        point._forward_pre_hooks,
        point._backward_pre_hooks,
    )


class HookWatch:
    """A quick test whether any of many hook points holds a hook; it costs a few nanoseconds per
    point.

    The watch looks at PyTorch's own dictionaries.

    Attributes:
        may_hold: False only while no point holds a hook. Every point that is given a hook sets it.
    """

    def __init__(self) -> None:
        self._dicts: list[Mapping[int, object]] = []
        self._edited = False
        self.may_hold = False

    def add(self, point: LoopHookPoint) -> None:
        """Include a point in the watch."""
        self._dicts += _hook_dicts(point)
        point.watch = self

    def begin_edit(self) -> None:
        """Count the edited schedule that begins as a hook, so that code compiled for the model's
        own schedule does not run.
        """
        self._edited = self.may_hold = True

    def end_edit(self) -> None:
        """Note that the model's own schedule is on again."""
        self._edited = False

    def __bool__(self) -> bool:
        return self._edited or any(self._dicts)


def reads_only(hook: AnyHook) -> AnyHook:
    """Declare that a hook function never writes into its value, so that the hook needs no copy of
    it.
    """
    hook.reads_only = True  # type: ignore[attr-defined]  # a mark on the function
    return hook


def by_rows(hook: AnyHook) -> AnyHook:
    """Declare that a hook function gives each row what it would give that row alone, so that a
    batch may be run in pieces, or several times beside itself.
    """
    hook.by_rows = True  # type: ignore[attr-defined]  # a mark on the function
    return hook


class LoopHookPoint(HookPoint):
    """A TransformerLens HookPoint that knows its iteration, `hook.loop()`, and its block,
    `hook.layer()`.

    A hook that may write receives a copy of the value, and the run goes on with the copy. So a hook
    that changes its value in place changes no tensor that was cached, stored or passed in before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # TransformerLens leaves it unannotated
        self.watch: HookWatch | None = None

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._noted(super().register_forward_hook(*args, **kwargs))

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._noted(super().register_forward_pre_hook(*args, **kwargs))

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._noted(super().register_full_backward_hook(*args, **kwargs))

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._noted(super().register_full_backward_pre_hook(*args, **kwargs))

    def _noted(self, handle: RemovableHandle) -> RemovableHandle:
        """Tell the watch that a hook was attached."""
        if self.watch is not None:
            self.watch.may_hold = True
        return handle

    def loop(self) -> int | None:
        """The iteration in the point's name, from 0; None outside the loop."""
        return number_after("loops", self.name)

    def layer(self) -> int:
        """The number of the block in the point's name, from 0.

        Raises:
            ValueError: The point is in no block.
        """
        for stack in ("blocks", "prelude", "coda"):
            number = number_after(stack, self.name)
            if number is not None:
                return number
        raise ValueError(f"hook point {self.name!r} is in no block, so it has no layer")

    def may_be_written(self) -> bool:
        """Whether the point holds a forward hook that may write; see `reads_only`."""
        readers = sum(hasattr(hook, "reads_only") for hook in self._own_hooks())
        return len(self._forward_hooks) + len(self._forward_pre_hooks) > readers

    def may_join_rows(self) -> bool:
        """Whether a hook is attached that has not declared to only read, or to take each row by
        itself.
        """
        hooks = [*self._own_hooks(), *self._forward_pre_hooks.values()]
        apart = sum(hasattr(hook, "reads_only") or hasattr(hook, "by_rows") for hook in hooks)
        return sum(map(len, _hook_dicts(self))) > apart

    def _own_hooks(self) -> list[object]:
        """The functions of the forward hooks that TransformerLens's calls attached and that are
        still there.
        """
        return [each.user_hook for each in self.fwd_hooks if each.hook.id in self._forward_hooks]

    def __call__(self, value: Tensor) -> Tensor:
        passed: Tensor = super().__call__(value.clone() if self.may_be_written() else value)
        return passed


class PointTree(nn.Module):
    """A place in the tree of hook points, reached as `model.loops[3].blocks[0].attn.hook_q`.

    `children` and `apply` reach only the points that were made so far.

    Args:
        name: The full name of the place.
        training: Whether the model is in training mode.
        show: A function that makes all points below, called if someone looks for a point there. It
            returns False if only weights are looked for, of which the tree has none.
    """

    def __init__(self, name: str, training: bool, show: Callable[[], bool] | None = None) -> None:
        super().__init__()
        self.name, self.training, self._show = name, training, show

    def __getattr__(self, name: str) -> Any:
        if name not in self._modules and not name.startswith("_"):
            self._complete()
        return super().__getattr__(name)

    def __getitem__(self, index: int) -> nn.Module:
        self._complete()
        return self.get_submodule(str(index))

    def __repr__(self) -> str:
        self._complete()
        return super().__repr__()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        if self._complete():
            yield from super().named_modules(*args, **kwargs)

    def _complete(self) -> bool:
        return self._show is None or self._show()


def existing_modules(module: nn.Module, points: bool = True) -> Iterator[nn.Module]:
    """All modules below a module and the module itself, without the hook points that nobody has
    asked for yet.

    Args:
        points: Whether hook points that exist are included.
    """
    yield module
    for part in module._modules.values():
        if part is not None and (points or not isinstance(part, PointTree)):
            yield from existing_modules(part, points)


def module_hooked(model: nn.Module) -> bool:
    """Whether a forward hook of PyTorch's own is attached to a module that is no hook point."""
    return any(
        part._forward_hooks or part._forward_pre_hooks
        for part in existing_modules(model, points=False)
        if not isinstance(part, HookPoint)
    )


def add_point(root: nn.Module, point: HookPoint) -> None:
    """Put a hook point at its name in the tree, and make the missing places above it."""
    node = root
    *path, last = str(point.name).split(".")
    for depth, step in enumerate(path, start=1):
        child = node._modules.get(step)
        if child is None:
            child = PointTree(".".join(path[:depth]), point.training)
            node.add_module(step, child)
        node = child
    node.add_module(last, point)


_BLANK = vars(LoopHookPoint())
_OWN = {name: type(x) for name, x in _BLANK.items() if isinstance(x, dict | list | set)}


def new_point(name: str, training: bool) -> LoopHookPoint:
    """Make a hook point quickly, with the attributes that the constructors of PyTorch and
    TransformerLens give it.

    It takes a tenth of their time, which counts because a model has hundreds of points.
    """
    point = LoopHookPoint.__new__(LoopHookPoint)
    own = {attribute: empty() for attribute, empty in _OWN.items()}
    vars(point).update(_BLANK, **own, name=name, training=training)
    return point


def is_hooked(point: HookPoint) -> bool:
    """Whether the point holds any hook, of TransformerLens or of PyTorch."""
    return any(_hook_dicts(point))


def live(points: Mapping[str, HookPoint]) -> Taps:
    """The points that hold a hook at the moment."""
    return {site: point for site, point in points.items() if is_hooked(point)}


def tap(taps: Taps, site: str, value: Tensor) -> Tensor:
    """Pass a value through its hook point if the point holds a hook.

    Raises:
        ValueError: A hook returned something else than a tensor of the same shape, dtype and
            device.
    """
    point = taps.get(site)
    if point is None:
        return value
    passed: Tensor = point(value)
    if passed is not value and _kind(passed) != _kind(value):
        raise ValueError(
            f"a hook at {getattr(point, 'name', site)!r} must return None or a tensor like its"
            f" value, {_kind(value)}, got {_kind(passed)}"
        )
    return passed


def _kind(value: object) -> str:
    """Shape, dtype and device of a tensor, in words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{list(value.shape)} {value.dtype} on {value.device}"
