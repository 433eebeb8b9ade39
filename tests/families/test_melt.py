"""MELT: its equations position by position, chunks and the exact form, generation, and the Ouro
that it contains.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from family_toys import POS, random_tokens
from golden_cases import GOLDEN
from loopscope.checkpoints.load import load
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.exits.exit_gate import readout_at_threshold
from loopscope.interp.generation import generate
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.attention import KeyValues
from loopscope.models.core.registry import build, config_from_dict
from loopscope.models.families.melt import (
    Melt,
    MeltConfig,
    advance_in_chunks,
    exact_logits,
    melt_from_ouro,
)
from loopscope.models.families.ouro import Ouro, OuroConfig
from loopscope.models.views import untied
from references.melt import by_the_equations
from toy import assert_close, is_close, randomize_

LOOPS, LAYERS = 3, 2
SIZES: dict[str, Any] = {
    "n_layers": LAYERS,
    "n_loops": LOOPS,
    "d_model": 15,
    "n_heads": 6,
    "n_key_value_heads": 2,
    "head_dim": 4,
    "d_mlp": 22,
    "d_vocab": 29,
}
OPTIONS = [
    {"h_0": h_0, "gate_input": gate_input}
    for h_0 in ("first_input", "zero")
    for gate_input in ("normed", "raw")
]
Options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(options.values())
)


def fresh(**changes: Any) -> Melt:
    model = build(MeltConfig(**{**SIZES, **changes})).double().requires_grad_(False)
    assert isinstance(model, Melt)
    return model


def toy(**changes: Any) -> Melt:
    return randomize_(fresh(**changes))


# The equations


def ends_of(chunk: int) -> list[int]:
    return sorted({*range(chunk, POS, chunk), POS})


@Options
@pytest.mark.parametrize("n_loops", [LOOPS, 1])
def test_forward_is_the_equations_with_the_whole_input_as_one_chunk(
    options: dict[str, Any], n_loops: int
) -> None:
    model = toy(**options)
    tokens = random_tokens(model)
    state = model.advance(model.begin(tokens, n_loops=n_loops))
    logits, latents = by_the_equations(model, tokens[1], n_loops, [POS])
    assert_close(model.readout(state)[1], logits)
    for name, value in latents.items():
        assert_close(model.state_parts(state)[name][1], value)


# Chunks, and the exact form


@Options
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_see_the_last_rows_of_those_before_them(options: dict[str, Any], chunk: int) -> None:
    model = toy(**options)
    tokens = random_tokens(model)
    state = advance_in_chunks(model, model.begin(tokens), chunk)
    logits, latents = by_the_equations(model, tokens[1], LOOPS, ends_of(chunk))
    assert_close(model.readout(state)[1], logits)
    for name, value in latents.items():
        assert_close(state.parts[name][1], value)
    assert not is_close(model(tokens), model.readout(state))


def test_exact_logits_are_chunks_of_one_and_a_plain_call_is_one_chunk() -> None:
    model = toy(prefill_chunk=2)
    tokens = random_tokens(model)
    begun = model.begin(tokens, n_loops=2)
    assert_close(exact_logits(model, tokens, 2), model.readout(advance_in_chunks(model, begun, 1)))
    assert_close(model(tokens, n_loops=2), model.readout(advance_in_chunks(model, begun, POS)))
    assert_close(model(tokens, n_loops=2), model.readout(advance_in_chunks(model, begun, POS + 2)))
    recorded = model.readout(advance_in_chunks(model, begun))
    assert_close(recorded, model.readout(advance_in_chunks(model, begun, 2)))
    assert not is_close(recorded, model(tokens, n_loops=2))
    whole = toy()
    assert_close(whole.readout(advance_in_chunks(whole, whole.begin(tokens))), whole(tokens))


def test_one_iteration_and_the_first_token_do_not_depend_on_chunks() -> None:
    model = toy()
    tokens = random_tokens(model)
    assert_close(exact_logits(model, tokens, 1), model(tokens, n_loops=1))
    assert_close(exact_logits(model, tokens)[:, 0], model(tokens)[:, 0])
    assert not is_close(exact_logits(model, tokens)[:, 1], model(tokens)[:, 1])


def test_the_exact_form_ignores_padding_and_later_tokens() -> None:
    model, lengths = toy(), (7, 3, 5)
    tokens = random_tokens(model)
    mask = (torch.arange(POS) < torch.tensor(lengths)[:, None]).long()
    logits = exact_logits(model, tokens * mask, mask=mask)
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], exact_logits(model, tokens[row, :length])[0])


def test_chunks_go_on_from_what_an_earlier_call_kept() -> None:
    model, store = toy(), {}
    tokens = random_tokens(model)
    begun = model.begin(tokens)
    first = advance_in_chunks(model, begun.rows(pos=slice(0, 4)), 2, store=store)
    kept = dict(store)
    second = advance_in_chunks(model, begun.rows(pos=slice(4, None)), 2, supplied=store)
    logits = torch.cat([model.readout(first), model.readout(second)], dim=1)
    assert_close(logits, model.readout(advance_in_chunks(model, begun, 2)))
    assert store == kept


def test_hook_points_see_one_chunk_at_a_time() -> None:
    model, seen = toy(), []
    name, pattern = "loops.1.blocks.0.attn.hook_gate", "loops.1.blocks.0.attn.hook_pattern"
    tokens = random_tokens(model)

    def shapes(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, value.shape[1] if hook.name == name else tuple(value.shape[2:])))

    with model.hooks([(name, shapes), (pattern, shapes)]):
        advance_in_chunks(model, model.begin(tokens), 3)
    assert seen == [
        (name, 3),
        (pattern, (3, 3)),
        (name, 3),
        (pattern, (3, 6)),
        (name, 1),
        (pattern, (1, 7)),
    ]


@pytest.mark.parametrize("chunk", [0, -2])
def test_no_number_of_positions_is_refused(chunk: int) -> None:
    model = toy()
    with pytest.raises(
        ValueError, match=f"chunk must be a number of positions, at least 1, got {chunk}"
    ):
        advance_in_chunks(model, model.begin(random_tokens(model)), chunk)


def test_chunks_from_the_middle_and_rows_of_unfinished_runs_are_refused() -> None:
    model, store = toy(), {}
    begun = model.begin(random_tokens(model))
    stopped = model.advance(begun, "loops.1", store=store)
    with pytest.raises(ValueError, match="this state stands before visit 2"):
        advance_in_chunks(model, stopped, 1)
    with pytest.raises(
        ValueError, match=r"a run must go to its end, but this one has no 'loops.2.blocks.0'"
    ):
        model.last_rows(store, stopped.n_loops)


# Generation


def test_a_token_leaves_one_row_per_layer() -> None:
    model, store = toy(), {}
    begun = model.begin(random_tokens(model))
    model.advance(begun, store=store)
    _, left = model.extend(begun, {})
    assert list(left) == [visit.name for visit in model.schedule()]
    for visit in model.schedule():
        assert torch.equal(left[visit.name].k, store[f"loops.{LOOPS - 1}.blocks.{visit.layer}"].k)


@Options
def test_cached_generation_is_the_equations_token_by_token(options: dict[str, Any]) -> None:
    model, lengths, new = toy(**options), (4, 1, 3), 3
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    tokens = random_tokens(model, pos=4) * mask
    found = generate(model, Batch(tokens, mask, torch.tensor(lengths) - 1), new)
    for row, length in enumerate(lengths):
        sequence = torch.cat([tokens[row, :length], found.new[row, :-1]])
        logits, _ = by_the_equations(model, sequence, LOOPS, list(range(length, length + new)))
        assert_close(found.logits[row], logits[length - 1 :])
        assert torch.equal(found.new[row], logits[length - 1 :].argmax(-1))


@pytest.mark.shapes
def test_generation_from_one_token_is_the_exact_form() -> None:
    model = toy()
    found = generate(model, random_tokens(model, pos=1), 5)
    assert_close(found.logits, exact_logits(model, found.tokens)[:, :-1])
    assert not is_close(found.logits, model(found.tokens)[:, :-1])


@pytest.mark.parametrize("chunk", [1, 2])
def test_prompts_are_run_in_the_configs_chunks_when_generating(chunk: int) -> None:
    model = toy(prefill_chunk=chunk)
    tokens = random_tokens(model, pos=5)
    found = generate(model, tokens, 2)
    sequence = torch.cat([tokens[2], found.new[2, :-1]])
    logits, _ = by_the_equations(model, sequence, LOOPS, [*range(chunk, 5, chunk), 5, 6])
    assert_close(found.logits[2], logits[4:])
    assert not is_close(found.logits, generate(toy(), tokens, 2).logits)


# What it contains


def ouro_of(model: Melt) -> Ouro:
    """The Ouro with a MELT's weights."""
    ouro = build(OuroConfig(**{name: getattr(model.cfg, name) for name in SIZES})).double()
    assert isinstance(ouro, Ouro)
    ouro.load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".latent_gate." not in name}
    )
    return ouro


