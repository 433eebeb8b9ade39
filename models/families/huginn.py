"""Models with a prelude, a core that is iterated on a latent state, and a coda; and the first of
them, Huginn (arXiv 2502.05171).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.blocks.components import GatedMLP
from loopscope.models.blocks.decoder import CodaDecoder, DecoderConfig, stack
from loopscope.models.blocks.decoder_block import Attention, Block, Projection, Stream
from loopscope.models.blocks.random_state import initial_state
from loopscope.models.blocks.rotary import Rotary, RotationTable, StoredRotary
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import NO_TAPS, Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, State, Visit


@dataclass(frozen=True, kw_only=True)
class PreludeCoreCodaConfig(DecoderConfig):
    """Sizes of a model with a prelude and a coda; n_layers counts the core's blocks.

    Attributes:
        n_prelude_layers, n_coda_layers: Blocks before and after the loop, each run once.
        state_std: Standard deviation of the initial latent before the embedding's scale; None means
            sqrt(2 / (5 d_model)).
        adapter_bias: Whether the adapter, which mixes the input into the state, has a bias.
    """

    TINY: ClassVar[Mapping[str, Any]] = {"n_prelude_layers": 1, "n_coda_layers": 1}
    n_prelude_layers: int = field(metadata=limits(least=0, most=MOST_BLOCKS))
    n_coda_layers: int = field(metadata=limits(most=MOST_BLOCKS))
    state_std: float | int | None = field(default=None, metadata=limits(least=0))
    adapter_bias: bool = False

    @property
    def initial_std(self) -> float:
        """Standard deviation of the initial latent before the embedding's scale."""
        return float((2 / (5 * self.d_model)) ** 0.5 if self.state_std is None else self.state_std)


class PreludeCoreCoda(CodaDecoder):
    """The prelude's output e enters every iteration: state <- blocks(adapter([state; e])), from a
    random latent state; a coda follows.

    The state of a run is the latent once the prelude has run, with e as the part `input`. Before
    that the initial latent is the part `state`. A family makes its blocks in `one_block`.

    Runs take `state=` (Float[Tensor, "batch pos d_model"], or one row for all) or `seed=`; with
    neither the seed is 0, so that a call can be repeated.
    """

    cfg: PreludeCoreCodaConfig
    core_norm_sites: ClassVar[tuple[str, ...]] = ()

    def __init__(self, cfg: PreludeCoreCodaConfig) -> None:
        super().__init__(cfg)
        self.make_rotary()
        self.prelude_blocks = nn.ModuleList(self.one_block() for _ in range(cfg.n_prelude_layers))
        self.blocks = nn.ModuleList(self.one_block() for _ in range(cfg.n_layers))
        self.coda_blocks = nn.ModuleList(self.one_block() for _ in range(cfg.n_coda_layers))
        self.adapter = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=cfg.adapter_bias)
        self.initialize()

    def make_rotary(self) -> None:
        """Set `rotary` where it is not Llama's."""

    def one_block(self) -> Block:
        """One block; prelude, core and coda have the same kind."""
        return self.block()

    @property
    def additive_residual(self) -> bool:
        return False

    def plan(self, n_loops: int) -> list[Slot]:
        opening, closing = ("hook_state_in", "hook_input", "hook_injected"), ("hook_state_out",)
        slots = stack(self.prelude_blocks, "prelude")
        for t in range(n_loops):
            slots += stack(
                self.blocks, f"loops.{t}.blocks", loop=t, opening=opening, closing=closing
            )
        return slots + stack(
            self.coda_blocks, "coda", scope="core_norm", opening=self.core_norm_sites
        )

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
        std = self.cfg.initial_std * self.embedding_scale
        latent = initial_state(resid, positions, std, state=state, seed=seed)
        return (
            (resid, {"state": latent}) if self.cfg.n_prelude_layers else (latent, {"input": resid})
        )

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, parts = super().visit_block(visit, resid, parts, rows, taps)
        if visit.stage == "prelude" and visit.layer == self.cfg.n_prelude_layers - 1:
            return parts["state"], {"input": resid}
        return resid, parts

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if visit.stage == "coda":
            return self.latent(resid, taps), parts
        state = tap(taps, "hook_state_in", resid)
        mixed = self.adapter(torch.cat([state, tap(taps, "hook_input", parts["input"])], dim=-1))
        return tap(taps, "hook_injected", mixed), parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_out", resid), parts

    def latent(self, resid: Stream, taps: Taps = NO_TAPS) -> Stream:
        """The core's output as the coda reads it."""
        return resid


