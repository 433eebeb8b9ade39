"""Attention that norms queries and keys before their positions; `hook_q` and `hook_k` are before
the norms, whose hook points are at attn.q_norm and attn.k_norm.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from loopscope.models.blocks.components import RMSNorm, norm_sites
from loopscope.models.blocks.decoder_block import Attention, Heads, KeyHeads
from loopscope.models.core.hooks import Taps

_SITES = (
    *Attention.sites[:3],
    *norm_sites("attn.q_norm"),
    *norm_sites("attn.k_norm"),
    *Attention.sites[3:],
)


class HeadNormedAttention(Attention):
    """Attention that norms each head's queries and keys.

    Args:
        sizes: The positional arguments of `Attention`.
        eps: Of both norms.
        bias: As for `Attention`.
        norm: Their class.
    """

    sites: ClassVar[tuple[str, ...]] = _SITES

    def __init__(
        self,
        *sizes: Any,
        eps: float,
        bias: bool | Literal["qkv"] = False,
        norm: type[RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__(*sizes, bias=bias)
        self.q_norm, self.k_norm = (
            norm(self.d_head, eps, f"attn.{which}_norm") for which in ("q", "k")
        )

    def normed(self, q: Heads, k: KeyHeads, taps: Taps) -> tuple[Tensor, Tensor]:
        return self.q_norm(q, taps), self.k_norm(k, taps)


class WholeNormedAttention(Attention):
    """Attention that norms the queries of all heads together, and the keys of all heads together
    (OLMo-2).

    Args:
        sizes: The positional arguments of `Attention`.
        eps: Of both norms.
        bias, fused: As for `Attention`.
        norm: Their class.
    """

    sites: ClassVar[tuple[str, ...]] = _SITES

    def __init__(
        self,
        *sizes: Any,
        eps: float,
        bias: bool = False,
        fused: bool = False,
        norm: type[RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__(*sizes, bias=bias, fused=fused)
        self.q_norm = norm(self.widths[0], eps, "attn.q_norm")
        self.k_norm = norm(self.widths[1], eps, "attn.k_norm")

    def normed(self, q: Heads, k: KeyHeads, taps: Taps) -> tuple[Tensor, Tensor]:
        q, k = self.q_norm(q.flatten(-2), taps), self.k_norm(k.flatten(-2), taps)
        return q.unflatten(-1, (-1, self.d_head)), k.unflatten(-1, (-1, self.d_head))
