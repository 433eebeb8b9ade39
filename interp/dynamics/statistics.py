"""Statistics of vectors: lengths, angles, and the effective rank of several of them; the median of
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.precision import widened
from loopscope.models.basis.numbers import given_tensor


def effective_rank(rows: Float[Tensor, "row d"] | Sequence[Sequence[float]]) -> Float[Tensor, ""]:
    """Measure how many directions some vectors use: the effective rank of the rows after their mean
    is subtracted.

    It is the exponential of the entropy of the singular values, each taken as a share of their sum.

    Args:
        rows: Float[Tensor, "row d"], or lists of numbers.

    Returns:
        The effective rank, from 1 to the rank, in float32 or wider; NaN if all rows are the same.

    Raises:
        ValueError: There are fewer than two rows, or a number is not finite.

    Source:
        Roy & Vetterli, "The effective rank", EUSIPCO 2007.
    """
    rows = widened(given_tensor(rows))
    if len(rows) < 2:
        raise ValueError(f"an effective rank needs at least two rows, got {len(rows)}")
    refuse_nonfinite("the rows", rows)
    sizes = torch.linalg.svdvals(rows - rows.mean(0))
    rounding = max(rows.shape) * torch.finfo(rows.dtype).eps * rows.norm()
    sizes = sizes.masked_fill(sizes <= rounding, 0.0)
    rank: Tensor = torch.special.entr(sizes / sizes.sum()).sum().exp()
    return rank


def norm_of(x: Tensor) -> Tensor:
    """The length of each vector along the last axis."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def cosine_of(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between the vectors along the last axis."""
    return (a / norm_of(a)[..., None] * (b / norm_of(b)[..., None])).sum(-1).clamp(-1.0, 1.0)


def median_of(values: Float[Tensor, " n"]) -> float:
    """The median, of an even number of values the mean of the two in the middle; NaN where there is
    no value, or one that is NaN.
    """
    if not len(values) or bool(values.isnan().any()):
        return math.nan
    ordered = values.double().sort().values
    return float((ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2)
