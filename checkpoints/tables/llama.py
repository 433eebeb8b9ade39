"""Key names that Llama-like releases share."""

from __future__ import annotations

from collections.abc import Mapping

ATTENTION = {
    f"self_attn.{part}_proj.weight": f"attn.{part}.weight" for part in ("q", "k", "v", "o")
}
MLP = {f"mlp.{part}_proj.weight": f"mlp.{part}.weight" for part in ("gate", "up", "down")}
PRE_NORMS = {"input_layernorm.weight": "ln1.w", "post_attention_layernorm.weight": "ln2.w"}


def edge_names(tied: bool) -> dict[str, str]:
    """Embedding, final norm, and the head where it is not tied."""
    head = {} if tied else {"lm_head.weight": "head"}
    return {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm.w", **head}


def block_names(theirs: str, ours: str, n_layers: int, parts: Mapping[str, str]) -> dict[str, str]:
    """Our names of the parts of each block of a stack."""
    return {
        f"{theirs}.{i}.{key}": f"{ours}.{i}.{name}"
        for i in range(n_layers)
        for key, name in parts.items()
    }
