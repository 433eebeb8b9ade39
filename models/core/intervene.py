"""Runs of a model with hooks and caches, over TransformerLens's `HookedRootModule`.

`HookedRootModule` was made for a fixed set of points and fails silently on a growing one. So every
way to add a hook goes through one resolver here: a name that matches nothing raises, a hook that a
call would never reach raises, and a context removes its own hooks and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.utilities.slice import Slice, SliceInput

from loopscope.models.basis.names import NamesFilter, is_pattern
from loopscope.models.core.cache import position_axis
from loopscope.models.core.hooks import Hook, LoopHookPoint, reads_only
from loopscope.models.core.points import HookPoints
from loopscope.models.core.state import checked_loops

Direction = Literal["fwd", "bwd"]
PosSlice = Slice | SliceInput | slice
Wanted = tuple[NamesFilter, Hook, Direction]
RESIDUAL_STREAM = ["hook_embed", "**.hook_resid_*"]


def in_directions(
    fwd: Sequence[tuple[NamesFilter, Hook]], bwd: Sequence[tuple[NamesFilter, Hook]]
) -> list[Wanted]:
    """Pairs of a filter and a hook, each with its direction."""
    forward: list[Wanted] = [(name, hook, "fwd") for name, hook in fwd]
    return forward + [(name, hook, "bwd") for name, hook in bwd]


class Interventions:
    """Attaches hooks to the points of a model.

    Args:
        root: The model.
        points: The model's hook points.
    """

    def __init__(self, root: HookedRootModule, points: HookPoints) -> None:
        self._root, self._points = root, points

    def attach(
        self,
        wanted: Sequence[Wanted],
        n_loops: int | None,
        recorded: int | None,
        level: int | None = None,
        *,
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> list[tuple[HookPoint, LensHandle]]:
        """Attach hooks, all of them or, where a filter matches nothing, none.

        Args:
            n_loops, recorded: As in `HookPoints.resolve`.
            level, is_permanent, prepend: As in TransformerLens's `add_hook`.

        Returns:
            The handle of each hook with its point.
        """
        found = [self._points.resolve(names, n_loops, recorded) for names, _, _ in wanted]
        attached: list[tuple[HookPoint, LensHandle]] = []
        for (names, hook, direction), full_names in zip(wanted, found, strict=True):
            points = [self._points.point(name) for name in full_names]
            handles = [
                point.add_hook(hook, direction, is_permanent, level, prepend) for point in points
            ]
            attached += zip(points, handles, strict=True)
            if is_pattern(names):
                self._points.belongs_to(checked_loops(n_loops, recorded), handles)
        return attached

    @contextmanager
    def during(
        self,
        wanted: Sequence[Wanted],
        n_loops: int | None,
        recorded: int | None,
        *,
        remove: bool,
        clear_contexts: bool,
    ) -> Iterator[None]:
        """Hooks for the length of a `with` block, from which exactly these are removed."""
        root = self._root
        root.context_level += 1
        attached: list[tuple[HookPoint, LensHandle]] = []
        try:
            attached = self.attach(wanted, n_loops, recorded, root.context_level)
            yield
        finally:
            root.context_level -= 1
            if remove:
                detach(attached)
                if clear_contexts:
                    root.clear_contexts()


def detach(attached: Sequence[tuple[HookPoint, LensHandle]]) -> None:
    """Take hooks off their points, whatever else is attached there."""
    for point, handle in attached:
        handle.hook.remove()
        for hooks in (point.fwd_hooks, point.bwd_hooks):
            hooks[:] = [other for other in hooks if other is not handle]


@dataclass(frozen=True)
class Keep:
    """How activations are kept.

    Attributes:
        device: Where; None for where they are.
        remove_batch_dim: Drop the batch axis of a batch of one.
        pos_slice: Positions to keep, in any form of TransformerLens's Slice; None for all.
    """

    device: torch.device | str | None = None
    remove_batch_dim: bool = False
    pos_slice: PosSlice = None

    def into(self, store: dict[str, Tensor]) -> Hook:
        """A hook that keeps each value under the name of its point."""

        @reads_only
        def save(value: Tensor, hook: HookPoint) -> None:
            assert hook.name is not None, "every hook point is named when it is made"
            kept = value.detach()
            if isinstance(hook, LoopHookPoint) and hook.may_be_written():
                kept = kept.clone()
            if self.pos_slice is not None:
                positions = Slice.unwrap(cast(SliceInput, self.pos_slice))
                kept = positions.apply(kept, dim=position_axis(hook.name))
            if self.remove_batch_dim:
                kept = kept.squeeze(0)
            store[hook.name] = kept if self.device is None else kept.to(self.device)

        return save


def loops_of_call(args: Sequence[Any], kwargs: dict[str, Any], recorded: int | None) -> int:
    """The iterations of a call of the model by its arguments."""
    return checked_loops(kwargs.get("n_loops", args[1] if len(args) > 1 else None), recorded)


def check_one_row(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise where the inputs of a call are more than one row."""
    tokens = kwargs.get("tokens", args[0] if args else None)
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and len(tokens) != 1:
        raise ValueError(f"remove_batch_dim needs a batch of one, got {len(tokens)}")
