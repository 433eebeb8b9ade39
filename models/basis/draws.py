"""Draws from a seed: the same whatever number format or device tensors are made in by default."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor


def seeded(seed: SupportsIndex) -> torch.Generator:
    """The generator of a seed, on the CPU; a draw from it names that device.

    Raises:
        TypeError: A seed that is no integer.
    """
    try:
        return torch.Generator().manual_seed(operator.index(seed))
    except TypeError:
        raise TypeError(f"a seed must be an integer, got {seed!r}") from None


def normal_rows(count: int, width: int, generator: torch.Generator) -> Float[Tensor, "row width"]:
    """Rows of normal numbers, in float32."""
    return torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")
