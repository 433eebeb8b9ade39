"""Dory in plain steps, one head and one position at a time, and small models of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopscope.models.core.registry import build
from loopscope.models.families.dory import Dory, DoryConfig


def unit(x: Tensor, eps: float) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).add(eps).sqrt()


def turned(x: Tensor, theta: float) -> Tensor:
    """Channels i and i + half of each row as one complex number, turned by the row's position."""
    half = x.shape[-1] // 2
    rates = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(len(x), dtype=torch.float32)[:, None] * rates  # float32, as released
    turns = torch.complex(angles.cos().double(), angles.sin().double())
    numbers = torch.complex(x[:, :half], x[:, half:]) * turns
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def slow_attention(x: Tensor, w: dict[str, Tensor], cfg: DoryConfig, full: bool) -> Tensor:
    theta = cfg.rope_theta if full else cfg.window_rope_theta
    heads = []
    for head in range(cfg.n_heads):
        own = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
        group = head // (cfg.n_heads // cfg.kv_heads)
        shared = slice(group * cfg.d_head, (group + 1) * cfg.d_head)
        q = turned(unit(x @ w["attn.q.weight"][own].T, cfg.eps), theta)
        k = turned(unit(x @ w["attn.k.weight"][shared].T, cfg.eps), theta)
        v = x @ w["attn.v.weight"][shared].T
        q = q * (w["attn.sqk"][own] * cfg.d_head**0.5 / cfg.start) ** 2
        rows = []
        for here in range(len(x)):
            first = 0 if full else max(0, here - cfg.window + 1)
            weights = (q[here] @ k[first : here + 1].T / cfg.d_head**0.5).softmax(-1)
            rows.append(weights @ v[first : here + 1])
        heads.append(torch.stack(rows))
    gate = w["attn.s_gate"] * cfg.d_model**0.25 / cfg.start
    gate = (x @ w["attn.gate.weight"].T * gate**2).sigmoid()
    return unit(torch.cat(heads, dim=-1) * gate, cfg.eps) @ w["attn.o.weight"].T


def slow_mlp(x: Tensor, w: dict[str, Tensor], cfg: DoryConfig) -> Tensor:
    gate = x @ w["mlp.gate.weight"].T * w["mlp.suv_gate"] * cfg.d_model**0.5
    up = x @ w["mlp.up.weight"].T * w["mlp.suv_up"] * cfg.d_model**0.5
    return unit(gate * gate.sigmoid() * up, cfg.eps) @ w["mlp.down.weight"].T


def slow_block(h: Tensor, model: Dory, prefix: str, layer: int) -> Tensor:
    cfg = model.cfg
    w = {
        name.removeprefix(prefix): value
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }
    full = layer in (cfg.full_layers or ())
    for part, found in (
        ("attn", lambda x: slow_attention(x, w, cfg, full)),
        ("mlp", lambda x: slow_mlp(x, w, cfg)),
    ):
        x = unit(h, cfg.eps)
        rate = (w[f"{part}_alpha"] * cfg.rate_start / cfg.start).abs()
        h = x + rate * (unit(found(x), cfg.eps) - x)
    return h


def slow_logits(model: Dory, ids: Tensor, n_loops: int) -> Tensor:
    """Logits "pos d_vocab" of one sequence."""
    w, cfg = dict(model.state_dict()), model.cfg
    h = w["embedding"][ids]
    for i in range(cfg.n_prelude_layers):
        h = slow_block(h, model, f"prelude_blocks.{i}.", i)
    e = unit(h, cfg.eps)
    for _ in range(n_loops):
        h = unit(h, cfg.eps) + e
        for i in range(cfg.n_layers):
            h = slow_block(h, model, f"blocks.{i}.", cfg.n_prelude_layers + i)
    for i in range(cfg.n_coda_layers):
        h = slow_block(h, model, f"coda_blocks.{i}.", cfg.n_prelude_layers + cfg.n_layers + i)
    head = w.get("head", w["embedding"])
    return unit(h, cfg.eps) @ head.T * w["logit_scale"] / cfg.start


SIZES: dict[str, Any] = {
    "n_prelude_layers": 1,
    "n_layers": 2,
    "n_coda_layers": 1,
    "n_loops": 3,
    "d_model": 15,
    "n_heads": 6,
    "n_key_value_heads": 2,
    "head_dim": 4,
    "d_mlp": 22,
    "d_vocab": 29,
    "window": 3,
    "full_layers": (1,),
}


def fresh(**changes: Any) -> Dory:
    """A model in float64 whose learned scales lie around their start, with both signs."""
    model = build(DoryConfig(**{**SIZES, **changes})).double()
    assert isinstance(model, Dory)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter * (1 + noise))
    return model.requires_grad_(False)
