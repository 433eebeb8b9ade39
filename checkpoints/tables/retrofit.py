"""Releases of retrofitted Llama and OLMo-2 (the collection tomg-group-umd/retrofitting-recurrence),
which call themselves Huginn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.huginn import (
    PARTS,
    TIED,
    initial_value,
    key_names,
    recognizes,
    sizes,
)
from loopscope.models.families.retrofit import (
    RetrofitConfig,
    RetrofitLlamaConfig,
    RetrofitOlmoConfig,
)

_LLAMA_NORMS = {"norm_1.weight": "ln1.w", "norm_2.weight": "ln2.w"}
_OLMO_NORMS = {
    "norm_1.weight": "ln1_post.w",
    "norm_2.weight": "ln2_post.w",
    "attn.q_norm.weight": "attn.q_norm.w",
    "attn.k_norm.weight": "attn.k_norm.w",
}


def _shared(fields: ConfigFields) -> dict[str, Any]:
    common = sizes(fields)
    scale = initial_value(fields, "embed_scale")
    fields.only("qk_bias", False)
    fields.only("initial_state_mode", "random")
    fields.only("partial_rotary_factor", 1.0, 1)
    # Left over from Huginn; here positions follow rope_theta and have no table.
    fields.unused("rope_base", "block_size")
    return {
        **common,
        "n_key_value_heads": fields.width("num_key_value_heads", None),
        "n_ctx": fields.positions("max_position_embeddings", None),
        "rope_theta": fields.number("rope_theta"),
        "rope_scaling": fields.mapping("rope_scaling", None),
        "state_std": initial_value(fields, "std"),
        "embedding_scale": common["d_model"] ** 0.5 if scale is None else scale,
    }


def _llama(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> RetrofitLlamaConfig:
    shared = _shared(fields)
    fields.only("head_dim", shared["d_model"] // shared["n_heads"])
    return RetrofitLlamaConfig(**shared)


def _olmo(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> RetrofitOlmoConfig:
    return RetrofitOlmoConfig(**_shared(fields), head_dim=fields.width("head_dim", None))


def _llama_names(cfg: RetrofitConfig) -> dict[str, str]:
    return key_names(cfg, {**PARTS, **_LLAMA_NORMS})


def _olmo_names(cfg: RetrofitConfig) -> dict[str, str]:
    return key_names(cfg, {**PARTS, **_OLMO_NORMS})


def _is_llama(values: Mapping[str, Any], keys: frozenset[str]) -> bool:
    return recognizes(values, keys, "norm_1.") and not any(
        recognizes(values, keys, part) for part in ("norm_4.", "attn.q_norm.")
    )


LLAMA = Table(
    family="retrofit_llama", recognizes=_is_llama, config=_llama, names=_llama_names, tied=TIED
)
OLMO = Table(
    family="retrofit_olmo",
    recognizes=lambda values, keys: (
        recognizes(values, keys, "attn.q_norm.") and not recognizes(values, keys, "norm_4.")
    ),
    config=_olmo,
    names=_olmo_names,
    tied=TIED,
)
