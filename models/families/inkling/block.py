"""One layer of Inkling-2-Mini on a list of block sums and an open sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from loopscope.models.blocks.components import RMSNorm, norm_sites
from loopscope.models.blocks.experts import Experts
from loopscope.models.blocks.short_convolution import ShortConvolution
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.families.inkling.attention import FullAttention, InklingAttention
from loopscope.models.families.inkling.config import InklingConfig
from loopscope.models.families.inkling.mixing import (
    MessageGate,
    Messages,
    MoreSources,
    Sources,
    Stream,
    joined,
    normed,
    read,
    read_sites,
)

_QKV = ("q", "k", "v")


class InklingBlock(nn.Module):
    """Attention and a mixture of experts, each on a mix of all block sums and the open sum.

    A sliding layer has one mix for attention (`qkv_mix`), a full one a mix for each of queries,
    keys and values (`q_mix`, ...); the first layer of all reads the open sum itself. In looped
    layers a gate (`q_gate`, `k_gate`, `v_gate`, `mlp_gate`) adds a message (`q_message`, ...) to
    each input, from iteration 1 on. `ln1` norms what attention reads, under `ln1_q`, `ln1_k` and
    `ln1_v` where there are three inputs.

    At the first layer of a block the open sum is closed: it joins the list, and a new open sum
    starts with the attention's output. So `hook_resid_pre` is the sum that is closed there, and
    `hook_resid_mid` what attention adds. `attn.hook_out` and `mlp.hook_out` are before the short
    convolutions, `hook_attn_out` and `hook_mlp_out` behind them.

    Args:
        layer: Its number, from 0, through prelude, loop and coda.
    """

    def __init__(self, cfg: InklingConfig, layer: int) -> None:
        super().__init__()
        d_model, full = cfg.d_model, layer in cfg.full_layers
        first, last = cfg.n_prelude_layers, cfg.n_prelude_layers + cfg.n_layers
        self.opens = layer % cfg.layers_per_block == 0
        self.mixes = ("q_mix", "k_mix", "v_mix") if full else ("qkv_mix",)
        shape = (3, d_model) if full else (d_model,)
        self.attn_query = nn.Parameter(torch.zeros(shape)) if layer else None
        self.mlp_query = nn.Parameter(torch.zeros(d_model))
        gates = (*_QKV, "mlp") if first <= layer < last else ()
        self.gates = nn.ModuleDict(
            {name: MessageGate(d_model, cfg.gate_rank, cfg.eps, f"{name}_gate") for name in gates}
        )
        norms = _QKV if full else ("shared",)
        self.ln1 = nn.ModuleDict({name: RMSNorm(d_model, cfg.eps, "ln1") for name in norms})
        self.attn = FullAttention(cfg) if full else InklingAttention(cfg)
        self.attn_conv = ShortConvolution(d_model, cfg.kernel, "attn")
        self.ln2 = RMSNorm(d_model, cfg.eps, "ln2")
        caps = (cfg.gate_cap, cfg.up_cap)
        self.mlp = Experts((d_model, cfg.d_mlp), cfg.n_experts, cfg.n_chosen, caps, cfg.route_scale)
        self.mlp_conv = ShortConvolution(d_model, cfg.kernel, "mlp")
        self.sites = self.sites_of(messages=False)

    def sites_of(self, *, messages: bool) -> tuple[str, ...]:
        """The hook points of a visit with or without messages, in order of execution."""
        mixes = () if self.attn_query is None else self.mixes
        norms = self._norm_sites(3 if messages else len(self.ln1))
        return (
            "hook_resid_pre",
            *(site for mix in mixes for site in read_sites(mix)),
            *(self._message_sites(_QKV) if messages else ()),
            *(site for norm in norms for site in norm_sites(norm)),
            *self.attn.sites, "attn.hook_out", "hook_attn_out", "hook_resid_mid",
            *read_sites("mlp_mix"),
            *(self._message_sites(("mlp",)) if messages else ()),
            *norm_sites("ln2"), *self.mlp.sites, "mlp.hook_out", "hook_mlp_out",
            "hook_resid_post",
        )  # fmt: skip

    def _message_sites(self, names: Sequence[str]) -> list[str]:
        gates = ((name, cast(MessageGate, self.gates[name])) for name in names)
        return [
            site for name, gate in gates for site in (*read_sites(f"{name}_message"), *gate.sites)
        ]

    @staticmethod
    def _norm_sites(inputs: int) -> tuple[str, ...]:
        return ("ln1",) if inputs == 1 else tuple(f"ln1_{name}" for name in _QKV)

    def forward(
        self, resid: Stream, blocks: Sources, messages: Messages | None, rows: Rows, taps: Taps
    ) -> tuple[Stream, MoreSources]:
        """The open sum and the block sums behind the layer."""
        resid = tap(taps, "hook_resid_pre", resid)
        inputs = self._attention_inputs(resid, blocks, messages, taps)
        out = tap(taps, "attn.hook_out", self.attn(*inputs, rows, taps))
        added = tap(taps, "hook_attn_out", self.attn_conv(out, rows))
        if self.opens:
            blocks, resid = joined(blocks, resid), added
        else:
            resid = resid + added
        resid = tap(taps, "hook_resid_mid", resid)
        x = read(normed(joined(blocks, resid)), self.mlp_query, "mlp_mix", resid.dtype, taps)
        x = self._with_message("mlp", x, messages, taps)
        out = tap(taps, "mlp.hook_out", self.mlp(self.ln2(x, taps), taps))
        added = tap(taps, "hook_mlp_out", self.mlp_conv(out, rows))
        return tap(taps, "hook_resid_post", resid + added), blocks

    def _attention_inputs(
        self, resid: Stream, blocks: Sources, messages: Messages | None, taps: Taps
    ) -> list[Tensor]:
        """The normed inputs of queries, keys and values."""
        inputs = [resid]
        if self.attn_query is not None:
            sources = normed(joined(blocks, resid))
            queries = zip(self.attn_query.view(-1, sources.shape[-1]), self.mixes, strict=True)
            inputs = [read(sources, query, mix, resid.dtype, taps) for query, mix in queries]
        if len(inputs) == 1 and (messages is not None or len(self.ln1) == 3):
            inputs = inputs * 3
        if messages is not None:
            inputs = [
                self._with_message(name, x, messages, taps)
                for name, x in zip(_QKV, inputs, strict=True)
            ]
        norms = [cast(RMSNorm, norm) for norm in self.ln1.values()] * (len(inputs) // len(self.ln1))
        sites = self._norm_sites(len(inputs))
        found = [
            norm(x, _taps_under(site, norm, taps))
            for norm, x, site in zip(norms, inputs, sites, strict=True)
        ]
        return found * (3 // len(found))

    def _with_message(self, name: str, x: Stream, messages: Messages | None, taps: Taps) -> Stream:
        """An input behind its message gate, in a visit with messages."""
        if messages is None:
            return x
        query, site = messages.queries[name], f"{name}_message"
        message = read(messages.sources, query, site, x.dtype, taps)
        gated: Tensor = self.gates[name](x, message, taps)
        return gated


def _taps_under(site: str, norm: RMSNorm, taps: Taps) -> Taps:
    """The hook points at a site under the names by which a norm knows them."""
    return {
        inner: taps[outer]
        for inner, outer in zip(norm.sites, norm_sites(site), strict=True)
        if outer in taps
    }
