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
_LARGEST = 1e15  # of a scaling's numbers; products of larger ones are not finite
SCALINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        (
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
}  # by kind: the numbers that a scaling must hold, and those that it may hold


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
        scaling: The released config's `rope_scaling`, with a `rope_type` of `SCALINGS`; None for
            none. "yarn" also multiplies cosines and sines. "dynamic" depends on the length of a
            call, which is the largest position among the rows that the call runs, plus 1: beyond
            the original length a later token changes earlier results.
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
        if kind_of(self.scaling or {}) in ("dynamic", "yarn") and (d_head < 4 or self.theta <= 1):
            raise ValueError(
                f"rope_scaling of the type {kind_of(self.scaling or {})!r} needs a d_head of at"
                f" least 4 and a base above 1, got {d_head} and {self.theta}"
            )
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
        grows = kind_of(self.scaling or {}) == "dynamic" and positions.numel() > 0
        length = positions.max() + 1 if grows else None
        angles = positions[..., None].float() * self.frequencies(positions.device, length)
        cos, sin, size = angles.cos(), angles.sin(), _magnitude(self.scaling)
        return (cos, sin) if size == 1.0 else (cos * size, sin * size)

    def frequencies(
        self, device: torch.device, length: Tensor | None = None
    ) -> Float[Tensor, " half"]:
        """Angle per position of each pair of channels, in radians.

        Args:
            length: The call's length in tokens; None for one that no scaling depends on.
        """
        exponents = (
            torch.arange(0, self.d_head, 2, dtype=torch.float32, device=device) / self.d_head
        )
        scaling = self.scaling
        if scaling is None:
            return 1.0 / self.theta**exponents
        if kind_of(scaling) == "dynamic":
            return 1.0 / self._stretched_base(scaling, length) ** exponents
        frequencies: Tensor = 1.0 / self.theta**exponents
        if kind_of(scaling) == "yarn":
            return self._yarn(frequencies, scaling)
        return _scaled(frequencies, scaling)

    def _stretched_base(self, scaling: Mapping[str, Any], length: Tensor | None) -> float | Tensor:
        """The base of the dynamic kind, which grows with a call's length beyond the original
        one.
        """
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
        if length is None:
            return self.theta
        growth = factor * length.clamp(min=original) / original - (factor - 1)
        base: Tensor = self.theta * growth ** (self.d_head / (self.d_head - 2))
        return base

    def _yarn(self, frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
        """Frequencies of which fast ones are kept, slow ones divided by the factor, and those
        between mixed (arXiv 2309.00071).
        """
        context = scaling["original_max_position_embeddings"]

        def pair_that_turns(times: float | int) -> float:
            """The pair of channels that turns so many times over the original length."""
            ratio = math.log(context / (times * 2 * math.pi))
            return self.d_head * ratio / (2 * math.log(self.theta))

        first = pair_that_turns(scaling.get("beta_fast") or 32)
        last = pair_that_turns(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.d_head - 1)
        if first == last:
            last += 0.001
        pairs = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
        slow = ((pairs - first) / (last - first)).clamp(0, 1)
        mixed: Tensor = frequencies / scaling["factor"] * slow + frequencies * (1 - slow)
        return mixed


class PartialRotary(Rotary):
    """Rotation of the first channels of each head; the others have no position (GPT-NeoX).

    Args:
        n_turned: Channels that are turned; even.
        theta, scaling: As for `Rotary`, of which the frequencies are those of a head of n_turned
            channels.
    """

    def __init__(
        self, n_turned: int, theta: float | int, scaling: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(n_turned, theta, scaling)

    def __call__(self, x: Heads, positions: Int[Tensor, "batch row"]) -> Heads:
        turned = super().__call__(x[..., : self.d_head], positions)
        return torch.cat([turned, x[..., self.d_head :]], dim=-1)


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


def kind_of(scaling: Mapping[str, Any]) -> Any:
    """The kind that a scaling names, under the newer or the older name."""
    return scaling.get("rope_type", scaling.get("type", "default"))


def checked_scaling(scaling: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The scaling if it is one that `Rotary` computes; None where it changes nothing."""
    if scaling is None:
        return None
    kind = kind_of(scaling)
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(
            f"rope_scaling must be of the type {', '.join(map(repr, SCALINGS))}, got {kind!r}"
        )
    _check_numbers(kind, scaling)
    if kind == "llama3" and scaling["high_freq_factor"] == scaling["low_freq_factor"]:
        raise ValueError(
            "rope_scaling's high_freq_factor and low_freq_factor must differ, got"
            f" {scaling['low_freq_factor']!r} for both"
        )
    return None if kind == "default" else scaling


def _check_numbers(kind: str, scaling: Mapping[str, Any]) -> None:
    """Raise where a number of a kind's is absent or is none that its field takes."""
    needed, possible = SCALINGS[kind]
    for name in needed:
        if name not in scaling:
            raise ValueError(
                f"rope_scaling of the type {kind!r} needs {name!r}, got {dict(scaling)}"
            )
        _check_number(name, scaling[name])
    for name in possible:
        if scaling.get(name) is not None:
            _check_number(name, scaling[name])


def _check_number(name: str, number: object) -> None:
    """Raise for a value that a scaling's field does not take."""
    if name == "truncate":
        if not isinstance(number, bool):
            raise ValueError(f"rope_scaling's truncate must be true or false, got {number!r}")
        return
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"rope_scaling's {name} must be a number, got {number!r}")
    if not 0 < number <= _LARGEST:
        raise ValueError(
            f"rope_scaling's {name} must be finite and above 0 (and at most {_LARGEST:g}), got"
            f" {number!r}"
        )


def _magnitude(scaling: Mapping[str, Any] | None) -> float:
    """The factor of cosines and sines: 1 but for yarn, which by default lets it grow with the
    logarithm of its factor.
    """
    if scaling is None or kind_of(scaling) != "yarn":
        return 1.0
    stated = scaling.get("attention_factor")
    if stated is not None:
        return float(stated)

    def grown(weight: float | int) -> float:
        return 0.1 * weight * math.log(max(scaling["factor"], 1.0)) + 1.0

    own, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(own) / grown(all_dims) if own and all_dims else grown(1.0)


def _scaled(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Frequencies of the kinds "linear" and "llama3"."""
    slowed: Tensor = frequencies / scaling["factor"]
    if kind_of(scaling) == "linear":
        return slowed
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = (
        scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    )  # of each pair over the original context
    share: Tensor = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * slowed + share * frequencies
