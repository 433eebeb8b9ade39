"""Releases of Nanbeige4.2 (Nanbeige/Nanbeige4.2-3B and its copies)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import rotary
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import ATTENTION, MLP, PRE_NORMS, block_names, edge_names
from loopscope.models.families.nanbeige import NanbeigeConfig

_ATTENTION_BIASES = {
    f"self_attn.{part}_proj.bias": f"attn.{part}.bias" for part in ("q", "k", "v", "o")
}
_MLP_BIASES = {f"mlp.{part}_proj.bias": f"mlp.{part}.bias" for part in ("gate", "up", "down")}
_HEAD_NORMS = {f"self_attn.{part}_layernorm.weight": f"attn.{part}_norm.w" for part in ("q", "k")}
_CONNECTIONS = {
    f"{theirs}_hc.{key}": f"{ours}_hc.{name}"
    for theirs, ours in (("self_attn", "attn"), ("mlp", "mlp"))
    for key, name in [(n, n) for n in ("alpha_pre", "alpha_post", "alpha_res", "bias")]
    + [("mapping_proj.weight", "projection")]
}

_HARMLESS = {
    "belongs to attention over earlier depths, which is off": (
        "depth_attention_recent_window",
        "depth_attention_static_anchor_once",
        "depth_attention_stride",
    ),
    "belongs to n-gram embeddings, which are off": (
        "emb_split_num",
        "emb_tp_num",
        "ngram_compressed_tokenizer",
        "ngram_embedding_hidden_size",
        "ngram_fused_mode",
        "ngram_layer_downproject_size",
        "ngram_mod_force_prime",
        "ngram_vocab_size_ratio",
        "skip_ngram_for_input",
    ),
    "is where a gate starts in training": ("mhc_init_gating_factor",),
    "is never read by the released code, whose heads have head_dim channels": ("kv_channels",),
}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> NanbeigeConfig:
    _refuse_other_switches(fields)
    return NanbeigeConfig(
        n_layers=fields.layers("num_hidden_layers"),
        n_loops=fields.iterations("num_loops", 1),
        d_model=fields.width("hidden_size"),
        n_heads=fields.width("num_attention_heads"),
        n_key_value_heads=fields.width("num_key_value_heads", None),
        head_dim=fields.width("head_dim", None),
        d_mlp=fields.width("intermediate_size"),
        d_vocab=fields.width("vocab_size"),
        eps=fields.number("rms_norm_eps", 1e-6),
        **rotary(fields, fields.positions("max_position_embeddings", 2048), default=10000.0),
        tied=fields.boolean("tie_word_embeddings", False),
        boundary_norm=not fields.boolean("skip_loop_final_norm", False),
        qk_norm=fields.boolean("qk_layernorm", False),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        n_streams=_streams(fields),
        sinkhorn_iterations=fields.iterations("mhc_sinkhorn_iterations", 20),
    )


def _streams(fields: ConfigFields) -> int | None:
    """Residual streams where hyper-connections are on; None where they are off."""
    connected, constrained = (
        fields.boolean("enable_hyper_connection", False),
        fields.boolean("enable_mhc", False),
    )
    if connected != constrained:
        raise CheckpointError(
            f"{fields.path}: enable_mhc must be {connected} where enable_hyper_connection is, got"
            f" {constrained}; only constrained hyper-connections are computed here"
        )
    n_streams: int = fields.layers("num_residual_streams", 4)
    return n_streams if connected else None


def _refuse_other_switches(fields: ConfigFields) -> None:
    """Name the first switch of the released code that is on and not computed here."""
    fields.only("hidden_act", "silu")
    fields.only(
        "pretraining_tp", 1, why="with more, the released code adds up slices and leaves biases out"
    )
    fields.only(
        "loop_loss_weights",
        [],
        None,
        why="it overrides num_loops; put one more than it has weights into num_loops and empty it",
    )
    split = "looping only the middle blocks is not computed here"
    fields.only("enable_double_loop_split", False, why=split)
    fields.only("loop_middle_layers", None, why=split)
    fields.only(
        "loop_share_kv", False, why="keys and values of the first iteration are not used again here"
    )
    fields.only("mhc_diff_for_loop", False, why=split)
    fields.only("mhc_double_stream_position_for_loop", None, why=split)
    identity = "hyper-connections with a fixed mixing matrix are not computed here"
    fields.only("enable_h_res_identity", False, why=identity)
    fields.only("mhc_identity_nohresparam", False, why=identity)
    fields.only(
        "enable_depth_attention", False, why="attention over earlier depths is not computed here"
    )
    n_grams = "n-gram embeddings are not computed here"
    fields.only("emb_neighbor_num", None, why=n_grams)
    fields.only("insert_ngram_layer_idx", [], None, why=n_grams)
    fields.only("ngram_insert_all_layers", False, why=n_grams)


def _names(cfg: NanbeigeConfig) -> dict[str, str]:
    parts = {**ATTENTION, **MLP, **PRE_NORMS}
    for has, more in (
        (cfg.attention_bias, _ATTENTION_BIASES),
        (cfg.mlp_bias, _MLP_BIASES),
        (cfg.qk_norm, _HEAD_NORMS),
        (cfg.n_streams is not None, _CONNECTIONS),
    ):
        parts |= more if has else {}
    return {**edge_names(cfg.tied), **block_names("model.layers", "blocks", cfg.n_layers, parts)}


TABLE = Table(
    family="nanbeige",
    recognizes=of_type("nanbeige"),
    config=_config,
    names=_names,
    harmless=_HARMLESS,
    skipped=r".*rotary_emb\.inv_freq|.*_hc\.h_(pre|post|res)_static",
    releases=(("Nanbeige/Nanbeige4.2-3B", "22 layers, 2 iterations"),),
)
