"""Parcae's block in plain steps, one head and one query at a time, and small models of it."""

from __future__ import annotations

import torch
from torch import Tensor

from loopscope.models.blocks.parcae_block import ParcaeBlock
from loopscope.models.core.registry import build
from loopscope.models.families.parcae import Parcae, ParcaeConfig


def made(cfg: ParcaeConfig, std: float = 0.3) -> Parcae:
    """A model in float64 with weights that make every part matter."""
    torch.manual_seed(4)
    model = build(cfg).double()
    assert isinstance(model, Parcae)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def tokens_of(cfg: ParcaeConfig, seed: int = 3) -> Tensor:
    return torch.randint(0, cfg.d_vocab, (3, 7), generator=torch.Generator().manual_seed(seed))


def normed(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, position: int, cfg: ParcaeConfig) -> Tensor:
    """Each pair of neighbouring channels as one complex number, turned on its own."""
    angles = position * (
        1.0
        / cfg.rope_theta ** (torch.arange(0, cfg.d_head, 2, dtype=torch.float32) / cfg.d_head)
        / 3
    )
    pairs = [torch.complex(x[..., 2 * i], x[..., 2 * i + 1]) for i in range(len(angles))]
    out = [
        pair * torch.complex(angle.cos().double(), angle.sin().double())
        for pair, angle in zip(pairs, angles, strict=True)
    ]
    return torch.stack([part for pair in out for part in (pair.real, pair.imag)], dim=-1)


def slow_block(block: ParcaeBlock, x: Tensor, cfg: ParcaeConfig, embedded: Tensor | None) -> Tensor:
    """A block head by head and query by query; `embedded` is "batch pos width" where value
    embeddings are added.
    """
    attn, seen, added = block.attn, normed(x, block.ln1.w, cfg.eps), torch.zeros_like(x)
    group, eps = cfg.n_heads // attn.n_kv_heads, torch.finfo(x.dtype).eps
    for head in range(cfg.n_heads):
        kv = head // group
        q, k, v = seen @ attn.W_Q[head], seen @ attn.W_K[kv], seen @ attn.W_V[kv]
        if embedded is not None:
            gate = 2 / (1 + torch.exp(-(seen[..., :32] @ attn.value_gate.weight[kv])))
            v = v + gate[..., None] * embedded[..., kv * cfg.d_head : (kv + 1) * cfg.d_head]
        q, k = (
            torch.stack(
                [normed(turned(part[:, i], i, cfg), 1.0, eps) for i in range(x.shape[1])], dim=1
            )
            for part in (q, k)
        )
        for pos in range(x.shape[1]):
            weights = ((k[:, : pos + 1] * q[:, pos : pos + 1]).sum(-1) / cfg.d_head**0.5).softmax(
                -1
            )
            added[:, pos] += (weights[..., None] * v[:, : pos + 1]).sum(1) @ attn.W_O[head]
    x = x + added
    hidden = (normed(x, block.ln2.w, cfg.eps) @ block.mlp.W_in).clamp(min=0)
    return x + 0.5 * hidden**2 @ block.mlp.W_out
