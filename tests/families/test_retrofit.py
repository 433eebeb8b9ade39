"""Retrofitted Llama and OLMo-2: golden outputs, a slow computation with grouped keys and stretched
positions, and refused configs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.models.blocks.random_state import latent_state
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.registry import FAMILIES, build
from loopscope.models.families.huginn import latent_states
from loopscope.models.families.retrofit import Retrofit, RetrofitConfig, RetrofitLlama, RetrofitOlmo
from references.huginn import (
    BLOCK,
    STATE,
    TABLE,
    after,
    from_zeros,
    slow_attention,
    slow_mlp,
    slow_norm,
)
from toy import assert_close, randomize_

NORMED_LATER: dict[str, Compute] = {
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.{part}.hook_out"
    ),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
FAMILY = pytest.mark.parametrize("family", ["retrofit_llama", "retrofit_olmo"])


@FAMILY
def test_golden_outputs(family: str, record_error: Callable[[str, str, float], None]) -> None:
    table = {**TABLE, **NORMED_LATER} if family == "retrofit_olmo" else TABLE
    check_case(GoldenCase(family, begin=STATE), table, record_error)


def test_the_case_tells_the_two_families_apart() -> None:
    assert isinstance(load(GOLDEN / "retrofit_llama"), RetrofitLlama)
    assert isinstance(load(GOLDEN / "retrofit_olmo"), RetrofitOlmo)


# A slow computation


def slow_frequencies(d_head: int, theta: float, scaling: Mapping[str, Any] | None) -> list[float]:
    """Radians per position of each pair of channels: long waves are slowed, short ones kept, those
    between are mixed.
    """
    found = []
    for i in range(d_head // 2):
        frequency = theta ** (-2 * i / d_head)
        if scaling is not None:
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = min(1.0, max(0.0, (turns - low) / (high - low)))
            frequency *= (1 - kept) / scaling["factor"] + kept
        found.append(frequency)
    return found


def slow_turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Channels i and i + half as one complex number, turned pair by pair; "pos head d_head"."""
    half, (cos, sin) = x.shape[-1] // 2, rotary.made_tables(torch.arange(len(x))[None])
    out = torch.empty_like(x)
    for i in range(half):
        c, s = cos[0, :, i, None].double(), sin[0, :, i, None].double()
        out[..., i] = x[..., i] * c - x[..., i + half] * s
        out[..., i + half] = x[..., i + half] * c + x[..., i] * s
    return out


def slow_block(x: Tensor, w: dict[str, Tensor], prefix: str, model: Retrofit) -> Tensor:
    cfg, own = (
        model.cfg,
        {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)},
    )

    def normed(y: Tensor, name: str) -> Tensor:
        return slow_norm(y, own[name], cfg.eps) if name in own else y

    q, k, v = (normed(x, "ln1.w") @ own["attn.qkv.weight"].T).split(
        [cfg.n_heads * cfg.d_head, *[cfg.kv_heads * cfg.d_head] * 2], dim=-1
    )
    q, k = normed(q, "attn.q_norm.w"), normed(k, "attn.k_norm.w")
    q, k, v = (y.unflatten(-1, (-1, cfg.d_head)) for y in (q, k, v))
    z = slow_attention(slow_turn(q, model.rotary), slow_turn(k, model.rotary), v)
    x = x + normed(z.flatten(1) @ own["attn.o.weight"].T, "ln1_post.w")
    return x + normed(
        slow_mlp(normed(x, "ln2.w"), own["mlp.gate_up.weight"], own["mlp.down.weight"]),
        "ln2_post.w",
    )


def slow_logits(model: Retrofit, ids: Tensor, state: Tensor, n_loops: int) -> Tensor:
    """Logits "pos d_vocab" of one sequence from its initial state "pos d_model"."""
    w, cfg = dict(model.state_dict()), model.cfg
    e = w["embedding"][ids] * cfg.embedding_scale
    for layer in range(cfg.n_prelude_layers):
        e = slow_block(e, w, f"prelude_blocks.{layer}.", model)
    for _ in range(n_loops):
        state = torch.cat([state, e], dim=-1) @ w["adapter.weight"].T
        for layer in range(cfg.n_layers):
            state = slow_block(state, w, f"blocks.{layer}.", model)
    for layer in range(cfg.n_coda_layers):
        state = slow_block(state, w, f"coda_blocks.{layer}.", model)
    return slow_norm(state, w["final_norm.w"], cfg.eps) @ w.get("head", w["embedding"]).T


def fresh(family: str, **changes: object) -> Retrofit:
    sizes = {
        "n_layers": 1,
        "n_prelude_layers": 1,
        "n_coda_layers": 2,
        "d_model": 30,
        "n_heads": 5,
        "d_mlp": 13,
        "d_vocab": 23,
    }
    model = build(FAMILIES[family][0].from_dict({**sizes, "eps": 0.01, **changes}))
    assert isinstance(model, Retrofit)
    return model


