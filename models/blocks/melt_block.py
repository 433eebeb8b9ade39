"""The blocks of MELT: a gated latent per layer, of which keys and values are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from loopscope.models.blocks.components import GatedMLP, Norm, norm_sites
from loopscope.models.blocks.decoder_block import Attention, Block, Placement, Stream
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap

_LATENT_NORM = norm_sites("attn.ln_latent")


class LatentGate(nn.Module):
    """z = sigmoid(x W + h U + b) and the new latent z h + (1 - z) x, channel by channel: z = 1
    keeps the old one.
    """

    sites: ClassVar[tuple[str, ...]] = ("attn.hook_latent_in", "attn.hook_gate")

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.W, self.U = (
            nn.Parameter(torch.empty(d_model, d_model)),
            nn.Parameter(torch.empty(d_model, d_model)),
        )
        self.b = nn.Parameter(torch.empty(d_model))

    def reset(self, std: float | int, bias: float | int) -> None:
        """Draw the matrices (normal) and set the bias."""
        for matrix in (self.W, self.U):
            nn.init.normal_(matrix, std=std)
        nn.init.constant_(self.b, bias)

    def forward(self, x: Stream, latent: Stream, taps: Taps) -> Stream:
        latent = tap(taps, "attn.hook_latent_in", latent)
        z = tap(taps, "attn.hook_gate", torch.sigmoid(x @ self.W + latent @ self.U + self.b))
        return z * latent + (1 - z) * x


class LatentAttention(Attention):
    """Attention whose queries are made of the stream, and whose keys and values are made of a
    latent.
    """

    def read(self, x: Stream, latent: Stream, rows: Rows, taps: Taps) -> Stream:
        """The latents as the rows of x read them."""
        flat = (self.q(x), self.k(latent), self.v(latent))
        q, k, v = (part.unflatten(-1, (-1, self.d_head)).contiguous() for part in flat)
        return self.attended(q, k, v, x, rows, taps)


class MeltBlock(Block):
    """An Ouro block with a latent, which a gate rewrites at every visit before keys and values are
    made of it.

    Args:
        normed: Whether the gate reads the normed input of attention; otherwise the raw one, and
            `ln1` norms the latent too, with its points at attn.ln_latent.
    """

    attn: LatentAttention

    def __init__(
        self,
        attn: LatentAttention,
        mlp: GatedMLP,
        norm: Callable[[str], Norm],
        norms: tuple[Placement, ...],
        *,
        normed: bool,
    ) -> None:
        super().__init__(attn, mlp, norm, norms)
        self.latent_gate = LatentGate(attn.q.in_features)
        self.normed = normed
        own = (*LatentGate.sites, "attn.hook_latent_out", *(() if normed else _LATENT_NORM))
        start = self.sites.index("attn.hook_q")
        self.sites = (*self.sites[:start], *own, *self.sites[start:])

    def forward(  # type: ignore[override]  # a latent goes in and out besides the stream
        self, x: Stream, latent: Stream | None, rows: Rows, taps: Taps
    ) -> tuple[Stream, Stream]:
        """The stream and the latent after the block; without a latent, the input becomes the first
        one.
        """
        assert self.ln1 is not None, "the input of attention is normed"
        x = tap(taps, "hook_resid_pre", x)
        normed = self.ln1(x, taps)
        taken: Tensor = normed if self.normed else x
        latent = tap(
            taps,
            "attn.hook_latent_out",
            taken if latent is None else self.latent_gate(taken, latent, taps),
        )
        if self.normed:
            seen = latent
        else:
            seen = self.ln1(
                latent,
                {
                    site: taps[own]
                    for site, own in zip(self.ln1.sites, _LATENT_NORM, strict=True)
                    if own in taps
                },
            )
        return self.added(x, self.attn.read(normed, seen, rows, taps), taps), latent
