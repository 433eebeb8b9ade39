"""Releases of Parcae (SandyResearch/parcae-140m and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.llama import block_names
from loopscope.models.families.parcae import INJECTIONS, ParcaeConfig

_BLOCK = {
    "norm_1.weight": "ln1.w",
    "norm_2.weight": "ln2.w",
    "attn.c_q.weight": "attn.q.weight",
    "attn.c_k.weight": "attn.k.weight",
    "attn.c_v.weight": "attn.v.weight",
    "attn.c_proj.weight": "attn.o.weight",
    "attn.ve_gate.weight": "attn.value_gate.weight",
    "mlp.fc.weight": "mlp.up.weight",
    "mlp.proj.weight": "mlp.down.weight",
}
_EDGE = {
    "freqs_cis": "rotation.freqs_cis",
    "transformer.wte.weight": "embedding",
    "transformer.ln_prelude.weight": "input_norm.w",
    "transformer.adapter.A_log": "injection.log_rate",
    "transformer.adapter.dt_bias": "injection.step_bias",
    "transformer.adapter.B": "injection.B",
    "transformer.adapter.adapter.weight": "injection.weight",
    "transformer.C.weight": "C.weight",
    "transformer.ln_f.weight": "final_norm.w",
}
_FIXED: dict[str, Any] = {
    "_class_name": "ParcaeConfig",
    "_is_recurrent_block_config": False,
    "model_class_name": "Parcae",
    "architecture_class_name": "Parcae",
    "block_class_name": "TransformerPreNormBlock",
    "mlp_class_name": "BaseMLP",
    "bias": False,
    "qk_bias": False,
    "clip_qkv": None,
    "use_abacus": False,
    "randomize_positions_from": None,
    "debias_attention": False,
    "center_attention": False,
    "simple_ops": False,
    "strategy": "single",
    "mup_model_scaling_factor": 1,
}
_HARMLESS = {
    "names the model": ("name", "hf_config"),
    "acts in training alone": (
        "activation_checkpoint_impl",
        "curriculum_target",
        "init",
        "init_orthogonal",
        "lockstep_k",
        "lockstep_n",
        "recurrent_iteration_method",
        "sampling_scheme",
        "skip_initialization",
    ),
}


def _stated(fields: ConfigFields, name: str, value: str) -> None:
    """Refuse another value, and an absent one, because the release's own default is another."""
    fields.text(name)
    fields.only(name, value)


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> ParcaeConfig:
    tied = fields.boolean("tie_embeddings", False)
    _check_kinds(fields, tied)
    sizes = _sizes(fields)
    tables, gates = _value_places(fields, sizes)
    theta, condensed = _rotary(fields)
    return ParcaeConfig(
        **sizes,
        n_ctx=fields.positions("block_size"),
        d_vocab=_padded_vocabulary(fields),
        eps=fields.number("norm_eps"),
        rope_theta=theta,
        rope_scaling=None if condensed == 1 else {"rope_type": "linear", "factor": condensed},
        tied=tied,
        injection=fields.text("injection_type", "diagonal"),
        prelude_norm=fields.boolean("prelude_norm", False),
        qk_norm=fields.boolean("qk_norm", False),
        value_tables=tables,
        value_gates=gates,
        logit_softcap=fields.number("logit_softcap", None),
        state_std=0.0 if fields.text("state_init", "like-init") == "zero" else None,
    )


def _check_kinds(fields: ConfigFields, tied: bool) -> None:
    for name, value in _FIXED.items():
        fields.only(name, value)
    _stated(fields, "norm_class_name", "RMSNorm")
    _stated(fields, "nonlin_name", "ReLU2")
    fields.only("attn_impl", "flash", "sdpa")
    fields.only(
        "use_fused_head",
        "pytorch",
        "cce",
        *(["full-triton"] if tied else []),
        why="an untied fused head is stored transposed",
    )
    fields.only("state_init", "like-init", "zero")
    fields.only(
        "init_strategy",
        "scaled",
        "scaled-zero",
        "scaled-geiping",
        why="others scale embeddings or logits, or draw another state",
    )
    fields.only("injection_type", *INJECTIONS)


