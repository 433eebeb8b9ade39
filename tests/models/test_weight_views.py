"""Weight views have the file's values in TransformerLens's shapes, and share storage with the
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loopscope.models.families.recurrent_depth import RecurrentDepth
from release_files import D_MODEL, D_VOCAB, loaded, release_tensors

HEADS = 5
D_HEAD = D_MODEL // HEADS


def columns(part: int, head: int) -> slice:
    """Where the fused projection keeps one head's queries (0), keys (1) or values (2)."""
    start = part * D_MODEL + head * D_HEAD
    return slice(start, start + D_HEAD)


@pytest.mark.shapes
@pytest.mark.parametrize(("part", "name"), [(0, "Q"), (1, "K"), (2, "V")])
def test_query_key_and_value_weights_are_columns_of_the_fused_projection(
    tmp_path: Path, part: int, name: str
) -> None:
    model, theirs = loaded(tmp_path / "a.pt"), release_tensors()
    for layer, block in enumerate(model.blocks):
        weight, bias = getattr(block.attn, f"W_{name}"), getattr(block.attn, f"b_{name}")
        assert (weight.shape, bias.shape) == ((HEADS, D_MODEL, D_HEAD), (HEADS, D_HEAD))
        for head in range(HEADS):
            assert torch.equal(
                weight[head], theirs[f"blocks.{layer}.attn.c_attn.weight"][:, columns(part, head)]
            )
            assert torch.equal(
                bias[head], theirs[f"blocks.{layer}.attn.c_attn.bias"][columns(part, head)]
            )


def test_output_and_mlp_weights_have_transformer_lens_shapes(tmp_path: Path) -> None:
    model, theirs = loaded(tmp_path / "a.pt"), release_tensors()
    for layer, block in enumerate(model.blocks):
        assert block.attn.W_O.shape == (HEADS, D_HEAD, D_MODEL)
        for head in range(HEADS):
            rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
            assert torch.equal(
                block.attn.W_O[head], theirs[f"blocks.{layer}.attn.c_proj.weight"][rows]
            )
        assert torch.equal(block.attn.b_O, theirs[f"blocks.{layer}.attn.c_proj.bias"])
        assert torch.equal(block.mlp.W_in, theirs[f"blocks.{layer}.mlp.c_fc.weight"])
        assert torch.equal(block.mlp.W_out, theirs[f"blocks.{layer}.mlp.c_proj.weight"])
        assert torch.equal(block.mlp.b_in, theirs[f"blocks.{layer}.mlp.c_fc.bias"])
        assert torch.equal(block.mlp.b_out, theirs[f"blocks.{layer}.mlp.c_proj.bias"])


def test_embedding_and_unembedding_are_one_matrix_without_bias(tmp_path: Path) -> None:
    model, theirs = loaded(tmp_path / "a.pt"), release_tensors()
    assert torch.equal(model.W_E, theirs["token_embedding.weight"])
    assert torch.equal(model.W_U, theirs["token_embedding.weight"].T)
    assert torch.equal(model.b_U, torch.zeros(D_VOCAB))


VIEWS: list[tuple[str, Callable[[RecurrentDepth], Tensor], str]] = [
    ("W_E", lambda model: model.W_E, "embedding"),
    ("W_U", lambda model: model.W_U, "embedding"),
    ("W_pos", lambda model: model.W_pos, "W_pos"),
    ("W_Q", lambda model: model.blocks[1].attn.W_Q, "blocks.1.attn.W_QKV"),
    ("W_K", lambda model: model.blocks[1].attn.W_K, "blocks.1.attn.W_QKV"),
    ("W_V", lambda model: model.blocks[1].attn.W_V, "blocks.1.attn.W_QKV"),
    ("b_Q", lambda model: model.blocks[1].attn.b_Q, "blocks.1.attn.b_QKV"),
    ("b_K", lambda model: model.blocks[1].attn.b_K, "blocks.1.attn.b_QKV"),
    ("b_V", lambda model: model.blocks[1].attn.b_V, "blocks.1.attn.b_QKV"),
    ("W_O", lambda model: model.blocks[1].attn.W_O, "blocks.1.attn.W_O_flat"),
    ("W_in", lambda model: model.blocks[1].mlp.W_in, "blocks.1.mlp.W_in"),
    ("W_out", lambda model: model.blocks[1].mlp.W_out, "blocks.1.mlp.W_out"),
]


@pytest.mark.parametrize(("name", "view", "parameter"), VIEWS, ids=[name for name, _, _ in VIEWS])
def test_weight_views_share_storage_with_the_parameters(
    tmp_path: Path, name: str, view: Callable[[RecurrentDepth], Tensor], parameter: str
) -> None:
    model = loaded(tmp_path / "a.pt", "learned")
    owner = model.state_dict()[parameter]
    assert view(model).untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
    with torch.no_grad():
        view(model).fill_(0.5)
    assert bool((owner == 0.5).any()), f"writing to {name} changes the model"
