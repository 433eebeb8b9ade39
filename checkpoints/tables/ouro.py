"""Releases of Ouro (ByteDance/Ouro-1.4B and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import rotary
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import ATTENTION, MLP, block_names, edge_names
from loopscope.models.families.ouro import OuroConfig

_NORMS = {
    "input_layernorm.weight": "ln1.w",
    "input_layernorm_2.weight": "ln1_post.w",
    "post_attention_layernorm.weight": "ln2.w",
    "post_attention_layernorm_2.weight": "ln2_post.w",
}

_GATE = {
    "model.early_exit_gate.weight": "gate.weight",
    "model.early_exit_gate.bias": "gate.bias",
}
_HARMLESS = {
    "says how long windows are and where, and windows are off": (
        "max_window_layers",
        "sliding_window",
    ),
    "is never read by the released code": ("chunk_size",),
}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> OuroConfig:
    n_layers = fields.layers("num_hidden_layers")
    fields.only("hidden_act", "silu")
    fields.only("use_sliding_window", False)
    fields.only("layer_types", None, ["full_attention"] * n_layers)
    return OuroConfig(
        exit_gate=any(key in tensors for key in _GATE),
        n_layers=n_layers,
        n_loops=fields.iterations("total_ut_steps"),
        d_model=fields.width("hidden_size"),
        n_heads=fields.width("num_attention_heads"),
        n_key_value_heads=fields.width("num_key_value_heads", None),
        head_dim=fields.width("head_dim", None),
        d_mlp=fields.width("intermediate_size"),
        d_vocab=fields.width("vocab_size"),
        eps=fields.number("rms_norm_eps"),
        **rotary(fields, fields.positions("max_position_embeddings")),
        tied=fields.boolean("tie_word_embeddings", False),
        exit_threshold=fields.number("early_exit_threshold", 1.0),
        exit_step=fields.iterations("early_exit_step", None),
    )


def _names(cfg: OuroConfig) -> dict[str, str]:
    return {
        **edge_names(cfg.tied),
        **(_GATE if cfg.exit_gate else {}),
        **block_names("model.layers", "blocks", cfg.n_layers, {**ATTENTION, **MLP, **_NORMS}),
    }


TABLE = Table(
    family="ouro",
    recognizes=of_type("ouro"),
    config=_config,
    names=_names,
    harmless=_HARMLESS,
    releases=(
        ("ByteDance/Ouro-1.4B", "24 layers, 4 iterations, exit gate"),
        ("ByteDance/Ouro-1.4B-Thinking", "24 layers, 4 iterations, exit gate"),
        ("ByteDance/Ouro-2.6B", "48 layers, 4 iterations, exit gate"),
        ("ByteDance/Ouro-2.6B-Thinking", "48 layers, 4 iterations, exit gate"),
    ),
)
