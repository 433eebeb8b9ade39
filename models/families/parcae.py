"""Parcae, a prelude, a core iterated on a latent state, and a coda, all with value embeddings
(arXiv 2604.12946).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.blocks.components import RMSNorm
from loopscope.models.blocks.decoder import CodaDecoder, DecoderConfig, stack
from loopscope.models.blocks.decoder_block import Stream
from loopscope.models.blocks.parcae_block import (
    GATE_CHANNELS,
    AdditiveInjection,
    DiagonalInjection,
    LinearInjection,
    ParcaeBlock,
    ValueAttention,
    Values,
)
from loopscope.models.blocks.random_state import initial_state
from loopscope.models.blocks.rotary import Rotary, RotationTable, StoredRotary
from loopscope.models.core.attention import Rows, softcapped
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, Visit

INJECTIONS: dict[str, Callable[[int], nn.Module]] = {
    "diagonal": DiagonalInjection,
    "linear": LinearInjection,
    "add": lambda d_model: AdditiveInjection(),
}
STAGES = ("prelude", "loops", "coda")


@dataclass(frozen=True, kw_only=True)
class ParcaeConfig(DecoderConfig):
    """Sizes; n_layers counts the core's blocks, d_mlp is the width of their MLPs, and n_loops the
    training's mean depth.

    Blocks have places 0, 1, 2, ... through the prelude, the core and the coda, the core counted
    once.

    Attributes:
        n_prelude_layers, n_coda_layers: Blocks before and after the loop, each run once.
        d_mlp_outside: Width of the MLPs of the prelude and the coda; None means d_mlp.
        injection: How the input enters the state: "diagonal" (decayed state plus a drive), "linear"
            (one matrix on both) or "add".
        prelude_norm: Whether the prelude's output is normed before it is injected.
        qk_norm: Whether queries and keys are normed after their rotation.
        value_tables: Places of the blocks for which there is a table of value embeddings; None
            means every second, the last among them.
        value_gates: Places of the blocks that have a gate for them, None likewise. Only where both
            exist are they added.
        logit_softcap: A cap c turns a logit x into c tanh(x / c); None for none.
        state_std: Standard deviation of the initial latent; None means sqrt(2 / (5 d_model)).
    """

    family: ClassVar[str] = "parcae"
    TINY: ClassVar[Mapping[str, Any]] = {"n_prelude_layers": 1, "n_coda_layers": 1}
    act_fn: ClassVar[str] = "relu2"
    n_prelude_layers: int = field(metadata=limits(most=MOST_BLOCKS))
    n_coda_layers: int = field(metadata=limits(most=MOST_BLOCKS))
    d_mlp_outside: int | None = None
    injection: str = "diagonal"
    prelude_norm: bool = True
    qk_norm: bool = True
    value_tables: Sequence[int] | None = None
    value_gates: Sequence[int] | None = None
    logit_softcap: float | int | None = field(default=None, metadata=limits(above=0))
    state_std: float | int | None = field(default=None, metadata=limits(least=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.injection not in INJECTIONS:
            raise ValueError(
                f"injection must be one of {', '.join(map(repr, INJECTIONS))}, got"
                f" {self.injection!r}"
            )
        if self.n_ctx is None:
            raise ValueError(
                "n_ctx must be given, because this family's rotary table has one row per position"
            )
        if self.head_dim not in (None, self.d_model // self.n_heads):
            raise ValueError(
                f"head_dim must be d_model / n_heads = {self.d_model // self.n_heads} in this"
                f" family, got {self.head_dim}"
            )
        for name in ("value_tables", "value_gates"):
            object.__setattr__(self, name, self._places(name))
        if self.value_gates and self.d_model < GATE_CHANNELS:
            raise ValueError(
                f"d_model must be at least {GATE_CHANNELS}, the channels that a value gate reads,"
                f" got {self.d_model}"
            )
        shared = [place for place in self.mixing() if self.stage_of(place) == "loops"]
        if shared and self.kv_heads != self.n_heads:
            raise ValueError(
                f"core blocks have n_heads={self.n_heads} heads of keys and values, which value"
                f" embeddings of n_key_value_heads={self.kv_heads} do not fit, but the block at"
                f" place {shared[0]} has both a table and a gate"
            )

    @property
    def n_places(self) -> int:
        """Blocks of the prelude, the core and the coda."""
        return self.n_prelude_layers + self.n_layers + self.n_coda_layers

    def stage_of(self, place: int) -> str:
        """The stage of the block at a place."""
        return STAGES[
            (place >= self.n_prelude_layers) + (place >= self.n_prelude_layers + self.n_layers)
        ]

    def mixing(self) -> tuple[int, ...]:
        """Places of the blocks that add value embeddings."""
        return tuple(
            place for place in self.value_tables or () if place in (self.value_gates or ())
        )

    def _places(self, name: str) -> tuple[int, ...]:
        given = getattr(self, name)
        if given is None:
            return tuple(range((self.n_places - 1) % 2, self.n_places, 2))
        wrong = [
            place
            for place in given
            if isinstance(place, bool)
            or not isinstance(place, int)
            or not 0 <= place < self.n_places
        ]
        if wrong:
            raise ValueError(
                f"{name} must hold places of blocks, 0 to {self.n_places - 1}, got {wrong[0]!r}"
            )
        return tuple(sorted(set(given)))


@family(ParcaeConfig)
class Parcae(CodaDecoder):
    """Parcae, a language model with a prelude, a core that is applied n_loops times to a random
    latent, and a coda. The prelude's normed output e enters every iteration: state <-
    blocks(injection(state, e)). After the last iteration a matrix C takes the state to the coda.

    Blocks add gated value embeddings, which are looked up from the token ids at every visit, so the
    ids are a part of the state (`ids`), beside `input` (e; before the end of the prelude the
    initial latent `state`). C's output is at `core_map.hook_out`.

    Every row of a call runs its n_loops iterations, by default the mean depth of training, as the
    release's evaluation does. The release's own forward pass draws a depth for each sequence
    instead; that is not done here.

    Runs take `state=` (Float[Tensor, "batch pos d_model"], or one row for all) or `seed=`; with
    neither the seed is 0, so that a call can be repeated. Rotation follows the stored table. Logits
    are in float32 at least, whatever the weights are in.

    Source:
        arXiv 2604.12946 and its released code.
    """

    cfg: ParcaeConfig

    def __init__(self, cfg: ParcaeConfig) -> None:
        super().__init__(cfg)
        assert cfg.n_ctx is not None, "checked by the config"
        self.rotation = RotationTable(
            Rotary(cfg.d_head, cfg.rope_theta, cfg.rope_scaling), cfg.n_ctx
        )
        self.rotary = StoredRotary(self.rotation, cfg.d_head, cfg.rope_theta)
        made = [self.parcae_block(place) for place in range(cfg.n_places)]
        core, coda = cfg.n_prelude_layers, cfg.n_prelude_layers + cfg.n_layers
        self.prelude_blocks, self.blocks, self.coda_blocks = map(
            nn.ModuleList, (made[:core], made[core:coda], made[coda:])
        )
        self.input_norm = (
            RMSNorm(cfg.d_model, cfg.eps, "prelude_norm") if cfg.prelude_norm else None
        )
        self.injection = INJECTIONS[cfg.injection](cfg.d_model)
        self.C = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        width = cfg.kv_heads * cfg.d_head
        self.value_embeds = nn.ParameterDict(
            {str(i): nn.Parameter(torch.empty(cfg.d_vocab, width)) for i in cfg.value_tables or ()}
        )
        self.initialize()
        if not self.C.weight.is_meta:
            nn.init.eye_(self.C.weight)
            if isinstance(self.injection, DiagonalInjection):
                self.injection.make_identity()

    def parcae_block(self, place: int) -> ParcaeBlock:
        """The block at a place; core blocks have as many heads of keys and values as of queries."""
        cfg, core = self.cfg, self.cfg.stage_of(place) == "loops"
        attn = ValueAttention(
            cfg.d_model,
            cfg.n_heads,
            cfg.n_heads if core else cfg.kv_heads,
            self.rotary,
            gate=place in (cfg.value_gates or ()),
            embeds=place in (cfg.value_tables or ()),
            qk_norm=cfg.qk_norm,
        )
        return ParcaeBlock(
            attn, cfg.d_mlp if core or cfg.d_mlp_outside is None else cfg.d_mlp_outside, cfg.eps
        )

    @property
    def additive_residual(self) -> bool:
        return False

    def plan(self, n_loops: int) -> list[Slot]:
        opening, closing = ("hook_state_in", "hook_input", "hook_injected"), ("hook_state_out",)
        norm = ("hook_scale", "hook_normalized", "hook_out") if self.cfg.prelude_norm else ()
        slots = stack(self.prelude_blocks, "prelude", scope="prelude_norm", closing=norm)
        for t in range(n_loops):
            slots += stack(
                self.blocks, f"loops.{t}.blocks", loop=t, opening=opening, closing=closing
            )
        return slots + stack(self.coda_blocks, "coda", scope="core_map", opening=("hook_out",))

    def embed(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        taps: Taps,
        *,
        state: Tensor | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, _ = super().embed(tokens, positions, taps)
        std = (
            (2 / (5 * self.cfg.d_model)) ** 0.5
            if self.cfg.state_std is None
            else self.cfg.state_std
        )
        return resid, {
            "ids": tokens,
            "state": initial_state(resid, positions, std, state=state, seed=seed),
        }

    def value_embedding(self, visit: Slot, ids: Int[Tensor, "batch pos"]) -> Values | None:
        """The value embeddings of some tokens at a visit's block; None where it adds none."""
        before = {
            "prelude": 0,
            "loops": self.cfg.n_prelude_layers,
            "coda": self.cfg.n_prelude_layers + self.cfg.n_layers,
        }
        place = before[visit.stage] + visit.layer
        if place not in self.cfg.mixing():
            return None
        embedded: Tensor = F.embedding(ids, self.value_embeds[str(place)])
        heads: Tensor = embedded.unflatten(-1, (-1, self.cfg.d_head))
        return heads

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = visit.block(resid, rows, taps, self.value_embedding(visit, parts["ids"]))
        ends_prelude = visit.stage == "prelude" and visit.layer == self.cfg.n_prelude_layers - 1
        return (
            _into_loop(resid, parts) if ends_prelude and self.input_norm is None else (resid, parts)
        )

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if visit.stage == "coda":
            return tap(taps, "hook_out", self.C(resid)), parts
        state = tap(taps, "hook_state_in", resid)
        return (
            tap(
                taps,
                "hook_injected",
                self.injection(state, tap(taps, "hook_input", parts["input"])),
            ),
            parts,
        )

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if visit.stage == "prelude" and self.input_norm is not None:
            return _into_loop(
                self.input_norm(
                    resid, {f"prelude_norm.{site}": point for site, point in taps.items()}
                ),
                parts,
            )
        return tap(taps, "hook_state_out", resid), parts

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        logits = super().unembed(normalized)
        logits, cap = (
            logits if logits.dtype == torch.float64 else logits.float(),
            self.cfg.logit_softcap,
        )
        return logits if cap is None else softcapped(logits, cap)


def _into_loop(output: Stream, parts: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The state before the first iteration, given the prelude's output."""
    return parts["state"], {"ids": parts["ids"], "input": output}
