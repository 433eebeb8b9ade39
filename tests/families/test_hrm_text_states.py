"""HRM-Text: a forward pass written out by hand, its two states, and its prefix."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.lens.lens import logit_lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.registry import build
from loopscope.models.families.hrm_text import HrmText, HrmTextConfig
from toy import assert_close, is_close, put, randomize_

BATCH, POS, LOOPS, LOW_LOOPS = 3, 7, 2, 3
LENGTHS = torch.tensor([7, 4, 5])
TYPES = torch.tensor([[1, 1, 1, 0, 0, 2, 0], [0, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
CONFIG = HrmTextConfig(
    n_layers=2,
    n_loops=LOOPS,
    n_low_loops=LOW_LOOPS,
    d_model=14,
    n_heads=6,
    n_key_value_heads=2,
    head_dim=4,
    d_mlp=11,
    d_vocab=29,
    n_ctx=9,
    embedding_scale=3.5,
    attention_bias=True,
    mlp_bias=True,
)


@pytest.fixture
def odd() -> HrmText:
    """Every size unequal, grouped heads wider than the stream, biases, and a first low state that
    is not zero.
    """
    model = build(CONFIG)
    assert isinstance(model, HrmText)
    return randomize_(model).double().requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 29, (BATCH, POS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Tensor:
    return (torch.arange(POS) < LENGTHS[:, None]).long()


# The same computation by hand


def by_hand(model: HrmText, tokens: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
    """Logits, one row and one head at a time."""
    cfg, rows = model.cfg, []
    for row, ids in enumerate(tokens):
        prefix = torch.zeros_like(ids, dtype=torch.bool) if types is None else types[row] == 1
        ahead = prefix[:, None] & prefix[None, :]
        seen = (torch.ones(POS, POS, dtype=torch.bool).tril() | ahead) & mask[row].bool()[None, :]
        high = model.embedding[ids] * cfg.embedding_scale
        low = model.low_init.expand_as(high)
        for _ in range(LOOPS):
            for _ in range(cfg.n_low_loops):
                low = run_stack(model, model.low, low + high, seen)
            high = run_stack(model, model.high, high + low, seen)
        rows.append(high @ model.W_U)
    return torch.stack(rows)


def run_stack(model: HrmText, blocks: Any, x: Tensor, seen: Tensor) -> Tensor:
    for block in blocks:
        x = x + attention_by_hand(model.cfg, block.attn, rms(x, model.cfg.eps), seen)
        normed = rms(x, model.cfg.eps)
        mlp = block.mlp
        hidden = F.silu(normed @ mlp.W_gate + mlp.b_gate) * (normed @ mlp.W_in + mlp.b_in)
        x = x + hidden @ mlp.W_out + mlp.b_out
    return rms(x, model.cfg.eps)


def attention_by_hand(cfg: HrmTextConfig, attn: Any, x: Tensor, seen: Tensor) -> Tensor:
    out = attn.b_O.expand_as(x)
    for head in range(cfg.n_heads):
        shared = head // (cfg.n_heads // cfg.kv_heads)
        q = turn(x @ attn.W_Q[head] + attn.b_Q[head], cfg.rope_theta)
        k = turn(x @ attn.W_K[shared] + attn.b_K[shared], cfg.rope_theta)
        v = x @ attn.W_V[shared] + attn.b_V[shared]
        pattern = (q @ k.T / cfg.d_head**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        gate = x @ attn.W_gate[head] + attn.b_gate[head]
        out = out + (gate.sigmoid() * (pattern @ v)) @ attn.W_O[head]
    return out


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turn(x: Tensor, theta: float) -> Tensor:
    """Rotation as a product of complex numbers; angles in float32."""
    half = x.shape[-1] // 2
    angles = torch.arange(POS).float()[:, None] * (
        1.0 / theta ** (torch.arange(half).float() / half)
    )
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.complex(
        angles.cos().double(), angles.sin().double()
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.shapes
@pytest.mark.parametrize("types", [None, TYPES])
def test_forward_is_the_one_written_out_by_hand(
    odd: HrmText, tokens: Tensor, mask: Tensor, types: Tensor | None
) -> None:
    logits = odd(tokens, mask=mask, token_types=types)
    expected = by_hand(odd, tokens, mask, types)
    for row, length in enumerate(LENGTHS.tolist()):
        assert_close(logits[row, :length], expected[row, :length])


def test_gated_heads_sum_to_what_attention_adds(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    for visit in odd.schedule():
        gate, z, gated = (
            cache[f"{visit.name}.attn.hook_{site}"] for site in ("gate", "z", "gated")
        )
        assert_close(gated, gate.sigmoid() * z)
        attn: Any = visit.block.attn
        assert_close(
            torch.einsum("bphd,hdm->bpm", gated, attn.W_O) + attn.b_O,
            cache[f"{visit.name}.hook_attn_out"],
        )


def test_a_fresh_model_runs() -> None:
    torch.manual_seed(0)
    model = build(replace(CONFIG, embedding_scale=50.0))
    assert isinstance(model, HrmText)
    assert not model.low_init.requires_grad
    _, cache = model.run_with_cache(torch.arange(9)[None], names_filter="**")
    assert 0.8 < float(cache["hook_embed"].std()) < 1.25
    assert float(cache["loops.0.low.0.hook_state_in"].abs().max()) == 0.0
    assert cache["q", 1, "high", 1].shape == (1, 9, 6, 4)
    assert cache["k", 1, "low", 2, 1].shape == (1, 9, 2, 4)


def test_fused_projections_with_biases_are_refused() -> None:
    with pytest.raises(
        ValueError, match="attention_bias and mlp_bias must be off where the projections are fused"
    ):
        replace(CONFIG, fused=True)


# Two states


def test_low_state_goes_on_and_its_start_enters_once(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    runs = [f"loops.{h}.low.{run}" for h in range(LOOPS) for run in range(LOW_LOOPS)]
    assert torch.equal(cache[f"{runs[0]}.hook_state_in"], odd.low_init.expand(BATCH, POS, -1))
    for before, after in pairwise(runs):
        assert torch.equal(cache[f"{after}.hook_state_in"], cache[f"{before}.hook_state_out"])


def test_both_states_can_be_read_between_runs(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    state = odd.begin(tokens)
    known = {"low": odd.low_init.expand(BATCH, POS, -1), "high": cache["hook_embed"]}
    for visit in odd.schedule():
        if visit.opening:
            parts = odd.state_parts(state)
            assert_close(parts["low"], known["low"])
            assert_close(parts["high"], known["high"])
        state = odd.advance(state, visit.index + 1)
        if visit.closing:
            known["high" if visit.scope.endswith("high") else "low"] = cache[
                f"{visit.scope}.hook_state_out"
            ]
    assert torch.equal(odd.state_parts(state)["high"], state.resid)
    assert_close(odd.unembed(known["high"]), odd(tokens))


def test_dynamics_of_each_state(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    last = [f"loops.{h}.low.{LOW_LOOPS - 1}.hook_state_out" for h in range(LOOPS)]
    low = torch.stack([odd.low_init.expand(BATCH, POS, -1), *(cache[name] for name in last)])
    high = torch.stack(
        [cache["hook_embed"], *(cache[f"loops.{h}.high.hook_state_out"] for h in range(LOOPS))]
    )
    for part, states in {"low": low, "high": high, "resid": high}.items():
        found = dynamics(odd, tokens, readout=-1, part=part)
        assert_close(found.states, states)


def test_a_patch_of_the_input_reaches_one_run_and_one_of_the_output_all_later_ones(
    odd: HrmText, tokens: Tensor
) -> None:
    index = (slice(None), 2)
    _, plain = odd.run_with_cache(tokens, names_filter="**")

    def changed(name: str, where: str) -> bool:
        with odd.hooks([(name, put(plain[name] + 1.0, index))]):
            _, cache = odd.run_with_cache(tokens, names_filter="**")
        return not is_close(cache[where][index], plain[where][index])

    assert changed("loops.0.low.0.hook_input", "loops.0.low.0.hook_state_out")
    assert not changed("loops.0.low.0.hook_input", "loops.0.low.1.hook_input")
    assert not changed("loops.0.low.0.hook_state_out", "loops.0.low.1.hook_input")
    assert changed("loops.0.low.2.hook_state_out", "loops.0.high.hook_input")
    assert not changed("loops.0.high.hook_input", "loops.1.low.0.hook_state_in")
    assert changed("loops.0.high.hook_state_out", "loops.1.low.2.hook_input")


def test_gradients_flow_through_every_low_run(odd: HrmText, tokens: Tensor) -> None:
    batch = Batch(tokens, torch.ones_like(tokens), torch.full((BATCH,), POS - 1))
    values, grads = gradients(
        odd, batch, lambda logits: logits[:, 5], "loops.*.low.*.hook_state_in"
    )
    along = torch.randn(
        tokens.shape[1],
        odd.cfg.d_model,
        generator=torch.Generator().manual_seed(2),
        dtype=torch.float64,
    )

    def shifted(name: str, step: float) -> Tensor:
        with torch.no_grad(), odd.hooks([(name, lambda value, hook: value + step * along)]):
            return odd(tokens)[:, -1, 5].sum()

    assert len(grads) == LOOPS * LOW_LOOPS
    for name in values:
        slope = (shifted(name, 1e-5) - shifted(name, -1e-5)) / 2e-5
        torch.testing.assert_close((grads[name] * along).sum(), slope, rtol=1e-5, atol=1e-8)
        assert float(slope.abs()) > 1e-4


def test_cache_coordinates(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    assert cache["resid_post", 1, "high", 0] is cache["loops.1.high.blocks.0.hook_resid_post"]
    assert cache["resid_post", 1, "low", 2, -1] is cache["loops.1.low.2.blocks.1.hook_resid_post"]
    assert cache["state_in", -1, "low", 1] is cache["loops.1.low.1.hook_state_in"]
    assert cache["high.state_out", 0] is cache["loops.0.high.hook_state_out"]
    assert cache["ln_boundary.scale", 0, "low", 1] is cache["loops.0.low.1.ln_boundary.hook_scale"]
    assert odd.hook_dict["loops.1.low.2.blocks.1.attn.hook_z"].loop() == 1
    with pytest.raises(KeyError, match="resid_post"):
        cache["resid_post", 0, 0]


# The prefix


def test_types_other_than_one_are_plain_causal(odd: HrmText, tokens: Tensor) -> None:
    alone = torch.tensor([0, 2, 0, 1, 0, 2, 0]).expand(BATCH, POS)
    assert_close(odd(tokens, token_types=alone), odd(tokens))


def test_prefix_tokens_see_each_other_and_nothing_later(odd: HrmText, tokens: Tensor) -> None:
    prefix = torch.tensor([0, 1, 1, 1, 0, 0, 0]).expand(BATCH, POS)

    def moved_by(column: int) -> list[bool]:
        other = tokens.clone()
        other[:, column] = (other[:, column] + 1) % 29
        before, after = odd(tokens, token_types=prefix), odd(other, token_types=prefix)
        return [not is_close(after[:, i], before[:, i]) for i in range(POS)]

    assert moved_by(3) == [False, True, True, True, True, True, True]
    assert moved_by(4) == [False, False, False, False, True, True, True]


def test_prefix_with_padding_subsets_of_rows_and_resuming(
    odd: HrmText, tokens: Tensor, mask: Tensor
) -> None:
    logits = odd(tokens, mask=mask, token_types=TYPES)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = odd(tokens[row : row + 1, :length], token_types=TYPES[row : row + 1, :length])
        assert_close(logits[row, :length], alone[0])
    store: dict[str, Any] = {}
    odd.advance(odd.begin(tokens, mask, token_types=TYPES), store=store)
    for stop in range(len(odd.schedule())):
        state = odd.advance(odd.begin(tokens, mask, token_types=TYPES), stop)
        assert_close(odd.readout(odd.advance(state)), logits)
        rest = odd.advance(state.rows(pos=slice(2, None)), supplied=store)
        assert_close(odd.readout(rest), logits[:, 2:])


def test_a_batch_carries_token_types_into_a_method(odd: HrmText, tokens: Tensor) -> None:
    batch = Batch(
        tokens, torch.ones_like(tokens), torch.full((BATCH,), POS - 1), {"token_types": TYPES}
    )
    lens = logit_lens(odd, batch, keep_logits=True)
    assert lens.logits is not None
    assert_close(lens.logits[-1], odd(tokens, token_types=TYPES)[:, -1])
    assert not is_close(lens.logits[-1], odd(tokens)[:, -1])


def test_self_patch_under_a_prefix_changes_nothing(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**.hook_resid_pre", token_types=TYPES)
    for name, value in list(cache.items())[::3]:
        with odd.hooks([(name, lambda value, hook: None)]):
            logits = odd(tokens, token_types=TYPES)
        with odd.hooks([(name, put(value, (slice(None), 1)))]):
            assert torch.equal(odd(tokens, token_types=TYPES), logits)


@pytest.mark.parametrize(
    ("types", "error", "message"),
    [
        (
            TYPES[:, :5],
            ValueError,
            r"one token type for each of the tokens \[3, 7\], got \[3, 5\]",
        ),
        (
            TYPES.double(),
            TypeError,
            r"token types must be integers, got torch\.float64",
        ),
    ],
)
def test_wrong_token_types_are_refused(
    odd: HrmText, tokens: Tensor, types: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        odd(tokens, token_types=types)


def test_token_types_without_a_prefix_are_refused(tokens: Tensor) -> None:
    with pytest.raises(
        ValueError, match="token types change nothing in this model, because its prefix_lm is off"
    ):
        build(replace(CONFIG, prefix_lm=False))(tokens, token_types=TYPES)
