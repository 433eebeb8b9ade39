"""Dory: its golden outputs, a slow computation of every option, its windows and its two cache
rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Compute, GoldenCase, check_case
from loopscope.interp.generation import Generated, generate
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.attention import KeyValueStore
from loopscope.models.families.dory import Dory
from references.dory import fresh, slow_attention, slow_logits, slow_mlp, unit
from toy import assert_close, is_close, put

FIRST_CHUNK = 3  # of the golden runs that go on one position at a time


def dory(case: GoldenCase, kv_cache: str = "per_loop") -> Dory:
    """The case's model with a rule for its generation cache."""
    assert isinstance(case.model, Dory)
    case.model.cfg = replace(case.model.cfg, kv_cache=kv_cache)
    return case.model


def direct_lens(case: GoldenCase, t: str) -> Tensor:
    model = dory(case)
    return model.unembed(model.normalize(case.activation(f"loops.{t}.hook_state_out")))


def real_positions(case: GoldenCase, side: str) -> Tensor:
    """Each row's real tokens run alone, in their columns; the reference's numbers at padding."""
    found = case.golden[f"variant.{side}_pad.logits"].clone()
    for row, real in enumerate(case.golden[f"variant.{side}_pad.attention_mask"].bool()):
        found[row, real] = case.model(case.tokens[row, real][None], n_loops=case.n_loops)[0]
    return found


def right_padded(case: GoldenCase) -> Tensor:
    mask = case.golden["variant.right_pad.attention_mask"]
    golden = case.golden["variant.right_pad.logits"]
    return torch.where(mask.bool()[..., None], case.logits(mask=mask), golden)


def loss(case: GoldenCase) -> Tensor:
    logits = case.logits()[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, case.tokens[:, 1:].flatten())[None]


def generated(case: GoldenCase, rule: str) -> Generated:
    cached = rule != "no_cache"
    model = dory(case, rule if cached else "per_loop")
    return generate(model, case.tokens, 4, use_cache=cached)


@torch.no_grad()
def stepwise(case: GoldenCase, rule: str) -> Tensor:
    """Logits of a first chunk, and then of one position at a time."""
    model, store, found = dory(case, rule), {}, []
    begun = model.begin(case.tokens, n_loops=case.n_loops)
    cuts = [slice(0, FIRST_CHUNK)]
    cuts += [slice(i, i + 1) for i in range(FIRST_CHUNK, case.tokens.shape[1])]
    for cut in cuts:
        end, new = model.extend(begun.rows(pos=cut), store)
        store = {name: store[name].followed_by(new[name]) if store else new[name] for name in new}
        found.append(model.readout(end))
    return torch.cat(found, dim=1)


SITES = {
    **{f"resid_{where}": f"hook_resid_{where}" for where in ("pre", "mid", "post")},
    "attn_in": "ln1.hook_out",
    "attn_out": "attn.hook_out",
    "mlp_in": "ln2.hook_out",
    "mlp_out": "mlp.hook_out",
    "attn.pattern": "attn.hook_pattern",
}
HEADS = {"q": "hook_rot_q", "k": "hook_rot_k", "v": "hook_v"}
GATES = {"gate_logit": "hook_gate", "gated": "hook_gated"}


def prefix(stage: str, t: str, j: str) -> str:
    return f"{stage}.{j}" if stage in ("prelude", "coda") else f"loops.{t}.blocks.{j}"


BLOCK = r"(prelude|coda|iter\.(\d+))\.block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids|variant\.\w+\.(?:attention_mask|position_ids))": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    BLOCK + rf"({'|'.join(SITES)})": lambda case, stage, t, j, what: case.activation(
        f"{prefix(stage, t, j)}.{SITES[what]}"
    ),
    BLOCK + r"attn\.(q|k|v)": lambda case, stage, t, j, what: case.heads_first(
        f"{prefix(stage, t, j)}.attn.{HEADS[what]}"
    ),
    BLOCK + r"attn\.(gate_logit|gated)": lambda case, stage, t, j, what: case.activation(
        f"{prefix(stage, t, j)}.attn.{GATES[what]}"
    ).flatten(-2),
    r"prelude_out": lambda case: case.activation("prelude.1.hook_resid_post"),
    r"injected_input": lambda case: case.activation("loops.2.hook_input"),
    r"iter\.(\d+)\.state_(in|out)": lambda case, t, end: case.activation(
        f"loops.{t}.hook_state_{end}"
    ),
    r"iter\.(\d+)\.state_in_normed": lambda case, t: case.activation(
        f"loops.{t}.ln_state.hook_out"
    ),
    r"iter\.(\d+)\.inject_out": lambda case, t: case.activation(f"loops.{t}.hook_injected"),
    r"iter\.(\d+)\.readout_logits": lambda case, t: case.logits(int(t) + 1),
    r"iter\.(\d+)\.direct_lens_logits": direct_lens,
    r"final_norm_out": lambda case: case.activation("ln_final.hook_out"),
    r"logits": GoldenCase.logits,
    r"variant\.loops_(\d+)\.logits": lambda case, n_loops: case.logits(int(n_loops)),
    r"variant\.right_pad\.logits": right_padded,
    r"variant\.(left)_pad\.logits": real_positions,
    r"variant\.labels\.loss": loss,
    r"variant\.generate_(\w+)\.tokens": lambda case, rule: generated(case, rule).tokens,
    r"variant\.generate_(\w+)\.logits": lambda case, rule: generated(case, rule).logits,
    r"variant\.stepwise_(\w+)\.logits": stepwise,
}


