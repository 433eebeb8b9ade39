"""Metrics of the logits at the readout: Float[Tensor, "batch d_vocab"] to Float[Tensor, "
batch"].
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.inputs import Metric


def margin(
    logits: Float[Tensor, "*any d_vocab"], answers: Int[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """Logit of the answer minus the largest other logit (arXiv 2604.07822, figure 8)."""
    right = logits.gather(-1, answers[..., None])[..., 0]
    others = logits.scatter(-1, answers[..., None], -torch.inf)
    return right - others.amax(-1)


def logit_margin(answers: Int[Tensor, " batch"]) -> Metric:
    """The metric "margin of these answers"."""

    def logit_margin(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        return margin(logits, answers.to(logits.device))

    return logit_margin


def logit_diff(right: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"]) -> Metric:
    """The metric "logit of the right token minus logit of the wrong one"."""

    def logit_diff(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        picked = logits.gather(-1, torch.stack([right, wrong], dim=-1).to(logits.device))
        return picked[:, 0] - picked[:, 1]

    return logit_diff


def metric_name(metric: Metric) -> str:
    """What a metric is called in a record."""
    return str(getattr(metric, "__name__", type(metric).__name__))
