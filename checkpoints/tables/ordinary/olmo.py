"""Released OLMo-2 models, which are looped without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import rotary
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import ATTENTION, MLP, block_names, edge_names
from loopscope.checkpoints.tables.ordinary.llama import HEAD_NORMS, biases, sizes
from loopscope.checkpoints.tables.ordinary.looping import OPTIONS
from loopscope.models.families.training_free.olmo import TrainingFreeOlmoConfig

_POST_NORMS = {
    "post_attention_layernorm.weight": "ln1_post.w",
    "post_feedforward_layernorm.weight": "ln2_post.w",
}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeOlmoConfig:
    fields.only("hidden_act", "silu")
    return TrainingFreeOlmoConfig(
        **sizes(fields, options),
        **rotary(fields, fields.positions("max_position_embeddings"), default=10000.0),
        tied=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
    )


def _names(cfg: TrainingFreeOlmoConfig) -> dict[str, str]:
    parts = {**ATTENTION, **MLP, **HEAD_NORMS, **_POST_NORMS}
    parts |= biases(ATTENTION) if cfg.attention_bias else {}
    return {**edge_names(cfg.tied), **block_names("model.layers", "blocks", cfg.n_layers, parts)}


OLMO2 = Table(
    "training_free_olmo",
    of_type("olmo2"),
    _config,
    _names,
    options=OPTIONS,
)
