"""Nanbeige: its golden outputs with one residual stream and with several, its switches, and what is
refused.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from family_toys import random_tokens
from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.models.core.registry import build
from loopscope.models.families.nanbeige import Nanbeige, NanbeigeConfig
from toy import assert_close, is_close, randomize_

SIZES: dict[str, Any] = {
    "n_layers": 2,
    "n_loops": 3,
    "d_model": 15,
    "n_heads": 6,
    "n_key_value_heads": 2,
    "head_dim": 4,
    "d_mlp": 22,
    "d_vocab": 29,
}


def fresh(**changes: Any) -> Nanbeige:
    model = build(NanbeigeConfig(**{**SIZES, **changes})).double()
    assert isinstance(model, Nanbeige)
    return model


def folder_of(
    case: str,
    into: Path,
    changes: Mapping[str, object],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """A copy of a case's folder with some config fields changed and some tensors added."""
    values = json.loads((GOLDEN / case / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**values, **changes}))
    if tensors is None:
        shutil.copy(GOLDEN / case / "model.safetensors", into)
    else:
        save_file(
            {**load_file(GOLDEN / case / "model.safetensors"), **tensors},
            into / "model.safetensors",
        )
    return into


def with_the_norm_once(case: GoldenCase) -> Tensor:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        return load(folder_of(case.name, Path(folder), {"skip_loop_final_norm": True}))(case.tokens)


def returned_states(case: GoldenCase) -> Tensor:
    last = f"loops.{case.n_loops - 1}"
    between = [
        case.activation(f"{last}.blocks.{j}.hook_resid_post")
        for j in range(case.model.cfg.n_layers - 1)
    ]
    return torch.stack(
        [
            case.activation(f"{last}.hook_state_in"),
            *between,
            case.activation(f"{last}.hook_state_out"),
        ]
    )


BLOCK = r"iter\.(\d+)\.block\.(\d+)\."
BOTH: dict[str, Compute] = {
    r"(input_ids)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    r"iter\.(\d+)\.state_in": lambda case, t: case.activation(f"loops.{t}.hook_state_in"),
    r"iter\.(\d+)\.state_out": lambda case, t: case.activation(f"loops.{t}.hook_state_out"),
    r"iter\.(\d+)\.loop_out": lambda case, t: case.activation(
        f"loops.{t}.blocks.{case.model.cfg.n_layers - 1}.hook_resid_post"
    ),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    r"iter\.(\d+)\.readout_logits": lambda case, t: case.logits(int(t) + 1),
    r"logits": lambda case: case.logits(),
    r"variant\.skip_loop_final_norm\.logits": with_the_norm_once,
}
PLAIN: dict[str, Compute] = {
    **BOTH,
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, t, j, which: case.heads_first(
        f"loops.{t}.blocks.{j}.attn.hook_rot_{which}"
    ),
    r"returned_hidden_states": returned_states,
    r"variant\.loop_loss_weights\.logits": lambda case: case.logits(
        2
    ),  # one weight means two iterations
}
STREAMS: dict[str, Compute] = {
    **BOTH,
    r"iter\.(\d+)\.streams_in": lambda case, t: case.activation(
        f"loops.{t}.blocks.0.hook_streams_pre"
    ),
    BLOCK + r"(attn|mlp)_hc\.h_res": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.{part}_hc.hook_keep"
    ),
    BLOCK + r"(attn|mlp)_hc\.h_post": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.{part}_hc.hook_write"
    ),
    BLOCK + r"(attn|mlp)_hc\.aggregated": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.{part}_hc.hook_collapsed"
    ),
    BLOCK + r"(attn|mlp)_hc\.sublayer_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"streams_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_streams_{where}"
    ),
}


@pytest.mark.parametrize(("name", "table"), [("nanbeige", PLAIN), ("nanbeige_mhc", STREAMS)])
def test_golden_outputs(
    name: str, table: Mapping[str, Compute], record_error: Callable[[str, str, float], None]
) -> None:
    check_case(GoldenCase(name), table, record_error)


def test_stored_frequencies_are_left_out(tmp_path: Path) -> None:
    stored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(4)}
    case = GoldenCase("nanbeige")
    model = load(folder_of("nanbeige", tmp_path, {}, stored))
    with torch.no_grad():
        assert torch.equal(model(case.tokens), case.logits())


