"""The block of GPT-NeoX: LayerNorms, projections with biases, and attention and MLP that may both
read the stream as it was before the block.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.blocks.components import MLP, LayerNorm
from loopscope.models.blocks.decoder_block import Attention, Projection, Stream
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import Taps, tap


class InterleavedAttention(Attention):
    """Attention whose stored matrix has the rows of q, k and v of one head after the other.

    Args:
        d_model, n_heads: Widths; every head has keys and values of its own.
        rotary: As for `Attention`.
        bias: Of both matrices.
    """

    def __init__(self, d_model: int, n_heads: int, rotary: Rotary, *, bias: bool = True) -> None:
        d_head = d_model // n_heads
        super().__init__(d_model, n_heads, n_heads, d_head, rotary, bias=bias, fused=True)

    def projected(self, x: Stream) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(x).unflatten(-1, (self.n_heads, 3, self.d_head)).unbind(-2)
        q, k, v = (part.contiguous() for part in parts)
        return q, k, v

    def _weight(self, which: Projection) -> Float[Tensor, "head d_model d_head"]:
        form = "(head part d_head) d_model -> part head d_model d_head"
        parts: Tensor = rearrange(self.qkv.weight, form, part=3, d_head=self.d_head)
        return parts["qkv".index(which)]

    def _bias(self, which: Projection) -> Float[Tensor, "head d_head"]:
        if self.qkv.bias is None:
            return super()._bias(which)
        form = "(head part d_head) -> part head d_head"
        parts: Tensor = rearrange(self.qkv.bias, form, part=3, d_head=self.d_head)
        return parts["qkv".index(which)]


class ParallelBlock(nn.Module):
    """x + attn(ln1(x)) + mlp(ln2(x)). There is no stream between the two, so no `hook_resid_mid`.

    Args:
        attn, mlp: Its two parts.
        eps: Of its norms.
    """

    def __init__(self, attn: Attention, mlp: MLP, eps: float | int) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.ln1, self.ln2 = (LayerNorm(attn.o.out_features, eps, site) for site in ("ln1", "ln2"))
        self.sites = (
            "hook_resid_pre", *self.ln1.sites, *attn.sites, "hook_attn_out",
            *self.ln2.sites, *mlp.sites, "hook_mlp_out", "hook_resid_post",
        )  # fmt: skip

    def forward(self, x: Stream, rows: Rows, taps: Taps) -> Stream:
        x = tap(taps, "hook_resid_pre", x)
        found = tap(taps, "hook_attn_out", self.attn(self.ln1(x, taps), rows, taps))
        made = tap(taps, "hook_mlp_out", self.mlp(self.ln2(x, taps), taps))
        return tap(taps, "hook_resid_post", made + found + x)
