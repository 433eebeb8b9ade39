"""Hyperloop: its equations written out, its parameter counts, and the plain looped model that it
contains.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from family_toys import random_tokens
from loopscope.interp.dynamics.states import dynamics
from loopscope.models.core.attention import Rows
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.registry import build, config_from_dict
from loopscope.models.families.hyperloop import Hyperloop, HyperloopConfig, LoopMixing
from loopscope.models.families.nanbeige import NanbeigeConfig
from toy import assert_close, is_close, randomize_

D_MODEL, STREAMS, LOOPS = 15, 5, 3
SIZES: dict[str, Any] = {
    "n_prelude_layers": 1,
    "n_layers": 2,
    "n_coda_layers": 2,
    "n_loops": LOOPS,
    "n_streams": STREAMS,
    "d_model": D_MODEL,
    "n_heads": 6,
    "n_key_value_heads": 2,
    "head_dim": 4,
    "d_mlp": 22,
    "d_vocab": 29,
}


def fresh(**changes: Any) -> Hyperloop:
    model = build(HyperloopConfig(**{**SIZES, **changes})).double().requires_grad_(False)
    assert isinstance(model, Hyperloop)
    return model


def toy(**changes: Any) -> Hyperloop:
    return randomize_(fresh(**changes))


def through(model: Hyperloop, blocks: Any, x: Tensor) -> Tensor:
    """Blocks on whole sequences, one after the other."""
    rows = Rows.make(model.begin(torch.zeros(x.shape[:2], dtype=torch.int64)), type(model).visible)
    for block in blocks:
        x = block(x, rows, NO_TAPS)
    return x


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gates(mixing: LoopMixing, y: Tensor, eps: float) -> list[list[float]]:
    """Read, write and keep of one position, number by number, from its streams "stream d_model"."""
    flat = [y[s, d].item() for s in range(STREAMS) for d in range(D_MODEL)]
    root = math.sqrt(sum(x * x for x in flat) / len(flat) + eps)
    gains = [1.0] * len(flat) if mixing.norm.w is None else mixing.norm.w.tolist()
    zeta = [x / root * gain for x, gain in zip(flat, gains, strict=True)]
    found = []
    for kind, factor in enumerate((1.0, 2.0, 1.0)):
        W, a, b = mixing.W[kind].tolist(), mixing.a[kind].item(), mixing.b[kind].tolist()
        found.append(
            [
                factor * sigmoid(a * sum(w * z for w, z in zip(W[s], zeta, strict=True)) + b[s])
                for s in range(STREAMS)
            ]
        )
    return found


def by_the_equations(model: Hyperloop, tokens: Tensor, n_loops: int) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the streams after every iteration."""
    x = through(model, model.prelude_blocks, model.W_E[tokens])
    y = torch.stack([x] * STREAMS, dim=2)
    history = [y]
    for t in range(n_loops):
        mixing = model.mixing[t]
        assert isinstance(mixing, LoopMixing)
        places = [(i, p) for i in range(tokens.shape[0]) for p in range(tokens.shape[1])]
        weights = {place: gates(mixing, y[place], model.cfg.eps) for place in places}
        read = torch.zeros_like(x)
        for place in places:
            for s in range(STREAMS):
                read[place] += weights[place][0][s] * y[place][s]
        out, new = through(model, model.blocks, read), torch.zeros_like(y)
        for place in places:
            for s in range(STREAMS):
                new[place][s] = weights[place][2][s] * y[place][s] + weights[place][1][s] * (
                    out[place] + mixing.embedding
                )
        y = new
        history.append(y)
    x = through(model, model.coda_blocks, sum(y[:, :, s] for s in range(STREAMS)) / STREAMS)
    return model.unembed(model.normalize(x)), history


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stream_norm_gain": True, "normalization_type": "RMS", "tied": True},
        {"final_norm": False},
    ],
)
@pytest.mark.parametrize("n_loops", [LOOPS, 2])
def test_forward_is_the_equations(changes: dict[str, Any], n_loops: int) -> None:
    model = toy(**changes)
    tokens = random_tokens(model)
    logits, cache = model.run_with_cache(
        tokens, n_loops=n_loops, names_filter="loops.*.hook_state_*.streams"
    )
    expected, history = by_the_equations(model, tokens, n_loops)
    assert_close(logits, expected)
    for t in range(n_loops):
        assert_close(cache[f"loops.{t}.hook_state_in.streams"], history[t])
        assert_close(cache[f"loops.{t}.hook_state_out.streams"], history[t + 1])


