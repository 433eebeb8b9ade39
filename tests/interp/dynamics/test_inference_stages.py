"""Stages of inference and the dependence on the input, against caches and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from family_toys import LOOPS, TOYS
from family_toys import padded as padded_family
from loopscope.interp.dynamics.inference_stages import inference_stages
from loopscope.interp.dynamics.input_dependence import input_dependence
from loopscope.models.basis.tokens import Batch
from toy import BATCH, LENGTHS, assert_close, cached, hook_count, padded, toy

pytestmark = pytest.mark.shapes
ALL = "loops.*.blocks.*"


def test_the_statistics_are_those_of_cached_states_and_patterns() -> None:
    model, batch = toy(), padded()
    found = inference_stages(model, batch, 3, batch_size=2)
    cache = cached(model, batch, [f"{ALL}.hook_resid_post", f"{ALL}.attn.hook_pattern"])
    visit = found.names.index("loops.1.blocks.1")
    sums = [0.0] * 4
    for row, n in enumerate(LENGTHS):
        states = cache["loops.1.blocks.1.hook_resid_post"][row, :n]
        pattern = cache["loops.1.blocks.1.attn.hook_pattern"][row, :, :n, :n]
        shares = torch.linalg.eigvalsh(states @ states.T)
        shares = (shares / shares.sum()).clamp(min=0)
        sums[0] += torch.special.entr(shares).sum().item()
        for head in pattern:
            got = head.mean(0)
            sums[1] += (1 - torch.special.entr(got).sum() / math.log(n)).item() / len(pattern)
            rows = [torch.special.entr(head[i]).sum() / math.log(i + 1) for i in range(1, n)]
            sums[2] += torch.stack(rows).mean().item() / len(pattern)
            sums[3] += head[1:, 0].mean().item() / len(pattern)
    expected = torch.tensor(sums).double() / BATCH
    statistics = (found.entropy, found.concentration, found.mixing, found.sink)
    torch.testing.assert_close(
        torch.stack([x[visit] for x in statistics]), expected, rtol=1e-6, atol=0
    )


def test_even_attention_mixes_and_a_sink_concentrates() -> None:
    model = toy()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
    even = inference_stages(model, padded(), 3)
    assert_close(even.mixing, torch.ones(6).double())
    harmonic = [sum(1 / (i + 1) for i in range(1, n)) / (n - 1) for n in LENGTHS]
    assert even.sink[0].item() == pytest.approx(sum(harmonic) / 3)
    frame = even.frame()
    assert list(frame["loop"]) == [0, 0, 1, 1, 2, 2]
    assert len(even.plot().data) == 4 * 3


def test_a_single_token_has_no_attention_to_others() -> None:
    one = torch.tensor([[3]])
    with pytest.raises(ValueError, match="at least two tokens, got an input of 1"):
        inference_stages(toy(), one, 3, readout=0)


# Input dependence


def pair(lengths: tuple[int, ...] = LENGTHS) -> tuple[Batch, Batch]:
    return padded(0, lengths), padded(1, lengths)


def test_a_model_that_sees_its_input_once_depends_on_the_state_alone() -> None:
    found = input_dependence(toy(), *pair(), 4)
    assert found.iterations == (1, 2, 3, 4)
    assert found.to_start.abs().max().item() == 0.0
    assert_close(found.to_input, found.apart)
    assert_close(found.dependence(), torch.zeros(4, BATCH).double())


def test_an_injected_input_is_returned_to() -> None:
    """Blocks that write nothing and an injection that is all there is: each run ends at its own
    input.
    """
    model = toy(injection=True)
    found = input_dependence(model, *pair(), 4, after=2)
    assert found.iterations == (2, 3, 4)
    assert (found.to_input[0] == 1).all()
    assert (found.to_start[0] == 0).all()
    assert (found.dependence()[1:] > 0).all()
    assert len(found.frame()) == 3 * BATCH
    assert len(found.plot().data) == 4
    assert hook_count(model) == 0


def test_the_mixed_run_is_the_first_input_with_the_seconds_state() -> None:
    model = toy(injection=True)
    first, second = pair()
    found = input_dependence(model, first, second, 3)
    states = [model.begin(batch, n_loops=3) for batch in (first, second)]
    one, other = (model.advance(state, "loops.1") for state in states)
    ends = [model.advance(s) for s in (replace(one, resid=other.resid), one)]
    read = torch.arange(BATCH), first.readout
    off = (ends[0].resid - ends[1].resid)[read].norm(dim=-1)
    assert_close(found.to_input[-1], off / (one.resid - other.resid)[read].norm(dim=-1))


@pytest.mark.parametrize("family", TOYS)
def test_every_family_exchanges_all_that_an_iteration_hands_on(family: str) -> None:
    """The same tokens twice: the mixed run is the run itself, so no part was left behind."""
    model = TOYS[family].make()
    batch = padded_family(TOYS[family], model)
    with pytest.raises(ValueError, match="different states"):
        input_dependence(model, batch, batch, LOOPS)
    other = replace(batch, tokens=(batch.tokens + 1) % model.cfg.d_vocab)
    found = input_dependence(model, batch, other, LOOPS)
    assert (found.to_start[0] == 0).all()
    assert found.to_input.isfinite().all()


@pytest.mark.parametrize("after", [0, 4])
def test_an_exchange_needs_iterations_around_it(after: int) -> None:
    with pytest.raises(ValueError, match=r"after must be at least 1.*, got [04]"):
        input_dependence(toy(), *pair(), 4, after=after)


def test_states_that_are_not_finite_have_no_statistics() -> None:
    model = toy(injection=True)
    with torch.no_grad():
        model.blocks[1].mlp.W_in.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the states at loops.* hold nan"):
        inference_stages(model, padded(), 2)
    with pytest.raises(ValueError, match="the distances between the states hold nan"):
        input_dependence(model, *pair(), 3)
