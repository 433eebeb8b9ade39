"""Inkling-2-Mini: passes that start anew, block sums, messages, convolutions, and experts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from family_toys import LOOPS, TOYS, full, padded
from golden_cases import GOLDEN
from loopscope.checkpoints.load import load
from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.common.inputs import begin_batch
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.layers import attention_dynamics
from loopscope.interp.lens.lens import logit_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.weights.circuits import qk_circuit
from loopscope.models.basis.tokens import Batch
from loopscope.models.blocks.experts import Experts
from loopscope.models.blocks.short_convolution import DynamicConvolution, ShortConvolution
from loopscope.models.core.attention import KeyValues, Rows, causal_keys
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.state import State
from loopscope.models.families.inkling.config import InklingConfig
from toy import assert_close, is_close, put, randomize_

TOY = TOYS["inkling2_loop"]
WIDTH, KERNEL, HEADS = 6, 3, 2


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    return TOY.make().requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> LoopedModel:
    return load(GOLDEN / "inkling2_loop").double().requires_grad_(False)


def values(model: LoopedModel, batch: Batch, names: Any, hooks: Any = ()) -> dict[str, Tensor]:
    with model.hooks(list(hooks), n_loops=LOOPS):
        return dict(
            model.run_with_cache(batch.tokens, n_loops=LOOPS, mask=batch.mask, names_filter=names)[
                1
            ]
        )


def test_a_readout_after_a_pass_is_a_shorter_call_bit_for_bit(model: LoopedModel) -> None:
    batch = padded(TOY, model)
    state = begin_batch(model, batch, 5)
    for loop, end in enumerate(model.iteration_ends(5)):
        state = model.advance(state, end)
        shorter = model(batch.tokens, n_loops=loop + 1, mask=batch.mask)
        assert torch.equal(model.readout(state), shorter)


def test_every_pass_starts_from_the_state_after_the_prelude(model: LoopedModel) -> None:
    batch = full(TOY, model)
    seen = values(model, batch, ["prelude.0.hook_resid_post", "loops.*.hook_state_in"])
    for loop in range(LOOPS):
        start = seen[f"loops.{loop}.hook_state_in"]
        assert torch.equal(start, seen["prelude.0.hook_resid_post"])
    other = [("loops.1.hook_state_in", lambda value, hook: value + 1)]
    patched = values(model, batch, "loops.*.hook_state_*", other)
    plain = values(model, batch, "loops.*.hook_state_*")
    changed = [name for name in plain if not torch.equal(plain[name], patched[name])]
    assert changed == ["loops.1.hook_state_in", "loops.1.hook_state_out", "loops.2.hook_state_out"]


def test_a_pass_reads_the_pass_before_through_its_sources_alone(model: LoopedModel) -> None:
    batch = full(TOY, model)
    state = model.advance(begin_batch(model, batch, LOOPS), "loops.1")
    logits = model.readout(model.advance(state))
    blocks = state.parts["blocks"]
    expected = torch.cat([blocks[:, :, 2:], state.resid[:, :, None]], dim=2)
    assert torch.equal(state.parts["sources"], expected), "one start block, then the loop's first"
    for changed in (state.resid + 1, state.resid * 0):
        again = model.advance(replace(state, resid=changed))
        assert torch.equal(model.readout(again), logits)
    parts = {**state.parts, "sources": state.parts["sources"] + torch.arange(15.0)}
    assert not is_close(model.readout(model.advance(replace(state, parts=parts))), logits)


def test_the_first_layer_of_a_block_closes_the_sum(golden: LoopedModel) -> None:
    batch = full(TOY, golden)
    seen = values(golden, batch, "**")
    for visit in golden.schedule(LOOPS):
        before, added, mid = (
            seen[f"{visit.name}.{site}"]
            for site in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid")
        )
        opens = visit.layer % 2 == 0  # loop and coda start with a block of two
        assert_close(mid, added if opens else before + added)
        post = seen[f"{visit.name}.hook_resid_post"]
        assert_close(post, mid + seen[f"{visit.name}.hook_mlp_out"])


def test_mixes_and_messages_are_means_of_normed_sources(model: LoopedModel) -> None:
    seen = values(model, full(TOY, model), "loops.1.**")
    sources = seen["loops.1.hook_sources"]
    scale = sources.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    for name in ("q", "k", "v", "mlp"):
        message = f"loops.1.blocks.1.{name}_message"
        weights = seen[f"{message}.hook_weights"]
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        mean = (weights[..., None] * sources / scale).sum(2)
        assert_close(seen[f"{message}.hook_out"], mean)
    assert seen["loops.1.blocks.1.q_mix.hook_weights"].shape[-1] == 3, "two blocks and the sum"


def test_the_last_lens_is_the_answer_and_coda_lenses_read_the_block_list(
    model: LoopedModel,
) -> None:
    batch = padded(TOY, model)
    lens = logit_lens(model, batch, LOOPS, keep_logits=True)
    assert lens.logits is not None
    logits = model(batch.tokens, n_loops=LOOPS, mask=batch.mask)
    assert_close(lens.logits[-1], logits[torch.arange(len(batch)), batch.readout])
    assert len(lens.logits) == len(model.schedule(LOOPS))


def rows_of(positions: Tensor, mask: Tensor, others: KeyValues | None = None) -> Rows:
    state = State(0, 1, torch.zeros(*positions.shape, 1), positions, mask)
    return Rows.make(state, causal_keys, others).at(
        "here", {"here": others} if others else None, {}
    )


def inputs(pos: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, pos, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.arange(pos).expand(2, -1), torch.ones(2, pos, dtype=torch.bool)


@pytest.mark.parametrize("length", [5, 4])
def test_a_short_convolution_is_its_sum_written_out(length: int) -> None:
    convolution = randomize_(ShortConvolution(WIDTH, KERNEL, "c")).double()
    x, positions, mask = inputs(5)
    mask = positions < torch.tensor([[5], [length]])
    found = convolution(x, rows_of(positions, mask))
    for row in range(2):
        for p in range(5):
            read = [(lag, p - lag) for lag in range(KERNEL) if p >= lag and mask[row, p - lag]]
            summed = sum(convolution.weight[:, 0, -1 - lag] * x[row, at] for lag, at in read)
            assert_close(found[row, p], (summed + x[row, p]) / math.sqrt(KERNEL + 1))


def test_a_dynamic_convolution_is_its_sum_written_out() -> None:
    convolution = DynamicConvolution(7, HEADS, WIDTH, KERNEL, "c", "hook_taps")
    convolution = randomize_(convolution).double()
    x, positions, mask = inputs(5)
    source = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2)).double()
    found = convolution(x, source, rows_of(positions, mask), NO_TAPS)
    for p in range(5):
        made = (source[0, p] @ convolution.projection.T).view(HEADS, KERNEL)
        for channel in range(WIDTH):
            head = channel // (WIDTH // HEADS)
            summed = sum(
                (convolution.static[lag, channel] + made[head, lag]) * x[0, p - lag, channel]
                for lag in range(min(p + 1, KERNEL))
            )
            expected = (summed + x[0, p, channel]) / math.sqrt(2 * KERNEL + 1)
            assert_close(found[0, p, channel], expected)


def test_later_rows_read_the_inputs_that_earlier_ones_left() -> None:
    """Earlier rows are padded, so that columns and positions differ, and one row is run again."""
    convolution = randomize_(ShortConvolution(WIDTH, KERNEL, "c")).double()
    x, positions, mask = inputs(6)
    whole = convolution(x, rows_of(positions, mask))
    order = torch.tensor([0, 1, 2, 5, 3])
    kept = x[:, order].clone()
    kept[:, 4] = 100.0  # position 3 is among the new rows
    real = torch.tensor([True, True, True, False, True]).expand(2, -1)
    before = KeyValues(kept[..., None, :1], kept[..., None, :1], positions[:, order], real)
    before = replace(before, inputs={"c": kept})
    found = convolution(x[:, 3:], rows_of(positions[:, 3:], mask[:, 3:], before))
    assert_close(found, whole[:, 3:])


def experts() -> tuple[Experts, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mixture = randomize_(Experts((5, 3), 7, 2, (1.5, 2.0), 1.7)).double()
    return mixture, torch.randn(2, 4, 5, generator=generator).double()


def test_experts_are_their_sum_written_out() -> None:
    mixture, x = experts()
    found, biased = mixture(x, NO_TAPS), 0
    for row, out in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        scores = (mixture.router.weight @ row).sigmoid()
        chosen = (scores + mixture.router.bias).argsort(descending=True)[:2].tolist()
        biased += chosen != scores.argsort(descending=True)[:2].tolist()
        total = torch.zeros(5, dtype=torch.float64)
        for expert in chosen:
            gate, up = (mixture.gate_up[expert, half::2] @ row for half in (0, 1))
            post = 1.5 * (gate / 1.5).tanh() * gate.sigmoid() * 2 * (up / 2).tanh()
            weight = 1.7 * scores[expert] / scores[chosen].sum()
            total = total + weight * (mixture.down[expert] @ post)
        assert_close(out, total)
    assert biased, "the bias changes the choice somewhere"


def test_the_gradient_of_an_expert_that_is_not_chosen_is_its_output(model: LoopedModel) -> None:
    batch = full(TOY, model)
    name = "coda.0.mlp.hook_expert_weights"

    def read(logits: Tensor) -> Tensor:
        return logits[:, 4]

    seen, grads = gradients(model, batch, read, [name], LOOPS)
    row, expert = 0, int((seen[name][0, -1] == 0).nonzero()[0])
    ends = []
    for step in (1e-4, -1e-4):
        moved = seen[name].clone()
        moved[row, -1, expert] += step
        with model.hooks([(name, put(moved, (slice(None),)))], n_loops=LOOPS):
            ends.append(model(batch.tokens, n_loops=LOOPS)[row, -1, 4])
    slope = grads[name][row, -1, expert]
    assert slope.abs() > 1e-6
    assert abs((ends[0] - ends[1]) / 2e-4 - slope) < 1e-6 * (1 + slope.abs())


def test_layers_with_other_heads_are_swept_by_their_own(golden: LoopedModel) -> None:
    clean, corrupted = padded(TOY, golden), padded(TOY, golden, seed=1)
    assert [golden.cfg.heads(full=full)[0] for full in (True, False)] == [6, 4]
    sweep = activation_patch(
        golden, clean, corrupted, lambda logits: logits[:, 3], 1,
        sites="attn.hook_z", heads="all", positions=[0], loops=[0],
    )  # fmt: skip
    heads = sweep.frame().groupby("layer")["head"].nunique()
    assert heads.tolist() == [4, 6, 4, 4]
    found = attention_dynamics(golden, clean, LOOPS)
    missing = found.entropy.isnan().sum((0, 2)) // LOOPS
    assert missing.tolist() == [2, 0, 2, 2]


def test_what_passes_hand_on_has_a_jacobian_and_weights_alone_are_no_circuit(
    model: LoopedModel,
) -> None:
    batch = full(TOY, model)
    assert model.loop_parts == ("sources",)
    spectrum = jacobian_spectrum(model, batch, 1, LOOPS, positions="readout")
    assert spectrum.radius.isfinite().all()
    assert (spectrum.radius > 0).all()
    with pytest.raises(ValueError, match="'sources' cannot vary"):
        jacobian_spectrum(model, batch, 0, LOOPS)
    with pytest.raises(ValueError, match="not made of the residual stream"):
        qk_circuit(model, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_prelude_layers": 1}, "start of the loop must be a multiple of layers_per_block=2"),
        ({"n_layers": 3}, "end of the loop must be a multiple of layers_per_block=2, got layer 5"),
        ({"n_prelude_layers": 0}, "n_prelude_layers must be at least 1"),
        ({"full_layers": (7,)}, r"full_layers must be layers in 0..6"),
        ({"full_layers": (True,)}, "full_layers must be layers"),
        ({"n_chosen": 6}, "n_chosen must be at most n_experts=5"),
        ({"n_sliding_key_value_heads": 3}, "n_sliding_key_value_heads must divide"),
        ({"d_vocab_padded": 3}, "d_vocab_padded must be at least d_vocab"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"layers_per_block": 2, "n_prelude_layers": 2, "n_layers": 4}
    with pytest.raises(ValueError, match=message):
        InklingConfig.tiny(**{**good, **changes})
