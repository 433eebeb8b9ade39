"""Attention without rotary positions: convolved keys and values, clipped queries and keys, a
learned bias by distance, a sink and an output gate.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.blocks.components import wide
from loopscope.models.blocks.decoder_block import Attention, Heads, Stream
from loopscope.models.blocks.short_convolution import DynamicConvolution, ShortConvolution
from loopscope.models.core.attention import BiasAt, Rows
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.families.inkling.config import InklingConfig


def _sites(*, full: bool) -> tuple[str, ...]:
    """The hook points of one kind of layer, in order of execution."""
    keys, values = (
        (
            f"attn.hook_{name}_proj",
            *((f"attn.hook_{name}_taps",) if full else ()),
            f"attn.hook_{name}",
        )
        for name in ("k", "v")
    )
    return (
        "attn.hook_q", *keys, *values,
        "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_rel", "attn.hook_sink",
        "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z",
        "attn.hook_gate", "attn.hook_gated",
    )  # fmt: skip


class InklingAttention(Attention):
    """Grouped-query attention of three inputs, one each for queries, keys and values.

    With clip(x, c) = x scaled down to length c where it is longer:

        q = clip(scale * (x_q W_q), c);  k = clip(conv(x_k W_k), c);  v = rms(conv(x_v W_v))

    The bias at distance D is clip(rel_scale * (x_q W_r), c_r) . proj[:, D], the output
    (z * sigmoid(x_q W_gate)) W_o. Sliding layers, which are these, have static convolutions and
    see `window` positions.

    `hook_k_proj` and `hook_v_proj` are before the convolutions, `hook_q` and `hook_k` before clip
    and scales, `hook_rot_q`, `hook_rot_k` and `hook_v` enter the kernel. `hook_rel` are the
    relative states after clip and scales, `hook_sink` the sink's logits. `hook_gate` is before
    the sigmoid, `hook_gated` the product.
    """

    full: ClassVar[bool] = False
    sites: ClassVar[tuple[str, ...]] = _sites(full=False)

    def __init__(self, cfg: InklingConfig) -> None:
        n_heads, kv_heads, d_head = cfg.heads(full=self.full)
        super().__init__(cfg.d_model, n_heads, kv_heads, d_head, None)
        self.cfg = cfg
        self.extent = cfg.rel_extent if self.full else cfg.window
        self.rel = nn.Linear(cfg.d_model, n_heads * cfg.d_rel, bias=False)
        self.gate = nn.Linear(cfg.d_model, n_heads * d_head, bias=False)
        self.sink = nn.Linear(cfg.d_model, n_heads, bias=False)
        self.q_scale = nn.Parameter(torch.ones(n_heads, d_head))
        self.rel_scale = nn.Parameter(torch.ones(n_heads, cfg.d_rel))
        self.rel_proj = nn.Parameter(torch.empty(cfg.d_rel, self.extent))
        self.k_conv, self.v_conv = (self._convolution(name) for name in ("k", "v"))

    def _convolution(self, name: str) -> ShortConvolution | DynamicConvolution:
        width, kernel = self.n_kv_heads * self.d_head, self.cfg.kernel
        if not self.full:
            return ShortConvolution(width, kernel, name)
        site = f"attn.hook_{name}_taps"
        return DynamicConvolution(self.cfg.d_model, self.n_kv_heads, width, kernel, name, site)

    def forward(  # type: ignore[override]  # queries, keys and values have inputs of their own
        self, x_q: Stream, x_k: Stream, x_v: Stream, rows: Rows, taps: Taps
    ) -> Stream:
        heads = (-1, self.d_head)
        q = tap(taps, "attn.hook_q", self.q(x_q).unflatten(-1, heads))
        k = tap(taps, "attn.hook_k", self._convolved("k", x_k, rows, taps))
        v = self._convolved("v", x_v, rows, taps)
        v = F.rms_norm(wide(v), v.shape[-1:], None, self.cfg.eps).to(v.dtype)
        v = tap(taps, "attn.hook_v", v)
        tau = self._tau(rows.places.positions)[..., None, None].to(q.dtype)
        q = tap(taps, "attn.hook_rot_q", clipped(self.q_scale * q, self.cfg.qk_clip) * tau)
        k = tap(taps, "attn.hook_rot_k", clipped(k, self.cfg.qk_clip))
        rel = self.rel_scale * self.rel(x_q).unflatten(-1, (-1, self.cfg.d_rel))
        rel = tap(taps, "attn.hook_rel", clipped(rel, self.cfg.rel_clip) * tau)
        sink = tap(taps, "attn.hook_sink", self.sink(x_q))
        z = rows.attend_biased(q, k, v, self.bias(rel), sink, taps)
        z = tap(taps, "attn.hook_z", z)
        gate = tap(taps, "attn.hook_gate", self.gate(x_q).unflatten(-1, heads))
        gated = tap(taps, "attn.hook_gated", z * gate.sigmoid())
        out: Tensor = self.o(gated.flatten(-2))
        return out

    def _convolved(self, name: str, x: Stream, rows: Rows, taps: Taps) -> Heads:
        """Keys or values of each head behind their convolution."""
        flat: Tensor = (self.k if name == "k" else self.v)(x)
        convolution = self.k_conv if name == "k" else self.v_conv
        heads = (-1, self.d_head)
        flat = tap(taps, f"attn.hook_{name}_proj", flat.unflatten(-1, heads)).flatten(-2)
        if isinstance(convolution, DynamicConvolution):
            flat = convolution(flat, x, rows, taps)
        else:
            flat = convolution(flat, rows)
        convolved: Tensor = flat.unflatten(-1, heads)
        return convolved

    def _tau(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """The factor of queries and relative states at each position."""
        p = positions.to(torch.promote_types(self.q_scale.dtype, torch.float32))
        if not self.full:
            return torch.ones_like(p)
        factor: Tensor = (
            1 + self.cfg.log_alpha * ((p + 1) / self.cfg.log_floor).clamp(min=1.0).log()
        )
        return factor

    def bias(self, rel: Float[Tensor, "batch pos head d_rel"]) -> BiasAt:
        """The bias of each score by distance, made of relative states."""
        table = (rel @ self.rel_proj.to(rel.dtype)).transpose(1, 2)  # batch head query distance

        def at(distance: Int[Tensor, "batch query key"]) -> Float[Tensor, "batch head query key"]:
            distance = distance[:, None]
            index = distance.clamp(0, self.extent - 1).expand(-1, table.shape[1], -1, -1)
            found = table.gather(3, index).masked_fill(distance >= self.extent, 0)
            return found if self.full else found.masked_fill(distance >= self.extent, -torch.inf)

        return at


class FullAttention(InklingAttention):
    """The attention of full layers: dynamic convolutions, whose taps for the layer's keys and
    values are `hook_k_taps` and `hook_v_taps`, and q and the relative states scaled by the
    logarithm of the position.
    """

    full: ClassVar[bool] = True
    sites: ClassVar[tuple[str, ...]] = _sites(full=True)


def clipped(
    x: Float[Tensor, "batch pos head width"], longest: float | int
) -> Float[Tensor, "batch pos head width"]:
    """Vectors scaled down to a length where they are longer; 1e-6 is added to their lengths."""
    length = wide(x).norm(dim=-1, keepdim=True)
    short: Tensor = wide(x) * (longest / (length + 1e-6)).clamp(max=1.0)
    return short.to(x.dtype)
