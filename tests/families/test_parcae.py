"""Parcae: its golden outputs, its injections, value embeddings and initial states."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.interp.dynamics.states import dynamics
from loopscope.models.core.registry import build
from loopscope.models.families.parcae import Parcae, ParcaeConfig
from references.parcae import made, normed, slow_block, tokens_of
from toy import assert_close, is_close

MISMATCHED = ParcaeConfig(
    n_layers=1,
    n_loops=2,
    n_prelude_layers=1,
    n_coda_layers=2,
    d_model=36,
    n_heads=6,
    n_key_value_heads=2,
    d_mlp=19,
    d_mlp_outside=23,
    d_vocab=29,
    n_ctx=9,
    rope_theta=300.0,
    rope_scaling={"rope_type": "linear", "factor": 3},
    value_tables=(1, 3),
    value_gates=(0, 3),
    logit_softcap=2.5,
)


def golden_model(case: GoldenCase) -> Parcae:
    assert isinstance(case.model, Parcae)
    return case.model


@torch.no_grad()
def drive(case: GoldenCase) -> Tensor:
    return golden_model(case).injection.drive(case.activation("prelude_norm.hook_out"))


@torch.no_grad()
def direct_lens(case: GoldenCase, t: str) -> Tensor:
    """Logits of a state without the coda."""
    model = golden_model(case)
    return model.unembed(model.normalize(model.C(case.activation(f"loops.{t}.hook_state_out"))))


def at_own_depth(case: GoldenCase) -> Tensor:
    """Every sequence after its own number of iterations, from one call for each."""
    depths = case.golden["variant.sampled_depth.steps"].tolist()
    return torch.stack([case.logits(depth)[row] for row, depth in enumerate(depths)])


def before_gradients(case: GoldenCase) -> Tensor:
    """The iterations of a sampled depth through which the release's training passes no gradient."""
    through = json.loads((GOLDEN / case.name / "config.json").read_text())["mean_backprop_depth"]
    return (case.golden["variant.sampled_depth.steps"] - through).clamp(min=0)


ITER, BLOCK = r"iter\.(\d+)\.", r"iter\.(\d+)\.block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids|init_state|variant\.sampled_depth\.steps)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    r"(prelude|coda)\.block\.(\d+)\.resid_post": lambda case, stage, j: case.activation(
        f"{stage}.{j}.hook_resid_post"
    ),
    r"(prelude|coda)\.block\.(\d+)\.attn\.ve_gate_logit": lambda case, stage, j: case.activation(
        f"{stage}.{j}.attn.hook_value_gate_logit"
    ),
    r"injected_input": lambda case: case.activation("loops.1.hook_input"),
    r"inject\.decay": lambda case: golden_model(case).injection.decay.detach(),
    r"inject\.drive": drive,
    ITER + r"state_(in|out)": lambda case, t, end: case.activation(f"loops.{t}.hook_state_{end}"),
    ITER + r"inject_out": lambda case, t: case.activation(f"loops.{t}.hook_injected"),
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.ve_gate_logit": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_value_gate_logit"
    ),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, t, j, which: case.heads_first(
        f"loops.{t}.blocks.{j}.attn.hook_rot_{which}"
    ),
    BLOCK + r"attn\.v": lambda case, t, j: case.heads_first(f"loops.{t}.blocks.{j}.attn.hook_v"),
    ITER + r"readout_logits": lambda case, t: case.logits(int(t) + 1),
    ITER + r"direct_lens_logits": direct_lens,
    r"after_C": lambda case: case.activation("core_map.hook_out"),
    r"final_norm_out": lambda case: case.activation("ln_final.hook_out"),
    r"logits": lambda case: case.logits(),
    r"variant\.init_zero\.logits": lambda case: case.logits(
        state=torch.zeros_like(case.golden["init_state"])
    ),
    r"variant\.sampled_depth\.no_grad_steps": before_gradients,
    r"variant\.sampled_depth\.logits": at_own_depth,
}


def the_case() -> GoldenCase:
    return GoldenCase("parcae", begin={"state": "init_state"})


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(the_case(), TABLE, record_error)


