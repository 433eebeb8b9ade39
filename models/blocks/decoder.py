"""The frame that most released looped language models share: token embedding, stacks of decoder
blocks, RMSNorm, a head that may be tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import BASE_OF_ANGLES
from loopscope.models.blocks.components import GatedMLP, Norm, RMSNorm, norm_sites
from loopscope.models.blocks.decoder_block import Attention, Block, Placement
from loopscope.models.blocks.rotary import Rotary, checked_scaling
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.state import Slot, State


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(LoopedConfig):
    """Sizes of a looped decoder.

    Attributes:
        n_key_value_heads: Heads of keys and values; None means n_heads.
        head_dim: Width of a head where it is not d_model / n_heads.
        rope_theta, rope_scaling: Of the rotary positions; see `Rotary`.
        tied: Whether the head is the token embedding.
    """

    act_fn: ClassVar[str] = "silu"
    normalization_type: ClassVar[str] = "RMS"
    n_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | int = field(default=10000.0, metadata=BASE_OF_ANGLES)
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_key_value_heads must divide n_heads={self.n_heads}, got {self.kv_heads}"
            )
        checked_scaling(self.rope_scaling)

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    def width_of_head(self) -> int:
        return super().width_of_head() if self.head_dim is None else self.head_dim


class LoopedDecoder(LoopedModel):
    """A looped model of decoder blocks. A family makes its blocks, calls `initialize`, and says in
    `plan` how they are visited.
    """

    cfg: DecoderConfig

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__(cfg)
        self.embedding = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.head = None if cfg.tied else nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.final_norm: nn.Module = RMSNorm(cfg.d_model, cfg.eps, "ln_final")
        self.rotary = Rotary(cfg.d_head, cfg.rope_theta, cfg.rope_scaling)

    def initialize(self) -> None:
        """Draw the matrices (normal, standard deviation 0.02), name the modules and make the hook
        points.
        """
        for parameter in self.parameters():
            if parameter.ndim > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
        self.setup()
        self.grow(self.cfg.n_loops or 1)

    def block(self, norms: tuple[Placement, ...] = ("input",)) -> Block:
        """One Llama block of the config's sizes; a family with other attention or another MLP makes
        its own.
        """
        cfg = self.cfg
        attn = Attention(cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary)
        return Block(attn, GatedMLP(cfg.d_model, cfg.d_mlp), self.norm, norms)

    def norm(self, site: str) -> Norm:
        """A norm of the stream whose hook points are at `site`."""
        return RMSNorm(self.cfg.d_model, self.cfg.eps, site)

    @property
    def embedding_scale(self) -> float:
        """The factor of the token embeddings."""
        return 1.0

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("hook_embed",), norm_sites("ln_final")

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        embedded = F.embedding(tokens, self.embedding)
        return (
            tap(
                taps,
                "hook_embed",
                embedded if self.embedding_scale == 1.0 else embedded * self.embedding_scale,
            ),
            {},
        )

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        return F.linear(normalized, self.embedding if self.head is None else self.head)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embedding

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return (self.embedding if self.head is None else self.head).T


class CodaDecoder(LoopedDecoder):
    """A looped decoder with blocks after the loop: the head reads what they make of a state that
    has finished an iteration.
    """

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        if state.visit in self.iteration_ends(state.n_loops):
            state = self.finish(state)
        return super().read_state(state, positions)


def stack(
    blocks: Iterable[nn.Module],
    prefix: str,
    *,
    loop: int | None = None,
    scope: str | None = None,
    opening: Sequence[str] = (),
    closing: Sequence[str] = (),
) -> list[Slot]:
    """The visits of one pass through a stack of blocks.

    Args:
        prefix: What the names begin with: "prelude", "coda" or "loops.3.blocks".
        loop: The iteration, from 0.
        scope: What the names of the sites before the first block (`opening`) and after the last
            (`closing`) begin with; None means the iteration's, "loops.3".
    """
    blocks = list(blocks)
    if scope is None:
        scope = "" if loop is None else f"loops.{loop}"
    return [
        Slot(
            name=f"{prefix}.{layer}",
            stage=prefix.split(".")[0],
            loop=loop,
            layer=layer,
            block=block,
            sites=cast("tuple[str, ...]", block.sites),
            scope=scope,
            opening=tuple(opening) if layer == 0 else (),
            closing=tuple(closing) if layer == len(blocks) - 1 else (),
        )
        for layer, block in enumerate(blocks)
    ]
