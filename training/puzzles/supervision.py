"""Deep supervision: one supervision step of a puzzle solver with its loss, and the rows that halt
after it.

Every step is one update of the weights. Both states go on to the next one without gradient; a row
that has halted is given a new puzzle at the beginning of the next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.models.core.state import State
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver

IGNORED = -100
_HALTING_SHARE = 0.5  # of the halting loss in the total


@dataclass(frozen=True)
class Examples:
    """Puzzles with their solutions.

    Attributes:
        cells: Int[Tensor, "batch cell"], token ids without the prefix.
        labels: Int[Tensor, "batch cell"], the right ids; -100 where a cell is not asked.
        puzzle: Int[Tensor, " batch"], the number of each puzzle's vector.
    """

    cells: Int[Tensor, "batch cell"]
    labels: Int[Tensor, "batch cell"]
    puzzle: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Carry:
    """The rows between two supervision steps.

    Attributes:
        high, low: Float[Tensor, "batch pos d_model"], both states, without gradient.
        steps: Int[Tensor, " batch"], supervision steps that each row has had.
        halted: Bool[Tensor, " batch"], the rows that are to begin anew.
        cells, labels, puzzle: What each row works on; as in `Examples`.
    """

    high: Float[Tensor, "batch pos d_model"]
    low: Float[Tensor, "batch pos d_model"]
    steps: Int[Tensor, " batch"]
    halted: Bool[Tensor, " batch"]
    cells: Int[Tensor, "batch cell"]
    labels: Int[Tensor, "batch cell"]
    puzzle: Int[Tensor, " batch"]

    @classmethod
    def empty(cls, model: PuzzleSolver, batch_size: int, n_cells: int) -> Carry:
        """Rows that all begin anew."""
        like = model.embedding
        state = like.new_zeros(batch_size, model.cfg.n_prefix + n_cells, model.cfg.d_model)
        none = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
        cells = torch.zeros(batch_size, n_cells, dtype=torch.int64, device="cpu")
        return cls(state, state, none, none == 0, cells, cells, none)

    def tensors(self) -> Mapping[str, Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Draws:
    """The random part of halting.

    Attributes:
        uniform: Float[Tensor, " batch"]; a row below the exploration rate explores.
        least: Int[Tensor, " batch"], the steps before which a row that explores does not halt.
    """

    uniform: Float[Tensor, " batch"]
    least: Int[Tensor, " batch"]

    @classmethod
    def make(cls, batch_size: int, max_steps: int, generator: torch.Generator) -> Draws:
        """Uniform numbers, and whole ones from 2 to `max_steps`."""
        return cls(
            torch.rand(batch_size, generator=generator, dtype=torch.float32, device="cpu"),
            torch.randint(
                2, max(3, max_steps + 1), (batch_size,), generator=generator, device="cpu"
            ),
        )


@dataclass(frozen=True)
class Supervised:
    """The outcome of one supervision step; sums over the rows.

    Attributes:
        logits: Float[Tensor, "batch cell d_vocab"].
        halting: Float[Tensor, "batch 2"], the halt and the continue logit.
        target: Float[Tensor, " batch"], of the continue logit; None where it has none.
        loss: The total, and `cell`, `halt` and `go_on` its parts.
        right: Bool[Tensor, " batch"], whether all asked cells are right.
    """

    logits: Float[Tensor, "batch cell d_vocab"]
    halting: Float[Tensor, "batch 2"]
    target: Float[Tensor, " batch"] | None
    loss: Float[Tensor, ""]
    cell: Float[Tensor, ""]
    halt: Float[Tensor, ""]
    go_on: Float[Tensor, ""]
    right: Bool[Tensor, " batch"]


def stable_max_cross_entropy(
    logits: Float[Tensor, "*rows d_vocab"], labels: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows"]:
    """-log(s(x_y) / sum_v s(x_v)) in float64, where s(x) is x + 1 from 0 on and 1 / (1 - x) below;
    0 where the label is -100.

    Args:
        logits: Of each class.
        labels: The right class of each row.

    Source:
        arXiv 2501.04697.
    """
    x = logits.double()
    positive = x >= 0
    size = torch.where(positive, x, x.new_zeros(())) + 1
    size = torch.where(positive, size, 1 / (1 - torch.where(positive, x.new_zeros(()), x)))
    asked = labels != IGNORED
    chosen = size.gather(-1, labels.where(asked, 0)[..., None])[..., 0]
    return (size.sum(-1).log() - chosen.log()).where(asked, 0.0)


def with_prefix(model: PuzzleSolver, cells: Int[Tensor, "batch cell"]) -> Int[Tensor, "batch pos"]:
    """The tokens of some boards: the columns of the prefix, whose ids are not read, and the
    cells.
    """
    return F.pad(cells, (model.cfg.n_prefix, 0))


def next_rows(model: PuzzleSolver, carry: Carry, fresh: Examples) -> Carry:
    """The rows with which a step begins: those that halted are given the fresh puzzles."""
    anew = carry.halted

    def take(new: Tensor, old: Tensor) -> Tensor:
        return new.where(anew.view(-1, *[1] * (old.ndim - 1)), old)

    first = {"high": model.high_init, "low": model.low_init}
    states = {
        name: take(own.detach().to(carry.high).expand_as(carry.high), getattr(carry, name))
        for name, own in first.items()
    }
    shown = {
        field.name: take(getattr(fresh, field.name), getattr(carry, field.name))
        for field in fields(Examples)
    }
    return Carry(**states, steps=carry.steps.where(~anew, 0), halted=anew, **shown)


def run_step(model: PuzzleSolver, rows: Carry, *, whole: bool = False) -> State:
    """One supervision step of some rows; gradients pass through its last runs only.

    Args:
        whole: Let them pass through every run.
    """
    tokens = with_prefix(model, rows.cells)
    state = model.begin(tokens, n_loops=1, puzzle=rows.puzzle, high=rows.high, low=rows.low)
    if not whole:
        with torch.no_grad():
            state = model.advance(state, f"loops.0.{model.trained_from}")
    return model.advance(state)


def supervise(
    model: PuzzleSolver,
    carry: Carry,
    fresh: Examples,
    draws: Draws,
    *,
    max_steps: int,
    exploration: float,
) -> tuple[Carry, Supervised]:
    """One supervision step in training.

    Args:
        carry: Of the step before.
        fresh: New puzzles, one for each row; those of rows that go on are not used.
        draws: The random part of halting.
        max_steps: Steps after which every row halts.
        exploration: Share of the rows that halt only after a number of steps of their own.

    Returns:
        The rows after the step, and the loss.

    Source:
        arXiv 2506.21734 and 2510.04871, and their public code.
    """
    rows = next_rows(model, carry, fresh)
    state = run_step(model, rows)
    low = state.parts["low"]
    logits = model.readout(state)[:, model.cfg.n_prefix :]
    halting = model.halt(state.resid[:, 0]).to(torch.promote_types(logits.dtype, torch.float32))
    steps = rows.steps + 1
    last = steps >= max_steps
    done = halting[:, 0] > (halting[:, 1] if model.learns_to_continue else 0)
    waits = (draws.uniform < exploration) & (steps < draws.least)
    after = Carry(
        state.resid.detach(),
        low.detach(),
        steps,
        last | (done & ~waits) if max_steps > 1 else last,
        rows.cells,
        rows.labels,
        rows.puzzle,
    )
    target = _continue_target(model, after, last) if model.learns_to_continue else None
    return after, _losses(logits, halting, target, rows.labels)


@torch.no_grad()
def _continue_target(
    model: PuzzleSolver, after: Carry, last: Bool[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The target of the continue logit: the value of the next step by its own two logits."""
    halt, go_on = model.halt(run_step(model, after).resid[:, 0]).unbind(-1)
    target: Tensor = halt.where(last, torch.maximum(halt, go_on)).sigmoid()
    return target


def _losses(
    logits: Float[Tensor, "batch cell d_vocab"],
    halting: Float[Tensor, "batch 2"],
    target: Float[Tensor, " batch"] | None,
    labels: Int[Tensor, "batch cell"],
) -> Supervised:
    asked = labels != IGNORED
    right = ((logits.argmax(-1) == labels) | ~asked).all(-1)
    each = stable_max_cross_entropy(logits, labels).sum(-1) / asked.sum(-1).clamp(min=1)
    cell = each.sum()

    def halting_loss(logit: Tensor, wanted: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit, wanted.to(logit), reduction="sum")

    halt = halting_loss(halting[:, 0], right)
    go_on = halt.new_zeros(()) if target is None else halting_loss(halting[:, 1], target)
    loss = cell + _HALTING_SHARE * (halt + go_on)
    return Supervised(logits, halting, target, loss, cell, halt, go_on, right)
