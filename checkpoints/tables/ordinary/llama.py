"""Released models of Llama's kind, which are looped without training: Llama, Mistral, Qwen2 (and
2.5) and Qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import rotary
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import ATTENTION, MLP, PRE_NORMS, block_names, edge_names
from loopscope.checkpoints.tables.ordinary.looping import OPTIONS, looping
from loopscope.checkpoints.tables.ordinary.reach import reach
from loopscope.models.families.training_free.model import TrainingFreeConfig

HEAD_NORMS = {f"self_attn.{part}_norm.weight": f"attn.{part}_norm.w" for part in ("q", "k")}


def sizes(fields: ConfigFields, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `WindowConfig` that configs of Llama's kind share."""
    n_layers = fields.layers("num_hidden_layers")
    return {
        **looping(options, n_layers),
        "n_layers": n_layers,
        "d_model": fields.width("hidden_size"),
        "n_heads": fields.width("num_attention_heads"),
        "n_key_value_heads": fields.width("num_key_value_heads", None),
        "d_mlp": fields.width("intermediate_size"),
        "d_vocab": fields.width("vocab_size"),
        "eps": fields.number("rms_norm_eps"),
    }


def _shared(fields: ConfigFields, options: dict[str, Any]) -> dict[str, Any]:
    fields.only("hidden_act", "silu")
    return {
        **sizes(fields, options),
        **rotary(fields, fields.positions("max_position_embeddings"), default=10000.0),
        "tied": fields.boolean("tie_word_embeddings", False),
    }


def _llama(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeConfig:
    return TrainingFreeConfig(
        **_shared(fields, options),
        head_dim=fields.width("head_dim", None),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _mistral(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeConfig:
    shared = _shared(fields, options)
    return TrainingFreeConfig(
        **shared,
        **reach(fields, shared["n_layers"], usually_full=()),
        head_dim=fields.width("head_dim", None),
    )


def _qwen_reach(fields: ConfigFields, n_layers: int) -> dict[str, Any]:
    """Layers with a window: none, or those from `max_window_layers` on."""
    first = fields.integer("max_window_layers", 28)
    if fields.boolean("use_sliding_window", False):
        return reach(fields, n_layers, range(min(first, n_layers)))
    fields.unused("sliding_window")
    fields.only(
        "layer_types", None, ["full_attention"] * n_layers, why="use_sliding_window is false"
    )
    return {}


def _qwen2(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeConfig:
    shared = _shared(fields, options)
    return TrainingFreeConfig(**shared, **_qwen_reach(fields, shared["n_layers"]), qkv_bias=True)


def _qwen3(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeConfig:
    shared = _shared(fields, options)
    return TrainingFreeConfig(
        **shared,
        **_qwen_reach(fields, shared["n_layers"]),
        head_dim=fields.width("head_dim"),
        attention_bias=fields.boolean("attention_bias", False),
        qk_norm=True,
    )


def _names(cfg: TrainingFreeConfig) -> dict[str, str]:
    parts = {**ATTENTION, **MLP, **PRE_NORMS, **(HEAD_NORMS if cfg.qk_norm else {})}
    inputs = {key: name for key, name in ATTENTION.items() if name != "attn.o.weight"}
    for has, matrices in (
        (cfg.attention_bias, ATTENTION),
        (cfg.qkv_bias, inputs),
        (cfg.mlp_bias, MLP),
    ):
        parts |= biases(matrices) if has else {}
    return {**edge_names(cfg.tied), **block_names("model.layers", "blocks", cfg.n_layers, parts)}


def biases(matrices: Mapping[str, str]) -> dict[str, str]:
    """Our names of the biases beside some matrices."""
    return {
        key.removesuffix("weight") + "bias": name.removesuffix("weight") + "bias"
        for key, name in matrices.items()
    }


LLAMA = Table(
    "training_free",
    of_type("llama"),
    _llama,
    _names,
    harmless={"says in how many slices the same products were computed": ("pretraining_tp",)},
    options=OPTIONS,
)
MISTRAL = Table(
    "training_free",
    of_type("mistral"),
    _mistral,
    _names,
    options=OPTIONS,
)
QWEN2 = Table(
    "training_free",
    of_type("qwen2"),
    _qwen2,
    _names,
    options=OPTIONS,
)
QWEN3 = Table(
    "training_free",
    of_type("qwen3"),
    _qwen3,
    _names,
    options=OPTIONS,
)