def _padded_vocabulary(fields: ConfigFields) -> int:
    """Rows of the embedding: as given, or the vocabulary filled up to a multiple."""
    padded: int | None = fields.width("padded_vocab_size", None)
    words, multiple = fields.width("vocab_size"), fields.width("padding_multiple", 512)
    return -(-words // multiple) * multiple if padded is None else padded


def _sizes(fields: ConfigFields) -> dict[str, Any]:
    d_model, n_heads = fields.width("n_embd"), fields.width("num_attention_heads")
    d_mlp_outside = fields.width("intermediate_size", None)
    fields.width("recurrent_embedding_dimension")
    fields.only(
        "recurrent_embedding_dimension",
        d_model,
        why="the core has the width of the prelude and the coda",
    )
    fields.only(
        "recurrent_num_attention_heads",
        None,
        n_heads,
        why="the core shares the rotary table of the prelude and the coda",
    )
    return {
        "n_layers": fields.layers("n_layers_in_recurrent_block"),
        "n_prelude_layers": fields.layers("n_layers_in_prelude"),
        "n_coda_layers": fields.layers("n_layers_in_coda"),
        "n_loops": fields.iterations("mean_recurrence"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_key_value_heads": fields.width("num_key_value_heads", None),
        "d_mlp": fields.width("recurrent_intermediation_embedding_dimension"),
        "d_mlp_outside": 4 * d_model if d_mlp_outside is None else d_mlp_outside,
    }


def _value_places(
    fields: ConfigFields, sizes: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places of the value embeddings' tables, and of their gates.

    Tables and gates stand at every second place, but the release counts the places in two ways, so
    that tables and gates need not meet. Tables: the core counts once. Gates: the coda comes after
    mean_recurrence runs of the core, and the count ends at the core's blocks times
    mean_backprop_depth.
    """
    n_prelude, n_core, n_coda = (
        sizes[name] for name in ("n_prelude_layers", "n_layers", "n_coda_layers")
    )
    places = range(n_prelude + n_core + n_coda)
    tables = tuple(place for place in places if (len(places) - 1 - place) % 2 == 0)
    last = n_core * fields.iterations("mean_backprop_depth") - 1
    counted = [
        place if place < n_prelude + n_core else place + n_core * (sizes["n_loops"] - 1)
        for place in places
    ]
    return tables, tuple(
        place for place, count in zip(places, counted, strict=True) if (last - count) % 2 == 0
    )


def _rotary(fields: ConfigFields) -> tuple[float, float]:
    """The rotary base, and the divisor of the positions; a loaded model has its angles stored."""
    inner = ConfigFields(fields.mapping("rope_settings", {}), fields.path, inside="rope_settings")
    inner.only("use_rope", True)
    theta, condensed = inner.number("rope_base", 50000.0), inner.number("rope_condense_ratio", 1.0)
    inner.done()
    return theta, condensed


def _names(cfg: ParcaeConfig) -> dict[str, str]:
    stacks = (
        ("transformer.prelude", "prelude_blocks", cfg.n_prelude_layers),
        ("transformer.core_block", "blocks", cfg.n_layers),
        ("transformer.coda", "coda_blocks", cfg.n_coda_layers),
    )
    blocks = {
        key: name
        for theirs, ours, n in stacks
        for key, name in block_names(theirs, ours, n, _BLOCK).items()
    }
    values = {
        f"value_embeds.{place}.weight": f"value_embeds.{place}" for place in range(cfg.n_places)
    }
    return {**_EDGE, **blocks, **values, **({} if cfg.tied else {"lm_head.weight": "head"})}


TABLE = Table(
    family="parcae",
    recognizes=lambda values, keys: (
        values.get("_class_name") == "ParcaeConfig" or values.get("model_class_name") == "Parcae"
    ),
    config=_config,
    names=_names,
    harmless=_HARMLESS,
    tied=("lm_head.weight", "transformer.wte.weight"),
    releases=(
        ("SandyResearch/parcae-140m", "pickled weights; prelude 2, core 2, coda 2"),
        ("SandyResearch/parcae-370m", "pickled weights; prelude 4, core 4, coda 4"),
        ("SandyResearch/parcae-770m", "pickled weights; prelude 6, core 6, coda 6"),
        ("SandyResearch/parcae-1.3b", "pickled weights; prelude 8, core 8, coda 8"),
    ),
)
