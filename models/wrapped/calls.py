"""One run of a wrapped module: its calls of the blocks counted, read and replaced."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.models.core.hooks import NO_TAPS, LoopHookPoint, Taps, live, tap
from loopscope.models.core.state import Visit

BEFORE, AFTER = "hook_resid_pre", "hook_resid_post"
STREAM = "hidden_states"  # what a block's stream is called where it is given by name


class _Stopped(Exception):  # no error: a run has come to where it was to stop
    """Raised inside the module where a run is to stop."""


@dataclass
class Calls:
    """The calls of the blocks in one run, each with its hooks.

    A module may write into its own tensors (`x += ...`). So hooks are shown copies of them, and
    what a hook or a state puts in is copied before the module goes on with it.

    A run always begins at the tokens. The calls before visit `start` are made again, with the hooks
    that are attached there; then `resid` takes the place of the last one's output (of the first
    block's input where `start` is 0).

    Attributes:
        module: The wrapped module.
        schedule: Which block is promised at each call.
        paths: Each block's name in the module, for errors.
        parts: Submodules of a block whose outputs are shown, by site.
        start, resid: Where the run takes over a state, and its residual stream; None for a run that
            takes over nothing.
        stop: The visit before which the run stops.
        hooked: Whether any hook point may hold a hook.
        count: Calls made so far.
    """

    module: nn.Module
    schedule: Sequence[Visit]
    paths: Mapping[nn.Module, str]
    parts: Mapping[str, str]
    start: int
    resid: Tensor | None
    stop: int
    hooked: bool
    count: int = 0

    def __post_init__(self) -> None:
        self._with_gradients = torch.is_grad_enabled()
        self._graphed = False  # whether the stream that entered the present block has a gradient

    def run(
        self, embedding: tuple[nn.Module, Callable[[Tensor], Tensor]], *args: Any, **kwargs: Any
    ) -> Any:
        """Call the module and return its output; None for a run that stopped on the way.

        Args:
            embedding: The token embedding, and a function that may replace its output.

        Raises:
            ValueError: The module calls its blocks in another order or another number of times than
                promised, or its embedding other than once.
        """
        embedded = [0]

        def embed(module: nn.Module, args: Any, output: Any) -> Tensor:
            embedded[0] += 1
            return embedding[1](output)

        with ExitStack() as attached:
            attached.callback(embedding[0].register_forward_hook(embed).remove)
            for block in self.paths:
                before = block.register_forward_pre_hook(self._before, with_kwargs=True)
                attached.callback(before.remove)
                for site, path in self.parts.items():
                    part = block.get_submodule(path)
                    attached.callback(part.register_forward_hook(self._part(site)).remove)
                attached.callback(block.register_forward_hook(self._after).remove)
            try:
                output = self.module(*args, **kwargs)
            except _Stopped:
                output = None
        if output is not None and self.count != len(self.schedule):
            raise ValueError(self._wrong_number())
        if embedded[0] != 1:
            raise ValueError(
                "a wrapped module must call its token embedding once in a run, got"
                f" {embedded[0]} calls; pass embed= with the embedding's name"
            )
        return output

    def _before(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        visit = self._promised(block)
        named = not args
        if named and STREAM not in kwargs:
            raise ValueError(
                f"{self.paths[block]!r} must be given its stream as first argument or as"
                f" {STREAM!r}, got {sorted(kwargs)}"
            )
        given = kwargs[STREAM] if named else args[0]
        if self.stop == 0:
            self.resid = given
            raise _Stopped
        given_state = self.resid if self.start == self.count == 0 else None
        x = given if given_state is None else given_state.clone()
        x = _through(self._taps(visit), BEFORE, x)
        self._graphed = self.hooked and x.requires_grad
        if x is given:
            return None
        return (args, {**kwargs, STREAM: x}) if named else ((x, *args[1:]), kwargs)

    def _after(self, block: nn.Module, args: Any, output: Any) -> Any:
        visit = self.schedule[self.count]
        given = first_tensor(output, self.paths[block])
        self._note_gradients(visit, cut=self._graphed and not given.requires_grad)
        y = _through(self._taps(visit), AFTER, given)
        self.count += 1
        if self.count == self.start and self.resid is not None:
            y = self.resid.clone()
        if self.count == self.stop:
            self.resid = y.clone()
            if self.stop < len(self.schedule):
                raise _Stopped
        return None if y is given else with_first(output, y)

    def _part(self, site: str) -> Callable[..., Any]:
        def show(part: nn.Module, args: Any, output: Any) -> Any:
            given = first_tensor(output, site)
            value = _through(self._taps(self.schedule[self.count]), site, given)
            return None if value is given else with_first(output, value)

        return show

    def _taps(self, visit: Visit) -> Taps:
        if not self.hooked:
            return NO_TAPS
        self._note_gradients(visit, cut=not torch.is_grad_enabled())
        return live(visit.points)

    def _promised(self, block: nn.Module) -> Visit:
        """The visit of the call that is being made."""
        if self.count >= len(self.schedule):
            raise ValueError(self._wrong_number(more=True))
        visit = self.schedule[self.count]
        if visit.block is not block:
            raise ValueError(
                f"call {self.count} of the module's blocks must be of {self.paths[visit.block]!r},"
                f" which `wrap` was told for {visit.name!r}, got a call of {self.paths[block]!r};"
                " give `blocks` in the order of the calls, and the right n_loops"
            )
        return visit

    def _wrong_number(self, more: bool = False) -> str:
        got = f"more than {self.count}" if more else f"{self.count}"
        return (
            f"the module must call its blocks {len(self.schedule)} times, as `blocks` and n_loops"
            f" promise, got {got} calls; pass the n_loops that the module runs"
        )

    def _note_gradients(self, visit: Visit, cut: bool) -> None:
        if self._with_gradients and cut:
            self._with_gradients = False
            warnings.warn(
                f"the wrapped module switches gradients off at {visit.name!r}: gradients leave out"
                " what passes through it, and are zero where nothing else leads on",
                stacklevel=2,
            )


def _through(taps: Taps, site: str, given: Tensor) -> Tensor:
    """The tensor with which the module goes on: its own, or a copy of what hooks put in its
    place.
    """
    if site not in taps:
        return given
    point = taps[site]
    copied = isinstance(point, LoopHookPoint) and point.may_be_written()  # by the point itself
    shown = given if copied else given.clone()
    passed = tap(taps, site, shown)
    return given if passed is shown else passed.clone()


def first_tensor(output: Any, name: str) -> Tensor:
    """The tensor that a module returns, alone or first of several."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{name!r} must return a tensor, alone or first of several, got a"
            f" {type(found).__name__}"
        )
    return found


def with_first(output: Any, value: Tensor) -> Any:
    """A module's output with another first tensor."""
    if isinstance(output, Tensor):
        return value
    if hasattr(output, "_replace"):  # a named tuple
        return type(output)(value, *output[1:])
    return type(output)([value, *output[1:]])


def logits_of(output: Any, shape: Sequence[int]) -> Tensor:
    """The logits in what a language model returns: a tensor, `.logits`, or first of several."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and not isinstance(output, Mapping):
        logits = first_tensor(output, "the wrapped module")
    if not isinstance(logits, Tensor) or list(logits.shape[:2]) != list(shape):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            "a wrapped module must return logits [batch, pos, d_vocab] of the tokens"
            f" {list(shape)}, got {got}"
        )
    return logits


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has an argument of this name."""
    return name in inspect.signature(module.forward).parameters
