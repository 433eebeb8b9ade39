"""Inkling-2-Mini's files: the reference class at another size, forms of a config, codes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from family_toys import random_tokens
from golden_cases import GOLDEN, GoldenCase
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.load import load, save
from loopscope.checkpoints.tables.inkling import TABLE
from loopscope.checkpoints.tables.quantised import decoded
from loopscope.models.core.registry import build
from toy import randomize_

NAME = "inkling2_loop"


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return GoldenCase(NAME)


# What transformers writes

SIZES: dict[str, Any] = {
    "vocab_size": 33, "unpadded_vocab_size": 31, "hidden_size": 15, "num_hidden_layers": 5,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 5,
    "sliding_window_size": 3, "d_rel": 3, "rel_extent": 5, "log_scaling_n_floor": 3,
    "conv_kernel_size": 3, "moe_intermediate_size": 7, "n_routed_experts": 5,
    "num_experts_per_tok": 2, "n_layers_per_attn_res_block": 1, "rms_norm_eps": 1e-3,
    "layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
    "qk_l2_clip_threshold": 2.0, "rel_l2_clip_threshold": 0.9, "route_scale": 1.7,
    "mlp_gate_softcap": 1.5, "mlp_up_softcap": 2.0, "final_logit_softcapping": 6.0,
    "max_position_embeddings": 64, "eos_token_id": None,
}  # fmt: skip
LOOP: dict[str, Any] = {
    "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 3,
    "loop_gate_rank": 4,
}  # fmt: skip
RANDOM_TOKENS = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(0))


def write_reference(folder: Path, model_type: str, **more: Any) -> Tensor:
    """Save a random model of transformers, and return its logits."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **more)
    theirs = AutoModelForCausalLM.from_config(
        config, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(0.0, 0.4)
        theirs.save_pretrained(folder)
        logits: Tensor = theirs(input_ids=RANDOM_TOKENS).logits
    return logits


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = 5e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)


def test_transformers_looped_model_gives_the_same(tmp_path: Path) -> None:
    expected = write_reference(tmp_path, "inkling2_loop_text", **LOOP)
    with torch.no_grad():
        assert_near(load(tmp_path)(RANDOM_TOKENS), expected)


def test_one_pass_is_the_unlooped_model_of_transformers(tmp_path: Path) -> None:
    expected = write_reference(tmp_path, "inkling2_text")
    config = json.loads((tmp_path / "config.json").read_text())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    ours = {**config, **LOOP, "model_type": "inkling2_loop_text"}
    (tmp_path / "config.json").write_text(json.dumps(ours))
    for key in ("queries", "kv_queries"):
        tensors[f"model.llm.middle_cycle_cross_pass_{key}"] = torch.randn(4, 15)
    for layer, name in [(i, n) for i in (1, 2) for n in ("attn", "k", "v", "mlp")]:
        prefix = f"model.llm.layers.{layer}.controllers.{name}"
        tensors[f"{prefix}.down_weight"] = torch.randn(4, 30)
        tensors |= {f"{prefix}.{part}_weight": torch.randn(15, 4) for part in ("gain", "forget")}
    save_file(tensors, weights)
    model = load(tmp_path)
    with torch.no_grad():
        assert_near(model(RANDOM_TOKENS, n_loops=1), expected)
        assert not torch.allclose(model(RANDOM_TOKENS, n_loops=2), expected, atol=0.01)


# Forms of a release

Content = tuple[dict[str, Any], dict[str, Tensor]]


