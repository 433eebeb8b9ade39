"""Draws from a seed: the same whatever number format or device tensors are made in by default."""

from __future__ import annotations

from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.models.basis.numbers import checked_integer


def seeded(seed: SupportsIndex) -> torch.Generator:
    """The generator of a seed, on the CPU; a draw from it names that device.

    Raises:
        TypeError, ValueError: As for `checked_seed`.
    """
    return torch.Generator(device="cpu").manual_seed(checked_seed(seed))


def checked_seed(seed: SupportsIndex) -> int:
    """A seed as Python's integer.

    Raises:
        TypeError: A seed that is no integer.
        ValueError: A seed that has more than 64 bits.
    """
    number = checked_integer(seed, "a seed")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"a seed must be in -2**63..2**64 - 1, got {number}")
    return number


def normal_rows(count: int, width: int, generator: torch.Generator) -> Float[Tensor, "row width"]:
    """Rows of normal numbers, in float32."""
    return torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")


def other_rows(count: int, seed: SupportsIndex) -> Int[Tensor, " row"]:
    """A random permutation that leaves no row in place: each row's successor on a random circle.

    Raises:
        ValueError: Fewer than two rows.
    """
    if count < 2:
        raise ValueError(
            f"to resample from other rows, at least two are needed, got {count}; give more inputs,"
            " or choose another replacement"
        )
    order = torch.randperm(count, generator=seeded(seed), device="cpu")
    return torch.empty_like(order).scatter(0, order, order.roll(-1))
