"""Initial latent states of looped models that start from noise: one vector per position, the same
for every row.

A vector depends on the seed and its position alone, so neither another row nor another column
changes it.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.models.basis.numbers import checked_integer

CUT = 3.0  # standard deviations at which the releases truncate their normal distribution
_PRECISION = 53  # bits of a float64 in [0, 1)


def latent_state(
    positions: Int[Tensor, "*rows"], width: int, std: float | int, seed: int
) -> Float[Tensor, "*rows width"]:
    """A vector of normal numbers, truncated at 3 standard deviations, for each position.

    The bits come from a counter-based generator whose key is (seed, position), so the draws are the
    same on every machine.

    Args:
        positions: Places in the sequence, from 0.
        width: Channels of a vector.
        std: Standard deviation of the normal distribution before it is cut; 0 gives zeros.
        seed: At least 0 and below 2^64.

    Returns:
        In float32, on the positions' device.

    Raises:
        TypeError: A seed that is no integer.
        ValueError: A seed out of range, or a negative standard deviation.
    """
    seed = checked_integer(seed, "seed")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2**64, got {seed}")
    if not std >= 0:
        raise ValueError(
            f"the standard deviation of an initial state must be at least 0, got {std}"
        )
    distinct, where = positions.unique(return_inverse=True)
    vectors = std * _truncated_normal(_uniform(distinct.tolist(), width, seed))
    return vectors.float().to(positions.device)[where]


def initial_state(
    like: Float[Tensor, "batch pos d_model"],
    positions: Int[Tensor, "batch pos"],
    std: float | int,
    *,
    state: Tensor | None = None,
    seed: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The latent that a run starts from: the one that is given, or one drawn by `latent_state`.

    Args:
        like: Whose shape, number format and device the latent takes.
        positions: Where its rows stand.
        std: Standard deviation of a drawn latent.
        state: Float[Tensor, "batch pos d_model"], or one row for all: "1 pos d_model".
        seed: Of a drawn latent; with neither it is 0, so that a call without either can be
            repeated.

    Raises:
        ValueError: Both are given, or the state has another shape.
    """
    if state is None:
        drawn = latent_state(positions, like.shape[-1], std, 0 if seed is None else seed)
        return drawn.to(like.dtype)
    if seed is not None:
        raise ValueError(
            "a run starts from state= or from what seed= draws, but both were given; leave one out"
        )
    if (
        state.ndim != 3
        or state.shape[0] not in (1, like.shape[0])
        or state.shape[1:] != like.shape[1:]
    ):
        raise ValueError(
            f"the initial state must have the shape {list(like.shape)} (batch pos d_model), or one"
            f" row for all, got {list(state.shape)}"
        )
    if not state.is_floating_point():
        raise ValueError(f"the initial state must hold floating-point numbers, got {state.dtype}")
    return state.to(like).expand(like.shape)


def _uniform(positions: list[int], width: int, seed: int) -> Float[Tensor, "position width"]:
    """Numbers in (0, 1), in float64."""
    bits = np.empty((len(positions), width), dtype=np.uint64)
    for row, position in enumerate(positions):
        bits[row] = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw(
            width
        )
    return torch.from_numpy(((bits >> np.uint64(64 - _PRECISION)) + 0.5) * 2.0**-_PRECISION)


def _truncated_normal(uniform: Float[Tensor, "position width"]) -> Float[Tensor, "position width"]:
    """The standard normal cut at `CUT`, by its inverse distribution function."""
    low, high = torch.special.ndtr(uniform.new_tensor([-CUT, CUT]))
    numbers: Tensor = torch.special.ndtri(low + uniform * (high - low)).clamp(-CUT, CUT)
    return numbers
