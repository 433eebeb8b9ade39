"""The architectures of GGUF files that can be read: their fields and tensors under the names that
transformers gives them, so that the tables of ordinary models read them on.

llama.cpp stores the rows of a Llama's queries and keys in another order (pairs of channels that are
turned together are neighbours), Gemma's norms with the 1 added to the weight, and Llama 3's scaling
of angles as a tensor of divisors. All three are undone here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.gguf.reader import GgufFile
from loopscope.checkpoints.gguf.sizes import check_sizes
from loopscope.models.blocks.rotary import Rotary

_FREQUENCIES = "rope_freqs.weight"
_EDGES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_GEMMA_SIZES = {
    **_SIZES,
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GPT2_SIZES = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_ELSEWHERE = (  # repeated by a tensor's shape, or read by `_scaling` and `check_sizes`
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
)
_LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the sizes whose scores have a divisor apart

Change = Callable[[str, Tensor, GgufFile], Tensor]


@dataclass(frozen=True)
class Kind:
    """How one architecture is read.

    Attributes:
        config: Config fields that have no field of their own in the file, by transformers'
            names.
        sizes: transformers' name of each field.
        block: transformers' name of each part of a block.
        edges, layers: The names of the other tensors, and of the list of blocks.
        change: A tensor without what llama.cpp changed in it, given its name in the file.
    """

    config: Callable[[GgufFile], Mapping[str, Any]]
    sizes: Mapping[str, str] = field(default_factory=lambda: _SIZES)
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    edges: Mapping[str, str] = field(default_factory=lambda: _EDGES)
    layers: str = "model.layers"
    change: Change = lambda name, tensor, file: tensor

    def key(self, name: str) -> str | None:
        """transformers' name of a tensor; None for one that it has no name for."""
        stem, _, ending = name.rpartition(".")
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if found is None:
            return f"{self.edges[stem]}.{ending}" if stem in self.edges else None
        part = self.block.get(found[2])
        return None if part is None else f"{self.layers}.{found[1]}.{part}.{ending}"


def config_of(file: GgufFile) -> dict[str, Any]:
    """The config of a file under transformers' names.

    Raises:
        CheckpointError: Another architecture, or a field that is not read here.
    """
    kind = kind_of_file(file)
    known = {name: value for name, value in file.fields.items() if name in kind.sizes}
    unknown = sorted(set(file.fields) - set(known) - set(_ELSEWHERE))
    if unknown:
        raise CheckpointError(
            f"{file.path} has the field {f'{file.architecture}.{unknown[0]}'!r}"
            f" (= {shown(file.fields[unknown[0]])}), which is not read here; it is refused, because"
            " it could change what the model computes"
        )
    if "token_embd.weight" not in file.names:
        raise CheckpointError(f"{file.path} lacks the tensor 'token_embd.weight'")
    check_sizes(file)
    return {
        "vocab_size": file.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file.names,
        **{kind.sizes[name]: value for name, value in known.items()},
        **kind.config(file),
    }


def tensors_of(file: GgufFile) -> dict[str, Tensor]:
    """The tensors of a file under transformers' names, in float32; a tensor without a
    transformers name keeps the file's name.
    """
    kind = kind_of_file(file)
    names = [name for name in file.names if name != _FREQUENCIES]
    return {kind.key(name) or name: kind.change(name, file.tensor(name), file) for name in names}


def keys_of(file: GgufFile) -> list[str]:
    """The keys of `tensors_of`, without the tensors, and that of the divisors of angles."""
    kind = kind_of_file(file)
    return [kind.key(name) or name for name in file.names]


def kind_of_file(file: GgufFile) -> Kind:
    """The kind of a file; CheckpointError for an architecture that is not read."""
    if file.architecture not in KINDS:
        raise CheckpointError(
            f"{file.path} has the architecture {shown(file.architecture)}; GGUF files are read of"
            f" {', '.join(KINDS)}"
        )
    return KINDS[file.architecture]


