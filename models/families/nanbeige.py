"""Nanbeige4.2, and its switch for several residual streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.blocks.components import GatedMLP, norm_sites
from loopscope.models.blocks.decoder import DecoderConfig, LoopedDecoder, stack
from loopscope.models.blocks.decoder_block import Attention, Block
from loopscope.models.blocks.hyper_connections import (
    Mixing,
    Streams,
    collapsed,
    copies,
    mixed,
    nanbeige_mixing,
)
from loopscope.models.blocks.normed_attention import HeadNormedAttention
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import stream_at
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, State, Visit

BOUNDARY = "ln_boundary"
Stream = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, kw_only=True)
class NanbeigeConfig(DecoderConfig):
    """Sizes, and those switches of the released code that are computed here. The release has the
    defaults.

    Attributes:
        boundary_norm: Whether the final norm closes every iteration; otherwise it comes once, after
            the last.
        qk_norm: RMSNorm of each head's queries and keys before the rotation.
        attention_bias, mlp_bias: Biases of the four projections of attention, and of the three of
            the MLP.
        n_streams: Residual streams that hyper-connections (mHC) mix around every sub-layer; None
            for one plain stream.
        sinkhorn_iterations: Of their mixing matrices.
    """

    family: ClassVar[str] = "nanbeige"
    boundary_norm: bool = True
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    n_streams: int | None = field(default=None, metadata=limits(least=2, most=MOST_BLOCKS))
    sinkhorn_iterations: int = field(default=20, metadata=limits(most=MOST_BLOCKS))


@family(NanbeigeConfig)
class Nanbeige(LoopedDecoder):
    """Nanbeige4.2, a language model: L shared pre-norm blocks applied n_loops times. The final norm
    closes every iteration, and its output enters the next.

    With `n_streams`, each iteration copies the state that enters it into n streams, and closes by
    taking their mean, so nothing but the mean is carried from one iteration to the next. Inside,
    the state has the part `streams`. `hook_resid_*` are then the means of the streams: a hook that
    changes one adds the change to every stream. `hook_streams_*` are the streams themselves.

    Source:
        arXiv 2608.13987, which describes the release's code. The code has a switch for
        hyper-connections (several residual streams), which no release turns on.
    """

    cfg: NanbeigeConfig

    def __init__(self, cfg: NanbeigeConfig) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(cfg.n_layers))
        self.final_norm = self.norm(BOUNDARY if cfg.boundary_norm else "ln_final")
        self.initialize()

    def make_block(self, layer: int) -> Block | StreamBlock:
        """One block of the shared stack."""
        cfg = self.cfg
        sizes: tuple[Any, ...] = (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary)
        bias = cfg.attention_bias
        attn = (
            HeadNormedAttention(*sizes, eps=cfg.eps, bias=bias)
            if cfg.qk_norm
            else Attention(*sizes, bias=bias)
        )
        block = Block(attn, GatedMLP(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias), self.norm)
        return block if cfg.n_streams is None else StreamBlock(block, cfg, layer)

    @property
    def additive_residual(self) -> bool:
        return not self.cfg.boundary_norm and self.cfg.n_streams is None

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        before, after = super().edge_sites()
        return before, () if self.cfg.boundary_norm else after

    def plan(self, n_loops: int) -> list[Slot]:
        norm = norm_sites(BOUNDARY) if self.cfg.boundary_norm else ()
        slots = []
        for t in range(n_loops):
            slots += stack(
                self.blocks,
                f"loops.{t}.blocks",
                loop=t,
                opening=("hook_state_in",),
                closing=(*norm, "hook_state_out"),
            )
        return slots

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = tap(taps, "hook_state_in", resid)
        return resid, (
            {} if self.cfg.n_streams is None else {"streams": copies(resid, self.cfg.n_streams)}
        )

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.cfg.n_streams is None:
            return super().visit_block(visit, resid, parts, rows, taps)
        streams = visit.block(parts["streams"], rows, taps)
        return streams.mean(2), {"streams": streams}

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return (
            tap(
                taps,
                "hook_state_out",
                self.final_norm(resid, taps) if self.cfg.boundary_norm else resid,
            ),
            {},
        )

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        return (
            stream_at(state, positions)
            if self.cfg.boundary_norm
            else super().read_state(state, positions)
        )


class HyperConnection(nn.Module):
    """The weights for reading, mixing and writing the streams around one sub-layer.

    It starts out as the release's code does: block l reads stream l mod n, writes to all streams,
    and keeps each as it is.

    Args:
        site: Where its hook points are.
    """

    def __init__(self, cfg: NanbeigeConfig, layer: int, site: str) -> None:
        super().__init__()
        n = cfg.n_streams or 1
        self.iterations = cfg.sinkhorn_iterations
        self.alpha_pre, self.alpha_post, self.alpha_res = (
            nn.Parameter(torch.full((1,), 0.01)) for _ in range(3)
        )
        self.projection = nn.Parameter(torch.zeros(2 * n + n * n, n * cfg.d_model))
        one_of_each = 40 * torch.eye(n) - 20
        self.bias = nn.Parameter(
            torch.cat([one_of_each[layer % n], torch.zeros(n), one_of_each.flatten()])
        )
        self.sites = tuple(f"{site}.hook_{what}" for what in ("read", "write", "keep", "collapsed"))

    def forward(self, streams: Streams, taps: Taps) -> tuple[Stream, Mixing]:
        """The input of the sub-layer, and the weights for its output."""
        alphas = torch.cat([self.alpha_pre, self.alpha_post, self.alpha_res])
        weights = nanbeige_mixing(streams, self.projection, alphas, self.bias, self.iterations)
        mixing = Mixing(
            *(tap(taps, site, value) for site, value in zip(self.sites, weights, strict=False))
        )
        return tap(taps, self.sites[-1], collapsed(streams, mixing.read)), mixing


class StreamBlock(nn.Module):
    """A pre-norm block on several residual streams, with a hyper-connection around each of its two
    sub-layers.

    Args:
        block: The same block on one stream.
        layer: Its number in the stack.
    """

    def __init__(self, block: Block, cfg: NanbeigeConfig, layer: int) -> None:
        super().__init__()
        assert block.ln1 is not None, "the block is pre-norm"
        assert block.ln2 is not None, "the block is pre-norm"
        self.attn, self.mlp, self.ln1, self.ln2 = block.attn, block.mlp, block.ln1, block.ln2
        self.attn_hc, self.mlp_hc = (
            HyperConnection(cfg, layer, "attn_hc"),
            HyperConnection(cfg, layer, "mlp_hc"),
        )
        after = {"pre": self.attn_hc.sites, "mid": self.mlp_hc.sites, "post": ()}
        wider = {
            f"hook_resid_{at}": (f"hook_streams_{at}", f"hook_resid_{at}", *sites)
            for at, sites in after.items()
        }
        self.sites = tuple(name for site in block.sites for name in wider.get(site, (site,)))

    def forward(self, streams: Streams, rows: Rows, taps: Taps) -> Streams:
        streams = _shown(taps, "pre", streams)
        x, mixing = self.attn_hc(streams, taps)
        out = tap(taps, "hook_attn_out", self.attn(self.ln1(x, taps), rows, taps))
        streams = _shown(taps, "mid", mixed(streams, mixing.keep, mixing.write, out))
        x, mixing = self.mlp_hc(streams, taps)
        out = tap(taps, "hook_mlp_out", self.mlp(self.ln2(x, taps), taps))
        return _shown(taps, "post", mixed(streams, mixing.keep, mixing.write, out))


def _shown(taps: Taps, at: str, streams: Streams) -> Streams:
    """The streams after their own hook point and that of their mean; what a hook changes in the
    mean is added to every stream.
    """
    streams = tap(taps, f"hook_streams_{at}", streams)
    if f"hook_resid_{at}" not in taps:
        return streams
    mean = streams.mean(2)
    return streams + (tap(taps, f"hook_resid_{at}", mean) - mean)[:, :, None]
