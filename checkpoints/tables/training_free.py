"""Ordinary models that are looped without training: released Llama, Qwen3 and GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.common.rotary import rotary
from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.release import BLOCK_KEYS
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.llama import ATTENTION, MLP, PRE_NORMS, block_names, edge_names
from loopscope.models.families.training_free.gpt2 import TrainingFreeGPT2Config
from loopscope.models.families.training_free.model import TrainingFreeConfig
from loopscope.models.families.training_free.rules import BETA, check_rule, checked_window

_HEAD_NORMS = {f"self_attn.{part}_norm.weight": f"attn.{part}_norm.w" for part in ("q", "k")}

_OPTIONS = {
    "window": "first and last layer to loop, both included, from 0 (needed)",
    "rule": "'blend' (default), 'euler' or 'naive'",
    "beta": f"share of the first pass in the blend ({BETA} by default)",
    "mode": "'block' (default) or 'layer'",
    "stash": "state that a cache's entries are made of: 'last' (default) or 'first'",
    "decode": "generated tokens are 'looped' (default) or run unlooped ('bypass')",
}


def _looping(options: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """Window, rule, beta, mode and the rule of the cache, from the caller's options."""
    if options.get("window") is None:
        raise ValueError(
            f"this is an ordinary model of {n_layers} layers, so say which of them to loop:"
            " window=(first, last), both included and counted from 0; arXiv 2605.23872 takes four"
            " in the middle, (12, 15) of 28 or (15, 18) of 36"
        )
    rule, mode = options.pop("rule", "blend"), options.pop("mode", "block")
    beta = options.pop("beta", BETA if rule == "blend" else None)
    check_rule(rule, beta, mode)
    cache: dict[str, Any] = {
        name: options.pop(name) for name in ("stash", "decode") if name in options
    }
    return {
        "window": checked_window(options.pop("window"), n_layers),
        "rule": rule,
        "beta": beta,
        "mode": mode,
        **cache,
    }


def _shared(fields: ConfigFields, options: dict[str, Any]) -> dict[str, Any]:
    """The fields that Llama and Qwen3 configs share."""
    n_layers = fields.layers("num_hidden_layers")
    fields.only("hidden_act", "silu")
    return {
        **_looping(options, n_layers),
        "n_layers": n_layers,
        "d_model": fields.width("hidden_size"),
        "n_heads": fields.width("num_attention_heads"),
        "d_mlp": fields.width("intermediate_size"),
        "d_vocab": fields.width("vocab_size"),
        "eps": fields.number("rms_norm_eps"),
        **rotary(fields, fields.positions("max_position_embeddings"), default=10000.0),
        "tied": fields.boolean("tie_word_embeddings", False),
        "attention_bias": fields.boolean("attention_bias", False),
    }


def _llama(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeConfig:
    return TrainingFreeConfig(
        **_shared(fields, options),
        n_key_value_heads=fields.width("num_key_value_heads", None),
        head_dim=fields.width("head_dim", None),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _qwen3(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeConfig:
    n_layers = fields.layers("num_hidden_layers")
    fields.only("use_sliding_window", False, why="sliding windows are not computed here")
    fields.only(
        "layer_types",
        None,
        ["full_attention"] * n_layers,
        why="sliding windows are not computed here",
    )
    return TrainingFreeConfig(
        **_shared(fields, options),
        n_key_value_heads=fields.width("num_key_value_heads"),
        head_dim=fields.width("head_dim"),
        qk_norm=True,
    )


def _names(cfg: TrainingFreeConfig) -> dict[str, str]:
    parts = {**ATTENTION, **MLP, **PRE_NORMS, **(_HEAD_NORMS if cfg.qk_norm else {})}
    for has, matrices in ((cfg.attention_bias, ATTENTION), (cfg.mlp_bias, MLP)):
        parts |= {_bias(key): _bias(name) for key, name in matrices.items()} if has else {}
    return {**edge_names(cfg.tied), **block_names("model.layers", "blocks", cfg.n_layers, parts)}


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _gpt2(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeGPT2Config:
    n_layers, d_model = fields.layers("n_layer"), fields.width("n_embd")
    fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh")  # two names of one function
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("reorder_and_upcast_attn", False)
    fields.only("add_cross_attention", False)
    fields.only("tie_word_embeddings", True, why="GPT-2's head is its token embedding")
    return TrainingFreeGPT2Config(
        **_looping(options, n_layers),
        n_layers=n_layers,
        d_model=d_model,
        n_heads=fields.width("n_head"),
        d_mlp=fields.width("n_inner", 4 * d_model),
        d_vocab=fields.width("vocab_size"),
        n_ctx=fields.positions("n_positions"),
        eps=fields.number("layer_norm_epsilon", 1e-5),
    )


def _gpt2_table(prefix: str) -> Table:
    """GPT-2 files have their keys under "transformer.", or under nothing."""

    def names(cfg: TrainingFreeGPT2Config) -> dict[str, str]:
        edges = {
            "wte.weight": "embedding",
            "wpe.weight": "W_pos",
            "ln_f.weight": "final_norm.w",
            "ln_f.bias": "final_norm.b",
        }
        return {
            **{prefix + key: name for key, name in edges.items()},
            **block_names(f"{prefix}h", "blocks", cfg.n_layers, BLOCK_KEYS),
        }

    return Table(
        family=TrainingFreeGPT2Config.family,
        recognizes=lambda values, keys: (
            values.get("model_type") == "gpt2"
            and ("transformer.wte.weight" in keys) == bool(prefix)
        ),
        config=_gpt2,
        names=names,
        skipped=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
        tied=("lm_head.weight", f"{prefix}wte.weight"),
        options=_OPTIONS,
        harmless={"repeats the number of positions": ("n_ctx",)},
        input_first=r".*\.c_(attn|proj|fc)\.weight",
    )


LLAMA = Table(
    "training_free",
    lambda values, keys: values.get("model_type") == "llama",
    _llama,
    _names,
    harmless={"says in how many slices the same products were computed": ("pretraining_tp",)},
    options=_OPTIONS,
)
QWEN3 = Table(
    "training_free",
    lambda values, keys: values.get("model_type") == "qwen3",
    _qwen3,
    _names,
    harmless={
        "says how long windows are and where, and windows are off": (
            "max_window_layers",
            "sliding_window",
        )
    },
    options=_OPTIONS,
)
GPT2, GPT2_WITH_PREFIX = _gpt2_table(""), _gpt2_table("transformer.")
