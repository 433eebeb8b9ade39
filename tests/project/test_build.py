"""Configurations, and the models that are built from them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from loopscope.models.core.registry import build, config_from_dict
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import D_HEAD, D_MLP, D_MODEL, D_VOCAB, HEADS, LAYERS, LOOPS, toy_config


def test_weight_views_show_the_models_own_weights(plain: RecurrentDepth) -> None:
    attn, mlp = plain.blocks[1].attn, plain.blocks[1].mlp
    shapes = {
        "W_Q": (HEADS, D_MODEL, D_HEAD),
        "W_K": (HEADS, D_MODEL, D_HEAD),
        "W_V": (HEADS, D_MODEL, D_HEAD),
        "W_O": (HEADS, D_HEAD, D_MODEL),
        "b_Q": (HEADS, D_HEAD),
        "b_K": (HEADS, D_HEAD),
        "b_V": (HEADS, D_HEAD),
        "b_O": (D_MODEL,),
    }
    assert {name: tuple(getattr(attn, name).shape) for name in shapes} == shapes
    assert (tuple(mlp.W_in.shape), tuple(mlp.W_out.shape)) == ((D_MODEL, D_MLP), (D_MLP, D_MODEL))
    assert (tuple(plain.W_E.shape), tuple(plain.W_U.shape), tuple(plain.b_U.shape)) == (
        (D_VOCAB, D_MODEL),
        (D_MODEL, D_VOCAB),
        (D_VOCAB,),
    )
    owners = {
        "W_Q": attn.W_QKV,
        "W_K": attn.W_QKV,
        "W_V": attn.W_QKV,
        "W_O": attn.W_O_flat,
        "b_Q": attn.b_QKV,
        "b_V": attn.b_QKV,
    }
    for name, owner in owners.items():
        assert (
            getattr(attn, name).untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
        ), name
    with torch.no_grad():
        attn.W_K[3].zero_()
    assert attn.W_QKV[:, D_MODEL + 3 * D_HEAD : D_MODEL + 4 * D_HEAD].abs().max() == 0
    assert attn.W_Q.abs().min() > 0


def test_config_is_frozen_and_goes_through_a_dictionary() -> None:
    cfg = toy_config("learned", True)
    assert (cfg.d_head, cfg.n_layers, cfg.n_loops) == (D_HEAD, LAYERS, LOOPS)
    assert config_from_dict(cfg.to_dict()) == cfg
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'd_model'"):
        cfg.d_model = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        (
            {"n_heads": 4},
            (
                r"n_heads must divide d_model: 4 heads do not divide d_model=35; pass one of \[1,"
                r" 5, 7, 35\]"
            ),
        ),
        ({"dropout": 1.0}, "dropout is a share, at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0, got -0.1"),
        ({"n_ctx": 5}, "n_ctx must be given with positions and only then"),
        ({"positions": "learned"}, "n_ctx must be given with positions and only then"),
        ({"d_modle": 3}, "has no field 'd_modle'"),
        ({"family": "other"}, r"the family must be one of \[.*'recurrent_depth'.*\], got 'other'"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({**toy_config().to_dict(), **changes})


def test_unknown_positions_are_refused() -> None:
    with pytest.raises(
        (ValueError, TypeError), match=r"(?s)positions.*rotary"
    ):  # TypeError where the test run checks types
        toy_config("rotary")


def test_missing_field_is_refused() -> None:
    values = toy_config().to_dict()
    del values["d_mlp"]
    with pytest.raises(ValueError, match="needs the field 'd_mlp'"):
        config_from_dict(values)


def test_models_are_built_in_eval_mode() -> None:
    model = build(toy_config())
    assert not any(module.training for module in model.modules())
