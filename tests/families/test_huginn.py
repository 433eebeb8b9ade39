"""Huginn: its golden outputs, its random state, the two uses of the final norm, and a slow
computation of it all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_cases import GOLDEN, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.blocks.random_state import latent_state
from loopscope.models.core.registry import build
from loopscope.models.families.huginn import Huginn, HuginnConfig, latent_states
from references.huginn import (
    STATE,
    TABLE,
    after,
    read_there,
    slow_attention,
    slow_mlp,
    slow_norm,
    whole_batch,
    without_coda,
)
from toy import assert_close, randomize_


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(GoldenCase("huginn", begin=STATE), TABLE, record_error)


# A slow computation


def slow_turn(x: Tensor, table: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, turned by the stored table; "pos head d_head"."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(
        table[..., 0], table[..., 1]
    )
    return torch.view_as_real(turned).flatten(-2)


def slow_block(x: Tensor, w: dict[str, Tensor], prefix: str, model: Huginn) -> Tensor:
    cfg, own = (
        model.cfg,
        {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)},
    )
    qkv = (slow_norm(x, own["ln1.w"], cfg.eps) @ own["attn.qkv.weight"].T).unflatten(
        -1, (3, cfg.n_heads, cfg.d_head)
    )
    bias = own.get("attn.qk_bias", torch.zeros(2, 1, 1, 1))
    table = w["rotation.freqs_cis"][0, : len(x)]
    z = slow_attention(
        slow_turn(qkv[:, 0] + bias[0], table), slow_turn(qkv[:, 1] + bias[1], table), qkv[:, 2]
    )
    x = slow_norm(x + z.flatten(1) @ own["attn.o.weight"].T, own["ln1_post.w"], cfg.eps)
    out = slow_mlp(
        slow_norm(x, own["ln2.w"], cfg.eps), own["mlp.gate_up.weight"], own["mlp.down.weight"]
    )
    return slow_norm(x + out, own["ln2_post.w"], cfg.eps)


def slow_logits(model: Huginn, ids: Tensor, state: Tensor, n_loops: int) -> Tensor:
    """Logits "pos d_vocab" of one sequence from its initial state "pos d_model"."""
    w, cfg = dict(model.state_dict()), model.cfg
    e = w["embedding"][ids] * math.sqrt(cfg.d_model)
    for layer in range(cfg.n_prelude_layers):
        e = slow_block(e, w, f"prelude_blocks.{layer}.", model)
    for _ in range(n_loops):
        state = torch.cat([state, e], dim=-1) @ w["adapter.weight"].T + w.get(
            "adapter.bias", torch.zeros(())
        )
        for layer in range(cfg.n_layers):
            state = slow_block(state, w, f"blocks.{layer}.", model)
    x = slow_norm(state, w["final_norm.w"], cfg.eps)
    for layer in range(cfg.n_coda_layers):
        x = slow_block(x, w, f"coda_blocks.{layer}.", model)
    return slow_norm(x, w["final_norm.w"], cfg.eps) @ w.get("head", w["embedding"]).T


def fresh(**changes: object) -> Huginn:
    sizes = {
        "n_layers": 2,
        "n_prelude_layers": 2,
        "n_coda_layers": 1,
        "d_model": 30,
        "n_heads": 5,
        "d_mlp": 13,
        "d_vocab": 23,
        "n_ctx": 9,
    }
    model = build(HuginnConfig.from_dict({**sizes, "eps": 0.01, **changes}))
    assert isinstance(model, Huginn)
    return model


VARIANTS = [
    {},
    {"qk_bias": False, "tied": True},
    {"adapter_bias": True, "n_prelude_layers": 0, "state_std": 0.5},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_option_equals_the_slow_computation(changes: dict[str, object]) -> None:
    model = randomize_(fresh(**changes)).double()
    tokens, state = torch.randint(23, (3, 7)), torch.randn(3, 7, 30, dtype=torch.float64)
    logits = model(tokens, n_loops=3, state=state)
    for ids, start, row in zip(tokens, state, logits, strict=True):
        assert_close(row, slow_logits(model, ids, start, 3))
    drawn = latent_state(torch.arange(7), 30, model.cfg.initial_std * math.sqrt(30), 0).double()
    assert_close(model(tokens, n_loops=2)[1], slow_logits(model, tokens[1], drawn, 2))


@pytest.mark.shapes
def test_weight_views_rebuild_queries_and_keys() -> None:
    model = randomize_(fresh()).double()
    _, cache = model.run_with_cache(
        torch.randint(23, (3, 7)), n_loops=1, names_filter="prelude.1.**"
    )
    attn, x = model.prelude_blocks[1].attn, cache["prelude.1.ln1.hook_out"]
    for which, weight, bias in (
        ("q", attn.W_Q, attn.b_Q),
        ("k", attn.W_K, attn.b_K),
        ("v", attn.W_V, attn.b_V),
    ):
        assert_close(
            torch.einsum("bpm,hmd->bphd", x, weight) + bias, cache[f"prelude.1.attn.hook_{which}"]
        )
    assert not attn.b_V.any()
    assert attn.b_K.any()


# Readouts


def test_lens_through_the_coda_is_the_shorter_run_and_without_it_is_not() -> None:
    case = GoldenCase("huginn", begin=STATE)
    lens = readout_lens(case.model, whole_batch(case), keep_logits=True)
    assert lens.logits is not None
    for t in range(case.n_loops):
        torch.testing.assert_close(lens.logits[t], case.logits(t + 1)[:, -1])
        torch.testing.assert_close(read_there(case, str(t)), case.logits(t + 1))
        assert (without_coda(case, str(t)) - read_there(case, str(t))).abs().max() > 0.1


@pytest.mark.shapes
def test_latents_are_normed_once() -> None:
    case = GoldenCase("huginn", begin=STATE)
    assert isinstance(case.model, Huginn)
    state = after(case, "1")
    torch.testing.assert_close(latent_states(case.model, state), case.model.normalize(state.resid))
    assert_is_core_norm(case)
    with pytest.raises(
        ValueError,
        match="a latent is read where an iteration has ended, but the state stands before visit 0 ",
    ):
        latent_states(case.model, case.model.begin(case.tokens))


def assert_is_core_norm(case: GoldenCase) -> None:
    norm, last = (
        case.cache["core_norm.hook_out"],
        case.cache[f"loops.{case.n_loops - 1}.hook_state_out"],
    )
    torch.testing.assert_close(norm, case.model.normalize(last))
    torch.testing.assert_close(norm, case.cache["coda.0.hook_resid_pre"])
    rms = (last.square().mean(-1, keepdim=True) + case.model.cfg.eps).sqrt()
    torch.testing.assert_close(case.cache["core_norm.hook_scale"], rms)


def test_a_hook_on_one_iterations_input_leaves_the_others() -> None:
    case = GoldenCase("huginn", begin=STATE)
    with case.model.hooks([("loops.2.hook_input", lambda value, hook: 0 * value)], n_loops=4):
        _, cache = case.model.run_with_cache(
            case.tokens, n_loops=4, names_filter="**.hook_injected", **case.begin
        )
    torch.testing.assert_close(cache["injected", 1], case.cache["injected", 1])
    state = case.cache["loops.2.hook_state_in"]
    torch.testing.assert_close(
        cache["injected", 2], state @ case.model.adapter.weight[:, : state.shape[-1]].T
    )


def test_a_run_can_be_resumed_inside_the_prelude_and_after_it() -> None:
    model = randomize_(fresh()).double()
    tokens = torch.randint(23, (3, 7))
    begun = model.begin(tokens, n_loops=2, seed=4)
    assert set(model.advance(begun, "prelude.1").parts) == {"state"}
    looping = model.advance(begun, "loops.0")
    assert set(looping.parts) == {"input"}
    assert torch.equal(looping.resid, begun.parts["state"])
    assert torch.equal(model.readout(model.advance(looping)), model(tokens, n_loops=2, seed=4))


# The random state


def test_a_call_without_state_or_seed_has_seed_zero() -> None:
    model, tokens = fresh(), torch.randint(23, (3, 7))
    assert torch.equal(model(tokens, n_loops=2), model(tokens, n_loops=2, seed=0))
    assert not torch.equal(model(tokens, n_loops=2), model(tokens, n_loops=2, seed=1))


def test_more_rows_and_columns_change_no_vector() -> None:
    small = latent_state(torch.arange(5)[None], 11, 0.3, 9)
    large = latent_state(torch.arange(8).expand(3, 8), 11, 0.3, 9)
    assert torch.equal(large[2, :5], small[0])
    assert torch.equal(latent_state(torch.tensor([6, 2]), 11, 0.3, 9), large[0, [6, 2]])
    assert large[0].unique(dim=0).shape == (8, 11)
    assert torch.equal(latent_state(torch.tensor(3), 11, 0, 9), torch.zeros(11))


def test_vectors_are_normal_and_cut_at_three_deviations() -> None:
    drawn = latent_state(torch.arange(100), 2000, 0.5, 3).double()
    assert 1.49 < drawn.abs().max() <= 1.5
    inside = torch.special.ndtr(torch.tensor(3.0, dtype=torch.float64)) * 2 - 1
    for z in (-2.0, -0.7, 0.0, 0.4, 1.9, 2.8):
        expected = 0.5 + (torch.special.ndtr(torch.tensor(z, dtype=torch.float64)) - 0.5) / inside
        assert (
            abs((drawn < 0.5 * z).double().mean() - expected)
            < 4 * 0.5 / len(drawn.flatten()) ** 0.5
        )
    assert abs(torch.corrcoef(drawn[:2])[0, 1]) < 4 / 2000**0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"seed": 1, "state": torch.zeros(3, 7, 30)},
            ValueError,
            "from state= or from what seed= draws, but both were given",
        ),
        (
            {"state": torch.zeros(2, 7, 30)},
            ValueError,
            r"must have the shape \[3, 7, 30\] .* got \[2, 7, 30\]",
        ),
        ({"state": torch.zeros(7, 30)}, ValueError, r"got \[7, 30\]"),
        (
            {"state": torch.zeros(3, 7, 30).long()},
            ValueError,
            "must hold floating-point numbers, got torch.int64",
        ),
        ({"seed": -1}, ValueError, r"seed must be at least 0 and below 2\*\*64, got -1"),
        ({"seed": 2**64}, ValueError, r"below 2\*\*64"),
        ({"seed": True}, TypeError, "seed must be an integer, got bool"),
    ],
)
def test_states_and_seeds_that_mean_nothing_are_refused(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fresh()(torch.randint(23, (3, 7)), n_loops=1, **options)


def test_a_negative_deviation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be at least 0, got -0\.1"):
        latent_state(torch.arange(3), 4, -0.1, 0)


# Loading


def test_the_stored_table_rules_in_its_own_number_format(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "huginn" / "model.safetensors")
    half = {
        key: value if key == "freqs_cis" else value.bfloat16() for key, value in tensors.items()
    }
    half["freqs_cis"] = half["freqs_cis"].roll(1, dims=1)
    save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "huginn" / "config.json").read_text())
    model, tokens = load(tmp_path), torch.randint(43, (3, 7))
    assert isinstance(model, Huginn)
    assert model.W_E.dtype == torch.bfloat16
    assert model.rotation.freqs_cis.dtype == torch.float32
    logits = model(tokens, n_loops=2)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())  # the head's own precision
    wide = load(tmp_path).double()
    state = torch.zeros(7, 24, dtype=torch.float64)
    whole = wide(tokens, n_loops=2, state=state[None])
    assert_close(whole[0], slow_logits(wide, tokens[0], state, 2))
    assert (
        model(tokens, n_loops=2, state=state[None]).double() - whole
    ).norm() < 0.1 * whole.norm()


def test_the_table_of_a_fresh_model_is_that_of_its_config() -> None:
    stored = load(GOLDEN / "huginn")
    made = build(stored.cfg)
    assert isinstance(stored, Huginn)
    assert isinstance(made, Huginn)
    torch.testing.assert_close(made.rotation.freqs_cis, stored.rotation.freqs_cis)


def test_init_values_may_be_absent(folder_with: Callable[..., Path]) -> None:
    given = json.loads((GOLDEN / "huginn" / "config.json").read_text())["init_values"]
    derived = load(folder_with("huginn", {"init_values": None})).cfg
    assert isinstance(derived, HuginnConfig)
    assert derived.state_std is None
    assert derived.initial_std == pytest.approx(given["std"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("nonlin_name", "GELU", "nonlin_name must be 'SiLU', got 'GELU'"),
        ("injection_type", "add", "injection_type must be 'linear', got 'add'"),
        ("test_time_noise", 0.1, "test_time_noise must be 0, got 0.1; the release would mix noise"),
        ("num_key_value_heads", 1, "num_key_value_heads must be 3, got 1; this family's attention"),
        ("head_dim", 6, "head_dim must be 8, got 6"),
        ("mean_recurrence", "4", "mean_recurrence must be a whole number, got '4'"),
        ("n_layers_in_coda", 0, "n_coda_layers must be at least 1, got 0"),
        ("init_values", {"embed_scale": 1.0}, "init_values must hold the number 'std', got None"),
        ("tie_word_embeddings", False, "tie_word_embeddings must be True, got False"),
        ("block_size", None, "lacks the field 'block_size'"),
        ("loop_gain", 2.0, "has the field 'loop_gain' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., object]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("huginn", {field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_ctx": None}, "n_ctx must be given, because this family's rotary table"),
        ({"n_key_value_heads": 1}, "n_key_value_heads must be None in this family .* got 1"),
        ({"head_dim": 4}, "head_dim must be None in this family .* got 4"),
        ({"n_prelude_layers": -1}, "n_prelude_layers must be at least 0, got -1"),
        ({"state_std": -0.5}, r"state_std must be at least 0, got -0\.5"),
    ],
)
def test_configs_that_mean_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(**changes)
