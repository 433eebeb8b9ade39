"""A block that mixes positions by an MLP along them, in place of attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.blocks.components import GatedMLP, RMSNorm
from loopscope.models.blocks.decoder_block import Stream
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import NO_TAPS, Taps, tap


class PositionBlock(nn.Module):
    """A gated MLP along the positions, then one along the channels, each followed by an RMSNorm
    without weight of the sum.

    The first MLP has one set of weights for all channels, so that it needs all its positions at
    once, and the norm after it is over the positions. `hook_pos_mlp_out` is what it adds.

    Args:
        d_model, d_mlp: Widths of the second MLP.
        n_pos, d_pos_mlp: Positions, and the inner width of the first MLP.
        eps: Of both norms.
    """

    def __init__(
        self, d_model: int, d_mlp: int, n_pos: int, d_pos_mlp: int, eps: float | int
    ) -> None:
        super().__init__()
        self.pos_mlp = GatedMLP(n_pos, d_pos_mlp, fused=True)
        self.mlp = GatedMLP(d_model, d_mlp, fused=True)
        self.ln2_post = RMSNorm(d_model, eps, "ln2_post", weighted=False)
        self.n_pos, self.eps = n_pos, eps
        self.sites = (
            "hook_resid_pre", "hook_pos_mlp_out", "hook_resid_mid", *GatedMLP.sites,
            "hook_mlp_out", *self.ln2_post.sites, "hook_resid_post",
        )  # fmt: skip

    def forward(self, x: Stream, rows: Rows, taps: Taps) -> Stream:
        self._check_whole(rows)
        x = tap(taps, "hook_resid_pre", x)
        mixed = self.pos_mlp(x.transpose(1, 2).contiguous(), NO_TAPS).transpose(1, 2)
        summed = x + tap(taps, "hook_pos_mlp_out", mixed.contiguous())
        x = tap(taps, "hook_resid_mid", self._over_positions(summed))
        out = tap(taps, "hook_mlp_out", self.mlp(x, taps))
        return tap(taps, "hook_resid_post", self.ln2_post(x + out, taps))

    def _over_positions(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """RMSNorm of each channel over the positions."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
        return F.rms_norm(wide, (self.n_pos,), None, self.eps).transpose(1, 2).to(x.dtype)

    def _check_whole(self, rows: Rows) -> None:
        positions, mask = rows.places.positions, rows.places.mask
        expected = torch.arange(self.n_pos, device=positions.device)
        if positions.shape[1] != self.n_pos or not bool(
            (positions == expected).all() and mask.all()
        ):
            raise ValueError(
                f"an MLP along the positions needs all its {self.n_pos} positions in order and"
                f" without padding, got {positions.shape[1]} positions, {int(mask.sum(1).min())} of"
                " them real in the shortest row"
            )
