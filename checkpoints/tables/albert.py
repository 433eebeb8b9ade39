"""Releases of ALBERT (albert-base-v2 and its kin), with the head for masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fill import same_values
from loopscope.checkpoints.table import Table, of_type
from loopscope.models.families.albert import AlbertConfig

_EMBEDDING = "albert.embeddings.word_embeddings.weight"
_BIAS, _BIAS_AGAIN = "predictions.bias", "predictions.decoder.bias"
_EDGE = {
    _EMBEDDING: "embedding",
    "albert.embeddings.position_embeddings.weight": "W_pos",
    "albert.embeddings.token_type_embeddings.weight": "W_type",
    "albert.embeddings.LayerNorm.weight": "embed_norm.w",
    "albert.embeddings.LayerNorm.bias": "embed_norm.b",
    "albert.encoder.embedding_hidden_mapping_in.weight": "embed_in.weight",
    "albert.encoder.embedding_hidden_mapping_in.bias": "embed_in.bias",
    "predictions.dense.weight": "head_in.weight",
    "predictions.dense.bias": "head_in.bias",
    "predictions.LayerNorm.weight": "head_norm.w",
    "predictions.LayerNorm.bias": "head_norm.b",
    _BIAS: "head_bias",
    _BIAS_AGAIN: "head_bias",
}
_LINEARS = {
    "attention.query": "attn.q",
    "attention.key": "attn.k",
    "attention.value": "attn.v",
    "attention.dense": "attn.o",
    "ffn": "mlp.up",
    "ffn_output": "mlp.down",
}
_NORMS = {"attention.LayerNorm": "ln1_post", "full_layer_layer_norm": "ln2_post"}
_HARMLESS = {
    "is left over from a version of the code that read it": (
        "down_scale_factor",
        "gap_size",
        "layers_to_keep",
        "net_structure_type",
        "num_memory_blocks",
    )
}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> AlbertConfig:
    fields.only("hidden_act", "gelu_new", "gelu")
    fields.only(
        "position_embedding_type", "absolute", why="relative positions are not computed here"
    )
    fields.only(
        "tie_word_embeddings", True, why="the head's last matrix is the token embedding here"
    )
    fields.only("is_decoder", False, why="this family sees tokens in both directions")
    fields.only("add_cross_attention", False)
    fields.only("pruned_heads", {}, None)
    _check_bias(fields, tensors)
    n_loops, n_groups = (
        fields.iterations("num_hidden_layers"),
        fields.layers("num_hidden_groups", 1),
    )
    return AlbertConfig(
        n_layers=fields.layers("inner_group_num", 1),
        n_loops=n_loops,
        n_groups=n_groups,
        n_grouped_loops=n_loops if n_groups != 1 else None,
        d_model=fields.width("hidden_size"),
        d_factor=fields.width("embedding_size"),
        n_heads=fields.width("num_attention_heads"),
        d_mlp=fields.width("intermediate_size"),
        d_vocab=fields.width("vocab_size"),
        n_ctx=fields.positions("max_position_embeddings"),
        n_token_types=fields.width("type_vocab_size", 2),
        eps=fields.number("layer_norm_eps", 1e-12),
        act_fn=fields.text("hidden_act", "gelu_new"),
    )


def _check_bias(fields: ConfigFields, tensors: Mapping[str, Tensor]) -> None:
    """The head's bias may be stored under two names, and is one tensor."""
    one, again = tensors.get(_BIAS), tensors.get(_BIAS_AGAIN)
    if one is not None and again is not None and not same_values(one, again):
        raise CheckpointError(
            f"{fields.path.parent}: {_BIAS_AGAIN} differs from {_BIAS}, but they are one bias in"
            " this family"
        )


def _names(cfg: AlbertConfig) -> dict[str, str]:
    parts = {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in _LINEARS.items()
        for kind in ("weight", "bias")
    }
    parts |= {
        f"{theirs}.{kind}": f"{ours}.{kind[0]}"
        for theirs, ours in _NORMS.items()
        for kind in ("weight", "bias")
    }
    blocks = [(group, layer) for group in range(cfg.n_groups) for layer in range(cfg.n_layers)]
    return {
        **_EDGE,
        **{
            f"albert.encoder.albert_layer_groups.{group}.albert_layers.{layer}.{theirs}": (
                f"groups.{group}.{layer}.{ours}"
            )
            for group, layer in blocks
            for theirs, ours in parts.items()
        },
    }


TABLE = Table(
    family="albert",
    recognizes=of_type("albert"),
    config=_config,
    names=_names,
    harmless=_HARMLESS,
    skipped=(
        r"albert\.pooler\..*|sop_classifier\..*|albert\.embeddings\.(position_ids|token_type_ids)"
    ),
    tied=("predictions.decoder.weight", _EMBEDDING),
    readout=None,
    releases=(
        ("albert/albert-base-v2", "one layer, 12 iterations; reads in both directions"),
        ("albert/albert-large-v2", "one layer iterated; reads in both directions"),
        ("albert/albert-xlarge-v2", "one layer iterated; reads in both directions"),
        ("albert/albert-xxlarge-v2", "one layer iterated; reads in both directions"),
    ),
)
