"""Where a run stands: visits, states, and the checks on what enters a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint


@dataclass(frozen=True)
class Slot:
    """One line of a family's schedule: which block comes next, and what its hook points are called.

    Attributes:
        name: Prefix of the block's hook names, e.g. "loops.3.blocks.0".
        stage: "loops", "prelude", "coda" or what the family calls it.
        loop: The iteration, from 0; None outside the loop.
        layer: The block's number in its stack.
        block: The module that holds the weights.
        sites: The block's hook points, in order of execution.
        scope: Prefix of the names of the iteration that the block opens or closes, e.g. "loops.3".
        opening, closing: The iteration's own hook points before this block, and after it.
    """

    name: str
    stage: str
    loop: int | None
    layer: int
    block: nn.Module
    sites: tuple[str, ...]
    scope: str = ""
    opening: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()

    def hook_names(self) -> list[str]:
        """Full names of the slot's points in order of execution."""
        before = [f"{self.scope}.{site}" for site in self.opening]
        inside = [f"{self.name}.{site}" for site in self.sites]
        return before + inside + [f"{self.scope}.{site}" for site in self.closing]


@dataclass(frozen=True)
class Visit(Slot):
    """A slot at its place in a schedule, with its hook points.

    Attributes:
        index: Place in the schedule, from 0.
        points: The block's hook points by site.
        boundary: The hook points of the iteration that it opens or closes, by site.
    """

    index: int = 0
    points: Mapping[str, HookPoint] = field(default_factory=dict)
    boundary: Mapping[str, HookPoint] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A run stopped before a visit; with the model it is all that is needed to go on.

    Every tensor is row-first (batch, then position), so a state can be sliced, joined and moved
    without knowing the family.

    Attributes:
        visit: Index of the next visit in the schedule; its length when the schedule is done.
        n_loops: Iterations of the schedule.
        resid: Float[Tensor, "batch pos d_model"], the residual stream.
        positions: Int[Tensor, "batch pos"].
        mask: Bool[Tensor, "batch pos"], True for real tokens.
        parts: What else the family carries, each "batch pos ...".
    """

    visit: int
    n_loops: int
    resid: Float[Tensor, "batch pos d_model"]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tags(self) -> Int[Tensor, "batch pos"] | None:
        """The part that a family's attention mask depends on besides positions, where it has
        one.
        """
        return self.parts.get("tags")

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """The state with `fn` applied to each of its tensors."""
        parts = {name: fn(part) for name, part in self.parts.items()}
        return replace(
            self,
            resid=fn(self.resid),
            positions=fn(self.positions),
            mask=fn(self.mask),
            parts=parts,
        )

    def rows(self, batch: slice | Tensor = slice(None), pos: slice = slice(None)) -> State:
        """A subset of the rows: some sequences, and a range of positions of each."""
        return self.map(lambda x: x[batch][:, pos])

    def to(self, device: torch.device | str) -> State:
        """The state on another device."""
        return self.map(lambda x: x.to(device))


class RunningRows(NamedTuple):
    """The rows that are being run, by their positions in the text.

    Attributes:
        here: Int[Tensor, "batch row"], of the rows that hook points see now.
        whole: Int[Tensor, "batch row"], of all rows of a run that is made in several pieces.
    """

    here: Int[Tensor, "batch row"]
    whole: Int[Tensor, "batch row"]


_RUNNING: ContextVar[RunningRows | None] = ContextVar("the rows that are being run", default=None)


@contextmanager
def running(positions: Int[Tensor, "batch row"] | None) -> Iterator[None]:
    """Inside the `with` block hooks can ask which rows they see; None is for runs without hooks."""
    if positions is None:
        yield
        return
    outside = _RUNNING.get()
    token = _RUNNING.set(RunningRows(positions, positions if outside is None else outside.whole))
    try:
        yield
    finally:
        _RUNNING.reset(token)


def running_rows() -> RunningRows | None:
    """The rows that the visits' hook points see now; None outside `LoopedModel.advance`."""
    return _RUNNING.get()


def cat_states(states: Sequence[State]) -> State:
    """Join states that stand at the same visit along the batch.

    Raises:
        ValueError: The states do not stand at the same visit of the same schedule.
    """
    first = states[0]
    places = {(s.visit, s.n_loops, s.resid.shape[1], tuple(s.parts)) for s in states}
    if len(places) > 1:
        raise ValueError(
            "states to join must stand at one visit with the same width and parts, got"
            f" {sorted(map(str, places))}"
        )

    def join(part: Callable[[State], Tensor]) -> Tensor:
        return torch.cat([part(state) for state in states])

    return replace(
        first,
        resid=join(lambda s: s.resid),
        positions=join(lambda s: s.positions),
        mask=join(lambda s: s.mask),
        parts={name: torch.cat([s.parts[name] for s in states]) for name in first.parts},
    )


def checked_tokens(tokens: object, d_vocab: int) -> Int[Tensor, "batch pos"]:
    """Token ids as a matrix, or a sentence about what is wrong with them."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"tokens must be an integer tensor [batch, pos], got {got}; model.encode(texts)"
            " makes one"
        )
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            "tokens must have the shape [batch, pos] with at least one of each, got"
            f" {list(tokens.shape)}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"tokens must be in 0..{d_vocab - 1} (d_vocab={d_vocab}), got {wrong}")
    return tokens


def checked_mask(mask: Tensor | None, tokens: Tensor) -> Bool[Tensor, "batch pos"]:
    """The mask as booleans; ones then zeros along pos, or a sentence that names what it is
    instead.
    """
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.ndim == 1:
        mask = mask[None]
    if mask.shape != tokens.shape:
        raise ValueError(
            f"the mask must have the tokens' shape {list(tokens.shape)}, got {list(mask.shape)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("the mask must hold only ones (real tokens) and zeros (padding)")
    real = mask.bool()
    if not bool(real[:, 0].all()):
        row = int((~real[:, 0]).nonzero()[0])
        raise ValueError(
            f"the mask must be ones then zeros along pos, but row {row} starts with padding; "
            "left padding is not supported, pad on the right (model.encode does)"
        )
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        row = int((real[:, 1:] & ~real[:, :-1]).any(-1).nonzero()[0])
        raise ValueError(
            f"the mask must be ones then zeros along pos, but row {row} has real tokens after"
            " padding"
        )
    return real


def checked_loops(n_loops: int | None, recorded: int | None) -> int:
    """The number of iterations of a call: the argument, or what the checkpoint records."""
    if n_loops is None:
        n_loops = recorded
    if n_loops is None:
        raise ValueError("this checkpoint records no number of iterations; pass n_loops=")
    if isinstance(n_loops, bool) or not isinstance(n_loops, int):
        raise TypeError(f"n_loops must be an integer, got {type(n_loops).__name__}")
    if n_loops < 1:
        raise ValueError(f"n_loops must be at least 1, got {n_loops}")
    return n_loops
