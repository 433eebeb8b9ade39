"""Releases of Inkling-2-Mini (thinkingmachines/Inkling-2-Mini), the text part. The image tower is
passed over; quantised experts become plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.quantised import decoded
from loopscope.models.families.inkling.config import InklingConfig

_WHOLE, _TEXT = "inkling2_loop", "inkling2_loop_text"
_KINDS = {"hybrid": True, "hybrid_sliding": False}
_EVERY = 6  # layers of which the last has full attention, where layer_types is not given
_EDGE = {
    "embed.weight": "embedding",
    "embed_norm.weight": "embed_norm.w",
    "norm.weight": "final_norm.w",
    "unembed.weight": "head",
    "attn_res.output_query": "output_query",
    "middle_cycle_cross_pass_queries": "message_queries",
    "middle_cycle_cross_pass_kv_queries": "message_kv_queries",
}
_LAYER = {
    "attn.wq_du.weight": "attn.q.weight",
    "attn.wk_dv.weight": "attn.k.weight",
    "attn.wv_dv.weight": "attn.v.weight",
    "attn.wr_du.weight": "attn.rel.weight",
    "attn.wo_ud.weight": "attn.o.weight",
    "attn.gate_attn.weight": "attn.gate.weight",
    "attn.attn_sink_proj.weight": "attn.sink.weight",
    "attn.q_l2_clip.scale": "attn.q_scale",
    "attn.rel_l2_clip.scale": "attn.rel_scale",
    "attn.rel_logits_proj.proj": "attn.rel_proj",
    "attn_sconv.weight": "attn_conv.weight",
    "mlp_norm.weight": "ln2.w",
    "mlp_sconv.weight": "mlp_conv.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.experts.w13_weight": "mlp.gate_up",
    "mlp.experts.w2_weight": "mlp.down",
}
_SLIDING = {
    "attn.k_sconv.weight": "attn.k_conv.weight",
    "attn.v_sconv.weight": "attn.v_conv.weight",
    "attn_norm.weight": "ln1.shared.w",
}
_FULL = {
    **{f"{name}_input_norm.weight": f"ln1.{name}.w" for name in ("q", "k", "v")},
    **{f"attn.{name}_sconv.static_w": f"attn.{name}_conv.static" for name in ("k", "v")},
    **{f"attn.{name}_sconv.weight_proj": f"attn.{name}_conv.projection" for name in ("k", "v")},
}
_GATES = {
    f"controllers.{theirs}.{part}_weight": f"gates.{ours}.{part}"
    for theirs, ours in (("attn", "q"), ("k", "k"), ("v", "v"), ("mlp", "mlp"))
    for part in ("down", "gain", "forget")
}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> InklingConfig:
    fields.only("tie_word_embeddings", False)
    fields.unused("quantization_config")  # the stored keys say how experts are stored
    if "text_config" not in fields:
        return _text_config(fields)
    fields.unused("vision_config", "image_token_id")
    text = fields.section("text_config")
    text.only("tie_word_embeddings", False)
    cfg = _text_config(text)
    text.done()
    return cfg


def _text_config(fields: ConfigFields) -> InklingConfig:
    fields.only("hidden_act", "silu")
    fields.only("scoring_func", "sigmoid")
    total = fields.layers("num_hidden_layers", 24)
    start, end, passes, rank = _loop(fields)
    if not 0 < start < end <= total:
        raise CheckpointError(
            f"{fields.path}: the loop must start after layer 0 and end by"
            f" num_hidden_layers={total}, got {start} to {end}"
        )
    kinds = fields.texts("layer_types", None) or [
        "hybrid" if (i + 1) % _EVERY == 0 else "hybrid_sliding" for i in range(total)
    ]
    if len(kinds) != total or not set(kinds) <= set(_KINDS):
        raise CheckpointError(
            f"{fields.path}: layer_types must name one of {' and '.join(_KINDS)} for each of"
            f" {total} layers, got {shown(kinds)}"
        )
    vocab = fields.width("vocab_size", 201024)
    return InklingConfig(
        n_prelude_layers=start,
        n_layers=end - start,
        n_coda_layers=total - end,
        n_loops=passes,
        layers_per_block=fields.layers("n_layers_per_attn_res_block", 6),
        full_layers=tuple(i for i, kind in enumerate(kinds) if _KINDS[kind]),
        d_vocab=min(fields.width("unpadded_vocab_size", 200058) or vocab, vocab),
        d_vocab_padded=vocab,
        gate_rank=rank,
        **_attention(fields),
        **_experts(fields),
    )


def _loop(fields: ConfigFields) -> tuple[int, int, int, int]:
    """First layer, layer behind the last, passes and gate rank of the loop: of `loop_config`, or
    else the flat fields.
    """
    flat = (
        fields.layers("loop_layer_index_start", 6),
        fields.layers("loop_layer_index_end", 18),
        fields.iterations("loop_num_passes", 3),
        fields.width("loop_gate_rank", 64),
    )
    if fields.mapping("loop_config", None) is None:
        return flat
    inner = fields.section("loop_config")
    found = (
        inner.layers("core_start", flat[0]),
        inner.layers("core_end", flat[1]),
        inner.iterations("num_passes", flat[2]),
        inner.width("gate_rank", flat[3]),
    )
    inner.done()
    return found


def _attention(fields: ConfigFields) -> dict[str, Any]:
    """The sizes of attention and of the stream."""
    return {
        "d_model": fields.width("hidden_size", 2304),
        "n_heads": fields.width("num_attention_heads", 24),
        "n_key_value_heads": fields.width("num_key_value_heads", 8),
        "head_dim": fields.width("head_dim", 128),
        "n_sliding_heads": fields.width("swa_num_attention_heads", 24),
        "n_sliding_key_value_heads": fields.width("swa_num_key_value_heads", 8),
        "sliding_head_dim": fields.width("swa_head_dim", 128),
        "window": _either(fields, fields.width, "sliding_window_size", "sliding_window", 1024),
        "rel_extent": fields.width("rel_extent", 1024),
        "d_rel": fields.width("d_rel", 16),
        "log_floor": fields.number("log_scaling_n_floor", 8192.0),
        "log_alpha": fields.number("log_scaling_alpha", 0.1),
        "qk_clip": fields.number("qk_l2_clip_threshold", 22.627416997969522),
        "rel_clip": fields.number("rel_l2_clip_threshold", 8.0),
        "kernel": _either(fields, fields.width, "conv_kernel_size", "sconv_kernel_size", 4),
        "n_ctx": _either(
            fields, fields.positions, "max_position_embeddings", "model_max_length", 1048576
        ),
        "eps": fields.number("rms_norm_eps", 1e-6),
        "logit_cap": fields.number("final_logit_softcapping", 30.0),
    }


def _experts(fields: ConfigFields) -> dict[str, Any]:
    """The sizes of the mixture of experts."""
    return {
        "d_mlp": _either(fields, fields.width, "moe_intermediate_size", "intermediate_size", 1152),
        "n_experts": _either(fields, fields.width, "n_routed_experts", "num_local_experts", 128),
        "n_chosen": fields.width("num_experts_per_tok", 8),
        "route_scale": _either(fields, fields.number, "route_scale", "routed_scaling_factor", 8.0),
        "gate_cap": fields.number("mlp_gate_softcap", 4.0),
        "up_cap": fields.number("mlp_up_softcap", 25.0),
    }


def _either(
    fields: ConfigFields, of: Callable[..., Any], name: str, other: str, default: Any
) -> Any:
    """A field that has two names.

    Raises:
        CheckpointError: Both are there and differ.
    """
    one, again = of(name, None), of(other, None)
    if None not in (one, again) and one != again:
        raise CheckpointError(
            f"{fields.path}: {name} and {other} name one size and must be equal, got {one} and"
            f" {again}"
        )
    return default if one is None and again is None else one if again is None else again


def _names(cfg: InklingConfig) -> dict[str, str]:
    names = {f"model.llm.{theirs}": ours for theirs, ours in _EDGE.items()}
    start, end = cfg.n_prelude_layers, cfg.n_prelude_layers + cfg.n_layers
    for layer in range(cfg.n_real_layers):
        stage, first = ("prelude_blocks", 0) if layer < start else ("blocks", start)
        stage, first = ("coda_blocks", end) if layer >= end else (stage, first)
        ours = f"{stage}.{layer - first}"
        parts = {**_LAYER, **(_FULL if layer in cfg.full_layers else _SLIDING)}
        parts |= _GATES if start <= layer < end else {}
        names |= {
            f"model.llm.layers.{layer}.{key}": f"{ours}.{part}" for key, part in parts.items()
        }
        names[f"model.llm.attn_res.mlp_queries.{layer}"] = f"{ours}.mlp_query"
        if layer:
            names[f"model.llm.attn_res.attn_queries.{layer - 1}"] = f"{ours}.attn_query"
    return names


TABLE = Table(
    family="inkling2_loop",
    recognizes=lambda values, keys: values.get("model_type") in (_WHOLE, _TEXT),
    config=_config,
    names=_names,
    skipped=r"model\.visual\..*",
    decode=lambda tensors, path: decoded(tensors, "model.llm.embed.weight", path),
    releases=(
        ("thinkingmachines/Inkling-2-Mini", "12 of 24 layers run 3 times; mixture of experts"),
    ),
)
