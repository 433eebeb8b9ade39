"""Pretrained language models cut into prelude, core and coda and taught to iterate: retrofitted
Llama and OLMo-2 (arXiv 2511.07384).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loopscope.models.blocks.components import GatedMLP
from loopscope.models.blocks.decoder_block import Attention, Block
from loopscope.models.blocks.normed_attention import WholeNormedAttention
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.registry import family
from loopscope.models.families.huginn import PreludeCoreCoda, PreludeCoreCodaConfig


@dataclass(frozen=True, kw_only=True)
class RetrofitConfig(PreludeCoreCodaConfig):
    """Sizes, and what token embeddings and the initial latent are multiplied by."""

    embedding_scale: float | int = 1.0


@dataclass(frozen=True, kw_only=True)
class RetrofitLlamaConfig(RetrofitConfig):
    """A retrofitted Llama."""

    family: ClassVar[str] = "retrofit_llama"


@dataclass(frozen=True, kw_only=True)
class RetrofitOlmoConfig(RetrofitConfig):
    """A retrofitted OLMo-2."""

    family: ClassVar[str] = "retrofit_olmo"


class Retrofit(PreludeCoreCoda):
    """Huginn's loop around another model's blocks, with no norm between core and coda."""

    cfg: RetrofitConfig

    @property
    def embedding_scale(self) -> float:
        return float(self.cfg.embedding_scale)


@family(RetrofitLlamaConfig)
class RetrofitLlama(Retrofit):
    """A pretrained Llama that was cut into prelude, core and coda and trained to iterate the core.
    Norms stand before attention and MLP, so an iteration's stream is a plain sum from
    `hook_injected` on.

    Source:
        arXiv 2511.07384.
    """

    def one_block(self) -> Block:
        cfg = self.cfg
        attn = Attention(
            cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary, fused=True
        )
        return Block(attn, GatedMLP(cfg.d_model, cfg.d_mlp, fused=True), self.norm, ("input",))


@family(RetrofitOlmoConfig)
class RetrofitOlmo(Retrofit):
    """A pretrained OLMo-2 that was cut into prelude, core and coda and trained to iterate the core.
    Norms stand after attention and MLP, and on queries and keys (`attn.q_norm`, `attn.k_norm`).

    Source:
        arXiv 2511.07384; the blocks are those of arXiv 2501.00656.
    """

    cfg: RetrofitOlmoConfig

    def make_rotary(self) -> None:
        self.rotary = Rotary(self.cfg.d_head, self.cfg.rope_theta, self.cfg.rope_scaling, wide=True)

    def one_block(self) -> Block:
        cfg = self.cfg
        sizes = (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary)
        return Block(
            WholeNormedAttention(*sizes, eps=cfg.eps, fused=True),
            GatedMLP(cfg.d_model, cfg.d_mlp, fused=True),
            self.norm,
            ("output",),
        )
