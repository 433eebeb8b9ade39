"""Ouro: its golden outputs, its gate, and the three ways to read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, save
from loopscope.interp.exits.exit_gate import (
    GatedReadout,
    exit_distribution,
    gate_logits,
    readout_at_threshold,
    readout_mixture,
)
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.families.ouro import Ouro


def gates(case: GoldenCase) -> Tensor:
    return torch.stack([case.cache[f"loops.{t}.hook_exit_logit"] for t in range(case.n_loops)])


def at_threshold(case: GoldenCase, threshold: str) -> GatedReadout:
    return readout_at_threshold(case.model, case.tokens, float(threshold), readout=-1)


def mixture(case: GoldenCase) -> Tensor:
    return readout_mixture(case.model, case.tokens, readout=-1).logits


def saturated(case: GoldenCase) -> Tensor:
    model = load(GOLDEN / case.name)
    assert isinstance(model, Ouro)
    with torch.no_grad():
        model.gate.bias.fill_(30.0)
    return readout_at_threshold(model, case.tokens, model.cfg.exit_threshold, readout=-1).logits


def mixture_loss(case: GoldenCase) -> Tensor:
    logits = mixture(case)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, case.tokens[:, 1:].flatten())[None]


BLOCK = r"iter\.(\d+)\.block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    r"iter\.(\d+)\.state_in": lambda case, t: case.activation(f"loops.{t}.hook_state_in"),
    r"iter\.(\d+)\.state_out": lambda case, t: case.activation(f"loops.{t}.hook_state_out"),
    r"iter\.(\d+)\.loop_out": lambda case, t: case.activation(
        f"loops.{t}.blocks.{case.model.cfg.n_layers - 1}.hook_resid_post"
    ),
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.{part}.hook_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, t, j, which: case.heads_first(
        f"loops.{t}.blocks.{j}.attn.hook_rot_{which}"
    ),
    BLOCK + r"attn\.v": lambda case, t, j: case.heads_first(f"loops.{t}.blocks.{j}.attn.hook_v"),
    r"iter\.(\d+)\.gate_logit": lambda case, t: gates(case)[int(t)],
    r"iter\.(\d+)\.exit_lambda": lambda case, t: gates(case)[int(t)].sigmoid(),
    r"iter\.(\d+)\.exit_prob": lambda case, t: exit_distribution(gates(case)).pdf[int(t)],
    r"iter\.(\d+)\.exit_cdf": lambda case, t: exit_distribution(gates(case)).cdf[int(t)],
    r"iter\.(\d+)\.readout_logits": lambda case, t: case.logits(int(t) + 1),
    r"logits": lambda case: at_threshold(case, "1.0").logits,
    r"variant\.threshold_([\d.]+)\.logits": lambda case, threshold: (
        at_threshold(case, threshold).logits
    ),
    r"variant\.threshold_([\d.]+)\.exit_step": lambda case, threshold: (
        at_threshold(case, threshold).iterations - 1
    ),
    r"variant\.(?:labels|weighted)\.logits": mixture,
    r"variant\.labels\.loss": mixture_loss,
    r"variant\.saturated_gate\.logits": saturated,
}


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(GoldenCase("ouro"), TABLE, record_error)


def test_threshold_one_is_the_last_iteration() -> None:
    case = GoldenCase("ouro")
    assert torch.equal(
        at_threshold(case, "1.0").iterations, torch.full_like(case.tokens, case.n_loops)
    )
    torch.testing.assert_close(at_threshold(case, "1.0").logits, case.logits())


def test_a_hook_on_the_gate_moves_the_exit_and_nothing_else() -> None:
    case = GoldenCase("ouro")
    model, third = case.model, "loops.2.hook_exit_logit"
    before = case.logits()
    never = [(f"loops.{t}.hook_exit_logit", lambda gate, hook: gate * 0 - 50.0) for t in range(2)]
    with model.hooks([*never, (third, lambda gate, hook: gate * 0 + 50.0)], n_loops=4):
        moved = readout_at_threshold(model, case.tokens, 0.5, readout=-1)
        assert torch.equal(case.logits(), before)
    assert torch.equal(moved.iterations, torch.full_like(case.tokens, 3))
    torch.testing.assert_close(moved.logits, case.logits(3))


def test_lens_of_every_iteration_is_the_shorter_run() -> None:
    case = GoldenCase("ouro")
    lens = readout_lens(case.model, case.tokens, readout=-1, keep_logits=True)
    assert lens.logits is not None
    for t in range(case.n_loops):
        torch.testing.assert_close(lens.logits[t], case.logits(t + 1)[:, -1])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("use_sliding_window", True, "use_sliding_window must be False, got True"),
        ("layer_types", ["sliding_attention"] * 3, "layer_types must be None or"),
        ("total_ut_steps", "4", "total_ut_steps must be a whole number, got '4'"),
        ("rope_scaling", {"rope_type": "axial"}, "rope_scaling must be of the type .* got 'axial'"),
        ("loop_gain", 2.0, "has the field 'loop_gain' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., object]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("ouro", {field: value}))


def test_threshold_out_of_range_is_refused() -> None:
    case = GoldenCase("ouro")
    with pytest.raises(ValueError, match=r"threshold must be finite .* at most 1, got 1\.5"):
        at_threshold(case, "1.5")


def test_recorded_iterations_can_be_replaced() -> None:
    assert load(GOLDEN / "ouro", n_loops=2).cfg == replace(load(GOLDEN / "ouro").cfg, n_loops=2)


def test_weights_without_a_gate_are_a_model_without_one(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "ouro" / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "early_exit_gate" not in key}
    shutil.copy(GOLDEN / "ouro" / "config.json", tmp_path)
    save_file(kept, tmp_path / "model.safetensors")
    model, case = load(tmp_path), GoldenCase("ouro")
    assert torch.equal(model(case.tokens), case.model(case.tokens))
    assert not [name for name in model.hook_names(3) if "exit" in name]
    for ask in (gate_logits, readout_mixture):
        with pytest.raises(ValueError, match="this Ouro has no exit gate to read"):
            ask(model, case.tokens, 3, readout=-1)
    save(model, tmp_path / "own")
    assert torch.equal(load(tmp_path / "own")(case.tokens), model(case.tokens))
    save_file(
        {**kept, "model.early_exit_gate.bias": torch.zeros(1)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lacks 1 key.* 'model\.early_exit_gate\.weight'"):
        load(tmp_path)
