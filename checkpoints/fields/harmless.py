"""The fields of a released config that never change a result, each under the reason.

A field falls under one of three rules. Where a family computes with a field, its table reads the
field. Where a field never changes a result, or not with the value that it has, it stands here (for
every family) or in the family's table. Every other field is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

Reasons = Mapping[str, tuple[str, ...]]

COMMON: Reasons = {
    "names the model, its classes, its files or the versions that wrote it": (
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "architectures",
        "auto_map",
        "base_model",
        "custom_pipelines",
        "finetuned_from",
        "language",
        "library_name",
        "license",
        "model_id",
        "model_name",
        "model_type",
        "name_or_path",
        "pipeline_tag",
        "tags",
        "tokenizer_class",
        "tokenizer_name",
        "transformers_version",
        "transformers.js_config",
    ),
    "repeats the number format of the weights": (
        "_pre_quantization_dtype",
        "dtype",
        "torch_dtype",
        "use_bfloat16",
    ),
    "chooses among programs that compute the same": (
        "*_attn_implementation",
        "*_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_flash_attn_2_enabled",
        "attn_implementation",
        "cache_implementation",
        "chunk_size_feed_forward",
        "flash_attention",
        "device_map",
        "fuse_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
        "low_cpu_mem_usage",
        "torchscript",
        "trust_remote_code",
        "use_cache",
        "use_flash_attention",
        "use_flash_attention_2",
        "use_flash_attn",
        "use_liger_kernel",
        "use_sdpa",
    ),
    "chooses what a call returns": (
        "keys_to_ignore_at_inference",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_router_logits",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "use_return_dict",
    ),
    "acts in training alone": (
        "*_dropout",
        "*_dropout_prob",
        "*_pdrop",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "init_std",
        "initializer_factor",
        "initializer_range",
        "label_smoothing",
        "loss_type",
        "neftune_noise_alpha",
        "router_aux_loss_coef",
        "tf_legacy_loss",
    ),
    "is left over from a trainer": (
        "axolotl_*",
        "dpo_*",
        "grpo_*",
        "max_seq_len",
        "max_seq_length",
        "max_sequence_length",
        "model_max_length",
        "rltt_*",
        "seq_length",
        "sft_*",
        "trl_*",
        "unsloth_*",
        "wandb_*",
    ),
    "belongs to a head for another task": (
        "_num_labels",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
    ),
    "is a token id or a setting of the tokenizer": (
        "add_bos_token",
        "add_eos_token",
        "bos_token",
        "bos_token_id",
        "chat_template",
        "cls_token_id",
        "decoder_start_token_id",
        "eos_token",
        "eos_token_id",
        "mask_token_id",
        "pad_token",
        "pad_token_id",
        "padding_side",
        "sep_token_id",
        "unk_token_id",
    ),
    "is a setting of generation": (
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "generation_config",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ),
}


def _whole_context(value: Any, values: Mapping[str, Any]) -> bool:
    """Whether a sliding window is as long as the longest input."""
    longest = values.get("max_position_embeddings")
    return _is_whole(value) and _is_whole(longest) and value >= longest


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all_full(value: Any, values: Mapping[str, Any]) -> bool:
    """Whether every layer attends to the whole input."""
    return isinstance(value, list) and all(each == "full_attention" for each in value)


def _is(*allowed: Any) -> Callable[[Any, Mapping[str, Any]], bool]:
    """Whether a value is one of some; true and 1 are not the same."""
    return lambda value, values: any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
    )


# The values with which a field of some models switches nothing on.
SWITCHED_OFF: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "add_cross_attention": _is(False),
    "alibi": _is(False),
    "attention_bias": _is(False),
    "attn_output_gate": _is(False),
    "embedding_multiplier": _is(1.0),
    "is_decoder": _is(False),
    "is_encoder_decoder": _is(False),
    "is_llama_config": _is(True),
    "layer_types": _all_full,
    "load_in_4bit": _is(False),
    "load_in_8bit": _is(False),
    "logit_scale": _is(1.0),
    "logits_scaling": _is(1.0),
    "mlp_bias": _is(False),
    "no_rope_layers": _is([]),
    "num_experts": _is(0),
    "num_local_experts": _is(0),
    "num_nextn_predict_layers": _is(0),
    "partial_rotary_factor": _is(1.0),
    "pretraining_tp": _is(1),
    "pruned_heads": _is({}),
    "qk_layernorm": _is(False),
    "qk_norm": _is(False),
    "qkv_bias": _is(False),
    "quantization_config": _is({}),
    "residual_multiplier": _is(1.0),
    "rope_interleaved": _is(False),
    "rotary_pct": _is(1.0),
    "sliding_window": _whole_context,
    "tie_encoder_decoder": _is(False),
    "use_alibi": _is(False),
    "use_mrope": _is(False),
    "use_parallel_residual": _is(False),
    "use_qk_norm": _is(False),
    "use_sliding_window": _is(False),
}


def changes_nothing(name: str, values: Mapping[str, Any], own: Reasons) -> bool:
    """Whether a field that the family does not compute with never changes a result.

    Args:
        name: The field.
        values: The whole config. A field that is null sets nothing.
        own: The list of the family.
    """
    off = SWITCHED_OFF.get(name)
    return (
        values[name] is None
        or (off is not None and off(values[name], values))
        or any(
            fnmatchcase(name, pattern)
            for reasons in (COMMON, own)
            for patterns in reasons.values()
            for pattern in patterns
        )
    )