VARIANTS = [
    ("retrofit_llama", {"n_heads": 15, "n_key_value_heads": 3, "tied": True}),
    (
        "retrofit_llama",
        {
            "n_key_value_heads": 1,
            "rope_scaling": LLAMA3,
            "rope_theta": 50.0,
            "embedding_scale": 1.7,
        },
    ),
    ("retrofit_olmo", {"n_heads": 9, "n_key_value_heads": 3, "head_dim": 4}),
    ("retrofit_olmo", {"n_prelude_layers": 0, "rope_scaling": LLAMA3, "rope_theta": 50.0}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_option_equals_the_slow_computation(family: str, changes: dict[str, object]) -> None:
    model = randomize_(fresh(family, **changes)).double()
    state = torch.randn(7, 30, dtype=torch.float64)
    for ids in torch.randint(23, (2, 7)):
        assert_close(
            model(ids[None], n_loops=2, state=state[None])[0], slow_logits(model, ids, state, 2)
        )


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_positions_are_stretched_as_the_release_stretches_them(
    scaling: dict[str, object] | None,
) -> None:
    for family in ("retrofit_llama", "retrofit_olmo"):
        rotary = fresh(family, n_heads=1, rope_theta=50.0, rope_scaling=scaling).rotary
        slow = torch.tensor(slow_frequencies(30, 50.0, scaling), dtype=torch.float64)
        torch.testing.assert_close(
            rotary.frequencies(torch.device("cpu")).double(), slow, rtol=1e-6, atol=0.0
        )


def test_olmo_turns_queries_in_float32_and_llama_in_their_own_type() -> None:
    q, positions = torch.randn(3, 7, 5, 6).bfloat16(), torch.arange(7).expand(3, 7)
    llama, olmo = (
        fresh(family).rotary(q, positions) for family in ("retrofit_llama", "retrofit_olmo")
    )
    assert olmo.dtype == llama.dtype == torch.bfloat16
    assert torch.equal(olmo, fresh("retrofit_llama").rotary(q.float(), positions).bfloat16())
    assert not torch.equal(olmo, llama)


def test_query_and_key_norms_have_points_and_leave_values_alone() -> None:
    model = randomize_(fresh("retrofit_olmo", n_heads=9, n_key_value_heads=3, head_dim=4)).double()
    _, cache = model.run_with_cache(torch.randint(23, (3, 7)), n_loops=1, names_filter="**.attn.**")
    attn, at = model.blocks[0].attn, "loops.0.blocks.0.attn."
    for which, norm in (("q", attn.q_norm), ("k", attn.k_norm)):
        flat = cache[f"{at}hook_{which}"].flatten(2)
        assert_close(cache[f"{at}{which}_norm.hook_out"], slow_norm(flat, norm.w, model.cfg.eps))
        assert cache[f"{at}{which}_norm.hook_scale"].shape == (3, 7, 1)
    assert not [name for name in cache if "v_norm" in name]


# Readouts


@FAMILY
@pytest.mark.shapes
def test_the_coda_reads_the_latent_as_it_is(family: str) -> None:
    case = GoldenCase(family, begin=STATE)
    assert isinstance(case.model, Retrofit)
    state = after(case, "1")
    assert torch.equal(latent_states(case.model, state), state.resid)
    assert not [name for name in case.cache if name.startswith("core_norm")]
    with torch.no_grad():
        torch.testing.assert_close(case.model.readout(state), case.logits(2))
    assert (from_zeros(case) - case.logits()).abs().max() > 1e-3


@FAMILY
def test_logits_keep_the_number_format_of_the_weights(family: str) -> None:
    model = fresh(family).bfloat16()
    assert model(torch.randint(23, (3, 7)), n_loops=2).dtype == torch.bfloat16


# Loading


@FAMILY
def test_what_the_state_and_the_embedding_are_multiplied_by(
    family: str, folder_with: Callable[..., object]
) -> None:
    given = {"embed_scale": 2.5, "std": 0.7, "embedding": 1.0, "out_proj": 1.0}
    cfg = load(folder_with(family, {"init_values": given})).cfg
    assert isinstance(cfg, RetrofitConfig)
    assert (cfg.embedding_scale, cfg.initial_std) == (2.5, 0.7)
    model = build(cfg)
    tokens = torch.randint(cfg.d_vocab, (2, 5))
    state = model.begin(tokens, n_loops=1, seed=6)
    torch.testing.assert_close(state.resid, 2.5 * model.W_E[tokens])
    torch.testing.assert_close(
        state.parts["state"][1], latent_state(torch.arange(5), cfg.d_model, 2.5 * 0.7, 6)
    )


@FAMILY
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qk_bias", True, "qk_bias must be False, got True"),
        (
            "initial_state_mode",
            "embed-init",
            "initial_state_mode must be 'random', got 'embed-init'",
        ),
        ("rope_theta", None, "lacks the field 'rope_theta'"),
        (
            "rope_scaling",
            {"rope_type": "longrope", "factor": 2.0},
            "rope_scaling must be of the type .* got 'longrope'",
        ),
        ("num_key_value_heads", 5, "n_key_value_heads must divide n_heads"),
        ("init_values", {"std": 0.1}, "init_values must hold the number 'embed_scale', got None"),
        ("loop_gain", 2.0, "has the field 'loop_gain' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    family: str, field: str, value: object, message: str, folder_with: Callable[..., object]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with(family, {field: value}))


def test_llama_heads_have_the_width_that_the_release_computes(
    folder_with: Callable[..., object],
) -> None:
    with pytest.raises(CheckpointError, match="head_dim must be 6, got 8"):
        load(folder_with("retrofit_llama", {"head_dim": 8}))
