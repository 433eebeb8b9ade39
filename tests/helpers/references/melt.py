"""MELT by its equations, one position after the other, in chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from loopscope.models.blocks.melt_block import MeltBlock
from loopscope.models.families.melt import Melt

Row = tuple[Tensor, Tensor]


def rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return w * x / math.sqrt(sum(number * number for number in x.tolist()) / len(x) + eps)


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    half = len(x) // 2
    angles = position * (1.0 / theta ** (torch.arange(0, len(x), 2, dtype=torch.float32) / len(x)))
    cos, sin = angles.cos().double(), angles.sin().double()
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def new_latent(model: Melt, block: MeltBlock, x: Tensor, before: Tensor | None) -> Tensor:
    gate = block.latent_gate
    if before is None and model.cfg.h_0 == "first_input":
        before = x
    elif before is None:
        before = torch.zeros_like(x)
    z = torch.sigmoid(x @ gate.W + before @ gate.U + gate.b)
    return z * before + (1 - z) * x


def row_of(model: Melt, block: MeltBlock, latent: Tensor, position: int) -> Row:
    """The key and the value of each key-value head."""
    source = latent if model.cfg.gate_input == "normed" else rms(latent, block.ln1.w, model.cfg.eps)
    keys = [turned(source @ W, position, model.cfg.rope_theta) for W in block.attn.W_K]
    return torch.stack(keys), torch.stack([source @ W for W in block.attn.W_V])


def attention(
    model: Melt, block: MeltBlock, normed: Tensor, position: int, seen: list[Row]
) -> Tensor:
    out = torch.zeros_like(normed)
    for head, (W_Q, W_O) in enumerate(zip(block.attn.W_Q, block.attn.W_O, strict=True)):
        q, group = (
            turned(normed @ W_Q, position, model.cfg.rope_theta),
            head * model.cfg.kv_heads // model.cfg.n_heads,
        )
        scores = torch.stack([q @ k[group] for k, _ in seen]) / math.sqrt(len(q))
        out += (
            sum(weight * v[group] for weight, (_, v) in zip(scores.softmax(0), seen, strict=True))
            @ W_O
        )
    return out


def one_chunk(
    model: Melt, tokens: Tensor, start: int, n_loops: int, past: list[list[Row]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """States and latents of some positions at the end; their last rows are put behind those of
    `past`.
    """
    eps, xs = model.cfg.eps, [model.W_E[token] for token in tokens]
    latents: dict[tuple[int, int], Tensor] = {}
    for t in range(n_loops):
        for layer, block in enumerate(cast("list[MeltBlock]", list(model.blocks))):
            normed = [rms(x, block.ln1.w, eps) for x in xs]
            rows: list[Row] = []
            for i, x in enumerate(xs):
                taken = normed[i] if model.cfg.gate_input == "normed" else x
                latents[layer, i] = new_latent(model, block, taken, latents.get((layer, i)))
                rows.append(row_of(model, block, latents[layer, i], start + i))
            for i in range(len(xs)):
                seen = past[layer] + rows[: i + 1]
                xs[i] = xs[i] + rms(
                    attention(model, block, normed[i], start + i, seen), block.ln1_post.w, eps
                )
                inner = rms(xs[i], block.ln2.w, eps)
                gated = F.silu(inner @ block.mlp.W_gate) * (inner @ block.mlp.W_in)
                xs[i] = xs[i] + rms(gated @ block.mlp.W_out, block.ln2_post.w, eps)
            if t == n_loops - 1:
                past[layer] += rows
        xs = [rms(x, model.final_norm.w, eps) for x in xs]
    return xs, {
        f"latent.{layer}": torch.stack([latents[layer, i] for i in range(len(xs))])
        for layer in range(len(model.blocks))
    }


def by_the_equations(
    model: Melt, tokens: Tensor, n_loops: int, ends: list[int]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Logits and last latents of one sequence in chunks that end before these positions."""
    past: list[list[Row]] = [[] for _ in model.blocks]
    states: list[Tensor] = []
    latents: list[dict[str, Tensor]] = []
    for start, end in pairwise([0, *ends]):
        found, kept = one_chunk(model, tokens[start:end], start, n_loops, past)
        states += found
        latents.append(kept)
    return torch.stack(states) @ model.W_U, {
        name: torch.cat([kept[name] for kept in latents]) for name in latents[0]
    }
