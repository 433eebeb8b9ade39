"""Logistic regression on kept states, by scikit-learn, and the description length of a task.

Axes: read d output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.probes.ridge import Fitted, Linear
from loopscope.interp.probes.states import Side, States
from loopscope.interp.probes.tasks import Task

_BLOCKS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Shares of the reads at which the blocks of a code end."""
_EXACT = 4096  # weights up to which Newton's method is taken, whose matrix has a row for each
_ITERATIONS = 2000  # of the solver; scikit-learn warns where they are too few


@dataclass(frozen=True)
class Code:
    """How many bits the classes of some reads take, given their states.

    Attributes:
        bits: Float[Tensor, " place"].
        uniform: The bits without any probe, all classes being equally likely.
    """

    bits: Float[Tensor, " place"]
    uniform: float

    def compression(self) -> Float[Tensor, " place"]:
        """Bits without a probe over bits with it: above 1 where the states tell something."""
        return self.uniform / self.bits


def fit_logistic(
    names: Sequence[str], tasks: Sequence[Task], train: Side, test: Side, strength: float
) -> tuple[Fitted, States]:
    """Fit every task at every place, one after the other.

    Each row is run once, and its states at all places are kept.

    Args:
        names: The hook point of each place.

    Returns:
        The probes, and the states of the rows that were fitted, on the CPU.
    """
    kept = _kept(names, train), _kept(names, test)
    maps, answers = [], []
    for name in names:
        x, held_out = (part[name].double() for part in kept)
        fits = [_fit(x, task.values[train.reads], strength) for task in tasks]
        answers.append([torch.from_numpy(fit.predict(held_out.numpy())) for fit in fits])
        maps.append(_map(fits[0], tasks[0]))
    return Fitted(tuple(maps), answers), kept[0]


def _kept(names: Sequence[str], side: Side) -> States:
    chunks = [states for _, states in side.pieces]
    return {name: torch.cat([chunk[name].cpu() for chunk in chunks]) for name in names}


def _fit(x: Float[Tensor, "read d"], values: Int[Tensor, " read"], strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    if len(values.unique()) < 2:
        raise ValueError(
            "a logistic probe needs rows of at least two classes to fit; give more rows, or another"
            " held_out or seed"
        )
    exact = x.shape[1] * len(values.unique()) <= _EXACT
    how = ("newton-cholesky", 1e-10) if exact else ("lbfgs", 1e-5)
    solver = LogisticRegression(C=1 / strength, solver=how[0], tol=how[1], max_iter=_ITERATIONS)
    return solver.fit(x.double().numpy(), values.numpy())


def _map(fit: Any, task: Task) -> Linear:
    """The map of a fitted probe; a class that no fitted read has gets the bias -inf."""
    weight, bias = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    assert task.classes is not None, "logistic probes have classes"
    if len(task.classes) == 2:
        return Linear(weight, bias)
    whole = weight.new_zeros(len(task.classes), weight.shape[1])
    biases = bias.new_full((len(task.classes),), -math.inf)
    seen = torch.from_numpy(fit.classes_)
    if len(seen) == 2:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    whole[seen], biases[seen] = weight, bias
    return Linear(whole, biases)


def code_of(kept: States, task: Task, reads: Int[Tensor, " read"], strength: float) -> Code:
    """The code of the classes of some reads given their states at each place."""
    assert task.classes is not None, "logistic probes have classes"
    values, size = task.values[reads], len(task.classes)
    lengths = [description_length(x, values, size, strength) for x in kept.values()]
    return Code(
        torch.tensor(lengths, dtype=torch.float64, device="cpu"), len(reads) * math.log2(size)
    )


def description_length(
    x: Float[Tensor, "read d"], values: Int[Tensor, " read"], n_classes: int, strength: float
) -> float:
    """The online code of the classes given the states, in bits (Voita & Titov 2020): each block of
    reads is coded by a probe that was fitted on the blocks before it.

    A class to which a probe of n reads gives the probability p is coded with (n p + 1) / (n + K),
    K being the number of classes, so that a class that is new to the probe has a code too. The
    first block is coded uniformly.
    """
    ends = sorted({max(1, math.ceil(share * len(x))) for share in _BLOCKS})
    bits = ends[0] * math.log2(n_classes)
    for start, end in pairwise(ends):
        seen, new = values[:start], values[start:end]
        probabilities = torch.zeros(len(new), n_classes, dtype=torch.float64, device="cpu")
        if len(seen.unique()) < 2:
            probabilities[:, seen[0]] = 1.0
        else:
            fit = _fit(x[:start], seen, strength)
            found = fit.predict_proba(x[start:end].double().numpy())
            probabilities[:, torch.from_numpy(fit.classes_)] = torch.from_numpy(found)
        coded = (start * probabilities + 1) / (start + n_classes)
        bits -= float(coded.gather(1, new[:, None]).log2().sum())
    return bits
