"""GGUF files: what llama.cpp changed is undone, and what cannot be read is a sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.gguf.kinds import KINDS
from loopscope.checkpoints.load import load, read_family
from loopscope.models.core.base import LoopedModel

SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 23,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LARGE = {"max_position_embeddings": 99999, "rope_theta": 500000.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 3}
FIELDS: dict[str, Any] = {
    "block_count": 3,
    "context_length": 23,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
OF_GEMMA = {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 3}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
TOKENS = torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(1))
WINDOW = {"window": (1, 1), "vocab": False}


def sized(kind: Any, config: Any, **more: Any) -> Callable[[], PreTrainedModel]:
    return lambda: kind(config(**{**SIZES, "rms_norm_eps": 1e-5, **more}))


CASES: dict[str, tuple[str, Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (
        "llama",
        sized(LlamaForCausalLM, LlamaConfig, rope_theta=500.0),
        {**FIELDS, "rope.freq_base": 500.0, "rope.dimension_count": 8, "vocab_size": 29},
    ),
    "llama3, tied": (
        "llama",
        sized(
            LlamaForCausalLM, LlamaConfig, rope_scaling=LLAMA3, tie_word_embeddings=True, **LARGE
        ),
        {**FIELDS, "rope.freq_base": 500000.0, "context_length": 99999},
    ),
    "qwen2": (
        "qwen2",
        sized(Qwen2ForCausalLM, Qwen2Config, rope_theta=300.0),
        {**FIELDS, "rope.freq_base": 300.0},
    ),
    "qwen3": (
        "qwen3",
        sized(Qwen3ForCausalLM, Qwen3Config, head_dim=16),
        {**FIELDS, "attention.key_length": 16, "attention.value_length": 16},
    ),
    "gemma2": (
        "gemma2",
        sized(Gemma2ForCausalLM, Gemma2Config, **GEMMA, final_logit_softcapping=2.0),
        {**FIELDS, **OF_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3",
        sized(
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            **GEMMA,
            rope_theta=700.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        {**FIELDS, **OF_GEMMA, **LINEAR, "rope.freq_base": 700.0},
    ),
    "gpt2": (
        "gpt2",
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=29, n_layer=3, n_embd=32, n_head=4, n_positions=23)
        ),
        {
            **{name: FIELDS[name] for name in ("block_count", "context_length")},
            "embedding_length": 32,
            "feed_forward_length": 128,
            "attention.head_count": 4,
            "attention.layer_norm_epsilon": 1e-5,
        },
    ),
}


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order: channel 2i is turned together with channel 2i + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def stored(architecture: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor as llama.cpp's converter writes it."""
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
    if architecture == "llama" and heads:
        return in_pairs(tensor, heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    turned = architecture == "gpt2" and name.startswith("blk.") and tensor.ndim == 2
    return tensor.T.contiguous() if turned else tensor


def names_in(architecture: str) -> dict[str, str]:
    """The file's name of each key of transformers."""
    kind = KINDS[architecture]
    blocks = [f"blk.{i}.{part}" for i in range(3) for part in kind.block]
    names = [f"{stem}.{end}" for stem in (*kind.edges, *blocks) for end in ("weight", "bias")]
    return {str(kind.key(name)): name for name in names}


def write(
    case: str,
    path: Path,
    *,
    codes: GGMLQuantizationType = GGMLQuantizationType.F32,
    fields: Mapping[str, Any] | None = None,
    divisors: Tensor | None = None,
) -> PreTrainedModel:
    """A random model of a case, written as a GGUF file; the model has the numbers of the codes."""
    architecture, make, own = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    writer, names = GGUFWriter(path, architecture), names_in(architecture)
    for name, value in {**own, **(fields or {})}.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{architecture}.{name}", value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    tied = bool(model.config.tie_word_embeddings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
            if tied and key == "lm_head.weight":
                continue
            rows = stored(architecture, names[key], parameter)
            coded = codes if parameter.ndim == 2 else GGMLQuantizationType.F32
            data = quantize(rows.numpy(), coded)
            writer.add_tensor(names[key], data, raw_dtype=coded)
            if coded is not GGMLQuantizationType.F32:
                change = KINDS[architecture].change
                numbers = torch.from_numpy(np.array(dequantize(data, coded)))
                file: Any = type("File", (), {"fields": own})
                parameter.copy_(change(names[key], numbers, file))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.set_attn_implementation("eager")  # early 5.x takes a kernel without Gemma 2's caps
    return model


def divisors_of(scaling: Mapping[str, Any]) -> Tensor:
    """What llama.cpp stores of a Llama 3: by how much each pair's angle is divided."""
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **LARGE}, rope_scaling=dict(scaling)))
    plain = LlamaForCausalLM(LlamaConfig(**{**SIZES, **LARGE}))
    divisors: Tensor = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    return divisors


