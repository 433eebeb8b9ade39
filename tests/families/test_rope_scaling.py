"""Scaled rotary positions: as transformers computes them, in all families that read a config's
rotary fields, and refused where two fields contradict each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.models.blocks.rotary import Rotary
from paths import GOLDEN

ORIGINAL, LENGTH = 9, 31
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 22,
    "num_attention_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": YARN,
    "yarn, all fields": {
        **YARN,
        "beta_fast": 3.0,
        "beta_slow": 0.2,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn, a given magnitude": {**YARN, "attention_factor": 1.7, "beta_fast": 2.0},
    "yarn by the context": {"rope_type": "yarn", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
}
BASES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "llama": lambda rope: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_hidden_layers=3, rope_parameters=rope)
    ),
    "qwen3": lambda rope: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, num_key_value_heads=1, num_hidden_layers=3, rope_parameters=rope)
    ),
    "hrm_text": lambda rope: HrmTextForCausalLM(
        HrmTextConfig(**SIZES, num_hidden_layers=1, rope_parameters=rope)
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"window": (1, 1), "n_loops": 1},
    "qwen3": {"window": (1, 1), "n_loops": 1},
    "hrm_text": {},
}


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(0, 29, (3, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", BASES)
def test_logits_are_those_of_the_reference_class(base: str, scaling: str, tmp_path: Path) -> None:
    """Also beyond the length that the model was made for, where a scaling begins to act."""
    torch.manual_seed(0)
    theirs = BASES[base]({"rope_theta": 300.0, **SCALINGS[scaling]}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, **OPTIONS[base])
    assert ours.cfg.n_ctx == (ORIGINAL if scaling == "linear" else 4 * ORIGINAL)
    for length in (5, ORIGINAL) if scaling == "linear" else (5, ORIGINAL, LENGTH):
        tokens = tokens_of(length)
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            torch.testing.assert_close(
                ours(tokens), expected, rtol=0, atol=2e-6 * float(expected.abs().max())
            )


def test_a_scaling_moves_the_angles() -> None:
    """Otherwise the comparison above would show nothing."""
    positions = torch.arange(LENGTH)[None]
    plain = Rotary(8, 300.0).tables(positions)[1]
    for scaling in SCALINGS.values():
        known = {"original_max_position_embeddings": ORIGINAL, **scaling}
        assert float((Rotary(8, 300.0, known).tables(positions)[1] - plain).abs().max()) > 0.05


def test_dynamic_angles_follow_the_longest_row_of_a_call() -> None:
    rotary = Rotary(8, 300.0, {**YARN, "rope_type": "dynamic"})
    whole, short = rotary.tables(torch.arange(LENGTH)[None]), torch.arange(ORIGINAL)[None]
    last = rotary.tables(torch.tensor([[4, LENGTH - 1]]))
    assert torch.equal(last[0][0], whole[0][0, [4, LENGTH - 1]])
    assert torch.equal(rotary.tables(short)[0], Rotary(8, 300.0).tables(short)[0])


# One function reads them for all families

NEWER = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 2.0}
OLDER = {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 10000}
FAMILIES = (
    "hrm_text",
    "nanbeige",
    "ouro",
    "retrofit_llama",
    "retrofit_olmo",
    "training_free_llama",
    "training_free_qwen3",
)
WITHOUT: dict[str, None] = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters"))


def options_of(case: str) -> dict[str, Any]:
    return {"window": (1, 3)} if case.startswith("training_free") else {}


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [{"rope_parameters": NEWER}, OLDER, {"rope_parameters": NEWER, **OLDER}],
    ids=["newer", "older", "both"],
)
def test_the_newer_and_the_older_fields_mean_the_same(
    case: str, fields: Mapping[str, object], folder_with: Callable[..., Path]
) -> None:
    cfg: Any = load(folder_with(case, {**WITHOUT, **fields}), **options_of(case)).cfg
    own = json.loads((GOLDEN / case / "config.json").read_text())["max_position_embeddings"]
    assert cfg.rope_theta == 10000.0
    assert Rotary(8, 10000.0, cfg.rope_scaling).scaling == cfg.rope_scaling
    assert cfg.rope_scaling["original_max_position_embeddings"] == own
    assert cfg.n_ctx == 2 * own


CONTRADICTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 700.0}},
        r"rope_theta must be 700.0, got 500.0; rope_parameters.rope_theta gives the base",
    ),
    (
        {"rope_scaling": {"rope_theta": 5.0}, "rope_parameters": {"rope_theta": 7.0}},
        r"rope_parameters.rope_theta must be 5.0, got 7.0; rope_scaling.rope_theta",
    ),
    (
        {**OLDER, "rope_parameters": {**NEWER, "factor": 3.0}},
        "rope_scaling must be None or .*'factor': 3.0.* got .*'factor': 2.0",
    ),
    (
        {**OLDER, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling must be None or .*'default'.* got .*'yarn'",
    ),
    (
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": "5"}},
        "rope_theta must be a number, got '5'",
    ),
    (
        {
            "rope_theta": 5.0,
            "rope_scaling": YARN,
            "original_max_position_embeddings": 12,
        },
        "original_max_position_embeddings must be 9, as the scaling says, got 12",
    ),
    (
        {"rope_theta": 5.0, "rope_scaling": {**YARN, "beta_fast": "32"}},
        "rope_scaling's beta_fast must be a number, got '32'",
    ),
    (
        {"rope_theta": 5.0, "rope_scaling": {**YARN, "truncate": 1}},
        "rope_scaling's truncate must be true or false, got 1",
    ),
    (
        {"rope_theta": 5.0, "rope_scaling": {**YARN, "attn_factor": 1}},
        "has the field 'attn_factor' in rope_scaling .* ignore=.'rope_scaling'",
    ),
    (
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        "rope_scaling must be of the type .* got 'longrope'",
    ),
    ({"rope_theta": 1.0, "rope_scaling": YARN}, "'yarn' needs a d_head of at least 4 and a"),
)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [(case, *each) for case, each in zip(cycle(FAMILIES), CONTRADICTIONS, strict=False)],
)
def test_contradictions_and_what_is_not_computed_are_refused_by_name(
    case: str, fields: Mapping[str, object], message: str, folder_with: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with(case, {**WITHOUT, **fields}), **options_of(case))


@pytest.mark.parametrize(
    ("base", "message"),
    [(50000, None), (10000.0, "rope_base must be 10000.0, got 50000.0; rope_theta gives the base")],
)
def test_a_second_base_beside_that_of_huginn_must_say_the_same(
    base: float, message: str | None, folder_with: Callable[..., Path]
) -> None:
    folder = folder_with("huginn", {"rope_theta": base})
    if message is None:
        assert load(folder).cfg == load(GOLDEN / "huginn").cfg
        return
    with pytest.raises(CheckpointError, match=message):
        load(folder)
