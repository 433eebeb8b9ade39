"""Small changes of a state: rows beside each other that differ from it by some vectors, or carry
the vectors along as derivatives (forward mode).

Axes: batch pos; `k` counts the changes of one example, `n` the numbers of one change: the columns
of the text times the width of the parts that vary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loopscope.interp.common.columns import Shown, shown_columns
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import begin_batch, sample_of
from loopscope.interp.common.places import one_in_range
from loopscope.interp.common.precision import widened
from loopscope.interp.dynamics.states import iteration_start
from loopscope.interp.dynamics.statistics import norm_of
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State

Space = Literal["state", "direction"]
Put = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Varying:
    """The numbers of a state that vary: some parts of it, at some columns of each example.

    Attributes:
        names: The parts that vary, jointly.
        free: Bool[Tensor, "batch pos"], the columns at which they do.
    """

    names: tuple[str, ...]
    free: Bool[Tensor, "batch pos"]

    def values(self, model: LoopedModel, state: State) -> dict[str, Tensor]:
        """The parts of a state that vary.

        Raises:
            ValueError: A part that this state does not have, or that is not made of real numbers.
        """
        known = floating(state)
        for name in self.names:
            if name not in known:
                raise ValueError(
                    f"the part {name!r} cannot vary in the state of this {type(model).__name__};"
                    f" its parts are {', '.join(known)}"
                )
        return {name: known[name] for name in self.names}

    def split(self, size: int) -> Iterator[Varying]:
        """These columns, split as `in_chunks` splits the batch."""
        for rows in self.free.split(size):
            yield replace(self, free=rows)

    def size(self, values: Mapping[str, Tensor]) -> int:
        """How many numbers a change has."""
        return sum(value[0].numel() for value in values.values())

    def draw(
        self, values: Mapping[str, Tensor], k: int, generator: torch.Generator
    ) -> Float[Tensor, "batch k n"]:
        """Normal numbers where the state varies, the same for every example; zeros elsewhere.

        They are drawn column by column, so that those of a column do not depend on how many
        columns of padding the batch has.
        """
        like = next(iter(values.values()))
        pos = self.free.shape[1]
        width = self.size(values) // pos
        how: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        drawn = torch.stack([torch.randn(k, width, **how) for _ in range(pos)])
        kind = torch.float64 if like.dtype == torch.float64 else torch.float32
        return (drawn.movedim(0, 1).to(like.device, kind) * self.free[:, None, :, None]).flatten(2)

    def beside(
        self, state: State, values: Mapping[str, Tensor], vectors: Float[Tensor, "batch k n"],
        put: Put,
    ) -> State:  # fmt: skip
        """The state k times beside itself (example by example), each time with another change.

        Args:
            values: Of the state.
            put: From a part and its change to the part that the new rows have; see `added` and
                `carried`.
        """
        k, pos = vectors.shape[1], self.free.shape[1]
        rows = state.map(lambda x: x.repeat_interleave(k, dim=0))
        widths = [value.flatten(2).shape[2] for value in values.values()]
        pieces = (vectors.unflatten(2, (pos, -1)) * self.free[:, None, :, None]).split(widths, -1)
        changed = {
            name: put(
                value.repeat_interleave(k, dim=0),
                piece.reshape(-1, *value.shape[1:]).to(value.dtype),
            )
            for (name, value), piece in zip(values.items(), pieces, strict=True)
        }
        parts = {name: changed.get(name, value) for name, value in rows.parts.items()}
        return replace(rows, resid=changed.get("resid", rows.resid), parts=parts)

    def matched(
        self, values: Mapping[str, Tensor], vectors: Float[Tensor, "batch k n"], scale: float | int
    ) -> Float[Tensor, "batch k n"]:
        """The changes, each of a norm that is this share of the norm of its example's state.

        Raises:
            ValueError: A state of zeros.
        """
        size = norm_of(self.joined(list(values.values()), 1))[..., None]
        if bool((size == 0).any()):
            raise ValueError(
                f"the state of example {int((size == 0).flatten().int().argmax())} is zeros, so no"
                " share of its norm is a change; begin after an iteration (start=1) of a run of at"
                " least 2"
            )
        return vectors / norm_of(vectors)[..., None] * (scale * size)

    def measured(
        self, values: Sequence[Tensor], k: int, space: Space
    ) -> Float[Tensor, "batch k n"]:
        """The rows' states, or their directions h / ||h|| at each column, as `joined`."""
        flat = [widened(value.flatten(2)) for value in values]
        if space == "direction":
            self._refuse_zeros(flat, k)
            flat = [value / norm_of(value)[..., None] for value in flat]
        whole = self.joined(flat, k)
        refuse_nonfinite(f"the {space}s", whole)
        return whole

    def joined(self, values: Sequence[Tensor], k: int) -> Float[Tensor, "batch k n"]:
        """Tensors of rows "batch*k pos ..." as one vector for each row; 0 where nothing varies."""
        whole = torch.cat([widened(value.flatten(2)) for value in values], dim=-1)
        whole = whole.unflatten(0, (-1, k))
        return torch.where(self.free[:, None, :, None], whole, 0.0).flatten(2)

    def carried_by(
        self, values: Sequence[Tensor], k: int, space: Space = "state"
    ) -> Float[Tensor, "batch k n"]:
        """The changes that rows carry as derivatives, as `joined`; those of h / ||h|| per column
        where the space is "direction".
        """
        pairs = [forward_ad.unpack_dual(value) for value in values]
        changes = [torch.zeros_like(x) if dx is None else dx for x, dx in pairs]
        if space == "direction":
            self._refuse_zeros([x for x, _ in pairs], k)
            changes = [
                _turned(widened(x.flatten(2)), widened(dx.flatten(2)))
                for (x, _), dx in zip(pairs, changes, strict=True)
            ]
        return self.joined(changes, k)

    def _refuse_zeros(self, values: Sequence[Tensor], k: int) -> None:
        """Refuse states that have no direction at a column that varies."""
        for value in values:
            zero = (norm_of(value.flatten(2)) == 0).unflatten(0, (-1, k)) & self.free[:, None]
            if bool(zero.any()):
                raise ValueError(
                    "a state of zeros has no direction, and some part of this state is zeros at"
                    " some column; pass space='state', or begin later with start="
                )


