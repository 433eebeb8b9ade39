"""Dory's releases: layouts of keys and configs, the class of transformers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_cases import FLOAT32, GOLDEN
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.interp.weights.circuits import composition_scores, ov_circuit, qk_circuit
from loopscope.models.families.dory import Dory, DoryConfig
from references.dory import fresh

HALVES = {"attn_alpha": "lambda_1", "mlp_alpha": "lambda_2"}
OLDER: dict[str, Any] = {
    "dory_format_version": 1,
    "model_type": "dory",
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 12,
    "n_input_layers": 4,
    "n_output_layers": 2,
    "n_recurrent_loops": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "attention_head_dim": 8,
    "swa_head_dim": 8,
    "max_position_embeddings": 64,
    "hybrid_layer_pattern": "S-*-S-*-S-*-",
    "swa_window_size": 4,
    "rope_theta": 3000.0,
    "rope_theta_2": 100.0,
    "rope_profile_layers": [2, 1, 1, 2, 2, 1, 1, 1, 2, 2, 1, 1],
    "no_rope_layers": [0] * 12,
    "init_method_std": 0.0177,
    "ngpt_alpha_init": 0.05,
    "ngpt": True,
    "output_transform": "replace",
    "attention_output_gate_logit_scale_init": 20**0.5,
}


def stored() -> dict[str, Tensor]:
    return load_file(GOLDEN / "dory" / "model.safetensors")


def released_config() -> dict[str, Any]:
    return json.loads((GOLDEN / "dory" / "config.json").read_text())


def saved_again(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released tensors under the keys that transformers saves: one number for each layer."""
    found = {}
    for key, tensor in tensors.items():
        stem, _, rest = key.removeprefix("backbone.layers.").partition(".")
        if key.startswith("backbone.layers."):
            layer, half = divmod(int(stem), 2)
            rest = rest.replace("mixer", "mlp" if half else "self_attn")
            key = f"backbone.layers.{layer}.{HALVES.get(rest, rest)}"
        found[key] = tensor
    return found


def folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors")
    return path


def as_transformers_saves(path: Path) -> Path:
    return folder(path, released_config(), saved_again(stored()))


def with_real_counts(path: Path) -> Path:
    """A config that counts each layer once, with the kinds of attention alone."""
    config = released_config()
    for name in ("num_hidden_layers", "n_input_layers", "n_output_layers"):
        config[name] //= 2
    del config["n_recurrent_layers"]
    config["layer_types"] = config["layer_types"][::2]
    return folder(path, config, stored())


def in_the_older_form(path: Path) -> Path:
    return folder(path, OLDER, stored())


@pytest.mark.parametrize("write", [as_transformers_saves, with_real_counts, in_the_older_form])
def test_every_layout_is_the_same_model(write: Callable[[Path], Path], tmp_path: Path) -> None:
    model, released = load(write(tmp_path)), load(GOLDEN / "dory")
    assert model.cfg == released.cfg
    for name, parameter in released.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_transformers_computes_the_same(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.dory", reason="transformers has no Dory before 5.24")
    import transformers

    theirs = transformers.DoryForCausalLM(
        transformers.DoryConfig(
            vocab_size=41,
            hidden_size=30,
            intermediate_size=26,
            num_hidden_layers=7,
            n_input_layers=1,
            n_recurrent_layers=4,
            n_output_layers=2,
            n_recurrent_loops=3,
            num_attention_heads=10,
            num_key_value_heads=2,
            head_dim=6,
            layer_types=[
                "full_attention" if layer in (2, 3, 6) else "sliding_attention"
                for layer in range(7)
            ],
            sliding_window=3,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
                "full_attention": {"rope_type": "default", "rope_theta": 900.0},
            },
            initializer_range=0.04,
            ngpt_alpha_init=0.3,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter * (1 + 0.2 * noise))
        theirs.save_pretrained(tmp_path)
        ids = torch.randint(41, (3, 11), generator=generator)
        expected, found = theirs(ids).logits, load(tmp_path)(ids)
    torch.testing.assert_close(
        found, expected, rtol=0.0, atol=FLOAT32 * expected.abs().max().item()
    )


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("attention_bias", True, "attention_bias must be False, got True"),
        ("mlp_bias", True, "mlp_bias must be False, got True"),
        ("n_output_layers", 4, "must sum to num_hidden_layers=12, got 4, 6, 4"),
        ("n_recurrent_layers", 5, "each divisible by 2, must sum to num_hidden_layers=12"),
        ("num_hidden_layers", 10, "layer_types must name .* for each of num_hidden_layers=10"),
        ("layer_types", ["mlp", "full_attention"] * 6, "must name attention and mlp in turn"),
        ("layer_types", ["chunked_attention", "mlp"] * 6, "must name sliding_attention or full"),
        ("rope_parameters", {"full_attention": {"rope_theta": 5.0}}, "lacks .*'sliding_attention'"),
        ("recurrent_kv_cache_mode", "first_loop", "mode must be 'per_loop' or 'last_loop'"),
        ("initializer_range", 0, "start must be at least 1e-06, got 0"),
        ("swa_window_size", 4, "has the field 'swa_window_size' .* which this family's loader"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., object]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("dory", {field: value}))


