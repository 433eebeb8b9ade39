"""Short causal convolutions over positions, which run on any set of rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.blocks.components import wide
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap


class ShortConvolution(nn.Module):
    """A depthwise causal convolution with a residual branch, (conv(x) + x) / sqrt(kernel + 1), at
    least in float32.

    Padded places count as zeros in the convolution, and as they are in the residual branch.

    Args:
        width: Channels.
        kernel: Places that a row reads: its own and those before it.
        name: The convolution's name within its visit, under which its inputs are kept for later
            rows.
    """

    def __init__(self, width: int, kernel: int, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, kernel))  # the last tap is the own place
        self.kernel, self.name = kernel, name

    def forward(
        self, x: Float[Tensor, "batch row width"], rows: Rows
    ) -> Float[Tensor, "batch row width"]:
        taps = wide(self.weight)[:, 0].flip(-1).T  # lag width
        summed = (taps * wide(rows.recent(self.name, x, self.kernel))).sum(2)
        return ((summed + wide(x)) / math.sqrt(self.kernel + 1)).to(x.dtype)


class DynamicConvolution(nn.Module):
    """A depthwise causal convolution whose taps are fixed numbers plus numbers made of the row's
    input: (conv(x) + x) / sqrt(2 kernel + 1), at least in float32.

    Args:
        d_model: Channels of the input that the taps are made of.
        heads: Groups of channels; the channels of a group share the part of a tap that is made.
        kernel, name: As for `ShortConvolution`.
        site: The hook point of the taps that are made, "batch pos head lag"; lag 0 is the own
            place.
    """

    def __init__(
        self, d_model: int, heads: int, width: int, kernel: int, name: str, site: str
    ) -> None:
        super().__init__()
        self.static = nn.Parameter(torch.empty(kernel, width))
        self.projection = nn.Parameter(torch.empty(heads * kernel, d_model))
        self.heads, self.kernel, self.name, self.site = heads, kernel, name, site

    def forward(
        self,
        x: Float[Tensor, "batch row width"],
        source: Float[Tensor, "batch row d_model"],
        rows: Rows,
        taps: Taps,
    ) -> Float[Tensor, "batch row width"]:
        """The convolved rows; `source` is what the taps are made of."""
        made = F.linear(source, self.projection).unflatten(-1, (self.heads, self.kernel))
        made = wide(tap(taps, self.site, made)).transpose(-1, -2)  # batch row lag head
        weights = made.repeat_interleave(x.shape[-1] // self.heads, -1) + wide(self.static)
        summed = (weights * wide(rows.recent(self.name, x, self.kernel))).sum(2)
        return ((summed + wide(x)) / math.sqrt(2 * self.kernel + 1)).to(x.dtype)
