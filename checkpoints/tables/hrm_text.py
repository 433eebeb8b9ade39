"""Releases of HRM-Text (sapientinc/HRM-Text-1B and its kin). Projections are fused, or have the
names of transformers' modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import rotary
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import ATTENTION, MLP, block_names
from loopscope.models.families.hrm_text import HrmTextConfig

_LOW_START = "model.z_L_init"
_STACKS = {"model.L_module.layers": "low", "model.H_module.layers": "high"}
_FUSED_ATTENTION = ".attn.gqkv_proj.weight"
_FUSED = {
    _FUSED_ATTENTION[1:]: "attn.qkv.weight",
    "attn.o_proj.weight": "attn.o.weight",
    "mlp.gate_up_proj.weight": "mlp.gate_up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
}
_WEIGHTS = {**ATTENTION, "self_attn.gate_proj.weight": "attn.gate.weight", **MLP}
_SEPARATE = _WEIGHTS | {
    key.replace(".weight", ".bias"): name.replace(".weight", ".bias")
    for key, name in _WEIGHTS.items()
}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> HrmTextConfig:
    n_heads = fields.width("num_attention_heads")
    fields.only(
        "num_key_value_heads", n_heads, None, why="every head has keys and values of its own"
    )
    fields.only("hidden_act", "silu")
    return HrmTextConfig(
        n_layers=_layers_per_stack(fields, tensors),
        n_loops=fields.iterations("H_cycles"),
        n_low_loops=fields.iterations("L_cycles"),
        d_model=fields.width("hidden_size"),
        n_heads=n_heads,
        head_dim=fields.width("head_dim", 128),
        d_mlp=fields.width("intermediate_size"),
        d_vocab=fields.width("vocab_size"),
        eps=fields.number("rms_norm_eps"),
        **rotary(fields, fields.positions("max_position_embeddings"), default=10000.0),
        tied=fields.boolean("tie_word_embeddings", False),
        embedding_scale=fields.number(
            "embedding_scale", 1.0 / fields.number("initializer_range", 0.02)
        ),
        prefix_lm=fields.boolean("prefix_lm", True),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        fused=any(key.endswith(_FUSED_ATTENTION) for key in tensors),
    )


def _layers_per_stack(fields: ConfigFields, tensors: Mapping[str, Tensor]) -> int:
    """The blocks of one stack. Without `num_layers_per_stack`, `num_hidden_layers` counts one stack
    or both, and the stored keys decide.
    """
    per_stack: int | None = fields.layers("num_layers_per_stack", None)
    if per_stack is not None:
        fields.unused("num_hidden_layers")  # then that of cache slots: blocks of a stack times runs
        return per_stack
    counted: int = fields.layers("num_hidden_layers")
    stored = len({key.split(".")[3] for key in tensors if key.startswith("model.L_module.layers.")})
    return stored if counted == 2 * stored else counted


def _names(cfg: HrmTextConfig) -> dict[str, str]:
    names = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        _LOW_START: "low_init",
    }
    parts = _FUSED if cfg.fused else _SEPARATE
    for theirs, ours in _STACKS.items():
        names |= block_names(theirs, ours, cfg.n_layers, parts)
    return names


TABLE = Table(
    family="hrm_text",
    recognizes=of_type("hrm_text"),
    config=_config,
    names=_names,
    harmless={"says through which low runs gradients flow in training": ("L_bp_cycles",)},
    releases=(("sapientinc/HRM-Text-1B", "two stacks of 16 layers in nested cycles"),),
)
