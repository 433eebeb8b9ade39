"""Checkpoints of spiral-lm 0.1.1, config as JSON beside the state dict. No release is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.llama import block_names
from loopscope.models.families.spiral import SpiralConfig

_MARKS = {"reproject", "momentum_zeta", "mean_iters", "emb_factor"}
_FIXED: dict[str, Any] = {
    "tie_embeddings": True,
    "emb_pretrained": "",
    "emb_frozen": False,
    "emb_trainable_rows": 0,
    "vision_dim": 0,
    "modality_adaln": False,
    "prefix_lm": False,
    "attn_chunk": 0,
    "rope_scaling": 1.0,
    "rope_orig_len": 0,
    "noise_init_std": 0.0,
    "reproject": "orthogonal",
    "modulation": "adaln_zero",
    "reversible": "momentum",
    "input_injection": "additive",
    "latent_points": 0,
    "work_mem": False,
    "work_mem_cleanup": False,
    "work_mem_hopfield": False,
    "work_mem_cleanup_realize": False,
    "work_mem_subspace": False,
    "attn_sink": False,
    "pk_mem": False,
    "twin": False,
    "stability": "spectral",
    "halting": "pondernet",
    "extra": {},
    "implementation_version": 2,
}
_OF_WHAT_IS_OFF = (
    "vision_proj_hidden",
    "vision_pad_id",
    "vision_tower",
    "vision_shuffle_r",
    "latent_route",
    "latent_slots",
    "latent_dim",
    "latent_beta",
    "latent_gate_init",
    "work_mem_dim",
    "work_mem_decay",
    "work_mem_write",
    "work_mem_gated",
    "work_mem_causal",
    "work_mem_gate_init",
    "work_mem_cleanup_slots",
    "work_mem_cleanup_beta",
    "work_mem_hopfield_size",
    "work_mem_hopfield_sep",
    "work_mem_hopfield_poly_n",
    "work_mem_hopfield_residual",
    "work_mem_hopfield_gate_init",
    "pk_keys",
    "pk_heads",
    "pk_topk",
    "pk_dim",
    "pk_gate_init",
    "twin_fast_iters",
    "twin_fast_min_iters",
    "twin_fast_latent_points",
    "twin_fast_dff",
    "twin_share_core",
    "twin_consistency",
    "twin_fast_ce",
    "twin_mutual",
    "twin_spec_gamma",
)
_OF_TRAINING = (
    "name",
    "dropout",
    "min_iters",
    "max_iters",
    "iters_dist",
    "iters_sigma",
    "truncated_bptt_k",
    "compile",
    "ponder_lambda_prior",
    "ponder_kl_beta",
    "exit_kl_threshold",
    "teacher_model",
    "distill_mode",
    "kd_temperature",
    "kd_loss",
    "jsd_beta",
    "on_policy_lambda",
    "top_k_logits",
    "seq_len_sample",
    "device",
    "seed",
)
_SPECTRAL = {"original": "original", "0._u": "u", "0._v": "v"}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> SpiralConfig:
    for name, value in _FIXED.items():
        fields.only(name, value)
    fields.only("activation", "gelu", "silu", "relu")
    return SpiralConfig(
        act_fn=fields.text("activation", "gelu"),
        n_layers=fields.layers("n_shared_blocks"),
        n_loops=fields.iterations("mean_iters"),
        d_model=fields.width("d_model"),
        n_heads=fields.width("n_heads"),
        d_mlp=fields.width("d_ff"),
        d_vocab=fields.width("vocab_size"),
        n_ctx=fields.positions("max_seq_len"),
        d_factor=fields.width("emb_factor"),
        d_timestep=fields.width("timestep_dim"),
        rope_theta=fields.number("rope_base"),
        turn_theta=fields.number("reproject_base"),
        momentum=fields.number("momentum_zeta"),
        qk_norm=fields.boolean("qk_norm"),
        gate_cap=fields.number("gate_cap"),
        gate_leak=fields.number("gate_leak"),
    )


def _spectral(theirs: str, ours: str) -> dict[str, str]:
    """The stored parts of a matrix that is divided by its spectral norm."""
    return {
        f"{theirs}.parametrizations.weight.{key}": f"{ours}.{name}"
        for key, name in _SPECTRAL.items()
    }


def _names(cfg: SpiralConfig) -> dict[str, str]:
    parts = {"ffn.0.bias": "mlp.into.bias", "ffn.2.bias": "mlp.out.bias"}
    for theirs, ours in (
        ("attn.qkv", "attn.qkv"),
        ("attn.proj", "attn.o"),
        ("ffn.0", "mlp.into"),
        ("ffn.2", "mlp.out"),
    ):
        parts |= _spectral(theirs, ours)
    linears = {"mod.mlp.0": "modulation.into", "mod.mlp.2": "modulation.out", "halt": "halt"}
    return {
        "tok_emb.weight": "embedding",
        "emb_in.weight": "embed_in.weight",
        "emb_out.weight": "embed_out.weight",
        "ln_f.weight": "final_norm.w",
        "ln_f.bias": "final_norm.b",
        **{
            f"{theirs}.{kind}": f"{ours}.{kind}"
            for theirs, ours in linears.items()
            for kind in ("weight", "bias")
        },
        **_spectral("inject", "inject"),
        **block_names("blocks", "blocks", cfg.n_layers, parts),
    }


TABLE = Table(
    family="spiral",
    recognizes=lambda values, keys: set(values) >= _MARKS and "tok_emb.weight" in keys,
    config=_config,
    names=_names,
    harmless={
        "belongs to a part that is off": _OF_WHAT_IS_OFF,
        "names the model, or acts in training alone": _OF_TRAINING,
    },
)