def latent_states(model: PreludeCoreCoda, state: State) -> Float[Tensor, "batch pos d_model"]:
    """The `latent_states` of the release: a latent as the coda reads it, so in Huginn behind
    the final norm already.

    Args:
        state: Where an iteration has ended and before the coda.

    Raises:
        ValueError: The state stands elsewhere.
    """
    if state.visit not in model.iteration_ends(state.n_loops):
        raise ValueError(
            "a latent is read where an iteration has ended, but the state stands before visit"
            f" {state.visit} of its schedule"
        )
    return model.latent(state.resid)


@dataclass(frozen=True, kw_only=True)
class HuginnConfig(PreludeCoreCodaConfig):
    """Sizes, and whether queries and keys have a bias. The embedding is multiplied by
    sqrt(d_model).
    """

    family: ClassVar[str] = "huginn"
    qk_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_ctx is None:
            raise ValueError(
                "n_ctx must be given, because this family's rotary table has one row per position"
            )
        for name in ("n_key_value_heads", "head_dim", "rope_scaling"):
            if getattr(self, name) is not None:
                rule = (
                    "each of its n_heads heads has keys of its own and d_model / n_heads channels,"
                    " and its rotary table is stored"
                )
                raise ValueError(
                    f"{name} must be None in this family ({rule}), got {getattr(self, name)!r}"
                )


class HuginnAttention(Attention):
    """Fused projections; queries and keys may have a bias (stored as one tensor), values have
    none.
    """

    def __init__(self, cfg: HuginnConfig, rotary: Rotary) -> None:
        super().__init__(cfg.d_model, cfg.n_heads, cfg.n_heads, cfg.d_head, rotary, fused=True)
        self.qk_bias = (
            nn.Parameter(torch.zeros(2, 1, cfg.n_heads, cfg.d_head)) if cfg.qk_bias else None
        )

    def projected(self, x: Stream) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().projected(x)
        return (q, k, v) if self.qk_bias is None else (q + self.qk_bias[0], k + self.qk_bias[1], v)

    def _bias(self, which: Projection) -> Float[Tensor, "head d_head"]:
        return (
            super()._bias(which)
            if self.qk_bias is None or which == "v"
            else self.qk_bias["qk".index(which), 0]
        )


@family(HuginnConfig)
class Huginn(PreludeCoreCoda):
    """Huginn, a language model with a prelude, a core that is applied n_loops times to a latent
    state, and a coda. The stream is normed after each addition. The final norm is used twice,
    before the coda (`core_norm`) and before the head.

    Rotation of neighbouring channels follows the stored table. Logits are in float32 at least,
    whatever the weights are in.

    Source:
        arXiv 2502.05171.
    """

    cfg: HuginnConfig
    core_norm_sites = ("hook_scale", "hook_normalized", "hook_out")

    def make_rotary(self) -> None:
        cfg = self.cfg
        assert cfg.n_ctx is not None, "checked by the config"
        self.rotation = RotationTable(Rotary(cfg.d_head, cfg.rope_theta), cfg.n_ctx)
        self.rotary = StoredRotary(self.rotation, cfg.d_head, cfg.rope_theta)

    def one_block(self) -> Block:
        cfg = self.cfg
        mlp = GatedMLP(cfg.d_model, cfg.d_mlp, fused=True)
        return Block(HuginnAttention(cfg, self.rotary), mlp, self.norm, ("input", "sum"))

    @property
    def embedding_scale(self) -> float:
        return float(self.cfg.d_model**0.5)

    def latent(self, resid: Stream, taps: Taps = NO_TAPS) -> Stream:
        normed: Tensor = self.final_norm(
            resid, {f"ln_final.{site}": point for site, point in taps.items()}
        )
        return normed

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        logits = super().unembed(normalized)
        return logits if logits.dtype == torch.float64 else logits.float()
