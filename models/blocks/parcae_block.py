"""Parcae's parts: the ways of injecting the input, attention with value embeddings, and its
block.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.blocks.components import RMSNorm, norm_sites
from loopscope.models.blocks.decoder_block import Attention, Stream
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap

GATE_CHANNELS = 32
_FRESH_DECAY = 0.2**0.5

Values = Float[Tensor, "batch pos kv_head d_head"]


class DiagonalInjection(nn.Module):
    """decay * state + step * B e, channel by channel, with step = softplus(step_bias) and decay =
    exp(-step * exp(log_rate)).

    The decay is below 1 in every channel, so what the state holds fades unless blocks renew it.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(d_model))
        self.step_bias = nn.Parameter(
            torch.full((d_model,), math.log(math.expm1(-math.log(_FRESH_DECAY))))
        )
        self.B = nn.Parameter(torch.empty(d_model, d_model))

    @torch.no_grad()
    def make_identity(self) -> None:
        """Let the input through as it is, as a fresh model does."""
        nn.init.eye_(self.B)

    @property
    def decay(self) -> Float[Tensor, " d_model"]:
        """Share of the state that an injection keeps."""
        return torch.exp(-F.softplus(self.step_bias) * self.log_rate.exp())

    def drive(self, e: Stream) -> Stream:
        """The vector that an injection adds; the same at every iteration."""
        return F.softplus(self.step_bias) * (e @ self.B.T)

    def forward(self, state: Stream, e: Stream) -> Stream:
        return state * self.decay + self.drive(e)


class LinearInjection(nn.Module):
    """One matrix on [state; e]."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, 2 * d_model))

    def forward(self, state: Stream, e: Stream) -> Stream:
        return F.linear(torch.cat([state, e], dim=-1), self.weight)


class AdditiveInjection(nn.Module):
    """state + e."""

    def forward(self, state: Stream, e: Stream) -> Stream:
        return state + e


class ValueAttention(Attention):
    """Attention that adds to its values an embedding of the tokens, gated by 2 sigmoid(gate) of the
    first channels of its input.

    `attn.hook_value_embed` is the embedding, `attn.hook_value_gate_logit` the gate before the
    sigmoid, `attn.hook_v` the sum. Rotation comes before the norm of queries and keys, which has no
    weight and the number format's own epsilon.

    Args:
        d_model, n_heads, n_kv_heads: Widths.
        gate: Whether the block has a gate; without one an embedding is not added.
        embeds: Whether it is given embeddings.
        qk_norm: Whether queries and keys are normed.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        rotary: Rotary,
        *,
        gate: bool,
        embeds: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_model // n_heads, rotary)
        self.qk_norm = qk_norm
        self.value_gate = nn.Linear(GATE_CHANNELS, n_kv_heads, bias=False) if gate else None
        q, k, v, *rest = Attention.sites
        mixed = ("attn.hook_value_embed", "attn.hook_value_gate_logit") if gate and embeds else ()
        self.sites = (q, k, *mixed, v, *rest)  # type: ignore[misc]  # an instance's own

    def forward(self, x: Stream, rows: Rows, taps: Taps, embedded: Values | None = None) -> Stream:
        q, k, v = self.projected(x)
        q, k = tap(taps, "attn.hook_q", q), tap(taps, "attn.hook_k", k)
        v = tap(taps, "attn.hook_v", self.mixed(x, v, embedded, taps))
        q, k = self.positioned(q, k, rows.places.positions, taps)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k = tap(taps, "attn.hook_rot_q", q), tap(taps, "attn.hook_rot_k", k)
        z = tap(taps, "attn.hook_z", rows.attend(q, k, v, taps))
        out: Tensor = self.o(z.flatten(-2))
        return out

    def mixed(self, x: Stream, v: Values, embedded: Values | None, taps: Taps) -> Values:
        """The values that are attended to."""
        if embedded is None or self.value_gate is None:
            return v
        embedded = tap(taps, "attn.hook_value_embed", embedded)
        logit = tap(taps, "attn.hook_value_gate_logit", self.value_gate(x[..., :GATE_CHANNELS]))
        return v + 2 * logit.sigmoid()[..., None] * embedded


class SquaredMLP(nn.Module):
    """down(relu(up(x))^2 / 2), without biases."""

    sites: ClassVar[tuple[str, ...]] = ("mlp.hook_pre", "mlp.hook_post")

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(d_model, d_mlp, bias=False),
            nn.Linear(d_mlp, d_model, bias=False),
        )

    def forward(self, x: Stream, taps: Taps) -> Stream:
        pre = tap(taps, "mlp.hook_pre", self.up(x))
        out: Tensor = self.down(tap(taps, "mlp.hook_post", F.relu(pre).square() * 0.5))
        return out

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.up.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.down.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return self.down.weight.new_zeros(self.down.in_features)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return self.down.weight.new_zeros(self.down.out_features)


class ParcaeBlock(nn.Module):
    """A pre-norm block: x + attn(ln1(x)), then x + mlp(ln2(x)).

    Args:
        attn: Its attention.
        d_mlp: Width of its MLP.
        eps: Of its norms.
    """

    def __init__(self, attn: ValueAttention, d_mlp: int, eps: float) -> None:
        super().__init__()
        d_model = attn.o.out_features
        self.attn, self.mlp = attn, SquaredMLP(d_model, d_mlp)
        self.ln1, self.ln2 = RMSNorm(d_model, eps, "ln1"), RMSNorm(d_model, eps, "ln2")
        self.sites = (
            "hook_resid_pre", *norm_sites("ln1"), *attn.sites, "hook_attn_out", "hook_resid_mid",
            *norm_sites("ln2"), *SquaredMLP.sites, "hook_mlp_out", "hook_resid_post",
        )  # fmt: skip

    def forward(self, x: Stream, rows: Rows, taps: Taps, embedded: Values | None = None) -> Stream:
        """The stream after the block.

        Args:
            embedded: Value embeddings of the rows' tokens, where there is a table for the block.
        """
        x = tap(taps, "hook_resid_pre", x)
        x = tap(
            taps,
            "hook_resid_mid",
            x + tap(taps, "hook_attn_out", self.attn(self.ln1(x, taps), rows, taps, embedded)),
        )
        return tap(
            taps,
            "hook_resid_post",
            x + tap(taps, "hook_mlp_out", self.mlp(self.ln2(x, taps), taps)),
        )
