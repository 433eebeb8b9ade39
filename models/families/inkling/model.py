"""Inkling-2-Mini, the text part: block sums instead of one stream, and passes that hand on
messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.blocks.components import RMSNorm, norm_sites
from loopscope.models.blocks.decoder import stack
from loopscope.models.core.attention import Rows, softcapped
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.hooks import NO_TAPS, Taps, live, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, State, Visit
from loopscope.models.families.inkling.block import InklingBlock
from loopscope.models.families.inkling.config import InklingConfig
from loopscope.models.families.inkling.mixing import (
    Messages,
    Sources,
    Stream,
    joined,
    normed,
    read,
    read_sites,
)

_MIXED = "hook_mixed_post"


@family(InklingConfig)
class Inkling(LoopedModel):
    """Inkling-2-Mini, text part: a prelude, L shared layers applied n_loops times, and a coda. Each
    pass starts from the same state and reads messages of the pass before.

    The stream is a list of finished block sums and an open sum; a layer reads a softmax mix of
    all of them. With h and B, the open sum and the blocks after the prelude:

        pass 0:  h_0, B_0 = layers(h, B)
        pass t:  h_t, B_t = layers(h, B; messages from h_{t-1} and the blocks that pass t-1 added)

    The coda goes on from the last h_t and B_t. So there is no chain of states: every
    `hook_state_in` is h, and a pass reaches the next one through its sources alone.
    `loops.{t}.hook_sources` are those, "batch pos source d_model": the blocks that pass t-1 added
    after h, and `hook_state_out` of pass t-1.

    `resid` of a `State` is the open sum. Its parts are `blocks` ("batch pos block d_model", oldest
    first, from the first layer on), `start` (h, from the loop on) and, at the end of an iteration,
    `sources` for the next one. A patch of `resid` between two iterations acts on a readout there;
    the next iteration sees a patch of `sources`. `hook_mixed_post` of a layer is the final mix over
    its blocks and open sum, which a lens reads.

    Source:
        The class Inkling2Loop of transformers 5.24, text part.
    """

    heads_read_stream: ClassVar[bool] = False  # heads read mixes and messages
    lens_site: ClassVar[str] = _MIXED
    wide_weights: ClassVar[str] = (
        r"(\w+\.\d+\.)?(attn_query|mlp_query|message_queries|message_kv_queries|output_query"
        r"|gates\.\w+\.(gain|forget)|mlp\.router\.\w+|\w+_conv\.weight|attn\.\w_conv\.\w+)"
    )
    cfg: InklingConfig

    def __init__(self, cfg: InklingConfig) -> None:
        super().__init__(cfg)
        d_model, start, end = cfg.d_model, cfg.n_prelude_layers, cfg.n_prelude_layers + cfg.n_layers
        self.embedding = nn.Parameter(torch.empty(cfg.padded_vocab, d_model))
        self.head = nn.Parameter(torch.empty(cfg.padded_vocab, d_model))
        self.embed_norm = RMSNorm(d_model, cfg.eps, "ln_embed")
        self.prelude_blocks, self.blocks, self.coda_blocks = (
            nn.ModuleList(InklingBlock(cfg, layer) for layer in layers)
            for layers in (range(start), range(start, end), range(end, cfg.n_real_layers))
        )
        self.message_queries, self.message_kv_queries = (
            nn.Parameter(torch.empty(2 * cfg.n_layers, d_model)) for _ in range(2)
        )
        self.output_query = nn.Parameter(torch.zeros(d_model))
        self.final_norm = RMSNorm(d_model, cfg.eps, "ln_final")
        for parameter in self.parameters():
            if parameter.ndim > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
        self.setup()
        self.grow(cfg.n_loops or 1)

    @property
    def loop_parts(self) -> tuple[str, ...]:
        return ("sources",)

    @property
    def additive_residual(self) -> bool:
        return False

    @property
    def rowwise(self) -> bool:
        """False: convolutions read neighbouring positions."""
        return False

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        before = ("hook_embed", *norm_sites("ln_embed"))
        return before, (*read_sites("final_mix"), *norm_sites("ln_final"))

    def plan(self, n_loops: int) -> list[Slot]:
        slots = _stack(self.prelude_blocks, "prelude")
        for t in range(n_loops):
            slots += _stack(self.blocks, f"loops.{t}.blocks", t)
        return slots + _stack(self.coda_blocks, "coda")

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        embedded = tap(taps, "hook_embed", F.embedding(tokens, self.embedding))
        return self.embed_norm(embedded, taps), {}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        start = parts.get("start", resid)
        kept = {"start": start, "blocks": parts["blocks"][:, :, : self.cfg.n_start_blocks]}
        resid = tap(taps, "hook_state_in", start)
        if visit.loop:
            kept["sources"] = tap(taps, "hook_sources", parts["sources"])
        return resid, kept

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        messages = None
        if visit.loop:
            messages = Messages(normed(parts["sources"]), self._queries(visit.layer))
        blocks = parts["blocks"] if "blocks" in parts else resid[:, :, None][:, :, :0]
        resid, blocks = visit.block(resid, blocks, messages, rows, taps)
        if _MIXED in taps:
            tap(taps, _MIXED, self.mixed_at_end(resid, blocks))
        return resid, {**parts, "blocks": blocks}

    def _queries(self, layer: int) -> dict[str, Float[Tensor, " d_model"]]:
        """The queries with which a looped layer reads messages."""
        rows = (*self.message_queries[2 * layer :][:2], *self.message_kv_queries[2 * layer :][:2])
        return dict(zip(("q", "mlp", "k", "v"), rows, strict=True))

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = tap(taps, "hook_state_out", resid)
        added = parts["blocks"][:, :, self.cfg.n_start_blocks + 1 :]
        return resid, {**parts, "sources": joined(added, resid)}

    def mixed_at_end(self, resid: Stream, blocks: Sources, taps: Taps = NO_TAPS) -> Stream:
        """The stream that the final norm reads."""
        sources = normed(joined(blocks, resid))
        return read(sources, self.output_query, "final_mix", resid.dtype, taps)

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        if state.visit in self.iteration_ends(state.n_loops):
            state = self.finish(state)
        if positions is not None:
            columns = positions
            state = state.map(lambda x: at_columns(x, columns)[:, None])
        taps = live(self.edge_points()) if self.any_hook() else NO_TAPS
        return self.normalize(self.mixed_at_end(state.resid, state.parts["blocks"], taps), taps)

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        return softcapped(F.linear(normalized, self.head[: self.cfg.d_vocab]), self.cfg.logit_cap)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embedding[: self.cfg.d_vocab]

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.head[: self.cfg.d_vocab].T


def _stack(blocks: nn.ModuleList, prefix: str, loop: int | None = None) -> list[Slot]:
    """The visits of one pass through a stack of layers."""
    messages = bool(loop)
    opening = ("hook_state_in", *(("hook_sources",) if messages else ()))
    return [
        replace(slot, sites=(*cast(InklingBlock, slot.block).sites_of(messages=messages), _MIXED))
        for slot in stack(
            blocks, prefix, loop=loop, opening=opening if loop is not None else (),
            closing=("hook_state_out",) if loop is not None else (),
        )
    ]  # fmt: skip
