"""HRM-Text: its golden outputs and its releases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.interp.lens.lens import logit_lens

# Golden outputs


def run_of(h: str, run: str) -> str:
    return f"loops.{h}.high" if run == "H" else f"loops.{h}.low.{run[1:]}"


def low_lens(case: GoldenCase, h: str, low: str) -> Tensor:
    lens = logit_lens(case.model, case.tokens, readout=-1, positions="all", keep_logits=True)
    assert lens.logits is not None
    last = lens.names.index(f"loops.{h}.low.{low}.blocks.{case.model.cfg.n_layers - 1}")
    return lens.logits[last].unflatten(0, tuple(case.tokens.shape))


def first_low_state(case: GoldenCase) -> Tensor:
    return case.model.state_parts(case.model.begin(case.tokens))["low"]


RUN = r"iter\.h(\d+)\.(l\d+|H)\."
BLOCK = RUN + r"block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids|variant\.prefix\.token_type_ids)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    r"init_state\.z_L": first_low_state,
    RUN + r"z_L_in": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_state_in"),
    RUN + r"z_H": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_input"),
    RUN + r"stack_in": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_injected"),
    RUN + r"z_[LH]_out": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_state_out"),
    BLOCK + r"(attn|mlp)_out": lambda case, h, run, j, part: case.activation(
        f"{run_of(h, run)}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, h, run, j, where: case.activation(
        f"{run_of(h, run)}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.pattern": lambda case, h, run, j: case.activation(
        f"{run_of(h, run)}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, h, run, j, which: case.heads_first(
        f"{run_of(h, run)}.blocks.{j}.attn.hook_rot_{which}"
    ),
    BLOCK + r"attn\.v": lambda case, h, run, j: case.heads_first(
        f"{run_of(h, run)}.blocks.{j}.attn.hook_v"
    ),
    BLOCK + r"attn\.gate_logit": (
        lambda case, h, run, j: case.activation(
            f"{run_of(h, run)}.blocks.{j}.attn.hook_gate"
        ).flatten(-2)
    ),
    r"iter\.h(\d+)\.H\.readout_logits": lambda case, h: case.logits(int(h) + 1),
    r"iter\.h(\d+)\.l(\d+)\.z_L_lens_logits": low_lens,
    r"logits": GoldenCase.logits,
    r"variant\.prefix\.logits": lambda case: case.logits(
        token_types=case.golden["variant.prefix.token_type_ids"]
    ),
    r"variant\.prefix_one_block\.logits": lambda case: case.logits(
        token_types=torch.ones_like(case.tokens)
    ),
}


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(GoldenCase("hrm_text"), TABLE, record_error)


# Models that transformers writes

RELEASES: dict[str, dict[str, Any]] = {
    "biases, under the modules' names": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "fused and tied, stretched positions": {
        "tie_word_embeddings": True,
        "embedding_scale": 2.5,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
            "rope_theta": 10.0,
        },
    },
}


@pytest.fixture(scope="module", params=RELEASES)
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A folder that transformers wrote, and its model."""
    from transformers import HrmTextConfig as TheirConfig
    from transformers import HrmTextForCausalLM

    torch.manual_seed(0)
    theirs = HrmTextForCausalLM(
        TheirConfig(
            vocab_size=31,
            hidden_size=15,
            intermediate_size=22,
            num_hidden_layers=2,
            num_attention_heads=5,
            head_dim=4,
            max_position_embeddings=16,
            H_cycles=3,
            L_cycles=2,
            **RELEASES[request.param],
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0.0, 0.02 if "embed" in name else 0.4)
    folder = tmp_path_factory.mktemp("release")
    theirs.save_pretrained(folder)
    if theirs.config.attention_bias:
        save_file(theirs.state_dict(), folder / "model.safetensors")
    return folder, theirs


def test_what_transformers_writes_gives_its_logits(release: tuple[Path, Any]) -> None:
    folder, theirs = release
    ours, tokens = load(folder), torch.arange(2 * 9).view(2, 9) % 31
    types = (torch.arange(9) < torch.tensor([[4], [6]])).long()
    assert ours.cfg.fused == theirs.config.tie_word_embeddings
    for given in (None, types):
        with torch.no_grad():
            expected = theirs(input_ids=tokens, token_type_ids=given).logits
            torch.testing.assert_close(
                ours(tokens, token_types=given),
                expected,
                rtol=0.0,
                atol=5e-5 * float(expected.abs().max()),
            )


@pytest.mark.parametrize("counted", [2, 2 + 2])
def test_every_form_of_a_config_means_the_same(
    release: tuple[Path, Any], counted: int, tmp_path: Path
) -> None:
    folder, _ = release
    values = json.loads((folder / "config.json").read_text())
    assert (values["num_hidden_layers"], values.pop("num_layers_per_stack")) == (2 * 3 * (2 + 1), 2)
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": counted}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert load(tmp_path).cfg == load(folder).cfg


def test_fused_weights_show_the_same_views(release: tuple[Path, Any]) -> None:
    folder, theirs = release
    for ours, module in (
        (load(folder).low, theirs.model.L_module),
        (load(folder).high, theirs.model.H_module),
    ):
        for block, layer in zip(ours, module.layers, strict=True):
            for view, name in (("W_Q", "q"), ("W_K", "k"), ("W_V", "v"), ("W_gate", "gate")):
                stored = getattr(layer.self_attn, f"{name}_proj").weight
                assert torch.equal(getattr(block.attn, view).transpose(1, 2).flatten(0, 1), stored)
            assert torch.equal(block.mlp.W_gate.T, layer.mlp.gate_proj.weight)
            assert torch.equal(block.mlp.W_in.T, layer.mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"embedding_scale": None}, "embedding_scale", 1 / 0.02),
        ({"embedding_scale": None, "initializer_range": 0.1}, "embedding_scale", 1 / 0.1),
        (
            {"rope_parameters": None, "rope_theta": 500, "num_key_value_heads": 3},
            "rope_theta",
            500.0,
        ),
        ({"rope_parameters": None}, "rope_theta", 10000.0),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
        ),
        ({"prefix_lm": None}, "prefix_lm", True),
    ],
)
def test_fields_that_a_config_may_leave_out(
    changes: Mapping[str, Any], field: str, value: object, folder_with: Callable[..., Path]
) -> None:
    assert getattr(load(folder_with("hrm_text", changes)).cfg, field) == value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        (
            "num_key_value_heads",
            1,
            (
                "num_key_value_heads must be 3 or None, got 1; every head has keys and values of"
                " its own"
            ),
        ),
        ("L_cycles", 0, "n_low_loops must be at least 1, got 0"),
        ("L_cycles", "3", "L_cycles must be a whole number, got '3'"),
        ("H_cycles", None, "lacks the field 'H_cycles'"),
        ("num_layers_per_stack", 3, r"lacks 16 key\(s\) .* first 'model.L_module.layers.2"),
        (
            "rope_parameters",
            {"rope_type": "longrope", "factor": 2.0},
            "rope_scaling must be of the type .* got 'longrope'",
        ),
        (
            "rope_parameters",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor must be 1.0, got 0.5",
        ),
        (
            "rope_parameters",
            {"mscale": 0.5},
            "has the field 'mscale' .* which this family's loader does not know",
        ),
        ("attention_bias", True, r"lacks 20 key\(s\) .* first 'model.L_module.layers.0.self_attn"),
        ("q_norm", True, "has the field 'q_norm' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("hrm_text", {field: value}))


def test_recorded_cycles_can_be_replaced() -> None:
    assert load(GOLDEN / "hrm_text", n_loops=5).cfg == replace(
        load(GOLDEN / "hrm_text").cfg, n_loops=5
    )
