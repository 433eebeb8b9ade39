"""The whole computation written down again: one iteration is a vanilla transformer, more are the
same blocks again.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopscope.models.families.recurrent_depth import RecurrentDepth, sinusoids
from toy import D_HEAD, D_MODEL, HEADS, LAYERS, N_CTX, assert_close, random_tokens


def vanilla_block(model: RecurrentDepth, layer: int, x: Tensor) -> Tensor:
    """A pre-LayerNorm GPT-2 block in plain PyTorch, without padding."""
    block = model.blocks[layer]
    normed = F.layer_norm(x, (D_MODEL,), block.ln1.w, block.ln1.b, model.cfg.eps)
    q, k, v = (
        part.unflatten(-1, (HEADS, D_HEAD))
        for part in (normed @ block.attn.W_QKV + block.attn.b_QKV).chunk(3, dim=-1)
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / D_HEAD**0.5
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2)
    x = x + z @ block.attn.W_O_flat + block.attn.b_O
    pre = (
        F.layer_norm(x, (D_MODEL,), block.ln2.w, block.ln2.b, model.cfg.eps) @ block.mlp.W_in
        + block.mlp.b_in
    )
    gelu_new = 0.5 * pre * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (pre + 0.044715 * pre**3)))
    return x + gelu_new @ block.mlp.W_out + block.mlp.b_out


def written_down_again(model: RecurrentDepth, tokens: Tensor, n_loops: int) -> Tensor:
    x = model.embedding[tokens]
    if model.positional:
        x = x + model.W_pos[: tokens.shape[1]]
    embedded = x
    for loop in range(n_loops):
        if model.cfg.input_injection and loop > 0:
            x = x + embedded
        for layer in range(LAYERS):
            x = vanilla_block(model, layer, x)
    return (
        F.layer_norm(x, (D_MODEL,), model.final_norm.w, model.final_norm.b, model.cfg.eps)
        @ model.embedding.T
    )


def test_one_iteration_is_the_vanilla_transformer(model: RecurrentDepth) -> None:
    assert_close(model(random_tokens(), n_loops=1), written_down_again(model, random_tokens(), 1))


@pytest.mark.parametrize("n_loops", [2, 5])
def test_more_iterations_are_the_same_blocks_again(n_loops: int, model: RecurrentDepth) -> None:
    assert_close(
        model(random_tokens(), n_loops=n_loops), written_down_again(model, random_tokens(), n_loops)
    )


def test_sinusoids_are_sines_in_even_and_cosines_in_odd_columns() -> None:
    table = sinusoids(N_CTX, D_MODEL)
    assert table.shape == (N_CTX, D_MODEL)
    for position, column in ((0, 0), (3, 0), (3, 1), (7, 8), (10, 33), (10, 34)):
        angle = torch.tensor(position * 10000.0 ** (-(column // 2 * 2) / D_MODEL))
        torch.testing.assert_close(
            table[position, column], angle.sin() if column % 2 == 0 else angle.cos()
        )
