"""Scores by gates: how the metric depends on how much of every edge is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.circuits.masked import MaskedRuns
from loopscope.interp.common.inputs import Metric
from loopscope.interp.common.metrics import measure_graphed


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
    total, parts = torch.zeros_like(every), runs.by_examples()
    for share in tqdm(shares, desc="gates", leave=False, delay=2):
        gates = (share * every).requires_grad_()
        total += _gradient(parts, metric, gates) / len(shares)
    return total


def _gradient(
    parts: Sequence[MaskedRuns], metric: Metric, gates: Float[Tensor, "reader writer span"]
) -> Float[Tensor, "reader writer span"]:
    """The gradient of the metric's mean over all examples by the gates. The metric is that of all
    examples together, so where they are run in parts their logits are made first.
    """
    if len(parts) == 1:
        with torch.enable_grad():
            (logits,) = parts[0].logits(gates[None])
            return torch.autograd.grad(measure_graphed(metric, logits).mean(), gates)[0]
    with torch.no_grad():
        logits = torch.cat([part.logits(gates[None])[0] for part in parts])
    with torch.enable_grad():
        mean = measure_graphed(metric, logits.requires_grad_()).mean()
        (slopes,) = torch.autograd.grad(mean, logits)
        total = torch.zeros_like(gates)
        for part, slope in zip(parts, slopes.split([len(p.batch) for p in parts]), strict=True):
            (found,) = torch.autograd.grad(part.logits(gates[None])[0], gates, slope)
            total += found
    return total
