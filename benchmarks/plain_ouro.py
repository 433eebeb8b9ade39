"""Ouro as a researcher would write it by hand: plain PyTorch, no hook points, the loop in forward.

It computes with the weights of a loaded model, so that two tools can be compared on one machine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return weight * wide.to(x.dtype)


class PlainBlock(nn.Module):
    """A sandwich-norm block with rotary attention and a gated MLP."""

    def __init__(self, block: Any, n_heads: int, eps: float) -> None:
        super().__init__()
        self.attn, self.mlp, self.n_heads, self.eps = block.attn, block.mlp, n_heads, eps
        self.norms = nn.ModuleList([block.ln1, block.ln1_post, block.ln2, block.ln2_post])

    def norm(self, x: Tensor, number: int) -> Tensor:
        return _rms(x, self.norms[number].w, self.eps)  # type: ignore[arg-type]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm(x, 0)
        q, k, v = (
            part(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.attn.q, self.attn.k, self.attn.v)
        )
        q, k = (each * cos + torch.cat(_swapped(each), -1) * sin for each in (q, k))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.norm(self.attn.o(z.transpose(1, 2).flatten(2)), 1)
        normed = self.norm(x, 2)
        hidden = F.silu(self.mlp.gate(normed)) * self.mlp.up(normed)
        return x + self.norm(self.mlp.down(hidden), 3)


class PlainOuro(nn.Module):
    """Blocks applied several times, the final norm after each iteration, logits at the end."""

    def __init__(self, model: Any, theta: float) -> None:
        super().__init__()
        cfg = model.cfg
        self.n_loops, self.theta, self.eps = cfg.n_loops, theta, cfg.eps
        self.d_head = cfg.d_model // cfg.n_heads
        self.embedding = nn.Embedding.from_pretrained(model.embedding)
        self.head = model.head
        self.final_norm = model.final_norm
        self.blocks = nn.ModuleList(PlainBlock(b, cfg.n_heads, cfg.eps) for b in model.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        turns = self.theta ** (-torch.arange(0, self.d_head, 2).float() / self.d_head)
        angles = torch.arange(tokens.shape[1]).float()[:, None] * torch.cat([turns, turns])
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for _ in range(self.n_loops):
            for block in self.blocks:
                x = block(x, cos, sin)
            x = _rms(x, self.final_norm.w, self.eps)
        return F.linear(x, self.head)


def _swapped(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    return -second, first
