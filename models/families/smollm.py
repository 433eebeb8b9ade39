"""SMolLM, a small looped language model of molecules (arXiv 2605.06322)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.blocks.components import GatedMLP, LayerNorm
from loopscope.models.blocks.decoder import DecoderConfig, LoopedDecoder, stack
from loopscope.models.blocks.decoder_block import Attention, Block, Stream
from loopscope.models.blocks.rotary import Angles, Rotary
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, Visit


@dataclass(frozen=True, kw_only=True)
class SMolLMConfig(DecoderConfig):
    """Sizes; the releases have one block, a tied head and rotary tables of n_ctx positions.

    Attributes:
        dropout: Share of the embedding, of attention weights and of block outputs that is dropped
            while the model is in train mode.
    """

    family: ClassVar[str] = "smollm"
    TINY: ClassVar[Mapping[str, Any]] = {"n_layers": 1}
    normalization_type: ClassVar[str] = "LN"
    n_layers: int = field(default=1, metadata=limits(most=MOST_BLOCKS))
    tied: bool = True
    dropout: float | int = field(default=0.0, metadata=limits(least=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_ctx is None:
            raise ValueError("n_ctx must be given, because the rotary tables are stored up to it")
        if self.dropout >= 1:
            raise ValueError(f"dropout must be a share from 0 to below 1, got {self.dropout!r}")


class HalfTables(nn.Module):
    """Cosines and sines of the first positions, each "1 1 position half" as the releases store
    them; filled in for a fresh model.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rotary: Rotary, n_positions: int) -> None:
        super().__init__()
        cos, sin = rotary.made_tables(torch.arange(n_positions)[None])
        self.register_buffer("cos", cos[:, None])
        self.register_buffer("sin", sin[:, None])


class TableRotary(Rotary):
    """Rotation of halves by stored tables, which hold whatever the frequencies would give.

    Args:
        stored: The module that holds them. It is read at every run, so it may be filled or moved
            later.
    """

    def __init__(self, stored: HalfTables, d_head: int, theta: float | int) -> None:
        super().__init__(d_head, theta)
        self.stored = stored

    def made_tables(self, positions: Int[Tensor, "batch row"]) -> tuple[Angles, Angles]:
        cos, sin = (
            table.to(positions.device)[0, 0, positions]
            for table in (self.stored.cos, self.stored.sin)
        )
        return cos, sin


class DropoutAttention(Attention):
    """Attention that drops a share of its weights and of its output while in train mode."""

    def __init__(self, *sizes: Any, dropout: float | int) -> None:
        super().__init__(*sizes, fused=True)
        self.dropout = float(dropout)

    def forward(self, x: Stream, rows: Rows, taps: Taps) -> Stream:
        return F.dropout(super().forward(x, rows, taps), self.dropout, self.training)


class DropoutMLP(GatedMLP):
    """A gated MLP that drops a share of its output while in train mode."""

    def __init__(self, d_model: int, d_mlp: int, *, dropout: float | int) -> None:
        super().__init__(d_model, d_mlp)
        self.dropout = float(dropout)

    def forward(self, x: Stream, taps: Taps) -> Stream:
        return F.dropout(super().forward(x, taps), self.dropout, self.training)


@family(SMolLMConfig)
class SMolLM(LoopedDecoder):
    """SMolLM, a small language model of molecules: one pre-LayerNorm block (n_layers of them in a
    fresh model) applied n_loops times, then a final LayerNorm and the head.

    Attention is causal with rotary positions from stored tables, its three input projections are
    stored as one matrix, and no projection has a bias. Nothing happens between iterations, so
    stopping earlier is the same as fewer of them.

    Args:
        cfg: Its configuration. Matrices start normal with standard deviation 0.02; `load` replaces
            them.

    Source:
        arXiv 2605.06322.
    """

    cfg: SMolLMConfig
    final_norm: LayerNorm

    def __init__(self, cfg: SMolLMConfig) -> None:
        super().__init__(cfg)
        assert cfg.n_ctx is not None, "the config requires it"
        self.rotation = HalfTables(self.rotary, cfg.n_ctx)
        self.rotary = TableRotary(self.rotation, cfg.d_head, cfg.rope_theta)
        self.blocks = nn.ModuleList(self.dropout_block() for _ in range(cfg.n_layers))
        self.final_norm = self.norm("ln_final")
        self.initialize()

    def dropout_block(self) -> Block:
        """One pre-LayerNorm block."""
        cfg = self.cfg
        attn = DropoutAttention(
            cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary, dropout=cfg.dropout
        )
        return Block(attn, DropoutMLP(cfg.d_model, cfg.d_mlp, dropout=cfg.dropout), self.norm)

    def norm(self, site: str) -> LayerNorm:
        return LayerNorm(self.cfg.d_model, self.cfg.eps, site)

    def plan(self, n_loops: int) -> list[Slot]:
        slots = []
        for t in range(n_loops):
            slots += stack(
                self.blocks,
                f"loops.{t}.blocks",
                loop=t,
                opening=("hook_state_in",),
                closing=("hook_state_out",),
            )
        return slots

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Float[Tensor, "batch pos d_model"], Mapping[str, Tensor]]:
        embedded = F.dropout(F.embedding(tokens, self.embedding), self.cfg.dropout, self.training)
        return tap(taps, "hook_embed", embedded), {}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_in", resid), parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_out", resid), parts
