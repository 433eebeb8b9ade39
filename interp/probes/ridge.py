"""Ridge regression from streamed sums: no state is kept, so memory does not grow with the reads.

Axes: read d output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from loopscope.interp.probes.states import Side
from loopscope.interp.probes.tasks import Task
from loopscope.models.basis.numbers import checked_number


def check_strength(strength: float) -> None:
    """Refuse a strength with which a probe may have no unique fit."""
    checked_number(strength, "strength", above=0)


class Linear(NamedTuple):
    """An affine map x -> weight x + bias.

    Attributes:
        weight: Float[Tensor, "output d"].
        bias: Float[Tensor, " output"].
    """

    weight: Float[Tensor, "output d"]
    bias: Float[Tensor, " output"]

    def __call__(self, x: Float[Tensor, "read d"]) -> Float[Tensor, "read output"]:
        return x.cpu().double() @ self.weight.T + self.bias


class RidgeSums:
    """The sums that a ridge regression needs, in float64: X'X, X'Y, and the sums of X and of Y.

    X is shifted by its first chunk's mean before it is summed, so that a large mean costs no
    digits.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._shift = torch.empty(0, device="cpu")
        self._count = 0

    def add(self, x: Float[Tensor, "read d"], y: Float[Tensor, "read output"]) -> None:
        """Take in some reads."""
        x, y = x.double(), y.to(x.device)
        if not self._count:
            self._shift = x.mean(0)
        x = x - self._shift
        new = [x.T @ x, x.T @ y, x.sum(0), y.sum(0)]
        self._count += len(x)
        if self._sums:
            new = [old.add_(more) for old, more in zip(self._sums, new, strict=True)]
        self._sums = new

    def solve(self, strength: float) -> Linear:
        """The minimiser of |Y - X w - b|^2 + strength |w|^2, the bias b being free."""
        xx, xy, x, y = self._sums
        centred = xx - torch.outer(x, x) / self._count
        cross = xy - torch.outer(x, y) / self._count
        centred.diagonal().add_(strength)
        weight = torch.cholesky_solve(cross, torch.linalg.cholesky(centred)).T
        bias = y / self._count - weight @ (self._shift + x / self._count)
        return Linear(weight.cpu(), bias.cpu())


class Fitted(NamedTuple):
    """Probes of several tasks at every place.

    Attributes:
        maps: The probe of the first task at each place.
        answers: For each place and task the answers to the held-out reads, "read".
    """

    maps: tuple[Linear, ...]
    answers: list[list[Shaped[Tensor, " read"]]]


def fit_ridge(
    names: Sequence[str], tasks: Sequence[Task], train: Side, test: Side, strength: float
) -> Fitted:
    """Fit every task at every place: each row is run once, and no state is kept.

    Args:
        names: The hook point of each place.
    """
    maps = ridge_maps(names, tasks, train, strength)
    widths = [len(task.outputs(torch.tensor([0], device="cpu"))[0]) for task in tasks]
    found: list[list[list[Tensor]]] = [[[] for _ in tasks] for _ in maps]
    for _, states in test.pieces:
        for name, linear, own in zip(names, maps, found, strict=True):
            parts = linear(states[name]).split(widths, dim=1)
            for task, part, answers in zip(tasks, parts, own, strict=True):
                answers.append(task.answer(part))
    first = [Linear(m.weight[: widths[0]], m.bias[: widths[0]]) for m in maps]
    return Fitted(tuple(first), [[torch.cat(parts) for parts in own] for own in found])


def ridge_maps(
    names: Sequence[str], tasks: Sequence[Task], train: Side, strength: float
) -> list[Linear]:
    """The ridge regression of the outputs of all tasks, side by side, at every place."""
    sums = {name: RidgeSums() for name in names}
    for reads, states in train.pieces:
        outputs = torch.cat([task.outputs(reads) for task in tasks], dim=1)
        for name, own in sums.items():
            own.add(states[name], outputs)
    return [own.solve(strength) for own in sums.values()]
