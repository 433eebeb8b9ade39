"""Dory's parts: projections onto the unit sphere, attention with scaled unit queries and a gate, an
MLP with scaled branches, and a block that moves a direction towards what they find.

The learned scales are computed in float32 at least.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.blocks.components import GatedMLP, norm_sites, wide
from loopscope.models.blocks.decoder_block import Attention, Heads, KeyHeads, Stream
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap


class UnitNorm(nn.Module):
    """x / sqrt(sum(x^2) + eps), at least in float32 and then in the input's type; there is no
    weight.

    Args:
        site: Where its points are; see `norm_sites`.
    """

    def __init__(self, eps: float | int, site: str) -> None:
        super().__init__()
        self.eps = eps
        self.scale_site, self.normalized_site, self.out_site = self.sites = norm_sites(site)

    def forward(self, x: Float[Tensor, "*rows width"], taps: Taps) -> Float[Tensor, "*rows width"]:
        numbers = wide(x)
        scale = (numbers.pow(2).sum(-1, keepdim=True) + self.eps).sqrt()
        unit = (numbers / tap(taps, self.scale_site, scale)).to(x.dtype)
        return tap(taps, self.out_site, tap(taps, self.normalized_site, unit))


class DoryAttention(Attention):
    """Attention with queries and keys of unit length, and with a gate in front of the output
    projection.

    Each query channel is multiplied by (sqk sqrt(d_head) / start)^2 after the rotation
    (`attn.hook_q_scale`). The gate is sigmoid(gate(x) (s_gate d_model^(1/4) / start)^2), where
    `attn.hook_gate` is gate(x). The gated results of all heads together have unit length before
    the output projection (`attn.z_norm`).

    Args:
        sizes: d_model, n_heads, n_kv_heads and d_head.
        eps: Of the norms.
        start: The number at which sqk and s_gate start.
        window: Positions that a row sees, its own included; None for all before it.
    """

    sites: ClassVar[tuple[str, ...]] = (
        *Attention.sites[:3], *norm_sites("attn.q_norm"), *norm_sites("attn.k_norm"),
        "attn.hook_q_scale", *Attention.sites[3:], "attn.hook_gate", "attn.hook_gated",
        *norm_sites("attn.z_norm"),
    )  # fmt: skip

    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        rotary: Rotary,
        *,
        eps: float | int,
        start: float | int,
        window: int | None,
    ) -> None:
        super().__init__(*sizes, rotary)
        d_model, n_heads, _, d_head = sizes
        self.start, self.window = start, window
        self.gate = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.sqk, self.s_gate = (
            nn.Parameter(torch.full((n_heads * d_head,), float(start))) for _ in range(2)
        )
        self.q_norm, self.k_norm, self.z_norm = (
            UnitNorm(eps, f"attn.{which}_norm") for which in "qkz"
        )

    def normed(self, q: Heads, k: KeyHeads, taps: Taps) -> tuple[Tensor, Tensor]:
        return self.q_norm(q, taps), self.k_norm(k, taps)

    def positioned(
        self, q: Heads, k: KeyHeads, positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Tensor]:
        scale = self._squared(self.sqk, self.d_head**0.5).expand(q.shape)
        scale = tap(taps, "attn.hook_q_scale", scale)
        q, k = super().positioned(q, k, positions, taps)
        return (q * scale).to(q.dtype), k

    def gated(
        self, z: Float[Tensor, "batch pos width"], x: Stream, taps: Taps
    ) -> Float[Tensor, "batch pos width"]:
        gate = tap(taps, "attn.hook_gate", self.gate(x).unflatten(-1, (-1, self.d_head)))
        share = (gate * self._squared(self.s_gate, x.shape[-1] ** 0.25)).sigmoid()
        gated = (z.unflatten(-1, (-1, self.d_head)) * share).to(z.dtype)
        unit: Tensor = self.z_norm(tap(taps, "attn.hook_gated", gated).flatten(-2), taps)
        return unit

    def _squared(self, learned: Tensor, factor: float) -> Float[Tensor, "head d_head"]:
        scale = (wide(learned) * (factor / self.start)).square()
        return rearrange(scale, "(head d_head) -> head d_head", d_head=self.d_head)

    @property
    def W_gate(self) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(
            self.gate.weight, "(head d_head) d_model -> head d_model d_head", d_head=self.d_head
        )


class DoryMLP(GatedMLP):
    """down(unit(silu(gate(x) suv_gate sqrt(d_model)) * up(x) suv_up sqrt(d_model))).

    Args:
        eps: Of the norm in front of `down` (`mlp.post_norm`).
    """

    sites: ClassVar[tuple[str, ...]] = (*GatedMLP.sites, *norm_sites("mlp.post_norm"))

    def __init__(self, d_model: int, d_mlp: int, eps: float | int) -> None:
        super().__init__(d_model, d_mlp)
        self.suv_gate, self.suv_up = (nn.Parameter(torch.ones(d_mlp)) for _ in range(2))
        self.post_norm = UnitNorm(eps, "mlp.post_norm")
        self.factor = float(d_model**0.5)

    def forward(self, x: Stream, taps: Taps) -> Stream:
        gate = tap(taps, "mlp.hook_pre", self._scaled(self.gate(x), self.suv_gate))
        up = tap(taps, "mlp.hook_pre_linear", self._scaled(self.up(x), self.suv_up))
        product = tap(taps, "mlp.hook_post", self.act(gate) * up)
        out: Tensor = self.down(self.post_norm(product, taps))
        return out

    def _scaled(self, x: Tensor, learned: Float[Tensor, " d_mlp"]) -> Tensor:
        return (x * (wide(learned) * self.factor)).to(x.dtype)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self._scaled(super().W_gate, self.suv_gate)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self._scaled(super().W_in, self.suv_up)


class DoryBlock(nn.Module):
    """A direction that moves towards the direction of attention's output, and then towards that of
    the MLP's: x <- unit(x), x <- x + rate (unit(out) - x), twice. The end has no norm.

    `ln1` and `ln2` are the norms of the stream, `ln1_post` and `ln2_post` those of the outputs.
    `hook_attn_rate` is |attn_alpha rate_start / start| for each channel, and `hook_attn_out` is
    what is added to the normed stream, rate (unit(out) - x); likewise for the MLP.

    Args:
        eps: Of the norms.
        start: The number at which the alphas start.
        rate_start: The rate where an alpha is `start`.
    """

    def __init__(
        self,
        attn: DoryAttention,
        mlp: DoryMLP,
        *,
        eps: float | int,
        start: float | int,
        rate_start: float | int,
    ) -> None:
        super().__init__()
        self.attn, self.mlp, self.factor = attn, mlp, rate_start / start
        self.ln1, self.ln1_post, self.ln2, self.ln2_post = (
            UnitNorm(eps, site) for site in ("ln1", "ln1_post", "ln2", "ln2_post")
        )
        self.attn_alpha, self.mlp_alpha = (
            nn.Parameter(torch.full((attn.o.out_features,), float(start))) for _ in range(2)
        )
        self.sites = (
            "hook_resid_pre", *norm_sites("ln1"), *attn.sites, "attn.hook_out",
            *norm_sites("ln1_post"), "hook_attn_rate", "hook_attn_out", "hook_resid_mid",
            *norm_sites("ln2"), *mlp.sites, "mlp.hook_out",
            *norm_sites("ln2_post"), "hook_mlp_rate", "hook_mlp_out", "hook_resid_post",
        )  # fmt: skip

    def forward(self, x: Stream, rows: Rows, taps: Taps) -> Stream:
        x = self.ln1(tap(taps, "hook_resid_pre", x), taps)
        found = self.ln1_post(tap(taps, "attn.hook_out", self.attn(x, rows, taps)), taps)
        x = self._moved(x, found, "attn", self.attn_alpha, taps)
        x = self.ln2(tap(taps, "hook_resid_mid", x), taps)
        found = self.ln2_post(tap(taps, "mlp.hook_out", self.mlp(x, taps)), taps)
        return tap(taps, "hook_resid_post", self._moved(x, found, "mlp", self.mlp_alpha, taps))

    def _moved(
        self, x: Stream, found: Stream, name: str, alpha: Float[Tensor, " d_model"], taps: Taps
    ) -> Stream:
        """The stream after a step towards a direction."""
        rate = (wide(alpha) * self.factor).abs().expand(x.shape)
        step = tap(taps, f"hook_{name}_rate", rate) * (found - x)
        return x + tap(taps, f"hook_{name}_out", step.to(x.dtype))
