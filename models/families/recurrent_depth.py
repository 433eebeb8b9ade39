"""The recurrent-depth transformer of "Loop, Think, & Generalize" (arXiv 2604.07822).

GPT-2 blocks applied R times with shared weights, one final LayerNorm, an output head tied to the
token embedding. R = 1 is the vanilla transformer. Weights keep GPT-2's fused, input-first layout;
W_Q, W_K, W_V, W_O, ... are views on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import limits
from loopscope.models.blocks.components import LayerNorm, Reader, linear, norm_sites
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, Visit

Positions = Literal["learned", "sinusoidal", "none"]


@dataclass(frozen=True, kw_only=True)
class RecurrentDepthConfig(LoopedConfig):
    """Sizes, positions ("learned", "sinusoidal", "none"), whether the embedding is added again
    before each later iteration, and the share of attention weights and block outputs that is
    dropped while the model is in train mode.
    """

    family: ClassVar[str] = "recurrent_depth"
    TINY: ClassVar[Mapping[str, Any]] = {"n_ctx": None}
    act_fn: ClassVar[str] = "gelu_new"
    normalization_type: ClassVar[str] = "LN"
    positions: Positions = "none"
    input_injection: bool = False
    dropout: float | int = field(default=0.0, metadata=limits(least=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.n_ctx is None) != (self.positions == "none"):
            raise ValueError(
                f"n_ctx must be given with positions and only then, got n_ctx={self.n_ctx},"
                f" positions={self.positions!r}"
            )
        if self.dropout >= 1:
            raise ValueError(f"dropout is a share, at least 0 and below 1, got {self.dropout!r}")


class FusedAttention(nn.Module):
    """GPT-2 attention with one fused projection for queries, keys and values."""

    sites: ClassVar = (
        "attn.hook_q",
        "attn.hook_k",
        "attn.hook_v",
        "attn.hook_attn_scores",
        "attn.hook_pattern",
        "attn.hook_z",
    )

    def __init__(self, cfg: RecurrentDepthConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head, self.dropout = cfg.n_heads, cfg.d_head, cfg.dropout
        self.W_QKV = nn.Parameter(torch.empty(cfg.d_model, 3 * cfg.d_model))
        self.b_QKV = nn.Parameter(torch.zeros(3 * cfg.d_model))
        self.W_O_flat = nn.Parameter(torch.empty(cfg.d_model, cfg.d_model))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model))

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rows: Rows, taps: Taps
    ) -> Float[Tensor, "batch pos d_model"]:
        qkv = linear(x, self.W_QKV, self.b_QKV)
        split = qkv.view(*x.shape[:-1], 3, self.n_heads, self.d_head).movedim(-3, 0)
        q, k, v = split.contiguous().unbind(
            0
        )  # one layout, so that a hook's copy goes through the same kernel
        q, k, v = (
            tap(taps, "attn.hook_q", q),
            tap(taps, "attn.hook_k", k),
            tap(taps, "attn.hook_v", v),
        )
        z = tap(
            taps, "attn.hook_z", rows.attend(q, k, v, taps, self.dropout if self.training else 0.0)
        )
        return linear(z.flatten(-2), self.W_O_flat, self.b_O)

    def _weight(self, index: int) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(
            self.W_QKV,
            "d_model (three head d_head) -> three head d_model d_head",
            three=3,
            head=self.n_heads,
        )[index]

    def _bias(self, index: int) -> Float[Tensor, "head d_head"]:
        return rearrange(
            self.b_QKV, "(three head d_head) -> three head d_head", three=3, head=self.n_heads
        )[index]

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self._weight(0)

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        return self._weight(1)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        return self._weight(2)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return self._bias(0)

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        return self._bias(1)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        return self._bias(2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return rearrange(
            self.W_O_flat, "(head d_head) d_model -> head d_head d_model", head=self.n_heads
        )


class FusedMLP(nn.Module):
    """GPT-2 MLP with gelu_new."""

    sites: ClassVar = ("mlp.hook_pre", "mlp.hook_post")

    def __init__(self, cfg: RecurrentDepthConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model))

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], taps: Taps
    ) -> Float[Tensor, "batch pos d_model"]:
        pre = tap(taps, "mlp.hook_pre", linear(x, self.W_in, self.b_in))
        post = tap(taps, "mlp.hook_post", F.gelu(pre, approximate="tanh"))
        return linear(post, self.W_out, self.b_out)


class FusedBlock(nn.Module):
    """A pre-LayerNorm block: x + attn(ln1(x)), then x + mlp(ln2(x))."""

    sites: ClassVar = (
        "hook_resid_pre",
        *norm_sites("ln1"),
        *FusedAttention.sites,
        "hook_attn_out",
        "hook_resid_mid",
        *norm_sites("ln2"),
        *FusedMLP.sites,
        "hook_mlp_out",
        "hook_resid_post",
    )

    def __init__(self, cfg: RecurrentDepthConfig) -> None:
        super().__init__()
        self.ln1 = LayerNorm(cfg.d_model, cfg.eps, "ln1")
        self.attn = FusedAttention(cfg)
        self.ln2 = LayerNorm(cfg.d_model, cfg.eps, "ln2")
        self.mlp = FusedMLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    @property
    def norm_readers(self) -> list[tuple[LayerNorm, list[Reader]]]:
        """The norms of the stream, each with the maps that read its output."""
        return [
            (self.ln1, [Reader(self.attn, "W_QKV", "b_QKV", input_first=True)]),
            (self.ln2, [Reader(self.mlp, "W_in", "b_in", input_first=True)]),
        ]

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rows: Rows, taps: Taps
    ) -> Float[Tensor, "batch pos d_model"]:
        x = tap(taps, "hook_resid_pre", x)
        attn_out = tap(
            taps, "hook_attn_out", self.dropout(self.attn(self.ln1(x, taps), rows, taps))
        )
        x = tap(taps, "hook_resid_mid", x + attn_out)
        mlp_out = tap(taps, "hook_mlp_out", self.dropout(self.mlp(self.ln2(x, taps), taps)))
        return tap(taps, "hook_resid_post", x + mlp_out)


@family(RecurrentDepthConfig)
class RecurrentDepth(LoopedModel):
    """The recurrent-depth transformer of "Loop, Think, & Generalize" (arXiv 2604.07822): L shared
    GPT-2 blocks applied n_loops times.

    Args:
        cfg: Its configuration. Weights start as GPT-2's do (normal, standard deviation 0.02);
            `load` replaces them.
    """

    cfg: RecurrentDepthConfig

    def __init__(self, cfg: RecurrentDepthConfig) -> None:
        super().__init__(cfg)
        self.embedding = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        if cfg.positions == "learned":
            self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx or 0, cfg.d_model))
        elif cfg.positions == "sinusoidal":
            self.register_buffer("W_pos", sinusoids(cfg.n_ctx or 0, cfg.d_model))
        self.blocks = nn.ModuleList(FusedBlock(cfg) for _ in range(cfg.n_layers))
        self.final_norm = LayerNorm(cfg.d_model, cfg.eps, "ln_final")
        for parameter in self.parameters():
            if parameter.ndim == 2 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
        self.setup()
        self.grow(cfg.n_loops or 1)

    @property
    def additive_residual(self) -> bool:
        return not self.cfg.input_injection

    @property
    def positional(self) -> bool:
        return self.cfg.positions != "none"

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        before = ("hook_embed", "hook_pos_embed") if self.positional else ("hook_embed",)
        return before, norm_sites("ln_final")

    def plan(self, n_loops: int) -> list[Slot]:
        last = self.cfg.n_layers - 1
        slots = []
        for t in range(n_loops):
            injected = ("hook_input", "hook_injected") if self.cfg.input_injection and t > 0 else ()
            for layer, block in enumerate(self.blocks):
                slots.append(
                    Slot(
                        name=f"loops.{t}.blocks.{layer}",
                        stage="loops",
                        loop=t,
                        layer=layer,
                        block=block,
                        sites=FusedBlock.sites,
                        scope=f"loops.{t}",
                        opening=("hook_state_in", *injected) if layer == 0 else (),
                        closing=("hook_state_out",) if layer == last else (),
                    )
                )
        return slots

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = tap(taps, "hook_embed", F.embedding(tokens, self.embedding))
        if self.positional:
            resid = resid + tap(taps, "hook_pos_embed", self.W_pos[positions])
        return resid, {"input": resid} if self.cfg.input_injection else {}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = tap(taps, "hook_state_in", resid)
        if "hook_input" in visit.opening:
            resid = tap(taps, "hook_injected", resid + tap(taps, "hook_input", parts["input"]))
        return resid, parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_out", resid), parts

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        return F.linear(normalized, self.embedding)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embedding

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.embedding.T


def sinusoids(n_positions: int, d_model: int) -> Float[Tensor, "n_positions d_model"]:
    """Even columns are sines and odd columns cosines, of frequency 10000^(-2i/d_model)."""
    rates = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    angles = torch.arange(n_positions)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model]
