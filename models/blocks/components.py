"""Norms, MLPs, and linear maps in the layouts of the releases.

W_gate, W_in, W_out and the biases of MLPs are views in TransformerLens's shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.core.hooks import Taps, tap


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias. Where a hook asks for its scale or its numbers before weight
    and bias, it computes in TransformerLens's steps instead of the fused kernel.

    Args:
        site: Where its points are; see `norm_sites`.
    """

    def __init__(self, d_model: int, eps: float | int, site: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))
        self.eps = eps
        self.scale_site, self.normalized_site, self.out_site = self.sites = norm_sites(site)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], taps: Taps
    ) -> Float[Tensor, "batch pos d_model"]:
        if self.scale_site in taps or self.normalized_site in taps:
            normalized = normalized_in_steps(x, self.eps, self.sites, taps)
            out = normalized * self.w + self.b
        else:
            out = F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        return tap(taps, self.out_site, out)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), at least in float32 and then in the input's type, times a weight
    where there is one.

    Args:
        width: Of the last axis.
        site: Where its points are; see `norm_sites`.
        weighted: Whether it has a weight.
    """

    def __init__(self, width: int, eps: float | int, site: str, weighted: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width)) if weighted else None
        self.eps = eps
        self.scale_site, self.normalized_site, self.out_site = self.sites = norm_sites(site)

    def forward(self, x: Float[Tensor, "*rows width"], taps: Taps) -> Float[Tensor, "*rows width"]:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.scale_site in taps:
            wide = wide / tap(
                taps, self.scale_site, (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
            )
        else:
            wide = F.rms_norm(wide, wide.shape[-1:], None, self.eps)
        return tap(taps, self.out_site, self.weighted(wide, x.dtype, taps))

    def weighted(
        self, wide: Float[Tensor, "*rows width"], kind: torch.dtype, taps: Taps
    ) -> Float[Tensor, "*rows width"]:
        """Divided numbers in the input's type, times the weight."""
        normalized = tap(taps, self.normalized_site, wide.to(kind))
        return normalized if self.w is None else self.w * normalized


class LateCastRMSNorm(RMSNorm):
    """RMSNorm cast to the input's type after the product with the weight (OLMo-2)."""

    offset: ClassVar[float] = 0.0

    def weighted(
        self, wide: Float[Tensor, "*rows width"], kind: torch.dtype, taps: Taps
    ) -> Float[Tensor, "*rows width"]:
        assert self.w is not None, "made with one"
        normalized = tap(taps, self.normalized_site, wide)
        return (normalized * (self.offset + self.w.to(wide.dtype))).to(kind)


class OffsetRMSNorm(LateCastRMSNorm):
    """The same times 1 + weight (Gemma)."""

    offset: ClassVar[float] = 1.0

    def __init__(self, width: int, eps: float | int, site: str) -> None:
        super().__init__(width, eps, site)
        self.w = nn.Parameter(torch.zeros(width))


Norm = LayerNorm | RMSNorm


class Reader(NamedTuple):
    """A linear map that reads a norm's output.

    Attributes:
        owner: The module that holds the map.
        weight, bias: The names of its parameters; the bias may be None.
        input_first: Whether the weight is stored "d_in d_out" instead of "d_out d_in".
    """

    owner: nn.Module
    weight: str
    bias: str
    input_first: bool


def norm_sites(site: str) -> tuple[str, str, str]:
    """The hook points of a norm: its divisor and its numbers before weight and bias, as in
    TransformerLens, and then its output.
    """
    return f"{site}.hook_scale", f"{site}.hook_normalized", f"{site}.hook_out"


def normalized_in_steps(
    x: Float[Tensor, "batch pos d_model"], eps: float | int, sites: tuple[str, str, str], taps: Taps
) -> Float[Tensor, "batch pos d_model"]:
    """A LayerNorm's numbers before weight and bias, with its divisor at a hook point."""
    x = x - x.mean(-1, keepdim=True)
    scale = tap(taps, sites[0], (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())
    return tap(taps, sites[1], x / scale)


class MLP(nn.Module):
    """down(act(up(x))), with biases; both matrices are stored output first."""

    sites: ClassVar[tuple[str, ...]] = ("mlp.hook_pre", "mlp.hook_post")

    def __init__(self, d_model: int, d_mlp: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(d_model, d_mlp), nn.Linear(d_mlp, d_model), act

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], taps: Taps
    ) -> Float[Tensor, "batch pos d_model"]:
        pre = tap(taps, "mlp.hook_pre", self.up(x))
        out: Tensor = self.down(tap(taps, "mlp.hook_post", self.act(pre)))
        return out

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.up.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.down.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return self.up.bias

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return self.down.bias


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)).

    Args:
        fused: One stored matrix `gate_up` with the rows of gate and up below each other, instead of
            two.
        bias: Biases of all three projections.
    """

    sites: ClassVar[tuple[str, ...]] = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")

    def __init__(
        self,
        d_model: int,
        d_mlp: int,
        act: Callable[[Tensor], Tensor] = F.silu,
        *,
        fused: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.act = act
        if fused:
            self.gate_up = nn.Linear(d_model, 2 * d_mlp, bias=bias)
        else:
            self.gate, self.up = (
                nn.Linear(d_model, d_mlp, bias=bias),
                nn.Linear(d_model, d_mlp, bias=bias),
            )
        self.down = nn.Linear(d_mlp, d_model, bias=bias)
        self.fused = fused

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], taps: Taps
    ) -> Float[Tensor, "batch pos d_model"]:
        halves = self.gate_up(x).chunk(2, dim=-1) if self.fused else (self.gate(x), self.up(x))
        gate, up = (
            half.contiguous() for half in halves
        )  # one layout, so that a hook's copy goes through the same kernel
        gate, up = tap(taps, "mlp.hook_pre", gate), tap(taps, "mlp.hook_pre_linear", up)
        out: Tensor = self.down(tap(taps, "mlp.hook_post", self.act(gate) * up))
        return out

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.gate_up.weight.chunk(2)[0].T if self.fused else self.gate.weight.T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.gate_up.weight.chunk(2)[1].T if self.fused else self.up.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.down.weight.T

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        return self._bias(self.gate_up.bias, 0) if self.fused else self._bias(self.gate.bias)

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return self._bias(self.gate_up.bias, 1) if self.fused else self._bias(self.up.bias)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return (
            self.down.weight.new_zeros(self.down.out_features)
            if self.down.bias is None
            else self.down.bias
        )

    def _bias(self, bias: Tensor | None, half: int | None = None) -> Float[Tensor, " d_mlp"]:
        if bias is None:
            return self.down.weight.new_zeros(self.down.in_features)
        return bias if half is None else bias.chunk(2)[half]


def wide(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same numbers at least in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_in d_out"], bias: Tensor
) -> Float[Tensor, "... d_out"]:
    """x @ weight + bias with input-first weights, in one addmm as GPT-2's Conv1D does it."""
    return torch.addmm(bias, x.reshape(-1, weight.shape[0]), weight).view(
        *x.shape[:-1], weight.shape[1]
    )