def _scaling(file: GgufFile) -> dict[str, Any]:
    """The scaling of angles: a kind with its numbers, or Llama 3's as a tensor of divisors."""
    usual = "linear" if "rope.scaling.factor" in file.fields else "none"  # as in llama.cpp
    kind = file.fields.get("rope.scaling.type", usual)
    numbers = {
        "factor": file.fields.get("rope.scaling.factor"),
        "original_max_position_embeddings": file.fields.get("rope.scaling.original_context_length"),
    }
    if _FREQUENCIES in file.names:
        if kind != "none":
            raise CheckpointError(
                f"{file.path} must scale angles by {_FREQUENCIES!r} or by a scaling of its fields,"
                f" got both, the second of the type {shown(kind)}"
            )
        return {"rope_scaling": _llama3(file)}
    if kind == "none":
        return {}
    stated = {name: value for name, value in numbers.items() if value is not None}
    if kind == "linear":
        stated.pop("original_max_position_embeddings", None)
    return {"rope_scaling": {"rope_type": kind, **stated}}


def _llama3(file: GgufFile) -> dict[str, Any]:
    """Llama 3's scaling, whose numbers besides the factor are the same in all of its releases."""
    divisors = file.tensor(_FREQUENCIES)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    width, theta = 2 * len(divisors), file.fields.get("rope.freq_base", 10000.0)
    plain, scaled = (
        Rotary(width, theta, each).frequencies(divisors.device) for each in (None, scaling)
    )
    if not torch.allclose(plain / scaled, divisors, rtol=1e-3):
        raise CheckpointError(
            f"{file.path}: {_FREQUENCIES!r} must hold the divisors of Llama 3's releases, got"
            f" {shown(divisors.tolist())}"
        )
    return scaling


def _llama(file: GgufFile) -> dict[str, Any]:
    width = file.fields.get("rope.dimension_count")
    found = {"model_type": "llama", "hidden_act": "silu", **_scaling(file)}
    biased = {"attention_bias": "blk.0.attn_q.bias" in file.names}
    return {**found, **biased, **({} if width is None else {"head_dim": width})}


def _qwen(model_type: str) -> Callable[[GgufFile], dict[str, Any]]:
    return lambda file: {"model_type": model_type, "hidden_act": "silu", **_scaling(file)}


def _gemma(model_type: str) -> Callable[[GgufFile], dict[str, Any]]:
    def config(file: GgufFile) -> dict[str, Any]:
        fields = file.fields
        large = fields.get("block_count") == _LARGE_GEMMA[file.architecture]
        heads = fields.get("attention.head_count", 1)
        width = fields.get("attention.key_length", 256)
        return {
            "model_type": model_type,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": fields["embedding_length"] / heads if large else width,
            **_scaling(file),
        }

    return config


def _gpt2(file: GgufFile) -> dict[str, Any]:
    tied = {"tie_word_embeddings": True}  # a head that is stored must be the embedding
    return {"model_type": "gpt2", "activation_function": "gelu_new", **tied}


def _in_halves(name: str, tensor: Tensor, file: GgufFile) -> Tensor:
    """Rows of a Llama's queries and keys in the order of transformers: channel i is turned together
    with channel i + d_head/2.
    """
    counts = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    part = name.split(".")[-2]
    if part not in counts:
        return tensor
    heads = file.fields.get(counts[part], file.fields.get("attention.head_count", 1))
    pairs: Tensor = tensor.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _without_one(name: str, tensor: Tensor, file: GgufFile) -> Tensor:
    return tensor - 1 if name.endswith("norm.weight") else tensor


def _input_first(name: str, tensor: Tensor, file: GgufFile) -> Tensor:
    inside = name.startswith("blk.") and tensor.ndim == 2
    return tensor.T.contiguous() if inside else tensor


_GEMMA_BLOCK = {**_BLOCK, **_GEMMA_NORMS}
KINDS: Mapping[str, Kind] = {
    "llama": Kind(_llama, change=_in_halves),
    "qwen2": Kind(_qwen("qwen2")),
    "qwen3": Kind(_qwen("qwen3"), block={**_BLOCK, **_HEAD_NORMS}),
    "gemma2": Kind(_gemma("gemma2"), _GEMMA_SIZES, _GEMMA_BLOCK, change=_without_one),
    "gemma3": Kind(
        _gemma("gemma3_text"), _GEMMA_SIZES, {**_GEMMA_BLOCK, **_HEAD_NORMS}, change=_without_one
    ),
    "gpt2": Kind(
        _gpt2,
        _GPT2_SIZES,
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        "transformer.h",
        _input_first,
    ),
}
