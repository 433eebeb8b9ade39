"""Huginn's golden keys as our names, and a slow computation of its parts; retrofits share both."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Compute, GoldenCase
from loopscope.interp.lens.lens import logit_lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.state import State
from loopscope.models.families.huginn import PreludeCoreCoda, latent_states

STATE = {"state": "init_state"}


def whole_batch(case: GoldenCase) -> Batch:
    width = case.tokens.shape[1]
    return Batch(
        case.tokens,
        torch.ones_like(case.tokens),
        torch.full((len(case.tokens),), width - 1),
        case.begin,
    )


def after(case: GoldenCase, t: str) -> State:
    """The case's run where iteration t has ended."""
    state = case.model.begin(case.tokens, n_loops=case.n_loops, **case.begin)
    return case.model.advance(state, case.model.iteration_ends(case.n_loops)[int(t)])


def without_coda(case: GoldenCase, t: str) -> Tensor:
    lens = logit_lens(
        case.model, whole_batch(case), case.n_loops, positions="all", keep_logits=True
    )
    assert lens.logits is not None
    return lens.logits[
        lens.names.index(f"loops.{t}.blocks.{case.model.cfg.n_layers - 1}")
    ].unflatten(0, case.tokens.shape)


def released_latents(case: GoldenCase) -> Tensor:
    assert isinstance(case.model, PreludeCoreCoda)
    return latent_states(case.model, after(case, str(case.n_loops - 1)))


def from_zeros(case: GoldenCase, n_loops: int | None = None) -> Tensor:
    return case.logits(n_loops, state=torch.zeros(1, *case.begin["state"].shape[1:]))


def injected(case: GoldenCase) -> Tensor:
    first, *later = (case.activation(f"loops.{t}.hook_input") for t in range(case.n_loops))
    assert all(torch.equal(first, other) for other in later)
    return first


@torch.no_grad()
def read_there(case: GoldenCase, t: str) -> Tensor:
    return case.model.readout(after(case, t))


BLOCK = r"iter\.(\d+)\.block\.(\d+)\."


EDGE = r"(prelude|coda)\.block\.(\d+)\."


TABLE: dict[str, Compute] = {
    r"(input_ids|init_state)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    EDGE + r"resid_post": lambda case, where, j: case.activation(f"{where}.{j}.hook_resid_post"),
    r"injected_input": injected,
    r"iter\.(\d+)\.state_(in|out)": lambda case, t, which: case.activation(
        f"loops.{t}.hook_state_{which}"
    ),
    r"iter\.(\d+)\.inject_out": lambda case, t: case.activation(f"loops.{t}.hook_injected"),
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, t, j, which: case.heads_first(
        f"loops.{t}.blocks.{j}.attn.hook_rot_{which}"
    ),
    BLOCK + r"attn\.v": lambda case, t, j: case.heads_first(f"loops.{t}.blocks.{j}.attn.hook_v"),
    r"iter\.(\d+)\.readout_logits": read_there,
    r"iter\.(\d+)\.direct_lens_logits": without_coda,
    r"latent_states": released_latents,
    r"final_norm_out": lambda case: case.activation("ln_final.hook_out"),
    r"logits": GoldenCase.logits,
    r"variant\.init_zero\.logits": from_zeros,
    r"variant\.init_zero_steps1\.logits": lambda case: from_zeros(case, 1),
}


def slow_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def slow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with one query at a time; "pos head d_head", and several query heads to a
    key head.
    """
    share = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        for pos in range(len(q)):
            keys, values = k[: pos + 1, head // share], v[: pos + 1, head // share]
            out[pos, head] = (keys @ q[pos, head] / math.sqrt(q.shape[2])).softmax(0) @ values
    return out


def slow_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    width = len(gate_up) // 2
    return (F.silu(x @ gate_up[:width].T) * (x @ gate_up[width:].T)) @ down.T
