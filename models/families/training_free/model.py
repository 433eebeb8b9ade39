"""Training-free looping of Llama and Qwen3 models (arXiv 2605.23872)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from loopscope.models.blocks.decoder import DecoderConfig, LoopedDecoder
from loopscope.models.blocks.decoder_block import Attention, Block, GatedMLP, HeadNormedAttention
from loopscope.models.core.registry import family
from loopscope.models.families.training_free.rules import WindowConfig
from loopscope.models.families.training_free.window import WindowLoops


@dataclass(frozen=True, kw_only=True)
class TrainingFreeConfig(WindowConfig, DecoderConfig):
    """Sizes of a Llama or Qwen3 model.

    Attributes:
        qk_norm: RMSNorm of each head's queries and keys before the rotation (Qwen3).
        attention_bias: Biases of the four projections of attention.
        mlp_bias: Biases of the three projections of the MLP.
    """

    family: ClassVar[str] = "training_free"
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


@family(TrainingFreeConfig)
class TrainingFree(WindowLoops, LoopedDecoder):
    """A frozen Llama or Qwen3 model with a window of its layers looped; see `WindowLoops`.

    Source:
        arXiv 2605.23872; the base models are those of arXiv 2407.21783 and arXiv 2505.09388.
    """

    cfg: TrainingFreeConfig

    def __init__(self, cfg: TrainingFreeConfig) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList(self._block() for _ in range(cfg.n_layers))
        self.initialize()

    def _block(self) -> Block:
        cfg = self.cfg
        sizes: tuple[Any, ...] = (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary)
        if cfg.qk_norm:
            attn: Attention = HeadNormedAttention(*sizes, eps=cfg.eps, bias=cfg.attention_bias)
        else:
            attn = Attention(*sizes, bias=cfg.attention_bias)
        return Block(attn, GatedMLP(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias), self.norm)