def content() -> Content:
    folder = GOLDEN / NAME
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def written(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def flat_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text-only form of a config, with the flat fields of the loop."""
    text = dict(config["text_config"])
    loop = text.pop("loop_config")
    return {
        **text,
        "loop_layer_index_start": loop["core_start"],
        "loop_layer_index_end": loop["core_end"],
        "loop_num_passes": loop["num_passes"],
        "loop_gate_rank": loop["gate_rank"],
    }


OTHER_NAMES = {
    "sliding_window_size": "sliding_window",
    "n_routed_experts": "num_local_experts",
    "conv_kernel_size": "sconv_kernel_size",
    "max_position_embeddings": "model_max_length",
    "moe_intermediate_size": "intermediate_size",
    "route_scale": "routed_scaling_factor",
}


@pytest.mark.slow
def test_every_form_of_a_config_means_the_same(case: GoldenCase, tmp_path: Path) -> None:
    config, tensors = content()
    text = {key: value for key, value in tensors.items() if ".visual." not in key}
    flat = flat_text(config)
    renamed = {OTHER_NAMES.get(name, name): value for name, value in flat.items()}
    both = {**config["text_config"], "loop_num_passes": 7, "loop_gate_rank": 9}
    forms: list[Content] = [
        (flat, text),
        (renamed, text),
        ({**flat, **renamed}, text),
        ({**config, "text_config": both}, tensors),
    ]
    for number, form in enumerate(forms):
        model = load(written(tmp_path / str(number), *form))
        assert model.cfg == case.model.cfg
        with torch.no_grad():
            assert_near(model(case.tokens), case.logits())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop_layer_index_start": 3}, "start of the loop must be a multiple"),
        ({"loop_layer_index_end": 5}, "end of the loop must be a multiple"),
        ({"loop_layer_index_start": 0}, "the loop must start after layer 0"),
        ({"loop_layer_index_end": 10}, "end by num_hidden_layers=9, got 2 to 10"),
        ({"sliding_window": 5}, "sliding_window_size and sliding_window name one size"),
        ({"layer_types": ["hybrid"] * 8}, "layer_types must name one of hybrid and hybrid_sliding"),
        ({"layer_types": ["full"] * 9}, "for each of 9 layers"),
        ({"layer_types": [1] * 9}, "layer_types must be a list of strings"),
        ({"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, tensors = content()
    with pytest.raises(CheckpointError, match=message):
        load(written(tmp_path / "bad", {**flat_text(config), **changes}, tensors))


def test_layers_without_types_are_five_sliding_ones_and_a_full_one() -> None:
    text = flat_text(content()[0])
    del text["layer_types"]
    fields = ConfigFields({"model_type": "inkling2_loop_text", **text}, Path("config.json"))
    assert TABLE.config(fields, {}, {}).full_layers == (5,)


WIDE = r".*(attn_res\.|cross_pass|(gain|forget)_weight|mlp\.gate\.|sconv\.(weight|static_w)$).*"


def halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights in 16 bits, but those that the family computes in float32."""
    return {
        key: tensor if re.fullmatch(WIDE, key) else tensor.bfloat16()
        for key, tensor in tensors.items()
    }


@pytest.mark.slow
def test_a_release_may_keep_some_weights_in_float32(case: GoldenCase, tmp_path: Path) -> None:
    config, tensors = content()
    model = load(written(tmp_path / "mixed", config, halves(tensors)))
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.float32, torch.bfloat16}
    with torch.no_grad():
        logits = model(case.tokens, n_loops=1)
        assert logits.dtype == torch.bfloat16
        assert (logits - case.logits(1)).norm() < 0.3 * case.logits(1).norm()
        save(model, tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")(case.tokens, n_loops=1), logits)
    more = {**halves(tensors), "model.llm.norm.weight": tensors["model.llm.norm.weight"]}
    with pytest.warns(UserWarning, match="mixes the number formats"):
        rest = load(written(tmp_path / "rest", config, more))
    assert {parameter.dtype for parameter in rest.parameters()} == {torch.float32}


# Quantised experts

HALF_BYTES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4(shape: tuple[int, int, int], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes with their scales, and their values number by number."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = shape
    codes = torch.randint(
        0, 256, (experts, rows, columns // 2), generator=generator, dtype=torch.uint8
    )
    scale = torch.rand(experts, rows, columns // 16, generator=generator).to(torch.float8_e4m3fn)
    amax, denominator = torch.rand(experts, generator=generator) + 0.5, torch.tensor([2688.0])
    values = torch.zeros(shape)
    for e, r, c in itertools.product(*map(range, shape)):
        byte = int(codes[e, r, c // 2])
        nibble = byte % 16 if c % 2 == 0 else byte // 16
        magnitude = HALF_BYTES[nibble % 8] * (-1 if nibble >= 8 else 1)
        outer = float(amax[e]) / 2688.0
        values[e, r, c] = magnitude * float(scale[e, r, c // 16].float()) * outer
    stored = {"": codes, "_scale": scale, "_amax": amax}
    return {**stored, "_outer_scale_denominator": denominator}, values


def mxfp8(shape: tuple[int, int, int], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.randint(
        120, 130, (*shape[:2], shape[2] // 32), generator=generator, dtype=torch.uint8
    )
    values = torch.zeros(shape)
    for e, r, c in itertools.product(*map(range, shape)):
        power = 2.0 ** (int(scale[e, r, c // 32]) - 127)
        values[e, r, c] = float(codes[e, r, c].float()) * power
    return {"": codes, "_scale": scale}, values


@pytest.mark.parametrize("quantised", [nvfp4, mxfp8])
def test_codes_become_the_numbers_that_they_mean(
    quantised: Callable[..., tuple[dict[str, Tensor], Tensor]],
) -> None:
    key = "model.llm.layers.3.mlp.experts.w13_weight"
    stored, values = quantised((3, 6, 64), 1)
    tensors = {f"{key}{part}": tensor for part, tensor in stored.items()}
    other = {"model.llm.embed.weight": torch.ones(2, 2)}
    path = Path("model.safetensors")
    found = decoded({**tensors, **other}, "model.llm.embed.weight", path)
    assert set(found) == {key, *other}
    torch.testing.assert_close(found[key], values)
    assert found[key].dtype == torch.float32
    for part, wrong in (("_scale", stored["_scale"][:, :, :1]), ("", values)):
        with pytest.raises(CheckpointError, match="and their scales do not fit"):
            decoded({**tensors, f"{key}{part}": wrong}, "", path)


@pytest.mark.parametrize("quantised", [nvfp4, mxfp8])
@pytest.mark.slow
def test_a_release_with_quantised_experts_is_one_with_their_numbers(
    quantised: Callable[..., tuple[dict[str, Tensor], Tensor]], tmp_path: Path
) -> None:
    config = {
        **SIZES, **LOOP, "model_type": "inkling2_loop_text", "hidden_size": 32,
        "moe_intermediate_size": 32, "n_routed_experts": 3,
    }  # fmt: skip
    cfg = TABLE.config(ConfigFields(config, Path("config.json")), {}, {})
    ours = {name: key for key, name in TABLE.names(cfg).items()}
    random = randomize_(build(cfg)).state_dict()
    plain = {ours[name]: tensor for name, tensor in random.items()}
    codes = dict(plain)
    for seed, key in enumerate(name for name in plain if ".experts." in name):
        stored, plain[key] = quantised(tuple(plain[key].shape), seed)
        del codes[key]
        codes |= {f"{key}{part}": tensor for part, tensor in stored.items()}
    models = [
        load(written(tmp_path / str(len(tensors)), config, tensors)) for tensors in (plain, codes)
    ]
    tokens = random_tokens(models[0])
    with torch.no_grad():
        assert_near(models[1](tokens), models[0](tokens))