@torch.no_grad()
def assert_same_logits(ours: LoopedModel, theirs: PreTrainedModel) -> None:
    expected = theirs(TOKENS, use_cache=False).logits
    error = (ours(TOKENS, n_loops=1) - expected).abs().max()
    assert error < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_that_it_was_written_from(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    theirs = write(case, path, divisors=divisors_of(LLAMA3) if case == "llama3, tied" else None)
    ours = load(path, **WINDOW)
    assert_same_logits(ours, theirs)
    assert read_family(tmp_path) == ours.cfg.family
    with torch.no_grad():
        assert not torch.allclose(ours(TOKENS, n_loops=3), ours(TOKENS, n_loops=1), atol=1e-3)


@pytest.mark.parametrize("codes", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_codes_are_turned_into_numbers(codes: str, tmp_path: Path) -> None:
    theirs = write("llama", tmp_path / "a.gguf", codes=GGMLQuantizationType[codes])
    ours = load(tmp_path, **WINDOW)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, theirs)


def test_a_llama_is_what_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    write("llama", tmp_path / "a.gguf", codes=GGMLQuantizationType.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    assert_same_logits(load(tmp_path, **WINDOW), theirs)


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_count": 8}, r"has the field 'llama\.expert_count' \(= 8\), which is not read"),
        ({"rope.scaling.type": "longrope"}, "rope_scaling must be of the type .* got 'longrope'"),
        ({"block_count": 4}, "lacks 9 key.s. of a training_free model with 4 layers"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write("llama", tmp_path / "a.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=rf"a\.gguf.*{message}"):
        load(tmp_path, **WINDOW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention.head_count": 0}, "head_count must be a whole number above 0, got 0"),
        ({"attention.head_count": 4.0}, r"head_count must be a whole number above 0, got 4\.0"),
        ({"attention.head_count_kv": 3}, "3 heads of keys must divide 4 heads"),
        ({"rope.dimension_count": 6}, "rope.dimension_count must be the width of a head, 8, got 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write("llama", tmp_path / "a.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=rf"a\.gguf.*{message}"):
        load(tmp_path, **WINDOW)


def test_a_factor_without_a_type_is_linear_and_beside_divisors_refused(tmp_path: Path) -> None:
    write("llama", tmp_path / "a.gguf", fields={"rope.scaling.factor": 8.0})
    found = load(tmp_path, **WINDOW)(TOKENS, n_loops=1)
    write("llama", tmp_path / "a.gguf", fields=LINEAR)
    assert torch.equal(found, load(tmp_path, **WINDOW)(TOKENS, n_loops=1))
    write("llama3, tied", tmp_path / "a.gguf", fields=LINEAR, divisors=divisors_of(LLAMA3))
    with pytest.raises(CheckpointError, match="got both, the second of the type 'linear'"):
        load(tmp_path, **WINDOW)


def test_divisors_that_are_not_llama_3s_are_refused(tmp_path: Path) -> None:
    write("llama", tmp_path / "a.gguf", divisors=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(CheckpointError, match="must hold the divisors of Llama 3's releases"):
        load(tmp_path, **WINDOW)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'mamba'; GGUF files are read of llama"):
        load(tmp_path, **WINDOW)


@pytest.mark.parametrize("kept", [0, 3, 40, 700, -900])
def test_a_file_that_is_cut_short_is_named(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write("llama", path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"a\.gguf is damaged or cut short") as raised:
        load(path, **WINDOW)
    assert "\n" not in str(raised.value)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write("llama", path)
    content = bytearray(path.read_bytes())
    content[-8:-4] = np.array([np.nan], dtype=np.float32).tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.gguf: .* NaN or infinite"):
        load(path, **WINDOW)


def test_without_the_package_a_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("llama", tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf; pip install 'loopscope\[g"):
        load(tmp_path, **WINDOW)


def test_the_window_must_be_said_and_two_files_are_a_choice(tmp_path: Path) -> None:
    write("llama", tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"a\.gguf: this is an ordinary model of 3 layers"):
        load(tmp_path, vocab=False)
    write("llama", tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints; name one of a\.gguf, b\.gguf"):
        load(tmp_path, **WINDOW)
