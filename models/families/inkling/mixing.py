"""Attention over block sums at one position: mixes within a pass, and messages between passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.blocks.components import wide
from loopscope.models.core.hooks import Taps, tap

Stream = Float[Tensor, "batch pos d_model"]
Sources = Float[Tensor, "batch pos source d_model"]
MoreSources = Float[Tensor, "batch pos more d_model"]
_EPS = 1e-6  # whatever the config's eps is


class Messages(NamedTuple):
    """The messages that a looped layer may read.

    Attributes:
        sources: Of the pass before, normed.
        queries: The layer's query for each of its inputs: q, k, v, mlp.
    """

    sources: Sources
    queries: Mapping[str, Float[Tensor, " d_model"]]


def normed(sources: Sources) -> Sources:
    """Sources over their root mean square, at least in float32."""
    return F.rms_norm(wide(sources), sources.shape[-1:], None, _EPS)


def joined(blocks: Sources, resid: Stream) -> MoreSources:
    """Block sums followed by the open sum."""
    return torch.cat([blocks, resid[:, :, None]], dim=2)


def read(
    sources: Sources, query: Float[Tensor, " d_model"], site: str, dtype: torch.dtype, taps: Taps
) -> Stream:
    """The mean of normed sources with the weights softmax(query . source / sqrt(d_model)).

    Args:
        site: Where its hook points are: `hook_weights`, "batch pos source", and `hook_out`.
        dtype: Of the result.
    """
    scores = sources @ query.to(sources.dtype) / math.sqrt(sources.shape[-1])
    weights = tap(taps, f"{site}.hook_weights", scores.softmax(-1))
    mean = (weights[..., None] * sources).sum(2).to(dtype)
    return tap(taps, f"{site}.hook_out", mean)


def read_sites(site: str) -> tuple[str, str]:
    """The hook points of `read`."""
    return f"{site}.hook_weights", f"{site}.hook_out"


class MessageGate(nn.Module):
    """An input x with a message m: (1 - tanh(F z)) x + tanh(G z) m, z = D [rms(x); rms(m)].

    `hook_forget` and `hook_gain` are the two hyperbolic tangents.

    Args:
        rank: Width of z.
        site: Where its hook points are.
    """

    def __init__(self, d_model: int, rank: int, eps: float | int, site: str) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, 2 * d_model))
        self.gain = nn.Parameter(torch.empty(d_model, rank))
        self.forget = nn.Parameter(torch.empty(d_model, rank))
        self.eps, self.site = eps, site

    def forward(self, x: Stream, message: Stream, taps: Taps) -> Stream:
        pair = torch.cat([self._rms(x), self._rms(message)], dim=-1)
        z = wide(F.linear(pair, self.down))
        forget, gain = (F.linear(z, wide(w)).tanh() for w in (self.forget, self.gain))
        forget = tap(taps, f"{self.site}.hook_forget", forget.to(x.dtype))
        gain = tap(taps, f"{self.site}.hook_gain", gain.to(x.dtype))
        return tap(taps, f"{self.site}.hook_out", (1 - forget) * x + gain * message)

    def _rms(self, x: Stream) -> Stream:
        return F.rms_norm(wide(x), x.shape[-1:], None, self.eps).to(x.dtype)

    @property
    def sites(self) -> tuple[str, str, str]:
        """The hook points in order of execution."""
        return f"{self.site}.hook_forget", f"{self.site}.hook_gain", f"{self.site}.hook_out"
