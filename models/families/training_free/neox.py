"""Training-free looping of GPT-NeoX models such as Pythia (arXiv 2605.23872)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from loopscope.models.basis.fields import limits
from loopscope.models.blocks.components import MLP, LayerNorm, Norm
from loopscope.models.blocks.decoder import DecoderConfig, LoopedDecoder
from loopscope.models.blocks.decoder_block import Block
from loopscope.models.blocks.parallel_block import InterleavedAttention, ParallelBlock
from loopscope.models.blocks.rotary import PartialRotary
from loopscope.models.core.registry import family
from loopscope.models.families.training_free.model import WindowLoops
from loopscope.models.families.training_free.rules import WindowConfig


@dataclass(frozen=True, kw_only=True)
class TrainingFreeNeoXConfig(WindowConfig, DecoderConfig):
    """Sizes of a GPT-NeoX model, every head of which has keys and values of its own.

    Attributes:
        n_turned: Channels of each head that have rotary positions; even.
        parallel: Whether attention and MLP both read the stream before the layer.
        attention_bias: Biases of the two projections of attention.
    """

    family: ClassVar[str] = "training_free_neox"
    act_fn: ClassVar[str] = "gelu"
    normalization_type: ClassVar[str] = "LN"
    n_key_value_heads: ClassVar[None] = None  # type: ignore[misc]  # no choice in this family
    head_dim: ClassVar[None] = None  # type: ignore[misc]  # likewise
    n_turned: int = field(default=2, metadata=limits(least=2))
    parallel: bool = True
    attention_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_turned % 2 or self.n_turned > self.d_head:
            raise ValueError(
                f"n_turned must be even and at most d_head={self.d_head}, got {self.n_turned}"
            )


@family(TrainingFreeNeoXConfig)
class TrainingFreeNeoX(WindowLoops, LoopedDecoder):
    """A frozen GPT-NeoX in which a window of layers runs several times, without training.

    `WindowLoops` has the rules of the loop.

    Source:
        arXiv 2605.23872; the base models are those of arXiv 2204.06745 and arXiv 2304.01373.
    """

    cfg: TrainingFreeNeoXConfig

    def __init__(self, cfg: TrainingFreeNeoXConfig) -> None:
        super().__init__(cfg)
        self.rotary = PartialRotary(cfg.n_turned, cfg.rope_theta, cfg.rope_scaling)
        self.final_norm = self.norm("ln_final")
        self.blocks = nn.ModuleList(self.make_block() for _ in range(cfg.n_layers))
        self.initialize()

    def norm(self, site: str) -> Norm:
        return LayerNorm(self.cfg.d_model, self.cfg.eps, site)

    def make_block(self) -> Block | ParallelBlock:
        """One layer of the ordinary model."""
        cfg = self.cfg
        attn = InterleavedAttention(cfg.d_model, cfg.n_heads, self.rotary, bias=cfg.attention_bias)
        mlp = MLP(cfg.d_model, cfg.d_mlp, F.gelu)
        return ParallelBlock(attn, mlp, cfg.eps) if cfg.parallel else Block(attn, mlp, self.norm)
