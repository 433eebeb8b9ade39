"""Hooks and caches with an iteration axis, over TransformerLens's `HookedRootModule`.

`HookedRootModule` was made for a fixed set of points and fails silently on a growing one, so the
ways to add a hook are redone here on one resolver: points grow to the longest call, take the
model's mode, and exist before a filter is resolved; a name that matches nothing raises; a hook that
a call would never reach raises.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice, SliceInput

from loopscope.models.core.cache import LoopCache, position_axis
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import (
    HookWatch,
    NamesFilter,
    add_point,
    is_hooked,
    is_pattern,
    loop_of,
    resolve,
)
from loopscope.models.core.state import checked_loops

Hook = Callable[..., Any]
Direction = Literal["fwd", "bwd"]
PosSlice = Slice | SliceInput | slice
RESIDUAL_STREAM = ["hook_embed", "**.hook_resid_*"]


class HookedLoops(HookedRootModule):
    """A root module whose hook points exist once per iteration."""

    cfg: LoopedConfig

    def __init__(self) -> None:
        super().__init__()
        self._grown = 0
        self._watch = HookWatch()
        self._loop_points: list[tuple[int, HookPoint]] = []
        self._edge_points: dict[str, HookPoint] = {}
        self._pattern_loops: dict[int, set[int]] = {}
        self._names: dict[int, dict[str, None]] = {}

    # Which points exist

    def setup(self) -> None:
        """Name the modules; a family calls it when its weights are made."""
        super().setup()  # type: ignore[no-untyped-call]  # TransformerLens leaves it unannotated

    @abstractmethod
    def _names_of_call(self, n_loops: int) -> list[str]:
        """Every hook name of a call, in order of execution."""

    @abstractmethod
    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Hook names before the first visit, and after the last."""

    def hook_names(self, n_loops: int | None = None) -> list[str]:
        """Every hook name of a call with `n_loops` iterations, in order of execution."""
        return list(self._known_names(n_loops))

    def _known_names(self, n_loops: int | None) -> dict[str, None]:
        """The names of a call in order, quick to look one up in."""
        n_loops = checked_loops(n_loops, self.cfg.n_loops)
        if n_loops not in self._names:
            self.grow(n_loops)
            self._names[n_loops] = dict.fromkeys(self._names_of_call(n_loops))
        return self._names[n_loops]

    def grow(self, n_loops: int) -> None:
        """Make the points of calls of up to `n_loops` iterations; they never go away."""
        if n_loops <= self._grown:
            return
        for name in self._names_of_call(n_loops):
            if name in self.hook_dict:
                continue
            point = add_point(self, name, self.training)
            self.hook_dict[name] = point
            self.mod_dict[name] = point
            loop = loop_of(name)
            if loop is not None:
                self._loop_points.append((loop, point))
            self._watch.add(point)
        self._edge_points = {
            site: self.hook_dict[site] for side in self.edge_sites() for site in side
        }
        self._grown = n_loops

    def edge_points(self) -> dict[str, HookPoint]:
        """The points outside the schedule's visits, by name."""
        return self._edge_points

    def any_hook(self) -> bool:
        """Whether any point holds a hook."""
        return bool(self._watch)

    def refuse_late_hooks(self, n_loops: int) -> None:
        """Raise if a hook would silently never fire in a call of `n_loops` iterations.

        Raises:
            ValueError: A hook is at a later iteration, or was given by a pattern for a call of
                another length.
        """
        self.grow(n_loops)
        if not self.any_hook():
            return
        for loop, point in self._loop_points:
            if loop >= n_loops and is_hooked(point):
                raise ValueError(
                    f"a hook is attached at {point.name!r}, but a call with n_loops={n_loops} has"
                    f" only the iterations 0 to {n_loops - 1}"
                )
        for resolved_for in set().union(*self._pattern_loops.values()) - {n_loops}:
            raise ValueError(
                f"hooks given by a pattern were attached for n_loops={resolved_for}, but this call"
                f" runs n_loops={n_loops}; pass n_loops={n_loops} where they are added"
            )

    # Adding hooks

    def resolve_names(self, names: NamesFilter, n_loops: int | None = None) -> list[str]:
        """The hook names that a filter means in a call; see `models.hooks.resolve`.

        An exact name may lie beyond `n_loops=None`'s call; a pattern or predicate needs to know the
        call's length.
        """
        if n_loops is None and not is_pattern(names):
            assert not callable(names), "a predicate counts as a pattern"
            entries = [names] if isinstance(names, str) else list(names or ())
            furthest = max((loop_of(entry + ".") or 0 for entry in entries), default=0) + 1
            n_loops = max(furthest, self.cfg.n_loops or 1, self._grown)
        n_loops = checked_loops(n_loops, self.cfg.n_loops)
        return resolve(names, self._known_names(n_loops), n_loops)

    def add_hook(
        self,
        name: NamesFilter,
        hook: Hook,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        n_loops: int | None = None,
    ) -> None:
        """Attach a hook `fn(value, hook)` to every point that the filter means in a call of
        `n_loops` iterations.
        """
        for full_name in self.resolve_names(name, n_loops):
            self.hook_dict[full_name].add_hook(
                hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend
            )
        if is_pattern(name):
            key = -1 if is_permanent else (level or 0)
            self._pattern_loops.setdefault(key, set()).add(checked_loops(n_loops, self.cfg.n_loops))

    def add_perma_hook(
        self, name: NamesFilter, hook: Hook, dir: Direction = "fwd", n_loops: int | None = None
    ) -> None:
        """Attach a hook that `reset_hooks` leaves in place."""
        self.add_hook(name, hook, dir=dir, is_permanent=True, n_loops=n_loops)

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks from every point, also from those of iterations that later calls do not
        reach.
        """
        super().remove_all_hook_fns(direction, including_permanent, level)
        kept = {
            key
            for key in self._pattern_loops
            if (key == -1 and not including_permanent) or level not in (None, key)
        }
        self._pattern_loops = {
            key: loops for key, loops in self._pattern_loops.items() if key in kept
        }

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[NamesFilter, Hook]] = (),
        bwd_hooks: Sequence[tuple[NamesFilter, Hook]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        n_loops: int | None = None,
    ) -> Iterator[HookedLoops]:
        """Hooks for the length of a `with` block; also after an error, exactly these are removed
        and no others.

        Args:
            fwd_hooks, bwd_hooks: Pairs of a filter and a hook `fn(value, hook)`.
            reset_hooks_end: Remove them at the end.
            clear_contexts: Also clear the points' contexts at the end.
            n_loops: Iterations of the calls inside; patterns are resolved for it, and a call of
                another length raises.
        """
        wanted: list[tuple[NamesFilter, Hook, Direction]] = [
            (name, fn, "fwd") for name, fn in fwd_hooks
        ]
        wanted += [(name, fn, "bwd") for name, fn in bwd_hooks]
        for name, _, _ in wanted:
            self.resolve_names(name, n_loops)
        self.context_level += 1
        try:
            for name, fn, direction in wanted:
                self.add_hook(name, fn, dir=direction, level=self.context_level, n_loops=n_loops)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(
                    clear_contexts, including_permanent=False, level=self.context_level
                )
            self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[tuple[NamesFilter, Hook]] = (),
        bwd_hooks: Sequence[tuple[NamesFilter, Hook]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Run the model with temporary hooks. Hooks are resolved for the call's own `n_loops`.

        Raises:
            KeyError: A name that this call does not have; nothing is attached then.
            ValueError: Backward hooks that would be removed before any backward pass.
        """
        if bwd_hooks and reset_hooks_end:
            raise ValueError(
                "backward hooks would be removed before a backward pass; pass"
                " reset_hooks_end=False, use `with model.hooks(bwd_hooks=...)`, or"
                " loopscope.gradients"
            )
        n_loops = self._loops_of_call(model_args, model_kwargs)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, n_loops):
            output: Tensor = self(*model_args, **model_kwargs)
        return output

    def _loops_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        given = kwargs.get("n_loops", args[1] if len(args) > 1 else None)
        return checked_loops(given, self.cfg.n_loops)

    # Caching

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
        n_loops: int | None = None,
    ) -> tuple[dict[str, Tensor], list[tuple[NamesFilter, Hook]], list[tuple[NamesFilter, Hook]]]:
        """Hooks that fill a dictionary; they are not attached yet. See `run_with_cache` for the
        arguments.
        """
        if incl_bwd:
            raise ValueError(
                "incl_bwd is not supported: a looped model's gradients belong to one iteration"
                " each; use loopscope.gradients"
            )
        store: dict[str, Tensor] = {} if cache is None else cache

        def save(value: Tensor, hook: HookPoint) -> None:
            assert hook.name is not None, "every hook point is named when it is made"
            kept = value.detach()
            if pos_slice is not None:
                kept = Slice.unwrap(cast(SliceInput, pos_slice)).apply(
                    kept, dim=position_axis(hook.name)
                )
            if remove_batch_dim:
                kept = kept.squeeze(0)
            store[hook.name] = kept if device is None else kept.to(device)

        wanted = RESIDUAL_STREAM if names_filter is None else names_filter
        fwd: list[tuple[NamesFilter, Hook]] = [
            (name, save) for name in self.resolve_names(wanted, n_loops)
        ]
        return store, fwd, []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        n_loops: int | None = None,
    ) -> dict[str, Tensor]:
        """Attach hooks that fill a dictionary until `reset_hooks`. See `run_with_cache` for the
        arguments.
        """
        store, fwd, _ = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, n_loops=n_loops
        )
        for name, save in fwd:
            self.add_hook(name, save)
        if fwd and (names_filter is None or is_pattern(names_filter)):
            self._pattern_loops.setdefault(0, set()).add(checked_loops(n_loops, self.cfg.n_loops))
        return store

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: PosSlice = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, LoopCache]:
        """Run the model and keep activations, each under the name of its own iteration.

        Args:
            names_filter: What to keep: a name, a pattern, a list or a predicate. None keeps the
                residual stream (embedding, resid_pre, resid_mid, resid_post); `"**"` keeps
                everything.
            device: Where to keep it, e.g. "cpu".
            remove_batch_dim: Drop the batch axis of a batch of one.
            reset_hooks_end, clear_contexts: As in `hooks`.
            pos_slice: Positions to keep (for scores and patterns: query positions), in any form of
                TransformerLens's Slice; an int keeps an axis of one.

        Returns:
            The logits and a `LoopCache`.

        Raises:
            KeyError: The filter matches nothing in this call.
            ValueError: `remove_batch_dim` with a batch of more than one, or `incl_bwd`.
        """
        n_loops = self._loops_of_call(model_args, model_kwargs)
        tokens = model_kwargs.get("tokens", model_args[0] if model_args else None)
        if (
            remove_batch_dim
            and isinstance(tokens, Tensor)
            and tokens.ndim == 2
            and len(tokens) != 1
        ):
            raise ValueError(f"remove_batch_dim needs a batch of one, got {len(tokens)}")
        store, fwd, _ = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice, n_loops=n_loops
        )
        with self.hooks(fwd, [], reset_hooks_end, clear_contexts, n_loops):
            logits: Tensor = self(*model_args, **model_kwargs)
        return logits, LoopCache(store, n_loops, has_batch_dim=not remove_batch_dim)
