"""Rotary positions: queries and keys are turned by angles that grow with the position (arXiv
2104.09864).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Heads = Float[Tensor, "batch row head d_head"]
Angles = Float[Tensor, "batch row half"]
Pairing = Literal["halves", "pairs"]


def rotate_halves(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """Channel i is turned together with channel i + d_head/2 (Llama's form)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_pairs(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """Channel 2i is turned together with channel 2i + 1 (the interleaved form)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class Rotary:
    """Rotation by angles position * theta^(-2i/d_head), computed in float32 and cast to the type of
    what is turned.

    Args:
        d_head: Channels of a head; even.
        theta: Base of the frequencies.
        scaling: The released config's `rope_scaling`, with `rope_type` "default", "linear" or
            "llama3"; None for none.
        pairing: Which two channels turn together.
        wide: Whether narrower numbers are turned in float32 and then cast back, instead of in their
            own type.

    Raises:
        ValueError: An odd d_head, or a kind of scaling that is not computed here.
    """

    def __init__(
        self,
        d_head: int,
        theta: float | int,
        scaling: Mapping[str, Any] | None = None,
        pairing: Pairing = "halves",
        *,
        wide: bool = False,
    ) -> None:
        if d_head % 2:
            raise ValueError(
                f"rotary positions turn pairs of channels, so d_head must be even, got {d_head}"
            )
        self.d_head, self.theta, self.pairing, self.wide = d_head, float(theta), pairing, wide
        self.scaling = checked_scaling(scaling)
        self._made_for: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Heads, positions: Int[Tensor, "batch row"]) -> Heads:
        rotate, kind = rotate_halves if self.pairing == "halves" else rotate_pairs, x.dtype
        x = x.float() if self.wide and kind != torch.float64 else x
        cos, sin = (table.to(x.dtype) for table in self.tables(positions))
        return rotate(x, cos, sin).to(kind)

    def tables(self, positions: Int[Tensor, "batch row"]) -> tuple[Angles, Angles]:
        """Cosines and sines of the rows' angles; kept for the next block, which is given the same
        rows.
        """
        if self._tables is None or self._made_for is not positions:
            self._tables, self._made_for = self.made_tables(positions), positions
        return self._tables

    def made_tables(self, positions: Int[Tensor, "batch row"]) -> tuple[Angles, Angles]:
        """Cosines and sines of the rows' angles."""
        angles = positions[..., None].float() * self.frequencies(positions.device)
        return angles.cos(), angles.sin()

    def frequencies(self, device: torch.device) -> Float[Tensor, " half"]:
        """Angle per position of each pair of channels, in radians."""
        exponents = (
            torch.arange(0, self.d_head, 2, dtype=torch.float32, device=device) / self.d_head
        )
        return _scaled(1.0 / self.theta**exponents, self.scaling)


class RotationTable(nn.Module):
    """The cosines and sines of the first positions as some releases store them: "1 position 1 half
    2", filled in for a fresh model.
    """

    freqs_cis: Tensor

    def __init__(self, rotary: Rotary, n_positions: int) -> None:
        super().__init__()
        made = torch.stack(rotary.made_tables(torch.arange(n_positions)[None]), dim=-1)
        self.register_buffer("freqs_cis", made[:, :, None])


class StoredRotary(Rotary):
    """Rotation of neighbouring channels by a stored table, which holds whatever the frequencies
    would give; float32 at least.

    Args:
        table: The module that holds it. It is read at every run, so it may be filled or moved
            later.
    """

    def __init__(self, table: RotationTable, d_head: int, theta: float | int) -> None:
        super().__init__(d_head, theta, pairing="pairs", wide=True)
        self.table = table

    def made_tables(self, positions: Int[Tensor, "batch row"]) -> tuple[Angles, Angles]:
        cos, sin = self.table.freqs_cis[0, :, 0].to(positions.device)[positions].unbind(-1)
        return cos, sin


def checked_scaling(scaling: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The scaling if it is one that `Rotary` computes; None where it changes nothing."""
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    needs = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if not isinstance(kind, str) or kind not in needs:
        raise ValueError(
            f"rope_scaling must be of the type 'default', 'linear' or 'llama3', got {kind!r}"
        )
    missing = [name for name in needs[kind] if name not in scaling]
    if missing:
        raise ValueError(
            f"rope_scaling of the type {kind!r} needs {missing[0]!r}, got {dict(scaling)}"
        )
    for name in needs[kind]:
        number = scaling[name]
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"rope_scaling's {name} must be a number, got {number!r}")
        if not 0 < number < math.inf:
            raise ValueError(f"rope_scaling's {name} must be finite and above 0, got {number!r}")
    if kind == "llama3" and scaling["high_freq_factor"] == scaling["low_freq_factor"]:
        raise ValueError(
            "rope_scaling's high_freq_factor and low_freq_factor must differ, got"
            f" {scaling['low_freq_factor']!r} for both"
        )
    return None if kind == "default" else scaling


def _scaled(frequencies: Tensor, scaling: Mapping[str, Any] | None) -> Tensor:
    if scaling is None:
        return frequencies
    slowed: Tensor = frequencies / scaling["factor"]
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return slowed
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = (
        scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    )  # of each pair over the original context
    share: Tensor = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * slowed + share * frequencies
