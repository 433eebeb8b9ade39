"""Releases of Nemotron-Labs Dory (nvidia/NVIDIA-Nemotron-Labs-Dory1.0-4B-BF16).

A layer is stored as two, attention and MLP, in the release; transformers saves it as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.rotary import only_kinds
from loopscope.checkpoints.table import Table, of_type
from loopscope.checkpoints.tables.llama import MLP
from loopscope.models.families.dory import DoryConfig

_SLIDING, _FULL, _MLP = "sliding_attention", "full_attention", "mlp"
_OLDER = ("dory_format_version", "hybrid_layer_pattern")
_PATTERN = {"S-": False, "*-": True}  # two letters of hybrid_layer_pattern: is attention full?
_COUNTS = ("n_input_layers", "n_recurrent_layers", "n_output_layers")


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> DoryConfig:
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("recurrent_kv_cache_mode", "per_loop", "last_loop")
    own = _older(fields) if any(name in fields for name in _OLDER) else _current(fields)
    return DoryConfig(
        d_model=fields.width("hidden_size", 2560),
        n_heads=fields.width("num_attention_heads", 16),
        n_key_value_heads=fields.width("num_key_value_heads", 4),
        d_mlp=fields.width("intermediate_size", 7168),
        d_vocab=fields.width("vocab_size", 131072),
        n_ctx=fields.positions("max_position_embeddings", 8192),
        rate_start=fields.number("ngpt_alpha_init", 0.05),
        kv_cache=fields.text("recurrent_kv_cache_mode", "per_loop"),
        tied=fields.boolean("tie_word_embeddings", False),
        **own,
    )


def _layers(
    fields: ConfigFields, full: Sequence[bool], counts: Sequence[int], divisor: int
) -> dict[str, Any]:
    """The fields that say which layers there are.

    Args:
        full: Whether each real layer has full attention.
        counts: Layers of prelude, loop and coda, as the config counts them.
        divisor: How many of the config's layers are one.
    """
    if sum(counts) != divisor * len(full) or any(count % divisor for count in counts):
        each = f", each divisible by {divisor}," if divisor > 1 else ""
        raise CheckpointError(
            f"{fields.path}: {', '.join(_COUNTS)}{each} must sum to num_hidden_layers="
            f"{divisor * len(full)}, got {', '.join(map(str, counts))}"
        )
    before, looped, after = (count // divisor for count in counts)
    return {
        "n_prelude_layers": before,
        "n_layers": looped,
        "n_coda_layers": after,
        "full_layers": tuple(layer for layer, is_full in enumerate(full) if is_full),
    }


def _counts(fields: ConfigFields, total: int, edge: Any) -> list[int]:
    """Layers of prelude, loop and coda; the loop has the rest where the config does not say."""
    before, after = (fields.layers(_COUNTS[i], *edge) for i in (0, 2))
    looped = fields.layers(_COUNTS[1], None)
    return [before, total - before - after if looped is None else looped, after]


# As transformers reads and writes it


def _current(fields: ConfigFields) -> dict[str, Any]:
    fields.only("hidden_act", "silu")
    kinds = fields.texts("layer_types", None)
    halves = kinds is not None and _MLP in kinds  # a layer is counted as attention and as MLP
    total = fields.layers("num_hidden_layers", *(() if halves else (36,)))
    edge = () if halves else (8,)  # no default where layers are counted twice
    if halves:
        _check_turns(fields, kinds)
    times = 2 if halves else 1
    attention = (kinds or _usual(total))[::times]
    if set(attention) - {_SLIDING, _FULL} or total != times * len(attention):
        raise CheckpointError(
            f"{fields.path}: layer_types must name {_SLIDING} or {_FULL} for each of"
            f" num_hidden_layers={total}, got {shown(kinds)}"
        )
    full = [kind == _FULL for kind in attention]
    return {
        **_layers(fields, full, _counts(fields, total, edge), times),
        **_angles(fields, set(attention)),
        "n_loops": fields.iterations("n_recurrent_loops", 2),
        "head_dim": fields.width("head_dim", 256),
        "window": fields.width("sliding_window", 1024),
        "start": fields.number("initializer_range", 0.0177),
    }


def _check_turns(fields: ConfigFields, kinds: Sequence[str]) -> None:
    """Refuse kinds of halves of layers that are not attention and MLP in turn."""
    if set(kinds[1::2]) != {_MLP} or len(kinds) % 2:
        raise CheckpointError(
            f"{fields.path}: layer_types must name attention and mlp in turn, got {shown(kinds)}"
        )


def _usual(total: int) -> list[str]:
    return [_FULL if layer % 4 == 3 else _SLIDING for layer in range(total)]


def _angles(fields: ConfigFields, kinds: set[str]) -> dict[str, float]:
    """The bases of the rotary positions; the config must say those of the kinds that it has."""
    found = {_SLIDING: 1e4, _FULL: 1e7}
    if "rope_parameters" in fields:
        rope = fields.section("rope_parameters")
        for kind in (_SLIDING, _FULL):
            if kind in rope or kind in kinds:
                one = rope.section(kind)
                one.only("rope_type", "default")
                one.only("partial_rotary_factor", 1.0)
                found[kind] = one.number("rope_theta")
                one.done()
        only_kinds(rope)
    return {"window_rope_theta": found[_SLIDING], "rope_theta": found[_FULL]}


# The older form, which vLLM reads

_ALWAYS: Mapping[str, tuple[Any, ...]] = {
    "dory_format_version": (1,),
    "ngpt": (True,),
    "fngpt": (True,),
    "ngpt_enable_final_norm": (False,),
    "attention_output_gate": (True,),
    "mlp_hidden_act": ("silu",),
    "initial_state": ("input_copy",),
    "input_transform": ("residual",),
    "output_transform": ("replace",),
    "mixer_type": (None,),
    "layer_types": (None,),
    "partial_rotary_factor": (1.0,),
    "partial_rotary_factor_2": (None, 1.0),
}


def _older(fields: ConfigFields) -> dict[str, Any]:
    """The fields of the older form, which counts every layer twice throughout."""
    for name, allowed in _ALWAYS.items():
        fields.only(name, *allowed)
    total = fields.layers("num_hidden_layers", 72)
    pattern = fields.text("hybrid_layer_pattern", "S-S-S-*-" * (total // 8))
    pairs = [pattern[i : i + 2] for i in range(0, len(pattern), 2)]
    if len(pattern) != total or set(pairs) - set(_PATTERN):
        raise CheckpointError(
            f"{fields.path}: hybrid_layer_pattern must name attention (S or *) and MLP (-) in turn,"
            f" {total} letters in all, got {shown(pattern)}"
        )
    full = [_PATTERN[pair] for pair in pairs]
    return {
        **_layers(fields, full, _counts(fields, total, (0,)), 2),
        **_profiles(fields, full),
        "n_loops": fields.iterations("n_recurrent_loops", 1),
        "head_dim": _one_size_of_head(fields),
        "window": fields.width("swa_window_size", 1024),
        "start": fields.number("init_method_std", 0.02),
    }


def _one_size_of_head(fields: ConfigFields) -> Any:
    """The width of a head, where sliding attention has the same heads as full attention."""
    head_dim = fields.width("attention_head_dim", 256)
    fields.only("head_dim", None, head_dim)
    fields.only("swa_head_dim", None, head_dim)
    fields.only("swa_num_attention_heads", None, fields.width("num_attention_heads", 16))
    fields.only("swa_num_key_value_heads", None, fields.width("num_key_value_heads", 4))
    usual = fields.width("hidden_size", 2560) ** 0.5
    fields.only(
        "attention_output_gate_logit_scale_init",
        None,
        usual,
        why="the gate's scale is the square root of hidden_size here",
    )
    return head_dim


def _profiles(fields: ConfigFields, full: Sequence[bool]) -> dict[str, Any]:
    """The bases of the rotary positions by kind of attention, from a profile for each layer."""
    total = 2 * len(full)
    fields.only("no_rope_layers", None, [0] * total)
    first = fields.number("rope_theta", 10000.0)
    bases = {1: first, 2: fields.number("rope_theta_2", first)}
    profiles = fields.integers("rope_profile_layers", [1] * total)
    if len(profiles) != total or set(profiles) - set(bases):
        raise CheckpointError(
            f"{fields.path}: rope_profile_layers must be 1 or 2 for each of num_hidden_layers="
            f"{total}, got {shown(profiles)}"
        )
    found = {}
    for name, kind in (("rope_theta", True), ("window_rope_theta", False)):
        used = {bases[profiles[2 * i]] for i, is_full in enumerate(full) if is_full == kind}
        if len(used) > 1:
            raise CheckpointError(
                f"{fields.path}: rope_profile_layers must give all {'full' if kind else 'sliding'}"
                f" attention one base of angles here, got {sorted(used)}"
            )
        found[name] = next(iter(used), first)
    return found


# Keys

_ATTENTION = {
    **{f"{part}_proj.weight": f"attn.{part}.weight" for part in "qkvo"},
    "g_proj.weight": "attn.gate.weight",
    "sqk": "attn.sqk",
    "s_gate": "attn.s_gate",
}
_BRANCHES = {
    **{key.removeprefix("mlp."): name for key, name in MLP.items()},
    "suv_gate": "mlp.suv_gate",
    "suv_up": "mlp.suv_up",
}


def _names(cfg: DoryConfig) -> dict[str, str]:
    """Our names of the keys of the release, and of those that transformers saves."""
    stacks = {
        "prelude_blocks": cfg.n_prelude_layers,
        "blocks": cfg.n_layers,
        "coda_blocks": cfg.n_coda_layers,
    }
    blocks = [f"{stack}.{i}" for stack, count in stacks.items() for i in range(count)]
    names = {
        "backbone.embeddings.weight": "embedding",
        "lm_head.logit_scale": "logit_scale",
        **({} if cfg.tied else {"lm_head.weight": "head"}),
    }
    for layer, block in enumerate(blocks):
        names |= _layer(block, f"{2 * layer}.mixer", f"{2 * layer + 1}.mixer")
        names[f"backbone.layers.{2 * layer}.attn_alpha"] = f"{block}.attn_alpha"
        names[f"backbone.layers.{2 * layer + 1}.mlp_alpha"] = f"{block}.mlp_alpha"
    for layer, block in enumerate(blocks):
        names |= _layer(block, f"{layer}.self_attn", f"{layer}.mlp")
        names[f"backbone.layers.{layer}.lambda_1"] = f"{block}.attn_alpha"
        names[f"backbone.layers.{layer}.lambda_2"] = f"{block}.mlp_alpha"
    return names


def _layer(block: str, attention: str, mlp: str) -> dict[str, str]:
    """Our names of a block's keys, given where the file has its two halves."""
    return {
        f"backbone.layers.{place}.{key}": f"{block}.{name}"
        for place, parts in ((attention, _ATTENTION), (mlp, _BRANCHES))
        for key, name in parts.items()
    }


TABLE = Table(
    family="dory",
    recognizes=of_type("dory"),
    config=_config,
    names=_names,
    tied=("lm_head.weight", "backbone.embeddings.weight"),
    releases=(
        (
            "nvidia/NVIDIA-Nemotron-Labs-Dory1.0-4B-BF16",
            "36 layers, of which 20 run 2 times, between 8 and 8",
        ),
    ),
)