@torch.no_grad()
def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(GoldenCase("dory"), TABLE, record_error)


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return GoldenCase("dory")


# Every option


VARIANTS: list[dict[str, Any]] = [
    {},
    {"tied": True, "full_layers": (), "window": 2, "window_rope_theta": 30.0},
    {"full_layers": None, "n_layers": 3, "n_key_value_heads": 6, "rope_theta": 50.0},
    {"n_prelude_layers": 0, "full_layers": (0, 2), "start": 0.3, "rate_start": 0.4},
    {"n_coda_layers": 0, "n_key_value_heads": 1, "eps": 0.02, "window": 1},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_option_equals_the_slow_computation(changes: dict[str, Any]) -> None:
    model = fresh(**changes)
    for ids in torch.randint(29, (2, 7)):
        assert_close(model(ids[None], n_loops=2)[0], slow_logits(model, ids, 2))


def test_what_hardly_moves_logits_is_right_too() -> None:
    """The inner norms and the first injection change only lengths that a later norm takes away."""
    model, ids = fresh(), torch.randint(29, (1, 7))
    _, cache = model.run_with_cache(ids, n_loops=1, names_filter="**")
    w, cfg, at = dict(model.state_dict()), model.cfg, "loops.0.blocks.1"
    own = {name.removeprefix("blocks.1."): value for name, value in w.items()}
    x = cache[f"{at}.ln1.hook_out"][0]
    assert_close(cache[f"{at}.attn.hook_out"][0], slow_attention(x, own, cfg, full=False))
    y = cache[f"{at}.ln2.hook_out"][0]
    assert_close(cache[f"{at}.mlp.hook_out"][0], slow_mlp(y, own, cfg))
    assert_close(y @ model.blocks[1].mlp.W_gate, cache[f"{at}.mlp.hook_pre"][0])
    assert_close(y @ model.blocks[1].mlp.W_in, cache[f"{at}.mlp.hook_pre_linear"][0])
    gate = torch.einsum("pd,hdk->phk", x, model.blocks[1].attn.W_gate)
    assert_close(gate, cache[f"{at}.attn.hook_gate"][0])
    e = unit(cache["prelude.0.hook_resid_post"], cfg.eps)
    assert_close(cache["loops.0.hook_injected"], 2 * e)
    for part in ("attn", "mlp"):
        rate = (own[f"{part}_alpha"] * cfg.rate_start / cfg.start).abs()
        assert_close(cache[f"{at}.hook_{part}_rate"], rate.expand(1, 7, -1))


def test_a_step_with_rate_zero_leaves_the_direction() -> None:
    model, ids, at = fresh(), torch.randint(29, (3, 7)), "loops.1.blocks.0."
    zero = [(f"{at}hook_{part}_rate", lambda rate, hook: 0 * rate) for part in ("attn", "mlp")]
    with model.hooks(zero, n_loops=2):
        _, cache = model.run_with_cache(ids, n_loops=2, names_filter=f"{at}hook_resid_*")
    before, after = cache[f"{at}hook_resid_pre"], cache[f"{at}hook_resid_post"]
    assert_close(after, unit(unit(before, 1e-6), 1e-6))


# Readouts


def test_the_readout_of_every_iteration_is_the_shorter_model_bit_for_bit(case: GoldenCase) -> None:
    model = case.model
    state = model.begin(case.tokens, n_loops=case.n_loops)
    for t, end in enumerate(model.iteration_ends(case.n_loops)):
        state = model.advance(state, end)
        assert torch.equal(model.readout(state), model(case.tokens, n_loops=t + 1))


def test_logit_lens_skips_the_coda_and_readout_lens_does_not(case: GoldenCase) -> None:
    direct = logit_lens(case.model, case.tokens, readout=-1, keep_logits=True)
    read = readout_lens(case.model, case.tokens, readout=-1, keep_logits=True)
    assert direct.logits is not None
    assert read.logits is not None
    visits = case.model.schedule()
    for t, end in enumerate(case.model.iteration_ends(case.n_loops)):
        assert visits[end - 1].loop == t
        golden = case.golden[f"iter.{t}.direct_lens_logits"][:, -1]
        torch.testing.assert_close(direct.logits[end - 1], golden, atol=2e-4, rtol=0.0)
        golden = case.golden[f"iter.{t}.readout_logits"][:, -1]
        torch.testing.assert_close(read.logits[t], golden, atol=2e-4, rtol=0.0)


def test_logits_of_narrow_weights_are_scaled_in_float32() -> None:
    model = fresh().bfloat16()
    ids = torch.randint(29, (3, 7))
    _, cache = model.run_with_cache(ids, n_loops=2, names_filter="ln_final.hook_out")
    logits, normed = model(ids, n_loops=2), cache["ln_final.hook_out"]
    assert logits.dtype == torch.float32
    assert normed.dtype == model.W_U.dtype == torch.bfloat16
    scale = model.logit_scale.float() / model.cfg.start
    assert torch.equal(logits, F.linear(normed, model.head).float() * scale)


# The two cache rules


def in_chunks(model: Dory, ids: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, KeyValueStore]:
    """Logits of consecutive chunks, and what the cache holds in the end."""
    begun, store, found, first = model.begin(ids), {}, [], 0
    for size in sizes:
        end, new = model.extend(begun.rows(pos=slice(first, first + size)), store)
        store = {name: store[name].followed_by(new[name]) if store else new[name] for name in new}
        found.append(model.readout(end))
        first += size
    return torch.cat(found, dim=1), store


def test_per_loop_equals_the_whole_run_and_last_loop_only_in_the_first_chunk() -> None:
    model, ids = fresh(), torch.randint(29, (3, 7))
    whole = model(ids)
    assert_close(in_chunks(model, ids, (3, 2, 1, 1))[0], whole)
    model.cfg = replace(model.cfg, kv_cache="last_loop")
    assert_close(model(ids), whole)
    assert_close(in_chunks(model, ids, (7,))[0], whole)
    chunked, one_by_one = (in_chunks(model, ids, sizes)[0] for sizes in ((3, 4), (3, 1, 1, 1, 1)))
    assert_close(chunked[:, :3], whole[:, :3])
    assert not is_close(chunked[:, 3:], whole[:, 3:])
    assert not is_close(chunked[:, 4:], one_by_one[:, 4:])


def test_last_loop_keeps_the_rows_of_the_last_iteration_for_all_iterations() -> None:
    model, ids = fresh(kv_cache="last_loop"), torch.randint(29, (3, 7))
    _, kept = in_chunks(model, ids, (4,))
    every: KeyValueStore = {}
    model.advance(model.begin(ids[:, :4]), store=every)
    for t in range(3):
        for layer in range(2):
            row = kept[f"loops.{t}.blocks.{layer}"]
            assert torch.equal(row.k, every[f"loops.2.blocks.{layer}"].k)
            assert torch.equal(row.v, every[f"loops.2.blocks.{layer}"].v)
    assert torch.equal(kept["coda.0"].k, every["coda.0"].k)


# Windows


def test_a_row_sees_its_window_and_no_more(case: GoldenCase) -> None:
    seen = torch.ones(7, 7).tril().bool()
    for visit in case.model.schedule():
        first = {"prelude": 0, "loops": 2, "coda": 5}[visit.stage]
        full = first + visit.layer in (1, 3, 5)
        near = seen if full else seen & ~seen.tril(-case.model.cfg.window)
        pattern = case.activation(f"{visit.name}.attn.hook_pattern")
        assert torch.equal(pattern > 0, near.expand_as(pattern)), visit.name


def test_a_window_as_wide_as_the_input_is_full_attention_bit_for_bit() -> None:
    ids, same = torch.randint(29, (3, 7)), {"window_rope_theta": 70.0, "rope_theta": 70.0}
    wide, full = fresh(full_layers=(), window=7, **same), fresh(full_layers=(0, 1, 2, 3), **same)
    assert torch.equal(wide(ids), full(ids))


def test_a_sweep_over_windows_without_padding_is_one_run_for_each_cell() -> None:
    model = fresh()
    clean, corrupted = torch.randint(29, (2, 3, 7))

    def first_channel(logits: Tensor) -> Tensor:
        return logits[:, 0]

    sweep = activation_patch(
        model, clean, corrupted, first_channel, n_loops=2, sites=["resid_pre"], readout=-1
    )
    _, source = model.run_with_cache(clean, n_loops=2)
    for cell, value in zip(sweep.cells, sweep.values, strict=True):
        patch = put(source[cell.name], (slice(None), cell.position))
        logits = model.run_with_hooks(corrupted, n_loops=2, fwd_hooks=[(cell.name, patch)])
        assert_close(value, first_channel(logits[:, -1]))
