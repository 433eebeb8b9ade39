"""Folders of ordinary models: the same logits as transformers gives them, and what the
loader refuses.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.models.families.training_free.gpt2 import TrainingFreeGPT2
from loopscope.models.families.training_free.model import TrainingFreeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "num_hidden_layers": 4,
    "hidden_size": 18,
    "intermediate_size": 22,
    "max_position_embeddings": 23,
}
HEADS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 9,
}
GPT2: dict[str, Any] = {
    "vocab_size": 29,
    "n_layer": 4,
    "n_embd": 15,
    "n_head": 3,
    "n_positions": 11,
    "bos_token_id": None,
    "eos_token_id": None,
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}
GEMMA3: dict[str, Any] = {
    "sliding_window": 3,
    "query_pre_attn_scalar": 5,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 100.0,
    "rope_theta": 2000.0,
    "final_logit_softcapping": 9.0,
}
LLAMA, QWEN3 = "training_free_llama", "training_free_qwen3"
BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, **HEADS, rope_scaling=LLAMA3, rope_theta=3000.0)
    ),
    "llama, tied, biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "llama, every head its keys": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_attention_heads=3)
    ),
    "llama, linear rope": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, **HEADS, rope_scaling={"rope_type": "linear", "factor": 3.0})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS)),
    "qwen3, tied, biases": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=True, attention_bias=True)
    ),
    "qwen3, last layers slide": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SIZES, **HEADS, use_sliding_window=True, sliding_window=3, max_window_layers=2
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_attention_heads=9, num_key_value_heads=3)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=None)),
    "mistral, sliding": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, **HEADS, sliding_window=3)
    ),
    "olmo2": lambda: Olmo2ForCausalLM(
        Olmo2Config(**SIZES, num_attention_heads=9, num_key_value_heads=3)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **HEADS, **CAPS, query_pre_attn_scalar=7, sliding_window=3)
    ),
    "gemma2, no caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **HEADS, attn_logit_softcapping=None, final_logit_softcapping=None)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, **GEMMA3)),
    "gemma3, no cap": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **HEADS, query_pre_attn_scalar=5, sliding_window=3)
    ),
    "gemma3, all layers full": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **HEADS, **GEMMA3, layer_types=["full_attention"] * 4)
    ),
    "gemma3, linear rope": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, **HEADS, **GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0}
        )
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, num_attention_heads=3, rotary_pct=0.4)
    ),
    "neox, serial, tied": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **SIZES,
            num_attention_heads=3,
            rotary_pct=1.0,
            use_parallel_residual=False,
            tie_word_embeddings=True,
            attention_bias=False,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2, n_inner": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, n_inner=14, layer_norm_epsilon=1e-3)
    ),
}


def released(make: Callable[[], PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A base model whose every parameter is far from what it starts as, and its folder."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")  # early 5.x takes a kernel without Gemma 2's caps
    return model


def random_tokens(length: int = 7) -> Tensor:
    return torch.randint(0, 29, (3, length), generator=torch.Generator().manual_seed(1))


def with_layers_repeated(
    base: PreTrainedModel, window: tuple[int, int], n_loops: int
) -> PreTrainedModel:
    """A copy whose own list of layers has the window's n_loops times, with a damped Euler step
    where each of them ends.
    """
    deep = copy.deepcopy(base)
    inner = getattr(deep, deep.base_model_prefix)
    name, count = ("h", "n_layer") if hasattr(inner, "h") else ("layers", "num_hidden_layers")
    layers, (first, last) = getattr(inner, name), window
    states: list[Tensor] = []

    def start(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0])

    def damp(module: nn.Module, inputs: object, g: Tensor) -> Tensor:
        return states[-1] + (g - states[-1]) / n_loops

    layers[first].register_forward_pre_hook(start)
    layers[last].register_forward_hook(damp)

    def repeated(each: Sequence[Any]) -> list[Any]:
        return [*each[:first], *(list(each[first : last + 1]) * n_loops), *each[last + 1 :]]

    setattr(inner, name, nn.ModuleList(repeated(layers)))
    setattr(deep.config, count, len(getattr(inner, name)))
    if getattr(deep.config, "layer_types", None) is not None:
        deep.config.layer_types = repeated(deep.config.layer_types)
    return deep


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_one_pass_is_the_base_model_and_three_are_its_layers_repeated(
    kind: str, tmp_path: Path
) -> None:
    theirs = released(BASES[kind], tmp_path).double()
    ours, tokens = load(tmp_path, window=(1, 2), rule="euler").double(), random_tokens()
    # most of their code computes in float32 at most: norms, Gemma's pattern too
    near = 1e-9 if "gpt2" in kind else 5e-6 if "gemma" in kind else 1e-6
    plain, looped = (
        theirs(tokens, use_cache=False).logits,
        with_layers_repeated(theirs, (1, 2), 3)(tokens, use_cache=False).logits,
    )
    assert (looped - plain).norm() > 0.05 * plain.norm()
    for n_loops, expected in ((1, plain), (3, looped)):
        assert (ours(tokens, n_loops=n_loops) - expected).abs().max() < near * expected.abs().max()


@pytest.mark.parametrize("kind", ["mistral", "qwen3, last layers slide", "gemma2", "gemma3"])
def test_a_window_that_is_absent_is_transformers_default_and_null_is_none(
    kind: str, tmp_path: Path
) -> None:
    released(BASES[kind], tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sliding_window": None}))
    assert load(tmp_path, window=(1, 2)).cfg.sliding_window is None
    path.write_text(json.dumps({**config, "sliding_window": 4096}))
    stated = load(tmp_path, window=(1, 2)).cfg
    del config["sliding_window"]
    path.write_text(json.dumps(config))
    assert load(tmp_path, window=(1, 2)).cfg == stated


@torch.no_grad()
def test_olmo2s_norms_round_once_in_bfloat16(tmp_path: Path) -> None:
    theirs = released(BASES["olmo2"], tmp_path).bfloat16()
    ours = load(tmp_path, window=(1, 2), dtype="bfloat16")
    block, layer = ours.blocks[1], theirs.model.layers[1]
    for norm, other in (
        (ours.final_norm, theirs.model.norm),
        (block.ln1_post, layer.post_attention_layernorm),
        (block.attn.q_norm, layer.self_attn.q_norm),
        (block.attn.k_norm, layer.self_attn.k_norm),
    ):
        x = torch.randn(5, 7, len(norm.w), generator=torch.Generator().manual_seed(2)).bfloat16()
        assert torch.equal(norm(x, {}), other(x))


def test_a_capped_head_has_no_direct_logit_attribution(tmp_path: Path) -> None:
    released(BASES["gemma2"], tmp_path)
    model = load(tmp_path, window=(1, 2), rule="naive")
    with pytest.raises(ValueError, match="but TrainingFreeGemma caps its logits; edge_attribution"):
        direct_logit_attribution(model, random_tokens(), 3, n_loops=2, readout=-1, heads=False)
    released(BASES["gemma3, no cap"], tmp_path)
    model = load(tmp_path, window=(1, 2), rule="naive")
    found = direct_logit_attribution(model, random_tokens(), 3, n_loops=2, readout=-1, heads=False)
    assert torch.allclose(found.values.sum(0) + found.constant, found.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("mistral", "layer_types", ["full_attention"] * 3, "layer_types must name 4 layers"),
        ("mistral", "mlp_bias", True, "has the field 'mlp_bias'"),
        ("qwen2", "attention_bias", True, "has the field 'attention_bias'"),
        ("qwen2", "layer_types", ["sliding_attention"] * 4, "layer_types must be None or"),
        ("gemma2", "hidden_activation", "gelu", "hidden_activation must be 'gelu_pytorch_tanh'"),
        ("gemma2", "use_bidirectional_attention", True, "use_bidirectional_attention must be"),
        ("gemma3", "attn_logit_softcapping", 50.0, "attn_logit_softcapping must be None, got 50"),
        ("gemma3", "rope_local_base_freq", 7.0, r"rope_local_base_freq must be 100\.0, got 7\.0"),
        ("olmo2", "clip_qkv", 8.0, "has the field 'clip_qkv'"),
        ("neox", "hidden_act", "gelu_fast", "hidden_act must be 'gelu', got 'gelu_fast'"),
        ("neox", "rotary_pct", 0.9, "rotary_pct must be 0.4, got 0.9; .* share of channels"),
    ],
)
def test_fields_of_other_bases_that_are_not_computed_are_refused(
    kind: str, field: str, value: object, message: str, tmp_path: Path
) -> None:
    released(BASES[kind], tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, window=(0, 1))


def test_what_stands_beside_the_kinds_of_rotary_positions_changes_nothing(tmp_path: Path) -> None:
    released(BASES["gemma3"], tmp_path)
    config, tokens = tmp_path / "config.json", random_tokens()
    whole = load(tmp_path, window=(0, 1))(tokens, n_loops=2)
    fields = json.loads(config.read_text())
    kinds = {key: fields["rope_parameters"][key] for key in ("full_attention", "sliding_attention")}

    def beside(**more: object) -> Tensor:
        config.write_text(json.dumps({**fields, "rope_parameters": {**kinds, **more}}))
        return load(tmp_path, window=(0, 1))(tokens, n_loops=2)

    assert torch.equal(beside(), whole)
    assert torch.equal(beside(rope_type="default", rope_theta=None), whole)
    with pytest.raises(CheckpointError, match="rope_type must be None or 'default', got 'linear'"):
        beside(rope_type="linear")
    with pytest.raises(CheckpointError, match=r"rope_theta must be None, got 7\.0"):
        beside(rope_theta=7.0)


@pytest.mark.parametrize("kind", ["mistral, sliding", "gemma3"])
def test_a_padded_row_beyond_every_window_changes_nothing(kind: str, tmp_path: Path) -> None:
    released(BASES[kind], tmp_path)
    model, tokens = load(tmp_path, window=(1, 2)).double(), random_tokens(11)
    mask = (torch.arange(11) < 4).long().expand_as(tokens)
    short = model(tokens[:, :4], n_loops=2)
    names = [("**.attn.hook_pattern", lambda value, hook: None)]
    for logits in (
        model(tokens, mask=mask, n_loops=2),
        model.run_with_hooks(tokens, mask=mask, n_loops=2, fwd_hooks=names),
    ):
        assert (logits[:, :4] - short).abs().max() < 1e-9


def as_first_released(folder: Path) -> None:
    """Rewrite a GPT-2 folder as the first releases are: keys without "transformer.", and two
    buffers in each layer.
    """
    tensors = {
        key.removeprefix("transformer."): tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    for layer in range(GPT2["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 11, 11).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")


def test_gpt2_keys_with_and_without_their_prefix(tmp_path: Path) -> None:
    released(BASES["gpt2"], tmp_path)
    logits = load(tmp_path, window=(0, 1))(random_tokens(), n_loops=2)
    as_first_released(tmp_path)
    assert torch.equal(load(tmp_path, window=(0, 1))(random_tokens(), n_loops=2), logits)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_head_that_is_not_gpt2s_embedding_is_refused(prefix: str, tmp_path: Path) -> None:
    released(BASES["gpt2"], tmp_path)
    if not prefix:
        as_first_released(tmp_path)
    mapped = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # the file is replaced
    save_file(
        {**tensors, "lm_head.weight": tensors[f"{prefix}wte.weight"] + 1},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight differs from {prefix}wte\.weight"):
        load(tmp_path, window=(0, 1))
    save_file(
        {**tensors, "lm_head.weight": tensors[f"{prefix}wte.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    assert isinstance(load(tmp_path, window=(0, 1)), TrainingFreeGPT2)


def test_weights_are_used_as_they_lie_in_the_file(tmp_path: Path) -> None:
    released(BASES["gpt2"], tmp_path)
    block, stored = (
        load(tmp_path, window=(1, 1)).blocks[2],
        load_file(tmp_path / "model.safetensors"),
    )
    fused = stored["transformer.h.2.attn.c_attn.weight"]
    assert torch.equal(block.attn.W_QKV, fused)
    assert torch.equal(block.attn.W_K[1], fused[:, 15 + 5 : 15 + 10])
    assert torch.equal(block.mlp.W_in, stored["transformer.h.2.mlp.c_fc.weight"])


# What is refused


@pytest.mark.parametrize(
    ("case", "field", "value", "message"),
    [
        (LLAMA, "hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        (
            LLAMA,
            "rope_scaling",
            {"rope_type": "longrope", "factor": 2.0},
            "rope_scaling must be of the type .* got 'longrope'",
        ),
        (
            LLAMA,
            "rope_scaling",
            {"rope_type": "llama3", "factor": 2.0},
            "rope_scaling of the type 'llama3' needs 'low_freq_factor'",
        ),
        (
            LLAMA,
            "rope_scaling",
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            "partial_rotary_factor must be 1.0, got 0.5",
        ),
        (
            LLAMA,
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 500000.0},
            "rope_scaling must be None or .* rope_parameters",
        ),
        (LLAMA, "num_local_experts", 8, "has the field 'num_local_experts'"),
        (LLAMA, "sliding_window", 16, "has the field 'sliding_window'"),
        (
            LLAMA,
            "model_type",
            "qwen3_moe",
            "no family that can be loaded .its model_type is 'qwen3_moe'",
        ),
        (
            QWEN3,
            "layer_types",
            ["full_attention"] * 5 + ["sliding_attention"],
            "layer_types must be None or",
        ),
        (QWEN3, "head_dim", None, "lacks the field 'head_dim', which must be a whole number"),
        (
            QWEN3,
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 7.0},
            "rope_theta must be 7.0, got 1000000.0; rope_parameters",
        ),
        (QWEN3, "mlp_bias", True, "has the field 'mlp_bias'"),
        (
            QWEN3,
            "attention_bias",
            True,
            (
                "lacks 24 key.s. of a training_free model with 6 layers, first"
                " 'model.layers.0.self_attn"
            ),
        ),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    case: str, field: str, value: object, message: str, folder_with: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with(case, {field: value}), window=(1, 3))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "activation_function",
            "relu",
            "activation_function must be 'gelu_new' or 'gelu_pytorch_tanh', got 'relu'",
        ),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx must be False"),
        ("scale_attn_weights", False, "scale_attn_weights must be True"),
        ("add_cross_attention", True, "add_cross_attention must be False"),
        (
            "tie_word_embeddings",
            False,
            "tie_word_embeddings must be True, got False; GPT-2's head is its token embedding",
        ),
        ("n_experts", 4, "has the field 'n_experts'"),
    ],
)
def test_gpt2_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    released(BASES["gpt2"], tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, window=(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            (
                r"an ordinary model of 6 layers, so say which of them to loop: window= takes"
                r" the first and the last, both included .* \(12, 15\) of 28"
            ),
        ),
        (
            {"window": (3, 1)},
            r"window must be the first and the last layer to loop, .* in 0\.\.5, got \(3, 1\)",
        ),
        ({"window": (1, 6)}, r"window must be .* in 0\.\.5, got \(1, 6\)"),
        (
            {"rule": "heun"},
            (
                "rule must be 'blend', 'euler' or 'naive', got 'heun'; that solver is not computed"
                " here"
            ),
        ),
        ({"rule": "newton"}, "rule must be 'blend', 'euler' or 'naive', got 'newton'$"),
        ({"mode": "both"}, "mode must be 'block' or 'layer', got 'both'"),
        ({"beta": 1.5}, "beta must be a share from 0 to 1, got 1.5"),
        (
            {"rule": "euler", "beta": 0.5},
            "beta belongs to rule='blend', but rule='euler' came with beta=0.5",
        ),
        ({"alpha": 0.7}, "a training_free release does not take alpha=0.7"),
        ({"n_heads": 4}, "a training_free release does not take n_heads=4"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, folder_with: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with(LLAMA, {}), **({"window": (1, 3), **options} if options else {}))


def test_the_fixed_recipe_of_the_paper_is_the_default(folder_with: Callable[..., Path]) -> None:
    cfg = load(folder_with(LLAMA, {}), window=[1, 3], n_loops=3).cfg
    assert isinstance(cfg, TrainingFreeConfig)
    assert (cfg.window, cfg.rule, cfg.beta, cfg.mode, cfg.n_loops) == (
        (1, 3),
        "blend",
        0.5,
        "block",
        3,
    )


def test_no_number_of_passes_is_recorded_unless_it_is_given(
    folder_with: Callable[..., Path],
) -> None:
    model = load(folder_with(QWEN3, {}), window=(2, 4))
    with pytest.raises(ValueError, match="records no number of iterations; pass n_loops="):
        model(random_tokens())
