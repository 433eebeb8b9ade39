"""Training-free looping of GPT-2 (arXiv 2605.23872)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.blocks.components import LayerNorm, norm_sites
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.families.recurrent_depth import FusedBlock, RecurrentDepthConfig
from loopscope.models.families.training_free.model import WindowLoops
from loopscope.models.families.training_free.rules import WindowConfig


@dataclass(frozen=True, kw_only=True)
class TrainingFreeGPT2Config(WindowConfig):
    """Sizes of a GPT-2 model, whose learned positions need n_ctx; its head is always the token
    embedding.
    """

    family: ClassVar[str] = "training_free_gpt2"
    act_fn: ClassVar[str] = "gelu_new"
    normalization_type: ClassVar[str] = "LN"
    tied: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_ctx is None:
            raise ValueError("n_ctx must be given: GPT-2 has learned positions")


@family(TrainingFreeGPT2Config)
class TrainingFreeGPT2(WindowLoops):
    """A frozen GPT-2 in which a window of layers runs several times, without training. The blocks
    are those of the recurrent-depth family.

    `WindowLoops` has the rules of the loop.

    Source:
        arXiv 2605.23872; GPT-2 is Radford et al. 2019, "Language Models are Unsupervised Multitask
        Learners".
    """

    cfg: TrainingFreeGPT2Config

    def __init__(self, cfg: TrainingFreeGPT2Config) -> None:
        super().__init__(cfg)
        sizes = RecurrentDepthConfig(
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            d_mlp=cfg.d_mlp,
            d_vocab=cfg.d_vocab,
            eps=cfg.eps,
        )
        self.embedding = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx or 0, cfg.d_model))
        self.blocks = nn.ModuleList(FusedBlock(sizes) for _ in range(cfg.n_layers))
        self.final_norm = LayerNorm(cfg.d_model, cfg.eps, "ln_final")
        for parameter in self.parameters():
            if parameter.ndim == 2 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
        self.setup()
        self.grow(cfg.n_loops or 1)

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("hook_embed", "hook_pos_embed"), norm_sites("ln_final")

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        embedded = tap(taps, "hook_embed", F.embedding(tokens, self.embedding))
        return embedded + tap(taps, "hook_pos_embed", self.W_pos[positions]), {}

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
