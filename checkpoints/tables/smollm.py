"""Releases of SMolLM (akhljndl/smollm): a pickle of weights, config object and tokenizer, or a
folder with the config as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.pickles import Record
from loopscope.checkpoints.table import Release, Table
from loopscope.models.families.smollm import SMolLMConfig

_MODULES = ("smollm.model", "smollm.config", "smollm.configs")
_MARKS = {"block_size", "ffn_mult", "n_embd", "weight_sharing"}
_EDGE = {
    "tok_emb.weight": "embedding",
    "rope_cos": "rotation.cos",
    "rope_sin": "rotation.sin",
    "ln_f.weight": "final_norm.w",
    "ln_f.bias": "final_norm.b",
}
_BLOCK = {
    "ln_1.weight": "ln1.w",
    "ln_1.bias": "ln1.b",
    "attn.c_attn.weight": "attn.qkv.weight",
    "attn.c_proj.weight": "attn.o.weight",
    "ln_2.weight": "ln2.w",
    "ln_2.bias": "ln2.b",
    "mlp.w_gate.weight": "mlp.gate.weight",
    "mlp.w_up.weight": "mlp.up.weight",
    "mlp.w_down.weight": "mlp.down.weight",
}


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> SMolLMConfig:
    why = "only the looped model is computed here, not its baselines"
    for switch in ("weight_sharing", "rope", "swiglu"):
        fields.boolean(switch)  # where the released code is told nothing it takes false
        fields.only(switch, True, why=why)
    d_model = fields.width("n_embd")
    return SMolLMConfig(
        n_loops=fields.iterations("n_layer"),
        d_model=d_model,
        n_heads=fields.width("n_head"),
        d_mlp=int(2 * fields.number("ffn_mult") * d_model / 3),
        d_vocab=fields.width("vocab_size"),
        n_ctx=fields.positions("block_size"),
        dropout=fields.number("dropout", 0.1),
    )


def _names(cfg: SMolLMConfig) -> dict[str, str]:
    return {**_EDGE, **{f"shared_block.{key}": f"blocks.0.{name}" for key, name in _BLOCK.items()}}


def _unpack(content: Mapping[str, Any]) -> Release | None:
    """The attributes of the config object, and the weights beside it."""
    config, weights = content.get("config"), content.get("model")
    if not isinstance(config, Record) or not isinstance(weights, Mapping):
        return None
    tensors = {str(key): value for key, value in weights.items() if isinstance(value, Tensor)}
    return (vars(config), tensors) if len(tensors) == len(weights) else None


TABLE = Table(
    family="smollm",
    recognizes=lambda values, keys: set(values) >= _MARKS and "tok_emb.weight" in keys,
    config=_config,
    names=_names,
    harmless={"is the token that the loss leaves out": ("pad_id",)},
    tied=("head.weight", "tok_emb.weight"),
    records=(
        *(f"{module}.TransformerConfig" for module in _MODULES),
        "smollm.tokenizer.SmilesTokenizer",
    ),
    unpack=_unpack,
    releases=(
        (
            "akhljndl/smollm",
            "pickled weights; one layer, 8 iterations; several models and seeds in one repository",
        ),
    ),
)
