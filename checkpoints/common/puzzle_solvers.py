"""Config fields and key names that the releases of the recursive puzzle solvers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.errors import CheckpointError

PREFIXES = ("inner.", "model.inner.")  # without and with the head that holds the loss
HARMLESS = {
    "decides training and its end alone": (
        "batch_size",
        "halt_exploration_prob",
        "no_ACT_continue",
        "loss",
        "causal",
    ),
    "names the class": ("name",),
    "repeats the number format of the weights": ("forward_dtype",),
}
_EDGE = {
    "embed_tokens.embedding_weight": "embedding",
    "lm_head.weight": "head",
    "q_head.weight": "halt.weight",
    "q_head.bias": "halt.bias",
    "puzzle_emb.weights": "puzzles",
    "embed_pos.embedding_weight": "W_pos",
    "H_init": "high_init",
    "L_init": "low_init",
}
_PARTS = {
    "self_attn.qkv_proj.weight": "attn.qkv.weight",
    "self_attn.o_proj.weight": "attn.o.weight",
    "mlp_t.gate_up_proj.weight": "pos_mlp.gate_up.weight",
    "mlp_t.down_proj.weight": "pos_mlp.down.weight",
    "mlp.gate_up_proj.weight": "mlp.gate_up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
}


def has_level(keys: frozenset[str], level: str) -> bool:
    """Whether the keys of some weights hold the stack of a level, "L" or "H"."""
    starts = tuple(f"{prefix}{level}_level.layers." for prefix in PREFIXES)
    return any(key.startswith(starts) for key in keys)


def stored(tensors: Mapping[str, Tensor], key: str) -> Tensor | None:
    """The tensor of a key under either prefix."""
    found = (tensors.get(prefix + key) for prefix in PREFIXES)
    return next((tensor for tensor in found if tensor is not None), None)


def names(stacks: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """Our name for each key.

    Args:
        stacks: By the release's name of a level, our name of its stack and its number of blocks.
    """
    plain = dict(_EDGE)
    for level, (ours, n_layers) in stacks.items():
        plain |= {
            f"{level}_level.layers.{i}.{key}": f"{ours}.{i}.{name}"
            for i in range(n_layers)
            for key, name in _PARTS.items()
        }
    return {prefix + key: name for prefix in PREFIXES for key, name in plain.items()}


def sizes(fields: ConfigFields, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `PuzzleConfig`. The vocabulary and the number of puzzles are those of the
    weights, and so is the number of positions where the weights depend on it.

    Raises:
        CheckpointError: No token embedding, or sizes that differ from those of the weights.
    """
    embedding = stored(tensors, _key("embedding"))
    if embedding is None or embedding.ndim != 2:
        raise CheckpointError(f"{fields.path}: the weights lack {PREFIXES[0]}{_key('embedding')}")
    d_model, n_low_layers = fields.width("hidden_size"), fields.layers("L_layers")
    expansion = fields.number("expansion")
    position_mlp = fields.boolean("mlp_t", False)
    d_puzzle = fields.integer("puzzle_emb_ndim", 0)
    n_prefix = fields.integer("puzzle_emb_len", 0) or -(-d_puzzle // d_model)
    puzzles = stored(tensors, _key("puzzles"))
    fields.only("pos_encodings", "rope", "learned", "none")
    kind = fields.text("pos_encodings", "rope")
    positions = "none" if position_mlp and kind == "rope" else kind
    n_ctx = _positions(fields, tensors, n_prefix, position_mlp)
    _agrees(fields, "vocab_size", len(embedding))
    _agrees(fields, "num_puzzle_identifiers", None if puzzles is None else len(puzzles))
    return {
        "n_layers": n_low_layers,
        "n_loops": fields.iterations("halt_max_steps", None),
        "n_cycles": fields.iterations("H_cycles"),
        "n_low_loops": fields.iterations("L_cycles"),
        "d_model": d_model,
        "n_heads": fields.width("num_heads"),
        "d_mlp": _inner_width(d_model, expansion),
        "d_vocab": len(embedding),
        "n_ctx": n_ctx,
        "eps": fields.number("rms_norm_eps", 1e-5),
        "rope_theta": fields.number("rope_theta", 10000.0),
        "n_prefix": n_prefix,
        "d_puzzle": d_puzzle,
        "n_puzzles": 0 if puzzles is None else len(puzzles),
        "positions": positions,
        "d_pos_mlp": _inner_width(n_ctx or 0, expansion) if position_mlp else 0,
    }


def _key(name: str) -> str:
    return next(key for key, ours in _EDGE.items() if ours == name)


def _inner_width(width: int, expansion: float) -> int:
    """The inner width of an MLP: two thirds of the expansion, rounded up to a multiple of 256."""
    return -(-round(expansion * width * 2 / 3) // 256) * 256


def _positions(
    fields: ConfigFields, tensors: Mapping[str, Tensor], n_prefix: int, position_mlp: bool
) -> int | None:
    """Prefix and cells together; None where neither the config nor the weights say."""
    cells = fields.positions("seq_len", None)
    told = None if cells is None else n_prefix + cells
    sized = stored(tensors, _key("W_pos"))
    if sized is None and position_mlp:
        down = stored(tensors, "L_level.layers.0.mlp_t.down_proj.weight")
        sized = down if down is not None and down.ndim == 2 else None
    if sized is not None and told not in (None, len(sized)):
        raise CheckpointError(
            f"{fields.path}: seq_len promises {told} positions with the prefix, but the weights"
            f" have {len(sized)}"
        )
    return told if sized is None else len(sized)


def _agrees(fields: ConfigFields, name: str, found: int | None) -> None:
    """Refuse a size that differs from that of the weights."""
    told = fields.integer(name, None)
    if found is not None and told not in (None, found):
        raise CheckpointError(f"{fields.path}: {name} is {told}, but the weights have {found}")