@pytest.mark.parametrize(("d_model", "blocks", "mixing", "millions"), [
    (1024, (2, 4, 2), 150_573, 135.7),
    (2048, (3, 4, 3), 301_101, 579.7),
    (2048, (4, 10, 4), 301_101, 990.8),
])  # fmt: skip
def test_parameters_are_as_many_as_in_the_paper(
    d_model: int, blocks: tuple[int, int, int], mixing: int, millions: float
) -> None:
    begin, middle, end = blocks
    with torch.device("meta"):
        model = build(
            HyperloopConfig(
                n_prelude_layers=begin,
                n_layers=middle,
                n_coda_layers=end,
                n_loops=3,
                d_model=d_model,
                n_heads=16,
                d_mlp=11 * d_model // 4,
                d_vocab=32000,
            )
        )
    assert isinstance(model, Hyperloop)
    assert sum(p.numel() for p in model.mixing.parameters()) == mixing
    without_embedding = sum(p.numel() for p in model.parameters()) - model.W_E.numel()
    assert round(without_embedding / 1e6, 1) == millions


def test_gains_in_the_norm_of_the_streams_are_counted_per_iteration() -> None:
    counts = [
        sum(p.numel() for p in fresh(stream_norm_gain=gain).mixing.parameters())
        for gain in (False, True)
    ]
    assert counts[1] - counts[0] == LOOPS * STREAMS * D_MODEL


def plain_logits(model: Hyperloop, tokens: Tensor, n_loops: int) -> Tensor:
    x = through(model, model.prelude_blocks, model.W_E[tokens])
    for _ in range(n_loops):
        x = through(model, model.blocks, x)
    return model.unembed(model.normalize(through(model, model.coda_blocks, x)))


def make_plain_(model: Hyperloop) -> None:
    """b_pre = -ln(n - 1), b_post = 0, keep and the added vector 0, whatever W is."""
    for mixing in model.mixing:
        assert isinstance(mixing, LoopMixing)
        mixing.a.zero_()
        mixing.b.copy_(
            torch.tensor([-math.log(STREAMS - 1), 0.0, -math.inf], dtype=torch.float64)[:, None]
        )
        mixing.embedding.zero_()


def test_streams_that_are_forgotten_are_the_plain_looped_model() -> None:
    model = toy()
    tokens = random_tokens(model)
    assert not is_close(model(tokens), plain_logits(model, tokens, LOOPS))
    make_plain_(model)
    assert_close(model(tokens), plain_logits(model, tokens, LOOPS))


def test_without_prelude_and_coda_that_is_the_flat_looped_family() -> None:
    model = toy(n_prelude_layers=0, n_coda_layers=0, normalization_type="RMS")
    make_plain_(model)
    same = (
        "n_layers",
        "n_loops",
        "d_model",
        "n_heads",
        "n_key_value_heads",
        "head_dim",
        "d_mlp",
        "d_vocab",
    )
    flat = build(
        NanbeigeConfig(**{name: SIZES[name] for name in same}, boundary_norm=False)
    ).double()
    flat.load_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("mixing.")
        }
    )
    tokens = random_tokens(model)
    for n_loops in range(1, LOOPS + 1):
        assert_close(model(tokens, n_loops=n_loops), flat(tokens, n_loops=n_loops))


