"""Number formats: statistics are computed in float32 or wider, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """Float64 as it is, anything narrower as float32."""
    return x if x.dtype == torch.float64 else x.float()
