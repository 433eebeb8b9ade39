"""Released Gemma 2 and Gemma 3 text models, which are looped without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import rotary, rotary_by_kind
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import ATTENTION, MLP, block_names, edge_names
from loopscope.checkpoints.tables.ordinary.llama import HEAD_NORMS, sizes
from loopscope.checkpoints.tables.ordinary.looping import OPTIONS
from loopscope.checkpoints.tables.ordinary.reach import reach
from loopscope.models.families.training_free.gemma import TrainingFreeGemmaConfig

_NORMS = {
    "input_layernorm.weight": "ln1.w",
    "post_attention_layernorm.weight": "ln1_post.w",
    "pre_feedforward_layernorm.weight": "ln2.w",
    "post_feedforward_layernorm.weight": "ln2_post.w",
}
_TANH = "gelu_pytorch_tanh"


def _shared(fields: ConfigFields, options: dict[str, Any], every: int) -> dict[str, Any]:
    """The fields of both kinds; of `every` layers the last one sees all earlier positions."""
    found = sizes(fields, options)
    fields.only("hidden_activation", _TANH)
    fields.only("hidden_act", _TANH)  # a second name in some configs
    fields.only("use_bidirectional_attention", False, None)
    return {
        **found,
        **reach(fields, found["n_layers"], range(every - 1, found["n_layers"], every)),
        "head_dim": fields.width("head_dim", 256),
        "tied": fields.boolean("tie_word_embeddings", True),
        "score_width": fields.number("query_pre_attn_scalar", 256.0),
    }


def _gemma2(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeGemmaConfig:
    return TrainingFreeGemmaConfig(
        **_shared(fields, options, every=2),
        **rotary(fields, fields.positions("max_position_embeddings"), default=10000.0),
        score_cap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(fields, "final_logit_softcapping", 30.0),
    )


def _cap(fields: ConfigFields, name: str, default: float | None) -> float | None:
    """A cap; null, unlike a field that is absent, says that there is none."""
    cap: float | None = fields.number(name, None)
    return cap if name in fields else default


def _gemma3(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeGemmaConfig:
    fields.only("attn_logit_softcapping", None, why="Gemma 3's own code does not apply it")
    older = fields.layers("sliding_window_pattern", None)
    newer = fields.layers("_sliding_window_pattern", None)
    return TrainingFreeGemmaConfig(
        **_shared(fields, options, every=newer or older or 6),
        **rotary_by_kind(fields, fields.positions("max_position_embeddings")),
        logit_cap=_cap(fields, "final_logit_softcapping", None),
        qk_norm=True,
    )


def _names(cfg: TrainingFreeGemmaConfig) -> dict[str, str]:
    parts = {**ATTENTION, **MLP, **_NORMS, **(HEAD_NORMS if cfg.qk_norm else {})}
    return {**edge_names(cfg.tied), **block_names("model.layers", "blocks", cfg.n_layers, parts)}


GEMMA2 = Table(
    "training_free_gemma",
    of_type("gemma2"),
    _gemma2,
    _names,
    options=OPTIONS,
)
GEMMA3 = Table(
    "training_free_gemma",
    of_type("gemma3_text"),
    _gemma3,
    _names,
    options=OPTIONS,
)
