"""Released GPT-NeoX models such as Pythia, which are looped without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import rotary, turned_share
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import block_names
from loopscope.checkpoints.tables.ordinary.looping import OPTIONS, looping
from loopscope.models.families.training_free.neox import TrainingFreeNeoXConfig

_EDGES = {
    "gpt_neox.embed_in.weight": "embedding",
    "gpt_neox.final_layer_norm.weight": "final_norm.w",
    "gpt_neox.final_layer_norm.bias": "final_norm.b",
}
_BOTH = ("weight", "bias")
_ATTENTION = {"attention.query_key_value": "attn.qkv", "attention.dense": "attn.o"}
_MLP = {"mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down"}
_NORMS = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeNeoXConfig:
    n_layers = fields.layers("num_hidden_layers")
    d_model, n_heads = fields.width("hidden_size"), fields.width("num_attention_heads")
    fields.only("hidden_act", "gelu")
    positions = rotary(
        fields,
        fields.positions("max_position_embeddings", 2048),
        default=10000.0,
        base="rotary_emb_base",
        partial=True,
    )
    share = turned_share(fields, "rotary_pct", default=0.25)
    return TrainingFreeNeoXConfig(
        **looping(options, n_layers),
        **positions,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_mlp=fields.width("intermediate_size"),
        d_vocab=fields.width("vocab_size"),
        eps=fields.number("layer_norm_eps", 1e-5),
        tied=fields.boolean("tie_word_embeddings", False),
        n_turned=int(d_model // n_heads * share),
        parallel=fields.boolean("use_parallel_residual", True),
        attention_bias=fields.boolean("attention_bias", True),
    )


def _names(cfg: TrainingFreeNeoXConfig) -> dict[str, str]:
    parts = {f"{key}.{part}": f"{name}.{part[0]}" for key, name in _NORMS.items() for part in _BOTH}
    parts |= {f"{key}.{part}": f"{name}.{part}" for key, name in _MLP.items() for part in _BOTH}
    of_attention = _BOTH if cfg.attention_bias else _BOTH[:1]
    parts |= {
        f"{key}.{part}": f"{name}.{part}"
        for key, name in _ATTENTION.items()
        for part in of_attention
    }
    head = {} if cfg.tied else dict.fromkeys(("embed_out.weight", "lm_head.weight"), "head")
    return {**_EDGES, **head, **block_names("gpt_neox.layers", "blocks", cfg.n_layers, parts)}


NEOX = Table(
    "training_free_neox",
    of_type("gpt_neox"),
    _config,
    _names,
    skipped=r"gpt_neox\.layers\.\d+\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)",
    tied=("embed_out.weight", "gpt_neox.embed_in.weight"),
    options=OPTIONS,
)