def test_fresh_weights_start_as_the_options_say() -> None:
    tokens = random_tokens(fresh())
    _, cache = fresh(gate_scale=0).run_with_cache(tokens, names_filter="loops.*.hook_stream_*")
    for name, value in cache.items():
        assert_close(value, torch.full_like(value, 1.0 if name.endswith("write") else 0.5))
    plain = fresh(gate_scale=0, gate_bias="plain")
    difference = (plain(tokens) - plain_logits(plain, tokens, LOOPS)).norm()
    assert 0 < difference < 1e-6 * plain(tokens).norm()
    first = fresh().mixing[0]
    assert isinstance(first, LoopMixing)
    bound = 1 / math.sqrt(STREAMS * D_MODEL)
    assert 0.9 * bound < first.W.abs().max() <= bound
    assert_close(first.a.float(), torch.full((3,), 0.01))
    assert not first.embedding.any()


def test_weights_of_an_iteration_act_there_and_nowhere_else() -> None:
    model = toy()
    tokens = random_tokens(model)
    before = [model(tokens, n_loops=n) for n in range(1, LOOPS + 1)]
    last = model.mixing[LOOPS - 1]
    assert isinstance(last, LoopMixing)
    last.embedding.add_(
        torch.linspace(-1, 1, D_MODEL)
    )  # not a constant, which LayerNorm would take away again
    after = [model(tokens, n_loops=n) for n in range(1, LOOPS + 1)]
    assert [is_close(a, b) for a, b in zip(after, before, strict=True)] == [True] * (LOOPS - 1) + [
        False
    ]


def test_longer_calls_are_refused() -> None:
    model = toy()
    message = (
        "n_loops must be at most 3: each iteration of a Hyperloop model has mixing weights of its"
        " own, .* got 4"
    )
    with pytest.raises(ValueError, match=message):
        model(random_tokens(model), n_loops=4)
    with pytest.raises(ValueError, match=message):
        model.hook_names(4)
    assert len(model.hook_names()) == len(set(model.hook_names()))


def test_sites_have_the_shapes_of_their_streams() -> None:
    model = toy()
    _, cache = model.run_with_cache(
        random_tokens(model),
        names_filter=[name for name in model.hook_names() if name.startswith("loops.1.hook_")],
    )
    shapes = {
        name.removeprefix("loops.1."): tuple(value.shape[2:]) for name, value in cache.items()
    }
    assert shapes == {
        "hook_state_in.streams": (STREAMS, D_MODEL),
        "hook_stream_read": (STREAMS,),
        "hook_stream_write": (STREAMS,),
        "hook_stream_keep": (STREAMS,),
        "hook_loop_out": (D_MODEL,),
        "hook_state_out.streams": (STREAMS, D_MODEL),
    }


@pytest.mark.parametrize("n_prelude_layers", [0, 2])
def test_streams_are_the_state_between_iterations(n_prelude_layers: int) -> None:
    model = toy(n_prelude_layers=n_prelude_layers)
    tokens = random_tokens(model)
    for t in range(LOOPS):
        state = model.advance(model.begin(tokens), f"loops.{t}")
        assert set(model.state_parts(state)) == {"resid", "streams"}
        assert_close(state.resid, state.parts["streams"].mean(2))
    record = dynamics(model, tokens, part="streams", readout=-1)
    assert record.states.shape[0] == LOOPS + 1
    assert record.states.shape[-1] == STREAMS * D_MODEL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_loops": None}, "n_loops must be given: each iteration"),
        ({"n_streams": 1}, "n_streams must be at least 2, got 1"),
        ({"n_coda_layers": -1}, "n_coda_layers must be at least 0, got -1"),
        ({"n_prelude_layers": True}, "n_prelude_layers must be an integer, got True"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"family": "hyperloop", **SIZES, **changes})


@pytest.mark.parametrize("field", ["normalization_type", "gate_bias"])
def test_choices_that_do_not_exist_are_refused(field: str) -> None:
    cfg = HyperloopConfig(**SIZES)
    object.__setattr__(
        cfg, field, "other"
    )  # past the type checks of the test run, which users do not have
    with pytest.raises(ValueError, match=f"{field} must be .* or .*, got 'other'"):
        cfg.__post_init__()
