"""Spiral, whose state is a pair: a position and a velocity that shared blocks push (spiral-lm
0.1.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import BASE_OF_ANGLES, limits
from loopscope.models.blocks.components import LayerNorm
from loopscope.models.blocks.decoder import stack
from loopscope.models.blocks.decoder_block import Stream
from loopscope.models.blocks.rotary import Rotary, rotate_pairs
from loopscope.models.blocks.spiral_block import SpectralLinear, SpiralBlock
from loopscope.models.core.attention import Rows, softcapped
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, Visit

MODULATION = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
_LONGEST_PERIOD = 10000.0
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class SpiralConfig(LoopedConfig):
    """Sizes; n_layers counts the shared blocks, which all read the same stream.

    Attributes:
        act_fn: The activation of the MLPs.
        d_factor: Width of the stored token embedding, from and to which the stream is projected.
        d_timestep: Width of the iteration's embedding; even.
        rope_theta: Base of the rotary positions of attention.
        turn_theta: Base of the frequencies by which iteration t turns the stream.
        momentum: Share of the velocity that an iteration keeps.
        qk_norm: Whether queries and keys are divided by their root mean square.
        gate_cap, gate_leak: A cap g above 0 turns a gate x into g tanh(x / g), plus the leak's
            share of what that takes away.
    """

    family: ClassVar[str] = "spiral"
    TINY: ClassVar[Mapping[str, Any]] = {"d_factor": 8, "d_timestep": 6}
    normalization_type: ClassVar[str] = "LN"
    act_fn: Literal["gelu", "silu", "relu"] = "gelu"  # type: ignore[misc]  # a choice in this family
    d_factor: int
    d_timestep: int
    rope_theta: float | int = field(default=10000.0, metadata=BASE_OF_ANGLES)
    turn_theta: float | int = field(default=10000.0, metadata=BASE_OF_ANGLES)
    momentum: float | int = field(default=0.9, metadata=limits(least=0, most=1))
    qk_norm: bool = True
    gate_cap: float | int = field(default=0.0, metadata=limits(least=0))
    gate_leak: float | int = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_model", "d_head", "d_timestep"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"{name} must be even, because its channels are turned or made in pairs, got"
                    f" {getattr(self, name)}"
                )


class Modulation(nn.Module):
    """Six vectors of the stream's width for an iteration, by an MLP of a sinusoidal embedding of
    its number (AdaLN-Zero).
    """

    def __init__(self, cfg: SpiralConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.into, self.out = (
            nn.Linear(cfg.d_timestep, cfg.d_timestep),
            nn.Linear(cfg.d_timestep, len(MODULATION) * cfg.d_model),
        )

    def forward(self, loop: int) -> dict[str, Float[Tensor, " d_model"]]:
        """By name, the gates after their cap."""
        half = self.cfg.d_timestep // 2
        steps = torch.arange(half, dtype=torch.float32, device=self.out.weight.device)
        angles = loop * torch.exp(-math.log(_LONGEST_PERIOD) * steps / half)
        embedded = torch.cat([angles.sin(), angles.cos()]).to(self.out.weight.dtype)
        vectors = dict(
            zip(
                MODULATION,
                self.out(F.silu(self.into(embedded))).chunk(len(MODULATION)),
                strict=True,
            )
        )
        return {
            name: self.capped(vector) if name.startswith("gate") else vector
            for name, vector in vectors.items()
        }

    def capped(self, gate: Tensor) -> Tensor:
        """A gate after the config's cap."""
        cap, leak = self.cfg.gate_cap, self.cfg.gate_leak
        if cap == 0:
            return gate
        capped = softcapped(gate, cap)
        return capped + leak * (gate - capped)