def varying(
    model: LoopedModel, batch: Batch, positions: Shown, parts: str | Sequence[str] | None
) -> Varying:
    """The numbers that vary in the states of a batch.

    Args:
        positions: The columns, as for `dynamics`.
        parts: Names of parts; None means those that an iteration hands to the next.

    Raises:
        ValueError: A model whose examples depend on one another, or an edited schedule with frozen
            visits.
    """
    if not model.batch_independent:
        raise ValueError(
            f"the examples of a {type(model).__name__} depend on one another, so one example's"
            " state cannot be changed alone"
        )
    if model.edited is not None and any(visit.frozen for visit in model.edited.visits):
        raise ValueError(
            "a frozen visit adds what an earlier iteration left, so no iteration of this schedule"
            " is a map of its own state; leave Freeze out of schedule_edit"
        )
    names = (parts,) if isinstance(parts, str) else tuple(parts or model.loop_parts)
    columns, shown = shown_columns(batch, positions)
    free = torch.zeros_like(batch.mask, dtype=torch.bool).scatter(1, columns, shown)
    return Varying(names, free)


def checked_space(space: Space) -> Space:
    """The space in which changes are measured; ValueError for any other."""
    if space not in ("state", "direction"):
        raise ValueError(f"space must be 'state' or 'direction', got {space!r}")
    return space


def checked_start(
    model: LoopedModel, batch: Batch, names: Sequence[str], start: int | None, n_loops: int
) -> int:
    """The iteration before which changes begin; None means the first one to which all the varying
    parts are handed.

    Raises:
        ValueError: An iteration that the call does not have.
    """
    if start is not None:
        return one_in_range("start", start, n_loops)
    with torch.no_grad():
        state = begin_batch(model, sample_of(model, batch), n_loops)
        for loop in range(n_loops):
            state = model.advance(state, iteration_start(model, loop, n_loops))
            if set(names) <= set(floating(state)):
                return loop
    return 0


def added(value: Tensor, change: Tensor) -> Tensor:
    """A part with its change added."""
    return value + change


def carried(value: Tensor, change: Tensor) -> Tensor:
    """A part that carries its change as a derivative, inside `forward_mode`."""
    dual: Tensor = forward_ad.make_dual(value, change)
    return dual


def carries(value: Tensor) -> bool:
    """Whether a part carries a derivative, inside `forward_mode`."""
    return forward_ad.unpack_dual(value).tangent is not None


@contextmanager
def forward_mode() -> Iterator[None]:
    """Inside the `with` block runs of a model push derivatives along.

    Attention takes the kernel that is made of plain operations, as the fused ones have no
    derivative in this mode.
    """
    with warnings.catch_warnings():  # PyTorch scripts these rules with a call that it deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._decomp.decompositions_for_jvp")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        yield


def check_map(
    model: LoopedModel, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Refuse an iteration that is no map from the varying parts to themselves.

    Args:
        before: The parts before the iteration.
        after: The same rows' parts after it, with the derivatives that they carry.
    """
    for name, value in before.items():
        if after[name].shape[1:] != value.shape[1:]:
            got = f"{list(value.shape)} and leaves it as {[len(value), *after[name].shape[1:]]}"
            raise ValueError(
                f"the Jacobian of an iteration needs one shape, but {name!r} enters it as {got}"
            )
    if not any(map(carries, after.values())):
        raise ValueError(
            f"an iteration of this {type(model).__name__} makes nothing of {', '.join(before)};"
            f" what it hands on is {', '.join(model.loop_parts)}"
        )


def floating(state: State) -> dict[str, Tensor]:
    """The residual stream and the parts of a state that hold real numbers, by name."""
    parts = {name: value for name, value in state.parts.items() if value.is_floating_point()}
    return {"resid": state.resid, **parts}


def _turned(x: Float[Tensor, "rows pos d"], dx: Float[Tensor, "rows pos d"]) -> Tensor:
    """The change of x / ||x|| that a change of x makes."""
    size = norm_of(x)[..., None]
    unit = x / size
    return (dx - unit * (unit * dx).sum(-1, keepdim=True)) / size
