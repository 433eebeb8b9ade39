"""Hyperloop transformers: a looped middle stack between several residual streams (arXiv
2604.21254).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.blocks.components import LayerNorm, Norm, RMSNorm, norm_sites
from loopscope.models.blocks.decoder import CodaDecoder, DecoderConfig, stack
from loopscope.models.blocks.hyper_connections import Streams, collapsed, copies
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import NO_TAPS, Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, Visit

STREAM_NORM = "ln_stream"
_OPENING = (
    "hook_state_in.streams", *norm_sites(STREAM_NORM),
    "hook_stream_read", "hook_stream_write", "hook_stream_keep",
)  # fmt: skip
_CLOSING = ("hook_loop_out", "hook_state_out.streams")


@dataclass(frozen=True, kw_only=True)
class HyperloopConfig(DecoderConfig):
    """Sizes, and a choice wherever the paper is silent; n_layers counts the middle blocks, and
    n_loops must be given.

    Attributes:
        n_prelude_layers, n_coda_layers: Blocks before and after the loop (the paper's begin and
            end).
        n_streams: Residual streams, at least 2; the paper has 4.
        normalization_type: Of the blocks and of the final norm: "LN" (a footnote says LayerNorm) or
            "RMS".
        stream_norm_gain: Whether the RMSNorm of the streams has weights, one set per iteration; the
            paper's parameter counts have none.
        final_norm: Whether a norm comes before the unembedding.
        gate_scale: Where the three factors a start.
        gate_bias: Where the shifts b start: at "zero", or "plain": each stream is read with weight
            1/n, written with 1 and forgotten, which is a plain looped model as far as the factors a
            are small.
    """

    family: ClassVar[str] = "hyperloop"
    TINY: ClassVar[Mapping[str, Any]] = {"n_prelude_layers": 1, "n_coda_layers": 1}
    n_prelude_layers: int = field(metadata=limits(least=0, most=MOST_BLOCKS))
    n_coda_layers: int = field(metadata=limits(least=0, most=MOST_BLOCKS))
    n_streams: int = field(default=4, metadata=limits(least=2, most=MOST_BLOCKS))
    normalization_type: Literal["LN", "RMS"] = "LN"  # type: ignore[misc]  # fixed for other families
    stream_norm_gain: bool = False
    final_norm: bool = True
    gate_scale: float | int = 0.01
    gate_bias: Literal["zero", "plain"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_loops is None:
            raise ValueError(
                "n_loops must be given: each iteration of a Hyperloop model has mixing weights of"
                " its own"
            )


class LoopMixing(nn.Module):
    """The parameters of one iteration: the weights that read, write and keep the streams, and a
    vector that is added to the loop's output.

    zeta = RMSNorm(flattened streams); read = sigmoid(a_0 W_0 zeta + b_0), write = 2 sigmoid(a_1 W_1
    zeta + b_1), keep = sigmoid(a_2 W_2 zeta + b_2), each one number per stream.
    """

    def __init__(self, cfg: HyperloopConfig) -> None:
        super().__init__()
        n, self.cfg = cfg.n_streams, cfg
        self.norm = RMSNorm(n * cfg.d_model, cfg.eps, STREAM_NORM, weighted=cfg.stream_norm_gain)
        self.W = nn.Parameter(torch.empty(3, n, n * cfg.d_model))
        self.a, self.b = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(3, n))
        self.embedding = nn.Parameter(torch.empty(cfg.d_model))

    @torch.no_grad()
    def reset(self) -> None:
        """Start the weights: W as PyTorch starts linear maps, a and b as the config says, the added
        vector at zero.
        """
        n = self.cfg.n_streams
        bound = 1 / math.sqrt(n * self.cfg.d_model)
        nn.init.uniform_(self.W, -bound, bound)
        self.a.fill_(self.cfg.gate_scale)
        starts = (
            (-math.log(n - 1), 0.0, -20.0) if self.cfg.gate_bias == "plain" else (0.0, 0.0, 0.0)
        )
        self.b.copy_(self.b.new_tensor(starts)[:, None].expand(3, n))
        self.embedding.zero_()

    def forward(self, streams: Streams, taps: Taps) -> tuple[Tensor, Tensor, Tensor]:
        """Weights "batch pos stream" for reading, for writing, and for keeping."""
        zeta = self.norm(streams.flatten(2), taps)
        logits = (
            F.linear(zeta, self.W.flatten(0, 1)).unflatten(-1, (3, -1)) * self.a[:, None] + self.b
        )
        read, write, keep = logits.unbind(2)
        read, write, keep = read.sigmoid(), 2 * write.sigmoid(), keep.sigmoid()
        return (
            tap(taps, "hook_stream_read", read),
            tap(taps, "hook_stream_write", write),
            tap(taps, "hook_stream_keep", keep),
        )


@family(HyperloopConfig)
class Hyperloop(CodaDecoder):
    """A Hyperloop transformer: blocks before the loop, L shared blocks applied n_loops times to a
    mixture of n residual streams, and blocks after it.

    The streams y start as copies of what comes before the loop. Iteration t works out read, write
    and keep weights from y, and then y <- keep y + write (F(sum of read y) + e_t), F being the
    whole middle stack. What follows the loop is given the mean of the streams. From the end of the
    prelude on, the state is the part `streams` (batch pos stream d_model); `resid` between
    iterations is their mean.

    The mixing weights belong to one iteration each, so a call has at most the config's n_loops. A
    shorter call runs the first of them and goes on as usual, which no training has given a meaning.

    Source:
        arXiv 2604.21254. No reference code and no weights were released, so this follows the
        equations. Where the paper leaves something open, the config has an option.
    """

    cfg: HyperloopConfig

    def __init__(self, cfg: HyperloopConfig) -> None:
        super().__init__(cfg)
        self.prelude_blocks = nn.ModuleList(self.block() for _ in range(cfg.n_prelude_layers))
        self.blocks = nn.ModuleList(self.block() for _ in range(cfg.n_layers))
        self.coda_blocks = nn.ModuleList(self.block() for _ in range(cfg.n_coda_layers))
        self.mixing = nn.ModuleList(LoopMixing(cfg) for _ in range(cfg.n_loops or 0))
        self.final_norm = self.norm("ln_final") if cfg.final_norm else nn.Identity()
        self.initialize()

    def initialize(self) -> None:
        super().initialize()
        for mixing in self.mixing:
            cast(LoopMixing, mixing).reset()

    def norm(self, site: str) -> Norm:
        kind = LayerNorm if self.cfg.normalization_type == "LN" else RMSNorm
        return kind(self.cfg.d_model, self.cfg.eps, site)

    @property
    def loop_parts(self) -> tuple[str, ...]:
        return ("streams",)

    @property
    def additive_residual(self) -> bool:
        return False

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        before, after = super().edge_sites()
        return before, after if self.cfg.final_norm else ()

    def plan(self, n_loops: int) -> list[Slot]:
        if n_loops > len(self.mixing):
            raise ValueError(
                f"n_loops must be at most {len(self.mixing)}: each iteration of a Hyperloop model"
                f" has mixing weights of its own, and this one has no more; got {n_loops}"
            )
        slots = stack(self.prelude_blocks, "prelude")
        for t in range(n_loops):
            slots += stack(
                self.blocks, f"loops.{t}.blocks", loop=t, opening=_OPENING, closing=_CLOSING
            )
        return slots + stack(self.coda_blocks, "coda")

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, parts = super().embed(tokens, positions, taps)
        return resid, (
            parts if self.cfg.n_prelude_layers else {"streams": copies(resid, self.cfg.n_streams)}
        )

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, parts = super().visit_block(visit, resid, parts, rows, taps)
        if visit.stage == "prelude" and visit.layer == self.cfg.n_prelude_layers - 1:
            return resid, {"streams": copies(resid, self.cfg.n_streams)}
        return resid, parts

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        streams = tap(taps, "hook_state_in.streams", parts["streams"])
        read, write, keep = self._mixing_of(visit)(streams, taps)
        return collapsed(streams, read), {
            "streams": streams,
            "stream_write": write,
            "stream_keep": keep,
        }

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        out = tap(taps, "hook_loop_out", resid + self._mixing_of(visit).embedding)
        kept, written = (
            parts["stream_keep"][..., None] * parts["streams"],
            parts["stream_write"][..., None] * out[:, :, None],
        )
        streams = tap(taps, "hook_state_out.streams", kept + written)
        return streams.mean(2), {"streams": streams}

    def _mixing_of(self, visit: Visit) -> LoopMixing:
        assert visit.loop is not None, "streams are mixed inside the loop"
        return cast(LoopMixing, self.mixing[visit.loop])

    def normalize(
        self, resid: Float[Tensor, "batch pos d_model"], taps: Taps = NO_TAPS
    ) -> Float[Tensor, "batch pos d_model"]:
        return super().normalize(resid, taps) if self.cfg.final_norm else resid
