"""Ouro, the looped language model with an exit gate (arXiv 2510.25741)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import limits
from loopscope.models.blocks.components import RMSNorm, norm_sites
from loopscope.models.blocks.decoder import DecoderConfig, LoopedDecoder, stack
from loopscope.models.core.base import stream_at
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, State, Visit

BOUNDARY = "ln_boundary"


@dataclass(frozen=True, kw_only=True)
class OuroConfig(DecoderConfig):
    """Sizes, and the release's own exit: the threshold on the exit distribution, or a fixed
    iteration (from 0), that its readout uses. `exit_gate` is False for weights without a gate.

    No call of this project applies them by itself: logits are always those after the last
    iteration.
    """

    family: ClassVar[str] = "ouro"
    exit_gate: bool = True
    exit_threshold: float | int = 1.0
    exit_step: int | None = field(default=None, metadata=limits(least=0))


@family(OuroConfig)
class Ouro(LoopedDecoder):
    """Ouro, a language model with an exit gate: L shared sandwich-norm blocks applied n_loops
    times. The final norm closes every iteration, and its output enters the next.

    The gate reads the normed state; its logit is at `loops.{t}.hook_exit_logit`. Early exit changes
    only which state is unembedded, so it is a function of a run (`readout_at_threshold`,
    `readout_mixture`), and a hook at the gate's logit steers it.

    Source:
        arXiv 2510.25741.
    """

    cfg: OuroConfig

    def __init__(self, cfg: OuroConfig) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList(self.block(("input", "output")) for _ in range(cfg.n_layers))
        self.final_norm = RMSNorm(cfg.d_model, cfg.eps, BOUNDARY)
        self.gate = nn.Linear(cfg.d_model, 1) if cfg.exit_gate else None
        self.initialize()

    @property
    def additive_residual(self) -> bool:
        return False

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("hook_embed",), ()

    def plan(self, n_loops: int) -> list[Slot]:
        gate = () if self.gate is None else ("hook_exit_logit",)
        closing = (*norm_sites(BOUNDARY), *gate, "hook_state_out")
        slots = []
        for t in range(n_loops):
            slots += stack(
                self.blocks,
                f"loops.{t}.blocks",
                loop=t,
                opening=("hook_state_in",),
                closing=closing,
            )
        return slots

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_in", resid), parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        normed = self.final_norm(resid, taps)
        if self.gate is not None and "hook_exit_logit" in taps:
            tap(taps, "hook_exit_logit", self.gate(normed)[..., 0])
        return tap(taps, "hook_state_out", normed), parts

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        return stream_at(state, positions)
