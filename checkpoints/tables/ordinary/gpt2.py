"""Released GPT-2 models, which are looped without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.release import BLOCK_KEYS
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.llama import block_names
from loopscope.checkpoints.tables.ordinary.looping import OPTIONS, looping
from loopscope.models.families.training_free.gpt2 import TrainingFreeGPT2Config


def _gpt2(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrainingFreeGPT2Config:
    n_layers, d_model = fields.layers("n_layer"), fields.width("n_embd")
    fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh")  # two names of one function
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("reorder_and_upcast_attn", False)
    fields.only("add_cross_attention", False)
    fields.only("tie_word_embeddings", True, why="GPT-2's head is its token embedding")
    return TrainingFreeGPT2Config(
        **looping(options, n_layers),
        n_layers=n_layers,
        d_model=d_model,
        n_heads=fields.width("n_head"),
        d_mlp=fields.width("n_inner", 4 * d_model),
        d_vocab=fields.width("vocab_size"),
        n_ctx=fields.positions("n_positions"),
        eps=fields.number("layer_norm_epsilon", 1e-5),
    )


def _gpt2_table(prefix: str) -> Table:
    """GPT-2 files have their keys under "transformer.", or under nothing."""

    def names(cfg: TrainingFreeGPT2Config) -> dict[str, str]:
        edges = {
            "wte.weight": "embedding",
            "wpe.weight": "W_pos",
            "ln_f.weight": "final_norm.w",
            "ln_f.bias": "final_norm.b",
        }
        return {
            **{prefix + key: name for key, name in edges.items()},
            **block_names(f"{prefix}h", "blocks", cfg.n_layers, BLOCK_KEYS),
        }

    return Table(
        family=TrainingFreeGPT2Config.family,
        recognizes=lambda values, keys: (
            values.get("model_type") == "gpt2"
            and ("transformer.wte.weight" in keys) == bool(prefix)
        ),
        config=_gpt2,
        names=names,
        skipped=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
        tied=("lm_head.weight", f"{prefix}wte.weight"),
        options=OPTIONS,
        harmless={"repeats the number of positions": ("n_ctx",)},
        input_first=r".*\.c_(attn|proj|fc)\.weight",
    )


GPT2, GPT2_WITH_PREFIX = _gpt2_table(""), _gpt2_table("transformer.")
