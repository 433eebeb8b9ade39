"""HRM-Text, two stacks of blocks at two speeds: the low one runs several times for each run of the
high one (arXiv 2605.20613).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.basis.tokens import checked_token_types
from loopscope.models.blocks.components import GatedMLP, RMSNorm, norm_sites
from loopscope.models.blocks.decoder import DecoderConfig, LoopedDecoder, stack
from loopscope.models.blocks.decoder_block import Attention, Block, Projection, Stream
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import Visible, prefix_keys
from loopscope.models.core.base import stream_at
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, State, Visit

BOUNDARY = "ln_boundary"
OPENING = ("hook_state_in", "hook_input", "hook_injected")
CLOSING = (*norm_sites(BOUNDARY), "hook_state_out")
OTHER_LEVEL = {"low": "high", "high": "low"}


@dataclass(frozen=True, kw_only=True)
class HrmTextConfig(DecoderConfig):
    """Sizes; n_layers counts the blocks of one stack (both have as many), n_loops the high cycles.

    Attributes:
        n_low_loops: Runs of the low stack in each high cycle.
        embedding_scale: What token embeddings are multiplied by; the default suits the standard
            deviation of fresh weights.
        prefix_lm: Whether `begin` takes token types, which mark tokens that see each other in both
            directions.
        attention_bias, mlp_bias: Whether the projections of these have biases.
        fused: Whether gate, queries, keys and values are stored in one matrix, and so the two
            projections into the MLP. Such matrices have no biases.
    """

    family: ClassVar[str] = "hrm_text"
    TINY: ClassVar[Mapping[str, Any]] = {"n_low_loops": 2}
    n_low_loops: int = field(metadata=limits(most=MOST_BLOCKS))
    embedding_scale: float | int = 50.0
    prefix_lm: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fused and (self.attention_bias or self.mlp_bias):
            raise ValueError(
                "attention_bias and mlp_bias must be off where the projections are fused"
            )


class GatedAttention(Attention):
    """Attention whose result is multiplied, channel by channel, by the sigmoid of a projection of
    what the block reads.

    `attn.hook_gate` is that projection before the sigmoid, `attn.hook_gated` the product, which the
    output projection reads.

    Args:
        d_model, n_heads, n_kv_heads, d_head, rotary, bias: As for `Attention`; the gate has a bias
            where the projections have.
        fused: One stored matrix `qkv` with the rows of gate, q, k and v below each other, without
            biases.
    """

    sites: ClassVar[tuple[str, ...]] = (*Attention.sites, "attn.hook_gate", "attn.hook_gated")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        rotary: Rotary | None,
        *,
        bias: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, rotary, bias=bias, fused=fused)
        self.gate_width = n_heads * d_head
        if fused:
            self.qkv = nn.Linear(d_model, self.gate_width + sum(self.widths), bias=False)
        else:
            self.gate = nn.Linear(d_model, self.gate_width, bias=bias)

    def projected(self, x: Stream) -> tuple[Tensor, Tensor, Tensor]:
        if not self.fused:
            return super().projected(x)
        flat = F.linear(x, self.qkv.weight[self.gate_width :]).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.d_head)).contiguous() for part in flat)
        return q, k, v

    def gated(
        self, z: Float[Tensor, "batch pos width"], x: Stream, taps: Taps
    ) -> Float[Tensor, "batch pos width"]:
        heads = (self.n_heads, self.d_head)
        gate = F.linear(x, self.qkv.weight[: self.gate_width]) if self.fused else self.gate(x)
        gate = tap(taps, "attn.hook_gate", gate.unflatten(-1, heads))
        return tap(taps, "attn.hook_gated", gate.sigmoid() * z.unflatten(-1, heads)).flatten(-2)

    def _rows(self, stored: Tensor, which: Projection) -> Tensor:
        return super()._rows(stored[self.gate_width :], which)

    @property
    def W_gate(self) -> Float[Tensor, "head d_model d_head"]:
        stored = self.qkv.weight[: self.gate_width] if self.fused else self.gate.weight
        return rearrange(stored, "(head d_head) d_model -> head d_model d_head", d_head=self.d_head)

    @property
    def b_gate(self) -> Float[Tensor, "head d_head"]:
        bias = None if self.fused else self.gate.bias
        flat = self.o.weight.new_zeros(self.gate_width) if bias is None else bias
        return rearrange(flat, "(head d_head) -> head d_head", d_head=self.d_head)


@family(HrmTextConfig)
class HrmText(LoopedDecoder):
    """HRM-Text, a language model with two states at two speeds: the low stack of blocks runs
    several times for each run of the high stack. The high state begins as the token embedding, the
    low state as `low_init`.

    In every high cycle the low stack runs n_low_loops times on low + high and its output is the new
    low state; then the high stack runs once on high + low and its output is the new high state.
    Each stack ends with an RMSNorm, and no norm has a weight. The low state goes on from one high
    cycle to the next. The head reads the high state.

    Stack runs are called `loops.{h}.low.{l}` and `loops.{h}.high`. At each, `hook_state_in` is the
    state of the level that runs, `hook_input` that of the other level, `hook_injected` their sum,
    and `hook_state_out` the level's new state. A patch of `hook_input` reaches that run alone; one
    of `hook_state_out` is the state from then on.

    Between runs the stream is the state that was written last, and the other level's is a part of
    the `State`; `state_parts` names both. Gradients flow through every run, also where the
    release's training lets them pass through the last low runs only.

    Without token types attention is causal; with them, tokens of type 1 see each other in both
    directions, and `causal` holds for the others only.

    Source:
        arXiv 2605.20613.
    """

    cfg: HrmTextConfig
    visible: ClassVar[Visible] = staticmethod(prefix_keys)

    def __init__(self, cfg: HrmTextConfig) -> None:
        super().__init__(cfg)
        self.low, self.high = (
            nn.ModuleList(self.gated_block() for _ in range(cfg.n_layers)) for _ in OTHER_LEVEL
        )
        self.low_init = nn.Parameter(torch.zeros(cfg.d_model), requires_grad=False)
        self.final_norm = self.norm(BOUNDARY)
        self.initialize()

    def gated_block(self) -> Block:
        """One pre-norm block with gated attention."""
        cfg = self.cfg
        sizes = (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head)
        attn = GatedAttention(*sizes, self.rotary, bias=cfg.attention_bias, fused=cfg.fused)
        return Block(
            attn, GatedMLP(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias, fused=cfg.fused), self.norm
        )

    def norm(self, site: str) -> RMSNorm:
        return RMSNorm(self.cfg.d_model, self.cfg.eps, site, weighted=False)

    @property
    def embedding_scale(self) -> float:
        return self.cfg.embedding_scale

    @property
    def loop_parts(self) -> tuple[str, ...]:
        return ("resid", "low")

    @property
    def additive_residual(self) -> bool:
        return False

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("hook_embed",), ()

    def plan(self, n_loops: int) -> list[Slot]:
        slots = []
        for h in range(n_loops):
            runs = [(self.low, f"loops.{h}.low.{run}") for run in range(self.cfg.n_low_loops)] + [
                (self.high, f"loops.{h}.high")
            ]
            for blocks, scope in runs:
                slots += stack(
                    blocks, f"{scope}.blocks", loop=h, scope=scope, opening=OPENING, closing=CLOSING
                )
        return slots

    def embed(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        taps: Taps,
        *,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The first high state, and the first low state.

        Args:
            token_types: Int[Tensor, "batch pos"]; tokens of type 1 see each other in both
                directions. None is plain causal attention.

        Raises:
            ValueError: Token types of another shape than the tokens, or for a model whose prefix_lm
                is off.
            TypeError: Token types that are no integers.
        """
        tags = {} if token_types is None else {"tags": self._prefix_tags(token_types, tokens)}
        embedded, _ = super().embed(tokens, positions, taps)
        return embedded, {**tags, "low": self.low_init.to(embedded.dtype).expand_as(embedded)}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        level = level_of(visit)
        other = OTHER_LEVEL[level]
        states = {"low": resid, "high": resid, **parts}  # the stream is the one that is no part
        injected = tap(taps, "hook_state_in", states[level]) + tap(
            taps, "hook_input", states[other]
        )
        kept = {name: part for name, part in parts.items() if name != level}
        return tap(taps, "hook_injected", injected), {**kept, other: states[other]}

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_out", self.normalize(resid, taps)), parts

    def state_parts(self, state: State) -> Mapping[str, Tensor]:
        """The stream and the other parts; between runs of a stack also both levels' states, "low"
        and "high".
        """
        named = super().state_parts(state)
        last = self.schedule(state.n_loops)[state.visit - 1] if state.visit else None
        if last is not None and not last.closing:
            return named
        return {**named, "high" if last is None else level_of(last): state.resid}

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        return stream_at(state, positions)

    def _prefix_tags(self, token_types: Tensor, tokens: Tensor) -> Int[Tensor, "batch pos"]:
        """1 for tokens of type 1, 0 for the others."""
        if not self.cfg.prefix_lm:
            raise ValueError(
                "token types change nothing in this model, because its prefix_lm is off; leave"
                " token_types out"
            )
        return (checked_token_types(token_types, tokens) == 1).to(tokens)


def level_of(visit: Slot) -> str:
    """Whose stack a visit belongs to, "low" or "high"."""
    return visit.scope.split(".")[2]