@family(SpiralConfig)
class Spiral(LoopedModel):
    """Spiral, whose state is a position h and a velocity v. Each iteration adds the
    input to the position and rotates it; shared blocks then act as a force on the velocity, which
    moves the position before it is rotated back.

    With e = inject(emb_in(tokens)), Q_t the rotation of neighbouring channels 2i and 2i + 1 by t *
    turn_theta^(-2i / d_model), and m the momentum:

        x = Q_t (h + e);  v <- m v + (1 - m) sum_j force_j(x, t);  h <- Q_t^-1 (x + v)

    h and v begin as zeros. Every block reads x, so their order does not matter; its force is what
    its two sub-layers add to x. The velocity stays in the turned frame of its iteration and is not
    turned between iterations. The head reads h.

    The stream of a `State` is h between iterations and x within one; parts are `v` and `input` (e).
    At an iteration's end `hook_state_out.v` is the new velocity before h moves by it, so a patch of
    it moves both. The modulation's points (`loops.{t}.hook_shift1` and so on) hold the iteration's
    vector at every row. `loops.{t}.hook_halt_logit` is the halting head's logit of h, which no call
    applies.

    Source:
        spiral-lm 0.1.1, SpiralCore.
    """

    cfg: SpiralConfig

    def __init__(self, cfg: SpiralConfig) -> None:
        super().__init__(cfg)
        d_model = cfg.d_model
        self.embedding = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_factor))
        self.embed_in, self.embed_out = (
            nn.Linear(cfg.d_factor, d_model, bias=False),
            nn.Linear(d_model, cfg.d_factor, bias=False),
        )
        self.inject = SpectralLinear(d_model, d_model)
        rotary = Rotary(cfg.d_head, cfg.rope_theta, pairing="pairs")
        sizes = (d_model, cfg.n_heads, cfg.d_mlp)
        act = _ACTIVATIONS[cfg.act_fn]
        self.blocks = nn.ModuleList(
            SpiralBlock(sizes, cfg.eps, rotary, qk_norm=cfg.qk_norm, act=act)
            for _ in range(cfg.n_layers)
        )
        self.modulation = Modulation(cfg)
        self.final_norm = LayerNorm(d_model, cfg.eps, "ln_final")
        self.halt = nn.Linear(d_model, 1)
        self.turning = Rotary(d_model, cfg.turn_theta, pairing="pairs")
        for parameter in self.parameters():
            if parameter.ndim > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, SpectralLinear):
                module.find_scale()
        self.setup()
        self.grow(cfg.n_loops or 1)

    @property
    def loop_parts(self) -> tuple[str, ...]:
        return ("resid", "v")

    @property
    def additive_residual(self) -> bool:
        return False

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("hook_embed_factors", "hook_embed"), self.final_norm.sites

    def plan(self, n_loops: int) -> list[Slot]:
        vectors = tuple(f"hook_{name}" for name in MODULATION)
        opening = (
            "hook_state_in.h",
            "hook_state_in.v",
            "hook_input",
            "hook_injected",
            "hook_rotated",
            *vectors,
        )
        closing = ("hook_state_out.v", "hook_state_out.h", "hook_halt_logit")
        slots = []
        for t in range(n_loops):
            slots += stack(
                self.blocks, f"loops.{t}.blocks", loop=t, opening=opening, closing=closing
            )
        return slots

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        factors = tap(taps, "hook_embed_factors", F.embedding(tokens, self.embedding))
        injected = self.inject(tap(taps, "hook_embed", self.embed_in(factors)))
        return torch.zeros_like(injected), {"input": injected, "v": torch.zeros_like(injected)}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert visit.loop is not None, "every visit of this family is in an iteration"
        h, v = tap(taps, "hook_state_in.h", resid), tap(taps, "hook_state_in.v", parts["v"])
        injected = tap(taps, "hook_injected", h + tap(taps, "hook_input", parts["input"]))
        turned = tap(taps, "hook_rotated", self.turned(injected, visit.loop))
        vectors = self.modulation(visit.loop)
        rows = {
            name: tap(taps, f"hook_{name}", vectors[name].expand_as(turned)) for name in MODULATION
        }
        return turned, {**parts, "v": v, **rows}

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        force = visit.block(resid, rows, taps, parts)
        return resid, {**parts, "force": parts["force"] + force if "force" in parts else force}

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert visit.loop is not None, "every visit of this family is in an iteration"
        kept = self.cfg.momentum
        v = tap(taps, "hook_state_out.v", kept * parts["v"] + (1 - kept) * parts["force"])
        h = tap(taps, "hook_state_out.h", self.turned(resid + v, -visit.loop))
        if "hook_halt_logit" in taps:
            tap(taps, "hook_halt_logit", self.halt(h)[..., 0])
        return h, {"input": parts["input"], "v": v}

    def turned(self, x: Stream, times: int) -> Stream:
        """The stream with channels 2i and 2i + 1 turned by their frequency's angle this many times,
        backwards where negative.
        """
        angles = (times * self.turning.frequencies(x.device)).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        cos, sin = (
            table.to(x.dtype).expand(*x.shape[:2], -1) for table in (angles.cos(), angles.sin())
        )
        return rotate_pairs(x[:, :, None], cos, sin)[:, :, 0]

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        return F.linear(self.embed_out(normalized), self.embedding)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embedding @ self.embed_in.weight.T

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return (self.embedding @ self.embed_out.weight).T
