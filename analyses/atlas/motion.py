"""Measurements of how the state moves over iterations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loopscope.analyses.atlas.material import Numbers, asked, opened, shuffled, solver
from loopscope.analyses.figures.dynamics import lyapunov
from loopscope.analyses.pages import multi_hop_claims
from loopscope.interp.dynamics.growth import auc
from loopscope.interp.dynamics.input_dependence import InputDependence, input_dependence
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.layers import attention_dynamics, layer_dynamics
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.dynamics.states import Dynamics, dynamics
from loopscope.interp.dynamics.statistics import median_of, norm_of
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

_HOPS, _LONG = 5, 24


def cycle() -> Numbers:
    """Fixed points of the blocks of an iteration, and settled attention."""
    model, batch = opened().model, asked(_HOPS)[0]
    blocks, step = _last_step(model, batch)
    ends = [block.states[-1][block.shown] for block in blocks]
    without = _last_step(shuffled(model), batch)[1]
    change = attention_dynamics(model, batch, _LONG).change[-1]
    return {
        "last step of the blocks' directions, the larger": step,
        "distance of the two ends over that step": median_of(norm_of(ends[0] - ends[1])) / step,
        "last change of attention, the largest of all heads": float(change.max()),
        "last step of shuffled weights": without,
        "last step over that of shuffled weights": step / without,
    }


def _last_step(model: LoopedModel, batch: Batch) -> tuple[list[Dynamics], float]:
    """The directions of every block's output, and the larger median of their last steps."""
    blocks = [block.directions() for block in layer_dynamics(model, batch, _LONG).layers]
    return blocks, max(median_of(block.step_norm()[-1][block.shown]) for block in blocks)


def two_scales() -> Numbers:
    """The size and the turn of the state's steps."""
    model, batch = opened().model, asked(_HOPS)[0]
    path = dynamics(model, batch)
    steps, without = path.step_norm()[:, path.shown], _cosine(dynamics(shuffled(model), batch))
    return {
        "last step over the first": median_of(steps[-1] / steps[1]),
        "cosine of consecutive steps, without its sign": abs(_cosine(path)),
        "cosine with shuffled weights": without,
        "cosine with shuffled weights minus cosine": without - _cosine(path),
    }


def _cosine(path: Dynamics) -> float:
    """The mean cosine of consecutive steps in the second half of a run."""
    return float(path.update_cosine()[len(path.iterations) // 2 + 1 :, path.shown].mean())


def recall() -> Numbers:
    """Runs that go on from another input's state, with the input given again and given once."""
    puzzles, batch = solver(50), asked(_HOPS)[0]
    again = input_dependence(
        puzzles.model, puzzles.tokens, puzzles.tokens.roll(1, 0), 9, readout=puzzles.cells.start
    )
    once = input_dependence(
        opened().model, batch, replace(batch, tokens=batch.tokens.roll(1, 0)), 9
    )
    return {
        "dependence on the input, given again": _dependence(again),
        "distance to the end of the own input": median_of(again.to_input[-1]),
        "dependence on the input, given once": _dependence(once),
    }


def _dependence(record: InputDependence) -> float:
    return float(record.dependence()[-1].nanmean())


def stability() -> Numbers:
    """Accuracy that falls with iterations, and the spectral radius of an iteration."""
    found: Numbers = {}
    for name in ("r2", "r_dyn"):
        checkpoint = f"mini/multi_hop/{name}"
        accuracy = multi_hop_claims.grid(checkpoint).accuracy[3]
        batch = asked(4, checkpoint)[0][:24]
        radius = jacobian_spectrum(opened(checkpoint).model, batch, _LONG // 2, _LONG).radius
        found[f"fall of {name}"] = float(accuracy.max() - accuracy[-1])
        found[f"radius of {name}"] = median_of(radius)
    both = found["radius of r2"], found["radius of r_dyn"]
    return found | {"radius of r2 minus radius of r_dyn": both[0] - both[1]}


def cancellation() -> Numbers:
    """Shares of sublayers against the exponent that they sum to."""
    model, batch = opened().model, asked(_HOPS)[0]
    own, without = _cancelled(model, batch), _cancelled(shuffled(model), batch)
    return {
        "sizes of the shares over the exponent's": own,
        "the same with shuffled weights": without,
        "the same over that of shuffled weights": own / without,
    }


def _cancelled(model: LoopedModel, batch: Batch) -> float:
    """The sizes of the shares over that of the exponent, in the second half of a run."""
    found = lyapunov_spectrum(model, batch, 1, _LONG, space="direction")
    late = found.shares[len(found.shares) // 2 :]
    return float(late.abs().sum(1).mean() / late.sum(1).mean().abs())


def wandering() -> Numbers:
    """Exponents of right and wrong answers."""
    record = lyapunov.run(lyapunov.LyapunovConfig(n_loops=_LONG))
    wrong, hops = ~record.right, torch.tensor([h or 0 for h in record.hops])
    within = [auc(record.exponent[hops == h], wrong[hops == h]) for h in hops.unique()]
    both, margin = record.separation.exponent, record.separation.margin
    return {
        "AUC of the exponent": both,
        "AUC within one hop count": float(torch.tensor(within).nanmean()),
        "median exponent of wrong answers": _median(record.exponent, wrong),
        "median exponent of right answers": _median(record.exponent, ~wrong),
        "AUC of the margin at half depth": margin,
        "AUC minus that of the margin at half depth": both - margin,
    }


def _median(values: Tensor, chosen: Tensor) -> float:
    return median_of(values[chosen])