def test_value_embeddings_act_where_the_reference_says() -> None:
    case = the_case()
    cfg = golden_model(case).cfg
    places = {
        "prelude": 0,
        "core": cfg.n_prelude_layers,
        "coda": cfg.n_prelude_layers + cfg.n_layers,
    }
    for entry in case.meta["value_embedding_map"]:
        place = places[entry["stage"]] + entry["block"]
        assert entry["value_embeds"] == (place in cfg.value_tables), entry
        assert entry["gate"] == (place in cfg.value_gates), entry


@pytest.mark.shapes
@torch.no_grad()
def test_equals_a_slow_computation_with_grouped_heads_and_gates_that_miss_their_tables() -> None:
    model, cfg = made(MISMATCHED), MISMATCHED
    tokens, state = tokens_of(cfg), torch.randn(3, 7, 36, dtype=torch.float64)
    e = slow_block(model.prelude_blocks[0], F.embedding(tokens, model.embedding), cfg, None)
    e, h = normed(e, model.input_norm.w, cfg.eps), state
    step = (1 + model.injection.step_bias.exp()).log()
    for _ in range(2):
        h = torch.exp(-step * model.injection.log_rate.exp()) * h + step * torch.einsum(
            "bpe,de->bpd", e, model.injection.B
        )
        h = slow_block(model.blocks[0], h, cfg, None)
    h = torch.einsum("bpe,de->bpd", h, model.C.weight)
    h = slow_block(model.coda_blocks[0], h, cfg, None)
    h = slow_block(model.coda_blocks[1], h, cfg, model.value_embeds["3"][tokens])
    logits = normed(h, model.final_norm.w, cfg.eps) @ model.head.T
    assert_close(model(tokens, state=state), 2.5 * (logits / 2.5).tanh())


ALIGNED = replace(
    MISMATCHED,
    n_key_value_heads=None,
    n_layers=2,
    value_tables=None,
    value_gates=None,
    logit_softcap=None,
    rope_scaling=None,
)


def test_default_places_are_every_second_block_from_the_last() -> None:
    assert ALIGNED.value_tables == ALIGNED.value_gates == ALIGNED.mixing() == (0, 2, 4)
    assert [ALIGNED.stage_of(place) for place in range(ALIGNED.n_places)] == [
        "prelude",
        "loops",
        "loops",
        "coda",
        "coda",
    ]


@torch.no_grad()
def test_value_embeddings_enter_at_every_iteration() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    logits = model(tokens)
    for t in range(2):
        off = [(f"loops.{t}.blocks.1.attn.hook_value_embed", lambda value, hook: value * 0)]
        assert not is_close(model.run_with_hooks(tokens, fwd_hooks=off), logits)
    none = [("**.attn.hook_value_embed", lambda value, hook: value * 0)]
    without = made(replace(ALIGNED, value_tables=()))
    without.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "value_embeds" not in name}
    )
    assert_close(model.run_with_hooks(tokens, fwd_hooks=none), without(tokens))


@torch.no_grad()
@pytest.mark.shapes
def test_injections_are_special_cases_of_the_linear_one() -> None:
    diagonal, tokens = made(ALIGNED), tokens_of(ALIGNED)
    linear = made(replace(ALIGNED, injection="linear"))
    shared = {
        name: value for name, value in diagonal.state_dict().items() if "injection" not in name
    }
    step = F.softplus(diagonal.injection.step_bias)
    matrix = torch.cat(
        [diagonal.injection.decay.diag(), step[:, None] * diagonal.injection.B], dim=1
    )
    linear.load_state_dict({**shared, "injection.weight": matrix})
    assert_close(linear(tokens), diagonal(tokens))
    added = made(replace(ALIGNED, injection="add"))
    added.load_state_dict(shared)
    one = torch.eye(36, dtype=torch.float64)
    linear.load_state_dict({**shared, "injection.weight": torch.cat([one, one], dim=1)})
    assert_close(linear(tokens), added(tokens))
    assert not is_close(added(tokens), diagonal(tokens))