def test_rotary_positions_may_be_written_twice(tmp_path: Path) -> None:
    case = GoldenCase("nanbeige")
    twice = {"rope_parameters": {"rope_theta": case.model.cfg.rope_theta, "rope_type": "default"}}
    assert load(folder_of("nanbeige", tmp_path, twice)).cfg == case.model.cfg


def test_head_norms_and_biases_follow_the_formula(tmp_path: Path) -> None:
    """Layer 0 by hand: x W + b, normed over each head's channels and then rotated; and the MLP with
    its biases.
    """
    generator, more = torch.Generator().manual_seed(4), {}
    attention, mlp = {"q": 32, "k": 16, "v": 16, "o": 24}, {"gate": 36, "up": 36, "down": 24}
    for i in range(4):
        more |= {
            f"model.layers.{i}.self_attn.{p}_proj.bias": torch.randn(n, generator=generator)
            for p, n in attention.items()
        }
        more |= {
            f"model.layers.{i}.mlp.{p}_proj.bias": torch.randn(n, generator=generator)
            for p, n in mlp.items()
        }
        more |= {
            f"model.layers.{i}.self_attn.{p}_layernorm.weight": torch.randn(8, generator=generator)
            for p in ("q", "k")
        }
    switches = {"qk_layernorm": True, "attention_bias": True, "mlp_bias": True}
    folder = folder_of("nanbeige", tmp_path, switches, more)
    model, stored = load(folder).double(), load_file(folder / "model.safetensors")
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens, n_loops=2, names_filter="loops.1.blocks.0.**")
    at, theirs = (
        "loops.1.blocks.0.",
        {key.removeprefix("model.layers.0."): value.double() for key, value in stored.items()},
    )
    assert isinstance(model, Nanbeige)

    def projected(x: Tensor, name: str) -> Tensor:
        return x @ theirs[f"{name}_proj.weight"].T + theirs[f"{name}_proj.bias"]

    for part in ("q", "k"):
        heads = projected(cache[at + "ln1.hook_out"], f"self_attn.{part}").unflatten(-1, (-1, 8))
        assert_close(cache[f"{at}attn.hook_{part}"], heads)
        normed = (
            theirs[f"self_attn.{part}_layernorm.weight"]
            * heads
            / (heads.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        )
        assert_close(
            cache[f"{at}attn.hook_rot_{part}"],
            model.rotary(normed, torch.arange(tokens.shape[1]).expand(tokens.shape)),
        )
    assert_close(
        cache[at + "attn.hook_v"].flatten(2),
        projected(cache[at + "ln1.hook_out"], "self_attn.v"),
    )
    assert_close(
        cache[at + "hook_attn_out"], projected(cache[at + "attn.hook_z"].flatten(2), "self_attn.o")
    )
    gate, up = (projected(cache[at + "ln2.hook_out"], f"mlp.{part}") for part in ("gate", "up"))
    assert_close(cache[at + "hook_mlp_out"], projected(gate * gate.sigmoid() * up, "mlp.down"))


@pytest.mark.parametrize("boundary_norm", [True, False])
def test_identical_streams_that_are_only_written_to_are_one_stream(boundary_norm: bool) -> None:
    plain = randomize_(fresh(boundary_norm=boundary_norm))
    several = fresh(boundary_norm=boundary_norm, n_streams=3)
    missing, unexpected = several.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("_hc." in name for name in missing)
    with torch.no_grad():
        for name, parameter in several.named_parameters():
            if name.endswith("_hc.projection"):
                parameter.zero_()
            if name.endswith(
                "_hc.bias"
            ):  # sigmoid and Sinkhorn at their limits: read one stream, write to all, keep each
                parameter.mul_(40.0)
    tokens = random_tokens(plain)
    assert_close(several(tokens), plain(tokens))


def test_fresh_streams_start_close_to_one_stream() -> None:
    several = fresh(n_streams=3)
    plain = fresh()
    plain.load_state_dict(
        {name: value for name, value in several.state_dict().items() if "_hc." not in name}
    )
    tokens = random_tokens(plain)
    difference = several(tokens) - plain(tokens)
    assert 0 < difference.norm() < 1e-2 * plain(tokens).norm()


def test_a_change_of_the_mean_reaches_every_stream() -> None:
    model = randomize_(fresh(n_streams=3))
    tokens, direction = random_tokens(model), torch.linspace(-1, 1, 15, dtype=torch.float64)
    at = "loops.1.blocks.1."
    hooks = [(at + "hook_resid_pre", lambda mean, hook: mean + direction)]
    with model.hooks(hooks, n_loops=2):
        by_mean = model(tokens, n_loops=2)
    with model.hooks(
        [(at + "hook_streams_pre", lambda streams, hook: streams + direction)], n_loops=2
    ):
        by_streams = model(tokens, n_loops=2)
    assert_close(by_mean, by_streams)
    assert not is_close(by_mean, model(tokens, n_loops=2))


@pytest.mark.shapes
def test_streams_are_part_of_the_state_inside_an_iteration_only() -> None:
    model = randomize_(fresh(n_streams=3))
    tokens = random_tokens(model)
    state = model.begin(tokens)
    assert set(model.state_parts(state)) == {"resid"}
    state = model.advance(state, "loops.1.blocks.1")
    assert state.parts["streams"].shape == (3, 7, 3, 15)
    assert_close(state.parts["streams"].mean(2), state.resid)
    assert set(model.state_parts(model.advance(state, "loops.2"))) == {"resid"}


def test_facts_follow_the_switches() -> None:
    facts = {
        (norm, n): fresh(boundary_norm=norm, n_streams=n).additive_residual
        for norm in (True, False)
        for n in (None, 2)
    }
    assert facts == {(True, None): False, (True, 2): False, (False, None): True, (False, 2): False}
    assert "ln_final.hook_scale" in fresh(boundary_norm=False).hook_names()
    assert "ln_final.hook_scale" not in fresh().hook_names()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("pretraining_tp", 2, "pretraining_tp must be 1, got 2"),
        (
            "loop_loss_weights",
            [0.1],
            "loop_loss_weights must be .* got \\[0.1\\]; it overrides num_loops",
        ),
        (
            "enable_double_loop_split",
            True,
            "enable_double_loop_split must be False, got True; looping only the middle",
        ),
        ("loop_middle_layers", 2, "loop_middle_layers must be None, got 2"),
        ("loop_share_kv", True, "loop_share_kv must be False, got True"),
        ("mhc_diff_for_loop", True, "mhc_diff_for_loop must be False"),
        (
            "mhc_double_stream_position_for_loop",
            "mid",
            "mhc_double_stream_position_for_loop must be None, got 'mid'",
        ),
        ("enable_h_res_identity", True, "enable_h_res_identity must be False"),
        ("mhc_identity_nohresparam", True, "mhc_identity_nohresparam must be False"),
        (
            "enable_depth_attention",
            True,
            "enable_depth_attention must be False, got True; attention over earlier depths",
        ),
        ("emb_neighbor_num", 3, "emb_neighbor_num must be None, got 3; n-gram embeddings"),
        ("insert_ngram_layer_idx", [1], "insert_ngram_layer_idx must be .* got \\[1\\]"),
        ("ngram_insert_all_layers", True, "ngram_insert_all_layers must be False"),
        (
            "enable_hyper_connection",
            True,
            "enable_mhc must be True where enable_hyper_connection is, got False",
        ),
        ("enable_mhc", True, "enable_mhc must be False where enable_hyper_connection is, got True"),
        (
            "rope_scaling",
            {"type": "longrope", "factor": 2.0},
            "rope_scaling must be of the type .* got 'longrope'",
        ),
        (
            "rope_parameters",
            {"rope_theta": 10000.0, "rope_type": "default"},
            "rope_theta must be 10000.0, got 70000.0; rope_parameters.rope_theta gives the base",
        ),
        ("skip_loop_final_norm", 1, "skip_loop_final_norm must be true or false, got 1"),
        ("loop_gain", 2.0, "has the field 'loop_gain' .* which this family's loader does not know"),
    ],
)
def test_switches_that_are_not_computed_are_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_of("nanbeige", tmp_path, {field: value}))


def test_one_stream_or_no_sinkhorn_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="n_streams must be at least 2, got 1"):
        load(folder_of("nanbeige_mhc", tmp_path, {"num_residual_streams": 1}))
    with pytest.raises(ValueError, match="sinkhorn_iterations must be at least 1, got 0"):
        NanbeigeConfig(**SIZES, n_streams=2, sinkhorn_iterations=0)


def test_hyper_connection_weights_without_the_switch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected key.*_hc\."):
        load(
            folder_of(
                "nanbeige_mhc", tmp_path, {"enable_hyper_connection": False, "enable_mhc": False}
            )
        )
