"""A mixture of experts: a router that chooses some of many gated MLPs for each row."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.blocks.components import wide
from loopscope.models.core.attention import softcapped
from loopscope.models.core.hooks import Taps, tap

Stream = Float[Tensor, "batch pos d_model"]
OfExperts = Float[Tensor, "batch pos expert"]


class Router(nn.Module):
    """Sigmoid scores of all experts, and the weights of those with the largest biased scores.

    The bias chooses alone: a chosen expert's weight is its score without bias, over the sum of the
    chosen scores, times `scale`.
    """

    sites: ClassVar[tuple[str, ...]] = ("mlp.hook_router_scores", "mlp.hook_expert_weights")

    def __init__(self, d_model: int, n_experts: int, n_chosen: int, scale: float | int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(n_experts))
        self.n_chosen, self.scale = n_chosen, scale

    def forward(self, x: Stream, taps: Taps) -> OfExperts:
        """The weight of each expert; zero for those that are not chosen."""
        scores = F.linear(wide(x), wide(self.weight)).sigmoid()
        scores = tap(taps, self.sites[0], scores)
        chosen = (scores + wide(self.bias)).topk(self.n_chosen, dim=-1).indices
        kept = scores.gather(-1, chosen)
        weights = torch.zeros_like(scores).scatter(
            -1, chosen, kept / kept.sum(-1, keepdim=True) * self.scale
        )
        return tap(taps, self.sites[1], weights)


class Experts(nn.Module):
    """The weighted sum of the chosen experts, down(cap(gate) * sigmoid(gate) * cap(up)) each.

    Hook points with the axis `expert` hold every expert. While one of these points holds a hook,
    or the weights do, every expert is run on every row; otherwise only what is chosen. Experts of
    weight zero add nothing.

    Args:
        n_experts, n_chosen: Experts, and how many of them a row is given.
        caps: Of the gate and of the up projection: cap(x) = c tanh(x / c).
        scale: Of the router's weights.
    """

    sites: ClassVar[tuple[str, ...]] = (
        *Router.sites,
        "mlp.hook_pre",
        "mlp.hook_pre_linear",
        "mlp.hook_post",
        "mlp.hook_expert_out",
    )

    def __init__(
        self,
        sizes: tuple[int, int],
        n_experts: int,
        n_chosen: int,
        caps: tuple[float | int, float | int],
        scale: float | int,
    ) -> None:
        super().__init__()
        d_model, d_mlp = sizes
        self.router = Router(d_model, n_experts, n_chosen, scale)
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_mlp, d_model))  # rows alternate
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_mlp))
        self.caps = caps

    def forward(self, x: Stream, taps: Taps) -> Stream:
        weights = self.router(x, taps).to(x.dtype)
        if any(site in taps for site in self.sites[1:]):
            return self._all(x, weights, taps)
        rows, weights = x.flatten(0, 1), weights.flatten(0, 1)
        out = torch.zeros_like(rows)
        for expert in weights.detach().any(0).nonzero()[:, 0].tolist():
            mine = weights[:, expert].nonzero()[:, 0]
            gate_up = F.linear(rows[mine], self.gate_up[expert])
            post = self.activated(gate_up[:, 0::2], gate_up[:, 1::2])
            added = weights[mine, expert, None] * F.linear(post, self.down[expert])
            out = out.index_add(0, mine, added)
        return out.view(x.shape)

    def _all(self, x: Stream, weights: OfExperts, taps: Taps) -> Stream:
        """The same sum over all experts, with hook points."""
        gate_up = torch.einsum("bpd,ewd->bpew", x, self.gate_up)
        gate = tap(taps, "mlp.hook_pre", gate_up[..., 0::2].contiguous())
        up = tap(taps, "mlp.hook_pre_linear", gate_up[..., 1::2].contiguous())
        post = tap(taps, "mlp.hook_post", self.activated(gate, up))
        out = torch.einsum("bpew,edw->bped", post, self.down)
        out = tap(taps, "mlp.hook_expert_out", out)
        return (weights[..., None] * out).sum(2)

    def activated(
        self, gate: Float[Tensor, "*rows d_mlp"], up: Float[Tensor, "*rows d_mlp"]
    ) -> Float[Tensor, "*rows d_mlp"]:
        """The input of the down projection."""
        return softcapped(gate, self.caps[0]) * gate.sigmoid() * softcapped(up, self.caps[1])
