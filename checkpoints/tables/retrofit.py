"""Releases of retrofitted Llama and OLMo-2 (the collection tomg-group-umd/retrofitting-recurrence),
which call themselves Huginn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.common.rotary import rotary
from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.huginn import (
    HARMLESS,
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

_HARMLESS = {
    **HARMLESS,
    "is left over from Huginn; here positions follow rope_theta and have no table": (
        "block_size",
        "rope_base",
    ),
}
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
    return {
        **common,
        "n_key_value_heads": fields.width("num_key_value_heads", None),
        **rotary(fields, fields.positions("max_position_embeddings", None)),
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


_RECURRENCES = (4, 8, 16, 32)


def _releases(base: str, sizes: str) -> tuple[tuple[str, str], ...]:
    """The releases of one base, which differ in the mean number of iterations in training."""
    return tuple(
        (
            f"smcleish/Recurrent-{base}-train-recurrence-{mean}",
            f"trained with {mean} iterations in the mean{sizes}",
        )
        for mean in _RECURRENCES
    )


LLAMA = Table(
    family="retrofit_llama",
    recognizes=_is_llama,
    config=_llama,
    names=_llama_names,
    harmless=_HARMLESS,
    tied=TIED,
    releases=(
        *_releases("Llama-3.2", "; prelude 4, core 6, coda 4"),
        *_releases("TinyLlama-3T", ""),
    ),
)
OLMO = Table(
    family="retrofit_olmo",
    recognizes=lambda values, keys: (
        recognizes(values, keys, "attn.q_norm.") and not recognizes(values, keys, "norm_4.")
    ),
    config=_olmo,
    names=_olmo_names,
    harmless=_HARMLESS,
    tied=TIED,
    releases=_releases("OLMo-2-0425", ""),
)