def ouro_golden() -> Ouro:
    model = load(GOLDEN / "ouro").double()
    assert isinstance(model, Ouro)
    return model


@Options
def test_gates_at_zero_are_ouro(options: dict[str, Any]) -> None:
    model = toy(**options)
    ouro, tokens = ouro_of(model), random_tokens(model)
    _, expected = ouro.run_with_cache(tokens, names_filter="**")
    sites = [name for name in expected if "attn_scores" not in name]
    with model.hooks([("**.hook_gate", lambda z, hook: torch.zeros_like(z))]):
        logits, cache = model.run_with_cache(tokens, names_filter=sites)
    assert_close(logits, ouro(tokens))
    for name in sites:
        assert_close(cache[name], expected[name])
    assert not is_close(model(tokens), ouro(tokens))
    for gate in model.latent_gates:
        gate.W.zero_()
        gate.U.zero_()
        gate.b.fill_(-800.0)
    assert_close(model(tokens), ouro(tokens))


@pytest.mark.parametrize("gate_input", ["normed", "raw"])
def test_the_first_iteration_is_ouros_where_it_starts_from_its_input(gate_input: str) -> None:
    model, from_zero = toy(gate_input=gate_input), toy(gate_input=gate_input, h_0="zero")
    ouro, tokens = ouro_of(model), random_tokens(model)
    assert_close(model(tokens, n_loops=1), ouro(tokens, n_loops=1))
    first = "loops.0.hook_state_out"
    assert_close(
        model.run_with_cache(tokens, names_filter=first)[1][first],
        ouro.run_with_cache(tokens, names_filter=first)[1][first],
    )
    assert not is_close(model(tokens, n_loops=2), ouro(tokens, n_loops=2))
    assert not is_close(from_zero(tokens, n_loops=1), ouro(tokens, n_loops=1))