def test_stretched_angles_are_refused(folder_with: Callable[..., object]) -> None:
    rope = released_config()["rope_parameters"]
    rope["full_attention"] |= {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(CheckpointError, match="rope_type must be 'default', got 'linear'"):
        load(folder_with("dory", {"rope_parameters": rope}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dory_format_version", 2, "dory_format_version must be 1, got 2"),
        ("ngpt", False, "ngpt must be True, got False"),
        ("initial_state", "zero", "initial_state must be 'input_copy', got 'zero'"),
        ("output_transform", "gated", "output_transform must be 'replace', got 'gated'"),
        ("partial_rotary_factor", 0.5, r"partial_rotary_factor must be 1\.0, got 0\.5"),
        ("head_dim", 4, "head_dim must be None or 8, got 4"),
        ("swa_num_key_value_heads", 2, "swa_num_key_value_heads must be None or 3, got 2"),
        ("attention_output_gate_logit_scale_init", 2.0, "the gate's scale is the square root"),
        ("hybrid_layer_pattern", "SS--S-*-S-*-", "must name attention .* and MLP .* in turn"),
        ("hybrid_layer_pattern", "S-*-", "in turn, 12 letters in all, got 'S-[*]-'"),
        ("no_rope_layers", [1] * 12, "no_rope_layers must be None or"),
        ("rope_profile_layers", [1] * 5, "rope_profile_layers must be 1 or 2 for each of"),
        ("rope_profile_layers", ["1"], "rope_profile_layers must be a list of whole numbers"),
        ("rope_profile_layers", [2] + [1] * 11, "must give all sliding attention one base"),
        ("layer_types", ["full_attention"], "layer_types must be None, got"),
    ],
)
def test_what_the_older_form_says_beyond_the_model_is_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder(tmp_path, {**OLDER, field: value}, stored()))


def test_one_weight_under_two_keys_must_be_one(tmp_path: Path) -> None:
    both = {**stored(), "backbone.layers.0.lambda_1": stored()["backbone.layers.0.attn_alpha"]}
    assert load(folder(tmp_path, released_config(), both)).cfg == load(GOLDEN / "dory").cfg
    both["backbone.layers.0.lambda_1"] = both["backbone.layers.0.lambda_1"] + 1
    with pytest.raises(CheckpointError, match="are one weight of a dory model, but differ"):
        load(folder(tmp_path, released_config(), both))


# What does not fit, and what no model has


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda model: qk_circuit(model, 0), "multiplies each channel of its rotated queries"),
        (lambda model: ov_circuit(model, 0), "multiplies what its heads found by a gate"),
        (lambda model: composition_scores(model, "V"), "multiplies what its heads found by a gate"),
    ],
)
def test_circuits_that_weights_alone_do_not_say_are_refused(
    method: Callable[[Dory], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        method(fresh())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_layers": (2, 1)}, r"full_layers must be layers in 0\.\.3 in increasing order"),
        ({"full_layers": (4,)}, r"full_layers must be layers in 0\.\.3"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"start": 1e-320}, "start must be at least 1e-06, got 1e-320"),
        ({"rate_start": 1e308}, r"rate_start must be at most 1000000\.0, got 1e\+308"),
        ({"kv_cache": "first_loop"}, "kv_cache must be 'per_loop' or 'last_loop'"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling must be None in this family"),
    ],
)
def test_configs_that_no_model_has_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoryConfig.from_dict({**fresh().cfg.to_dict(), **changes})
