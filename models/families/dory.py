"""Nemotron-Labs Dory, a normalised transformer (nGPT) whose middle blocks are looped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.basis.fields import BASE_OF_ANGLES, MOST_BLOCKS, limits
from loopscope.models.blocks.components import norm_sites, wide
from loopscope.models.blocks.decoder import CodaDecoder, DecoderConfig, stack
from loopscope.models.blocks.dory_block import DoryAttention, DoryBlock, DoryMLP, UnitNorm
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import KeyValueStore
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import NO_TAPS, Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, State, Visit

STATE_NORM = "ln_state"
_OPENING = ("hook_state_in", *norm_sites(STATE_NORM), "hook_input", "hook_injected")
_EVERY = 4  # layers of which the last has full attention, where full_layers is not given


@dataclass(frozen=True, kw_only=True)
class DoryConfig(DecoderConfig):
    """Sizes of a Dory model; n_layers counts the recurrent blocks.

    Attributes:
        n_prelude_layers, n_coda_layers: Blocks before and after the loop, each run once.
        full_layers: Layers whose attention sees all earlier positions, counted from 0 over prelude,
            recurrent blocks and coda; the others see a window. None means every fourth.
        window: Positions that a row of the other layers sees, its own included.
        rope_theta, window_rope_theta: Base of the rotary positions in full layers, and in the
            others.
        eps: Added to the sum of squares inside each norm.
        start: The number at which the learned scales and rates start, and by which each is divided
            in every run. Its square divides numbers of float32, so it has bounds.
        rate_start: The rate of a step where its learned number is `start`.
        kv_cache: What a generation cache keeps of a recurrent block: keys and values of each
            iteration ("per_loop"), or of the last iteration only, which every iteration of later
            calls sees ("last_loop"). A call without a cache does not depend on it.
    """

    family: ClassVar[str] = "dory"
    TINY: ClassVar[Mapping[str, Any]] = {
        "n_prelude_layers": 1,
        "n_coda_layers": 1,
        "full_layers": (1,),
        "window": 3,
    }
    n_prelude_layers: int = field(metadata=limits(least=0, most=MOST_BLOCKS))
    n_coda_layers: int = field(metadata=limits(least=0, most=MOST_BLOCKS))
    full_layers: tuple[int, ...] | None = None
    window: int = 1024
    rope_theta: float | int = field(default=1e7, metadata=BASE_OF_ANGLES)
    window_rope_theta: float | int = field(default=1e4, metadata=BASE_OF_ANGLES)
    eps: float | int = field(default=1e-6, metadata=limits(least=0))
    start: float | int = field(default=0.0177, metadata=limits(least=1e-6, most=1e6))
    rate_start: float | int = field(default=0.05, metadata=limits(least=0, most=1e6))
    kv_cache: Literal["per_loop", "last_loop"] = "per_loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_scaling is not None:
            raise ValueError(
                "rope_scaling must be None in this family, which has two bases of angles and"
                f" stretches neither, got {self.rope_scaling!r}"
            )
        object.__setattr__(self, "full_layers", self._checked_layers())

    @property
    def n_real_layers(self) -> int:
        """Blocks with weights of their own: prelude, recurrent blocks and coda."""
        return self.n_prelude_layers + self.n_layers + self.n_coda_layers

    def _checked_layers(self) -> tuple[int, ...]:
        total, given = self.n_real_layers, self.full_layers
        if given is None:
            return tuple(range(_EVERY - 1, total, _EVERY))
        found = list(given) if isinstance(given, tuple | list) else [None]
        whole = [layer for layer in found if type(layer) is int and 0 <= layer < total]
        if len(whole) != len(found) or whole != sorted(set(whole)):
            raise ValueError(
                f"full_layers must be layers in 0..{total - 1} in increasing order, got"
                f" {given!r:.200}"
            )
        return tuple(whole)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopedConfig:
        if isinstance(values.get("full_layers"), list):
            values = {**values, "full_layers": tuple(values["full_layers"])}
        return super().from_dict(values)


@family(DoryConfig)
class Dory(CodaDecoder):
    """Nemotron-Labs Dory, a normalised transformer: blocks before the loop, L shared blocks applied
    n_loops times, and blocks after it. Only the direction of a state has a meaning, not its length.

    With unit(x) = x / sqrt(sum(x^2) + eps) and e = unit(prelude output), every iteration computes
    state <- blocks(unit(state) + e); the state before the first one is the prelude's output. In the
    first iteration both terms are equal. Every block normalises the stream that it reads and moves
    it towards what it finds (`DoryBlock`), so the norm of a state carries no meaning: compare
    directions. The norm at the loop's entry is `loops.{t}.ln_state`.

    From the first iteration on, e is the part `input` of a `State`. Logits are in float32 at least,
    each token's with a learned scale of its own.

    Source:
        transformers 5.24.0, models/dory; the normalised transformer is that of arXiv 2410.01131.
    """

    cfg: DoryConfig

    def __init__(self, cfg: DoryConfig) -> None:
        super().__init__(cfg)
        self.window_rotary = Rotary(cfg.d_head, cfg.window_rope_theta)
        first, last = cfg.n_prelude_layers, cfg.n_prelude_layers + cfg.n_layers
        self.prelude_blocks = self._blocks(range(first))
        self.blocks = self._blocks(range(first, last))
        self.coda_blocks = self._blocks(range(last, cfg.n_real_layers))
        self.state_norm = UnitNorm(cfg.eps, STATE_NORM)
        self.final_norm = UnitNorm(cfg.eps, "ln_final")
        self.logit_scale = nn.Parameter(torch.full((cfg.d_vocab,), float(cfg.start)))
        self.initialize()

    def _blocks(self, layers: range) -> nn.ModuleList:
        return nn.ModuleList(self._block(layer in (self.cfg.full_layers or ())) for layer in layers)

    def _block(self, full: bool) -> DoryBlock:
        cfg = self.cfg
        attn = DoryAttention(
            (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head),
            self.rotary if full else self.window_rotary,
            eps=cfg.eps,
            start=cfg.start,
            window=None if full else cfg.window,
        )
        mlp = DoryMLP(cfg.d_model, cfg.d_mlp, cfg.eps)
        return DoryBlock(attn, mlp, eps=cfg.eps, start=cfg.start, rate_start=cfg.rate_start)

    @property
    def additive_residual(self) -> bool:
        return False

    def plan(self, n_loops: int) -> list[Slot]:
        slots = stack(self.prelude_blocks, "prelude")
        for t in range(n_loops):
            slots += stack(
                self.blocks,
                f"loops.{t}.blocks",
                loop=t,
                opening=_OPENING,
                closing=("hook_state_out",),
            )
        return slots + stack(self.coda_blocks, "coda")

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if "input" not in parts:  # the first iteration, which the prelude's output enters
            parts = {**parts, "input": self.state_norm(resid, NO_TAPS)}
        state = self.state_norm(tap(taps, "hook_state_in", resid), taps)
        injected = state + tap(taps, "hook_input", parts["input"])
        return tap(taps, "hook_injected", injected), parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_out", resid), parts

    def extend(self, state: State, before: KeyValueStore) -> tuple[State, KeyValueStore]:
        end, new = super().extend(state, before)
        if self.cfg.kv_cache == "per_loop":
            return end, new
        last = state.n_loops - 1
        kept = {
            visit.name: new[
                visit.name if visit.loop is None else f"loops.{last}.blocks.{visit.layer}"
            ]
            for visit in self.schedule(state.n_loops)
        }
        return end, kept

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        return wide(super().unembed(normalized)) * self._head_scale

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        stored = super().W_U
        return (stored * self._head_scale).to(stored.dtype)

    @property
    def _head_scale(self) -> Float[Tensor, " d_vocab"]:
        return wide(self.logit_scale) / self.cfg.start