def test_gates_at_one_keep_the_first_latent() -> None:
    model = toy()
    tokens = random_tokens(model)
    with model.hooks([("**.hook_gate", lambda z, hook: torch.ones_like(z))]):
        _, cache = model.run_with_cache(tokens, names_filter="**.hook_latent_out")
    _, plain = model.run_with_cache(tokens, names_filter="**.hook_latent_out")
    for t, layer in [(t, layer) for t in range(1, LOOPS) for layer in range(LAYERS)]:
        name = f"loops.{t}.blocks.{layer}.attn.hook_latent_out"
        assert_close(cache[name], cache[f"loops.0.blocks.{layer}.attn.hook_latent_out"])
        assert not is_close(plain[name], plain[f"loops.0.blocks.{layer}.attn.hook_latent_out"])


def test_an_ouro_becomes_a_melt_with_weights_of_its_own() -> None:
    ouro, tokens = ouro_golden(), random_tokens(ouro_golden())
    before = {name: value.clone() for name, value in ouro.state_dict().items()}
    model = melt_from_ouro(ouro, h_0="zero", gate_std=0, gate_bias=-800.0, n_loops=2)
    assert model.cfg == MeltConfig(
        **{
            name: value
            for name, value in ouro.cfg.to_dict().items()
            if name not in ("family", "n_loops")
        },
        n_loops=2,
        h_0="zero",
        gate_std=0,
        gate_bias=-800.0,
    )
    assert model.read_at == ouro.read_at
    assert_close(model(tokens), ouro(tokens, n_loops=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in ouro.state_dict().items())


def test_only_an_ouro_with_shared_weights_becomes_a_melt() -> None:
    with pytest.raises(TypeError, match="an Ouro with shared weights, got a Melt"):
        melt_from_ouro(fresh())
    with pytest.raises(TypeError, match="an Ouro with shared weights, got an untied copy"):
        melt_from_ouro(untied(ouro_golden(), 2))
    with pytest.raises(TypeError, match="n_gates"):
        melt_from_ouro(ouro_golden(), n_gates=3)


# Gates, sites, parts


def test_gates_have_as_many_parameters_as_the_reported_sizes_leave_for_them() -> None:
    sizes = {
        "n_layers": 24,
        "n_loops": 4,
        "d_model": 2048,
        "n_heads": 16,
        "d_mlp": 5632,
        "d_vocab": 49152,
    }
    with torch.device("meta"):
        model = build(MeltConfig(**sizes))
    assert isinstance(model, Melt)
    gates = sum(parameter.numel() for gate in model.latent_gates for parameter in gate.parameters())
    assert round(gates / 1e6, 1) == 201.4
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == 1.6


def test_fresh_gates_start_as_the_options_say() -> None:
    tokens = random_tokens(fresh())
    _, cache = fresh(gate_std=0, gate_bias=-2).run_with_cache(tokens, names_filter="**.hook_gate")
    assert len(cache) == (LOOPS - 1) * LAYERS
    for value in cache.values():
        assert_close(value, torch.full_like(value, 1 / (1 + math.exp(2))))
    drawn = torch.cat(
        [x.flatten() for gate in fresh(gate_std=0.5).latent_gates for x in (gate.W, gate.U)]
    )
    assert 0.45 < drawn.std() < 0.55
    assert fresh().latent_gates[0].W.std() < 0.03


def test_every_gate_is_reached_by_gradients() -> None:
    model = toy().requires_grad_(True)
    model(random_tokens(model)).logsumexp(-1).sum().backward()
    for gate in model.latent_gates:
        assert all(
            parameter.grad is not None and bool((parameter.grad != 0).any())
            for parameter in gate.parameters()
        )


def test_the_first_iteration_has_a_gate_only_where_it_starts_from_zero() -> None:
    own = [
        "hook_latent_in",
        "hook_gate",
        "hook_latent_out",
        "ln_latent.hook_scale",
        "ln_latent.hook_normalized",
        "ln_latent.hook_out",
    ]

    def sites(model: Melt, t: int) -> list[str]:
        found = [name.removeprefix(f"loops.{t}.blocks.1.attn.") for name in model.hook_names()]
        return [name for name in found if name in own]

    assert [sites(toy(), t) for t in range(LOOPS)] == [own[2:3], own[:3], own[:3]]
    assert [sites(toy(h_0="zero"), t) for t in range(LOOPS)] == [own[:3]] * 3
    assert [sites(toy(gate_input="raw"), t) for t in range(LOOPS)] == [own[2:], own, own]
    with pytest.raises(KeyError, match=r"loops\.0\.blocks.0.attn.hook_gate"):
        toy().run_with_cache(random_tokens(toy()), names_filter="loops.0.blocks.0.attn.hook_gate")


def test_sites_show_the_blend_and_the_latent_goes_on() -> None:
    model = toy(gate_input="raw")
    _, cache = model.run_with_cache(random_tokens(model), names_filter="**")
    for t in range(1, LOOPS):
        at = f"loops.{t}.blocks.1."
        before, z, after = (
            cache[f"{at}attn.hook_{site}"] for site in ("latent_in", "gate", "latent_out")
        )
        assert_close(before, cache[f"loops.{t - 1}.blocks.1.attn.hook_latent_out"])
        assert_close(after, z * before + (1 - z) * cache[f"{at}hook_resid_pre"])
        scale, normalized, out = (
            cache[f"{at}attn.ln_latent.hook_{site}"] for site in ("scale", "normalized", "out")
        )
        assert_close(scale, (after.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt())
        assert_close(normalized, after / scale)
        assert_close(out, model.blocks[1].ln1.w * after / scale)


@pytest.mark.shapes
def test_latents_are_parts_of_the_state_for_the_methods() -> None:
    model = toy()
    tokens = random_tokens(model)
    for t in range(LOOPS + 1):
        state = model.advance(model.begin(tokens), t * LAYERS)
        assert set(model.state_parts(state)) == {"resid", "latent.0", "latent.1"}
    record = dynamics(model, tokens, part="latent.1", readout=-1)
    _, cache = model.run_with_cache(tokens, names_filter="**.hook_latent_out")
    for t in range(LOOPS):
        assert_close(record.states[t + 1], cache[f"loops.{t}.blocks.1.attn.hook_latent_out"])
    assert bool(
        (jacobian_spectrum(model, tokens, 1, parts="latent.1", readout=-1).radius > 0).all()
    )


def test_the_exit_gate_is_ouros() -> None:
    model = toy()
    tokens = random_tokens(model)
    states = [model(tokens, n_loops=t + 1) for t in range(LOOPS)]
    with model.hooks([("loops.1.hook_exit_logit", lambda logit, hook: logit * 0 + 50.0)]):
        early = readout_at_threshold(model, tokens, 0.999999, readout=-1)
    assert_close(early.logits, states[1])
    assert_close(readout_at_threshold(model, tokens, 1.0, readout=-1).logits, states[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_std": -0.1}, "gate_std must be at least 0, got -0.1"),
        ({"gate_bias": math.inf}, "gate_bias must be finite, got inf"),
        ({"gate_bias": True}, "gate_bias must be a number, got True"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ({"window": 50}, "window must be None: .* got 50"),
        ({"n_key_value_heads": 4}, "n_key_value_heads must divide n_heads=6, got 4"),
    ],
)
def test_configs_that_are_not_computed_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"family": "melt", **SIZES, **changes})


@pytest.mark.parametrize("field", ["h_0", "gate_input"])
def test_options_that_do_not_exist_are_refused(field: str) -> None:
    cfg = MeltConfig(**SIZES)
    object.__setattr__(
        cfg, field, "both"
    )  # past the type checks of the test run, which users do not have
    with pytest.raises(ValueError, match=f"{field} must be .* or .*, got 'both'"):
        cfg.__post_init__()


def test_rows_that_are_kept_are_of_every_position() -> None:
    model, store = toy(), {}
    advance_in_chunks(model, model.begin(random_tokens(model)), 3, store=store)
    kept: KeyValues = store["loops.0.blocks.1"]
    assert kept is store["loops.2.blocks.1"]
    assert kept.k.shape == kept.v.shape == (3, POS, 2, 4)
    assert kept.positions.tolist() == [list(range(POS))] * 3
