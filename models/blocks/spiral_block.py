"""Spiral's block: LayerNorms without weights that the iteration shifts, scales and gates, and
matrices divided by a spectral norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.blocks.components import norm_sites, normalized_in_steps
from loopscope.models.blocks.decoder_block import Attention, Heads, Stream
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap

_QK_EPS = 1e-6
_POWER_STEPS = 30


class SpectralLinear(nn.Module):
    """A linear map by original / (u^T original v), with vectors u and v that are stored, also in
    train mode, and never updated.
    """

    u: Float[Tensor, " d_out"]
    v: Float[Tensor, " d_in"]

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.out_features = d_out
        self.original = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.register_buffer("u", torch.full((d_out,), d_out**-0.5))
        self.register_buffer("v", torch.full((d_in,), d_in**-0.5))

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix that is applied."""
        return self.original / (self.u @ (self.original @ self.v))

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def find_scale(self) -> None:
        """Set u and v near the first singular vectors, for weights that came without them."""
        if self.original.is_meta:
            return
        for _ in range(_POWER_STEPS):
            self.u = F.normalize(self.original @ self.v, dim=0)
            self.v = F.normalize(self.original.T @ self.u, dim=0)


class ModulatedNorm(nn.Module):
    """LayerNorm whose weight and bias are an iteration's (1 + scale) and shift."""

    fixed: ClassVar[bool] = False

    def __init__(self, eps: float, site: str) -> None:
        super().__init__()
        self.eps = eps
        self.scale_site, self.normalized_site, self.out_site = self.sites = norm_sites(site)

    def forward(self, x: Stream, shift: Stream, scale: Stream, taps: Taps) -> Stream:
        if self.scale_site in taps or self.normalized_site in taps:
            normed = normalized_in_steps(x, self.eps, self.sites, taps)
        else:
            normed = F.layer_norm(x, x.shape[-1:], None, None, self.eps)
        return tap(taps, self.out_site, (1 + scale) * normed + shift)


class SpiralAttention(Attention):
    """Attention over one spectral-normed matrix for queries, keys and values; queries and keys are
    normed before they are turned.
    """

    def __init__(self, d_model: int, n_heads: int, rotary: Rotary, *, qk_norm: bool) -> None:
        super().__init__(d_model, n_heads, n_heads, d_model // n_heads, rotary, fused=True)
        self.qk_norm = qk_norm
        self.qkv = SpectralLinear(d_model, 3 * d_model)  # type: ignore[assignment]  # shows a weight and a bias, as a Linear does
        self.o = SpectralLinear(d_model, d_model)  # type: ignore[assignment]  # likewise

    def normed(self, q: Heads, k: Heads, taps: Taps) -> tuple[Tensor, Tensor]:
        if not self.qk_norm:
            return q, k
        return F.rms_norm(q, q.shape[-1:], None, _QK_EPS), F.rms_norm(
            k, k.shape[-1:], None, _QK_EPS
        )


class SpectralMLP(nn.Module):
    """Two spectral-normed layers with biases and an activation between them."""

    sites: ClassVar[tuple[str, ...]] = ("mlp.hook_pre", "mlp.hook_post")

    def __init__(self, d_model: int, d_mlp: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.into, self.out = (
            SpectralLinear(d_model, d_mlp, bias=True),
            SpectralLinear(d_mlp, d_model, bias=True),
        )

    def forward(self, x: Stream, taps: Taps) -> Stream:
        pre = tap(taps, "mlp.hook_pre", self.into(x))
        out: Tensor = self.out(tap(taps, "mlp.hook_post", self.act(pre)))
        return out

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.into.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.out.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        assert self.into.bias is not None, "made with one"
        return self.into.bias

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        assert self.out.bias is not None, "made with one"
        return self.out.bias


class SpiralBlock(nn.Module):
    """Gated attention and a gated MLP, one after the other on the stream; the block returns what
    they add to it, its force.

    `attn.hook_out` and `mlp.hook_out` are before the gates, `hook_attn_out` and `hook_mlp_out`
    after them.

    Args:
        sizes: d_model, n_heads, d_mlp.
        act: The activation of the MLP.
    """

    sites: ClassVar[tuple[str, ...]] = (
        "hook_resid_pre",
        *norm_sites("ln1"),
        *Attention.sites,
        "attn.hook_out",
        "hook_attn_out",
        "hook_resid_mid",
        *norm_sites("ln2"),
        *SpectralMLP.sites,
        "mlp.hook_out",
        "hook_mlp_out",
        "hook_resid_post",
        "hook_force",
    )

    def __init__(
        self,
        sizes: tuple[int, int, int],
        eps: float,
        rotary: Rotary,
        *,
        qk_norm: bool,
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        d_model, n_heads, d_mlp = sizes
        self.attn = SpiralAttention(d_model, n_heads, rotary, qk_norm=qk_norm)
        self.mlp = SpectralMLP(d_model, d_mlp, act)
        self.ln1, self.ln2 = ModulatedNorm(eps, "ln1"), ModulatedNorm(eps, "ln2")

    def forward(self, x: Stream, rows: Rows, taps: Taps, vectors: Mapping[str, Tensor]) -> Stream:
        """The force.

        Args:
            vectors: shift1, scale1, gate1, shift2, scale2 and gate2, each "batch pos d_model".
        """
        x = tap(taps, "hook_resid_pre", x)
        out = self.attn(self.ln1(x, vectors["shift1"], vectors["scale1"], taps), rows, taps)
        added = tap(taps, "hook_attn_out", vectors["gate1"] * tap(taps, "attn.hook_out", out))
        mid = tap(taps, "hook_resid_mid", x + added)
        out = self.mlp(self.ln2(mid, vectors["shift2"], vectors["scale2"], taps), taps)
        added = tap(taps, "hook_mlp_out", vectors["gate2"] * tap(taps, "mlp.hook_out", out))
        return tap(taps, "hook_force", tap(taps, "hook_resid_post", mid + added) - x)