@torch.no_grad()
def test_a_state_that_no_block_renews_decays_to_the_fixed_point_of_the_injection() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    silent = [
        (f"loops.*.blocks.*.hook_{part}_out", lambda value, hook: value * 0)
        for part in ("attn", "mlp")
    ]
    with model.hooks(silent, n_loops=4):
        cache = model.run_with_cache(tokens, n_loops=4, names_filter="loops.*.hook_*")[1]
    decay, force = model.injection.decay, model.injection.drive(cache["loops.0.hook_input"])
    assert ((decay > 0) & (decay < 1)).all()
    rest = force / (1 - decay)
    for t in range(4):
        assert_close(cache["state_out", t] - rest, decay ** (t + 1) * (cache["state_in", 0] - rest))


@torch.no_grad()
def test_without_a_prelude_norm_its_output_is_injected_as_it_is() -> None:
    model, tokens = made(replace(ALIGNED, prelude_norm=False)), tokens_of(ALIGNED)
    cache = model.run_with_cache(tokens, names_filter="**")[1]
    assert torch.equal(cache["loops.1.hook_input"], cache["prelude.0.hook_resid_post"])
    assert not [name for name in model.hook_names() if name.startswith("prelude_norm")]
    state = model.advance(model.begin(tokens), "loops.1")
    assert_close(model.readout(model.advance(state.rows(slice(1, None)))), model(tokens)[1:])


@torch.no_grad()
@pytest.mark.shapes
def test_seed_and_state_set_the_initial_latent() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    drawn = model.begin(tokens, seed=0).parts["state"]
    assert_close(model(tokens, seed=0), model(tokens))
    assert_close(model(tokens, state=drawn), model(tokens))
    assert not is_close(model(tokens, seed=1), model(tokens))
    assert drawn.abs().max() <= 3 * (2 / 180) ** 0.5
    assert_close(model(tokens, state=drawn * 0), made(replace(ALIGNED, state_std=0.0))(tokens))
    with pytest.raises(ValueError, match=r"must have the shape \[3, 7, 36\]"):
        model(tokens, state=torch.zeros(3, 6, 36))


@torch.no_grad()
def test_a_state_at_the_end_of_an_iteration_is_read_through_the_coda() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    state = model.begin(tokens)
    for t, end in enumerate(model.iteration_ends(2)):
        state = model.advance(state, end)
        assert_close(model.readout(state), model(tokens, n_loops=t + 1))


@torch.no_grad()
def test_dynamics_begin_at_the_latent() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    record = dynamics(model, tokens, 2, readout=-1, positions="all")
    assert_close(record.states[0], model.begin(tokens).parts["state"])
    cache = model.run_with_cache(tokens, names_filter="loops.*.hook_state_out")[1]
    assert_close(record.states[1:], cache.stack("state_out"))


def test_one_call_has_one_depth() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    with pytest.raises(
        TypeError,
        match=(
            r"every row of a call runs the same number of iterations, got tensor\(\[1, 4, 2\]\);"
            r" call once for each depth"
        ),
    ):
        model.begin(tokens, n_loops=torch.tensor([1, 4, 2]))


def test_fresh_model_begins_with_the_release_s_decay_and_identities() -> None:
    model = build(ALIGNED)
    assert isinstance(model, Parcae)
    torch.testing.assert_close(model.injection.decay, torch.full((36,), 0.2**0.5))
    assert torch.equal(model.injection.B, torch.eye(36))
    assert torch.equal(model.C.weight, torch.eye(36))
    assert model(tokens_of(ALIGNED)).isfinite().all()


def test_value_embeddings_of_grouped_heads_do_not_fit_the_core() -> None:
    with pytest.raises(
        ValueError,
        match="which value embeddings of n_key_value_heads=2 do not fit, but the block at place 1",
    ):
        replace(MISMATCHED, value_gates=(0, 1, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_coda_layers": 0}, "n_coda_layers must be at least 1, got 0"),
        (
            {"injection": "gated"},
            "injection must be one of 'diagonal', 'linear', 'add', got 'gated'",
        ),
        ({"d_model": 30}, "d_model must be at least 32, .* got 30"),
        ({"value_tables": [5]}, "value_tables must hold places of blocks, 0 to 3, got 5"),
        ({"n_ctx": None}, "n_ctx must be given"),
        ({"head_dim": 8}, "head_dim must be d_model / n_heads = 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParcaeConfig.from_dict({**MISMATCHED.to_dict(), **changes})
