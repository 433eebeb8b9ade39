"""Training-free looping of OLMo-2 (arXiv 2605.23872)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from loopscope.models.blocks.components import GatedMLP, LateCastRMSNorm, Norm
from loopscope.models.blocks.decoder import DecoderConfig, LoopedDecoder
from loopscope.models.blocks.decoder_block import Block
from loopscope.models.blocks.normed_attention import WholeNormedAttention
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.registry import family
from loopscope.models.families.training_free.model import WindowLoops
from loopscope.models.families.training_free.rules import WindowConfig


@dataclass(frozen=True, kw_only=True)
class TrainingFreeOlmoConfig(WindowConfig, DecoderConfig):
    """Sizes of an OLMo-2 model.

    Attributes:
        attention_bias: Biases of the four projections of attention.
    """

    family: ClassVar[str] = "training_free_olmo"
    attention_bias: bool = False


@family(TrainingFreeOlmoConfig)
class TrainingFreeOlmo(WindowLoops, LoopedDecoder):
    """A frozen OLMo-2 in which a window of layers runs several times, without training. Attention
    and MLP have a norm after them and none before; queries and keys are normed over all heads
    together.

    `WindowLoops` has the rules of the loop.

    Source:
        arXiv 2605.23872; the base model is that of arXiv 2501.00656.
    """

    cfg: TrainingFreeOlmoConfig

    def __init__(self, cfg: TrainingFreeOlmoConfig) -> None:
        super().__init__(cfg)
        self.final_norm = self.norm("ln_final")
        self.rotary = Rotary(cfg.d_head, cfg.rope_theta, cfg.rope_scaling, wide=True)
        self.blocks = nn.ModuleList(self.make_block() for _ in range(cfg.n_layers))
        self.initialize()

    def norm(self, site: str) -> Norm:
        return LateCastRMSNorm(self.cfg.d_model, self.cfg.eps, site)

    def make_block(self) -> Block:
        """One layer of the ordinary model."""
        cfg = self.cfg
        sizes: tuple[Any, ...] = (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary)
        attn = WholeNormedAttention(
            *sizes, eps=cfg.eps, bias=cfg.attention_bias, norm=LateCastRMSNorm
        )
        return Block(attn, GatedMLP(cfg.d_model, cfg.d_mlp), self.norm, ("output",))
