"""Where a run stands: visits, states, and the checks on what enters a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from loopscope.models.basis.arguments import Argument, ArgumentError
from loopscope.models.basis.numbers import given_tensor, is_bool

MOST_LOOPS = 2**14  # iterations of a call: each has visits and hook names of its own
PAD_ID = 0


@dataclass(frozen=True)
class Slot:
    """One entry of a family's schedule: the block that runs next, and the names of its hook points.

    Attributes:
        name: The prefix of the block's hook names, e.g. "loops.3.blocks.0".
        stage: "loops", "prelude", "coda" or the family's own word.
        loop: The iteration, from 0; None outside the loop.
        layer: The number of the block in its stack, from 0.
        block: The module that holds the weights.
        sites: The hook points of the block, in order of execution.
        scope: The prefix of the names of the iteration that the block opens or closes, e.g.
            "loops.3".
        opening, closing: The hook points of the iteration before this block, and after it.
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
        return [name for name, _ in self.places_of_names()]

    def places_of_names(self) -> Iterator[tuple[str, str]]:
        """Full names of the slot's points in order of execution, with each one's prefix."""
        for prefix, sites in (
            (self.scope, self.opening),
            (self.name, self.sites),
            (self.scope, self.closing),
        ):
            yield from ((f"{prefix}.{site}", prefix) for site in sites)


@dataclass(frozen=True)
class Visit(Slot):
    """A slot at its place in a schedule, with its hook points.

    Attributes:
        index: The place in the schedule, from 0.
        n_loops: The number of iterations of the schedule.
        points: The hook points of the block by site, as far as they were made.
        boundary: The hook points of the iteration that the block opens or closes, as far as they
            were made.
        acts_as: In an edited schedule, the visit of the model's own schedule that runs here. The
            hook points are those of this visit; the block and all that depends on the iteration are
            those of the other. None in the model's own schedule.
        keeps: The part of the state that stores the output of the block for a later `Freeze`; empty
            for most visits.
        frozen: The part of the state that is added instead of running the block; empty for most
            visits.
    """

    index: int = 0
    n_loops: int = 1
    points: Mapping[str, HookPoint] = field(default_factory=dict)
    boundary: Mapping[str, HookPoint] = field(default_factory=dict)
    acts_as: Visit | None = None
    keeps: str = ""
    frozen: str = ""


@dataclass(frozen=True)
class State:
    """A run that is stopped before a visit; with the model it is all that is needed to go on.

    The axes of every tensor begin with batch and position, so a state can be sliced, joined and
    moved without knowing the family.

    Attributes:
        visit: The index of the next visit in the schedule; the length of the schedule if all visits
            have run.
        n_loops: The number of iterations of the schedule.
        resid: Float[Tensor, "batch pos d_model"], the residual stream.
        positions: Int[Tensor, "batch pos"], the position of each token in its text.
        mask: Bool[Tensor, "batch pos"], True for real tokens.
        parts: The other tensors that the family carries, by name, each "batch pos ...".
        order: The visits of an edited schedule, each with the visit that it runs; None for the
            model's own schedule.
    """

    visit: int
    n_loops: int
    resid: Float[Tensor, "batch pos d_model"]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    order: tuple[str, ...] | None = None

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
    places = {(s.visit, s.n_loops, s.resid.shape[1], tuple(s.parts), s.order) for s in states}
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
    """Token ids as a matrix; lists and arrays of integers are taken too.

    Raises:
        TypeError: Not integers, or rows of unequal length.
        ValueError: Another shape than [batch, pos], or ids outside the vocabulary.
    """
    ids = integers(tokens)
    if ids is None:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"tokens must be an integer tensor [batch, pos], got {got}; model.encode(texts)"
            " makes one"
        )
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(
            "tokens must have the shape [batch, pos] with at least one of each, got"
            f" {list(ids.shape)}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"tokens must be in 0..{d_vocab - 1} (d_vocab={d_vocab}), got {wrong}")
    return ids


def integers(values: object) -> Tensor | None:
    """A tensor, a list or an array of whole numbers as a tensor; None where it is none."""
    if not isinstance(values, Tensor):
        try:
            values = given_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            return None
    if values.dtype in (torch.int64, torch.int32):
        return values
    whole = values.dtype in (torch.int16, torch.int8, torch.uint8)
    return values.long() if whole else None


def checked_mask(mask: object, tokens: Tensor) -> Bool[Tensor, "batch pos"]:
    """The mask as booleans: ones then zeros along pos; lists and arrays are taken too.

    Raises:
        ValueError: Another shape than the tokens', other numbers, or padding before real tokens.
    """
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        try:
            mask = torch.as_tensor(mask, device=tokens.device)
        except (TypeError, ValueError, RuntimeError):
            got = type(mask).__name__
            raise ValueError(f"the mask must be a tensor like the tokens, got {got}") from None
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


def refuse_unmasked_padding(tokens: Int[Tensor, "batch pos"]) -> None:
    """Raise where a row ends with padding (id 0) in a model whose real tokens would see it."""
    ends = (tokens[:, -1] == PAD_ID).nonzero()
    if len(ends):
        raise ValueError(
            f"row {int(ends[0])} ends with padding (id {PAD_ID}), which the real tokens of this"
            " model would see, because it is not causal; pass mask= (model.encode makes one)"
        )


def checked_loops(n_loops: object, recorded: int | None) -> int:
    """The number of iterations of a call: the argument, or what the checkpoint records.

    Raises:
        TypeError: Not a whole number.
        ValueError: Fewer than 1 or more than `MOST_LOOPS`, or no number at all.
    """
    n_loops = recorded if n_loops is None else n_loops
    if n_loops is None:
        unsaid = "this checkpoint records no number of iterations; pass "
        raise ArgumentError(unsaid, Argument("n_loops"))
    if is_bool(n_loops) or not isinstance(n_loops, SupportsIndex):
        raise TypeError(f"n_loops must be an integer, got {type(n_loops).__name__}")
    try:
        count = n_loops.__index__()
    except TypeError:
        raise TypeError(
            "n_loops must be an integer, since every row of a call runs the same number of"
            f" iterations, got {n_loops!r}; call once for each depth"
        ) from None
    if not 1 <= count <= MOST_LOOPS:
        limit = "at least 1" if count < 1 else f"at most {MOST_LOOPS}"
        raise ValueError(f"n_loops must be {limit}, got {count}")
    return count
