"""Releases of Huginn (tomg-group-umd/huginn-0125), and the parts that the retrofits share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.common.rotary import rotary
from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.llama import block_names
from loopscope.models.families.huginn import HuginnConfig, PreludeCoreCodaConfig

MODEL_TYPE = "huginn_raven"
TIED = ("lm_head.weight", "transformer.wte.weight")
PARTS = {
    "attn.Wqkv.weight": "attn.qkv.weight",
    "attn.proj.weight": "attn.o.weight",
    "mlp.fc.weight": "mlp.gate_up.weight",
    "mlp.proj.weight": "mlp.down.weight",
}
_NORMS = {
    "norm_1.weight": "ln1.w",
    "norm_2.weight": "ln1_post.w",
    "norm_3.weight": "ln2.w",
    "norm_4.weight": "ln2_post.w",
}
HARMLESS = {
    "acts in training alone": (
        "activation_checkpoint_impl",
        "init_orthogonal",
        "init_strategy",
        "mean_backprop_depth",
        "sampling_scheme",
    ),
    "counts or names what other fields say": (
        "architecture_class_name",
        "effective_expected_depth",
        "n_layers",
        "padding_multiple",
        "vocab_size",
    ),
    "sets the noise that is off": ("test_time_noise_type",),
    "is never read by the released code, whose attention sees the whole input": ("sliding_window",),
}


def recognizes(values: Mapping[str, Any], keys: frozenset[str], part: str) -> bool:
    """Whether a release is of this model type and its core's first block has a part."""
    return values.get("model_type") == MODEL_TYPE and any(
        key.startswith(f"transformer.core_block.0.{part}") for key in keys
    )


def sizes(fields: ConfigFields) -> dict[str, Any]:
    """`PreludeCoreCodaConfig`'s fields without positions, key-value heads and the initial state."""
    fields.only("block_class_name", "SandwichBlock")
    fields.only("mlp_class_name", "GatedMLP")
    fields.only("nonlin_name", "SiLU")
    fields.only("norm_class_name", "RMSNorm_llama")
    fields.only("injection_type", "linear")
    fields.only("state_init", "like-init")
    fields.only(
        "test_time_noise", 0, why="the release would mix noise into the state before each iteration"
    )
    tied = fields.boolean("tie_embeddings", True)
    fields.only("tie_word_embeddings", tied)
    return {
        "n_layers": fields.layers("n_layers_in_recurrent_block"),
        "n_prelude_layers": fields.layers("n_layers_in_prelude"),
        "n_coda_layers": fields.layers("n_layers_in_coda"),
        "n_loops": fields.iterations("mean_recurrence"),
        "d_model": fields.width("n_embd"),
        "n_heads": fields.width("n_heads"),
        "d_mlp": fields.width("intermediate_size"),
        "d_vocab": fields.width("padded_vocab_size", None) or fields.width("vocab_size"),
        "eps": fields.number("norm_eps"),
        "adapter_bias": fields.boolean("bias", False),
        "tied": tied,
    }


def initial_value(fields: ConfigFields, name: str) -> float | None:
    """One of the released `init_values`; None where the config has none, and the width decides."""
    values = fields.mapping("init_values", None)
    if values is None:
        return None
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"{fields.path}: init_values must hold the number {name!r}, got {value!r}"
        )
    return float(value)


def key_names(cfg: PreludeCoreCodaConfig, parts: Mapping[str, str]) -> dict[str, str]:
    """Our name of each key, given those of a block's parts."""
    edge = {
        "wte.weight": "embedding",
        "ln_f.weight": "final_norm.w",
        "adapter.weight": "adapter.weight",
    }
    if cfg.adapter_bias:
        edge["adapter.bias"] = "adapter.bias"
    head = {} if cfg.tied else {"lm_head.weight": "head"}
    stacks = (
        ("transformer.prelude", "prelude_blocks", cfg.n_prelude_layers),
        ("transformer.core_block", "blocks", cfg.n_layers),
        ("transformer.coda", "coda_blocks", cfg.n_coda_layers),
    )
    blocks = {
        key: name
        for theirs, ours, n in stacks
        for key, name in block_names(theirs, ours, n, parts).items()
    }
    return {**{f"transformer.{key}": name for key, name in edge.items()}, **head, **blocks}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> HuginnConfig:
    common = sizes(fields)
    fields.only(
        "num_key_value_heads",
        common["n_heads"],
        why="this family's attention has as many key heads as query heads",
    )
    fields.only("head_dim", common["d_model"] // common["n_heads"])
    return HuginnConfig(
        **common,
        **rotary(fields, fields.positions("block_size"), base="rope_base"),
        qk_bias=fields.boolean("qk_bias", True),
        state_std=initial_value(fields, "std"),
    )


def _names(cfg: HuginnConfig) -> dict[str, str]:
    bias = {"attn.qk_bias": "attn.qk_bias"} if cfg.qk_bias else {}
    return {"freqs_cis": "rotation.freqs_cis", **key_names(cfg, {**PARTS, **_NORMS, **bias})}


TABLE = Table(
    family="huginn",
    recognizes=lambda values, keys: recognizes(values, keys, "norm_4."),
    config=_config,
    names=_names,
    harmless={
        **HARMLESS,
        "is never read by the released code, whose table of angles has block_size rows": (
            "max_position_embeddings",
        ),
    },
    tied=TIED,
    releases=(("tomg-group-umd/huginn-0125", "3.5 B parameters; prelude 2, core 4, coda 2"),),
)
