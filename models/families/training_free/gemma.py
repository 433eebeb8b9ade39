"""Training-free looping of Gemma 2 and Gemma 3 (arXiv 2605.23872)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.basis.fields import BASE_OF_ANGLES, limits
from loopscope.models.blocks.components import GatedMLP, Norm, OffsetRMSNorm
from loopscope.models.blocks.decoder import LoopedDecoder
from loopscope.models.blocks.decoder_block import Attention, Block
from loopscope.models.blocks.normed_attention import HeadNormedAttention
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import Scoring, softcapped
from loopscope.models.core.registry import family
from loopscope.models.families.training_free.model import WindowLoops
from loopscope.models.families.training_free.reach import ReachConfig
from loopscope.models.families.training_free.rules import WindowConfig

_POSITIVE = limits(above=0)


@dataclass(frozen=True, kw_only=True)
class TrainingFreeGemmaConfig(WindowConfig, ReachConfig):
    """Sizes of a Gemma 2 or Gemma 3 model.

    Attributes:
        rope_theta, rope_scaling: Of the rotary positions; of those in `full_layers` alone where
            `sliding_rope_theta` is given.
        sliding_rope_theta: Base of the rotary positions in the other layers, which no scaling
            changes (Gemma 3); None for those of the full layers.
        qk_norm: RMSNorm of each head's queries and keys before the rotation (Gemma 3).
        score_width: Scores are divided by the square root of this; None means d_head.
        score_cap, logit_cap: A cap c turns a score or a logit x into c tanh(x / c); None for none.
    """

    family: ClassVar[str] = "training_free_gemma"
    act_fn: ClassVar[str] = "gelu_pytorch_tanh"
    tied: bool = True
    sliding_rope_theta: float | int | None = field(default=None, metadata=BASE_OF_ANGLES)
    qk_norm: bool = False
    score_width: float | int | None = field(default=None, metadata=_POSITIVE)
    score_cap: float | int | None = field(default=None, metadata=_POSITIVE)
    logit_cap: float | int | None = field(default=None, metadata=_POSITIVE)


@family(TrainingFreeGemmaConfig)
class TrainingFreeGemma(WindowLoops, LoopedDecoder):
    """A frozen Gemma 2 or Gemma 3 in which a window of layers runs several times, without training.
    Attention and MLP each have a norm before and a norm after them.

    `WindowLoops` has the rules of the loop.

    Source:
        arXiv 2605.23872; the base models are those of arXiv 2408.00118 and arXiv 2503.19786.
    """

    cfg: TrainingFreeGemmaConfig

    def __init__(self, cfg: TrainingFreeGemmaConfig) -> None:
        super().__init__(cfg)
        self.final_norm = self.norm("ln_final")
        self.sliding_rotary = (
            self.rotary
            if cfg.sliding_rope_theta is None
            else Rotary(cfg.d_head, cfg.sliding_rope_theta)
        )
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(cfg.n_layers))
        self.initialize()

    def norm(self, site: str) -> Norm:
        return OffsetRMSNorm(self.cfg.d_model, self.cfg.eps, site)

    def make_block(self, layer: int) -> Block:
        """One layer of the ordinary model."""
        cfg = self.cfg
        rotary = self.rotary if layer in cfg.full_layers else self.sliding_rotary
        sizes: tuple[Any, ...] = (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, rotary)
        if cfg.qk_norm:
            attn: Attention = HeadNormedAttention(*sizes, eps=cfg.eps, norm=OffsetRMSNorm)
        else:
            attn = Attention(*sizes)
        attn.window = cfg.reach(layer)
        attn.scoring = Scoring(float(cfg.score_width or cfg.d_head) ** -0.5, cfg.score_cap)
        mlp = GatedMLP(cfg.d_model, cfg.d_mlp, partial(F.gelu, approximate="tanh"))
        return Block(attn, mlp, self.norm, ("input", "output"))

    @property
    def linear_head(self) -> bool:
        return self.cfg.logit_cap is None

    @property
    def embedding_scale(self) -> float:
        """sqrt(d_model), rounded to the number format of the weights as the release does."""
        return float(torch.tensor(self.cfg.d_model**0.5, device="cpu").to(self.embedding.dtype))

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        logits, cap = super().unembed(normalized), self.cfg.logit_cap
        return logits if cap is None else softcapped(logits, cap)
