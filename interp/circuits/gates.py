"""Scores by gates: how the metric depends on how much of every edge is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.circuits.masked import MaskedRuns
from loopscope.interp.common.inputs import Metric
from loopscope.interp.common.metrics import measure


def gate_scores(
    runs: MaskedRuns, metric: Metric, shares: Sequence[float]
) -> Float[Tensor, "reader writer span"]:
    """The gradient of the metric's mean over the batch by the gate of every edge, as its mean over
    runs in which all gates are open by the same share.

    A gate that is open by a share gives the reader this share of what the writer adds in this run,
    and the rest of what it adds in the replacing run. All gates closed is the replacing run, all
    open the model's own, so the integral over the shares from 0 to 1, summed over all edges, is
    the difference of the two runs' metrics in every family.

    Args:
        shares: Each one run with its gradient.
    """
    every = runs.graph.every.to(runs.replacement.outputs)
    total = torch.zeros_like(every)
    for share in tqdm(shares, desc="gates", leave=False, delay=2):
        with torch.enable_grad():
            gates = (share * every).requires_grad_()
            (logits,) = runs.logits(gates[None])
            (found,) = torch.autograd.grad(measure(metric, logits).mean(), gates)
        total += found / len(shares)
    return total
