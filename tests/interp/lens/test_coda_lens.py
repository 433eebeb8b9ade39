"""The coda lens on every family, trajectories of chosen tokens, and shared tuned lenses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from family_toys import LOOPS, TOYS, padded
from loopscope.checkpoints.load import load
from loopscope.interp.lens.decoding import rank_trajectory
from loopscope.interp.lens.lens import coda_lens, logit_lens, readout_lens
from loopscope.interp.lens.tuned_lens import TunedLens
from loopscope.interp.lens.tuned_training import train_tuned_lens, tuned_lens_kl
from toy import assert_close, toy
from toy import padded as padded_toy


@pytest.mark.parametrize("family", TOYS)
def test_after_an_iteration_the_coda_lens_is_the_readout_lens(family: str) -> None:
    model = TOYS[family].make()
    batch = padded(TOYS[family], model)
    found = coda_lens(model, batch, LOOPS, keep_logits=True)
    visits = [visit for visit in model.schedule(LOOPS) if visit.loop is not None]
    assert found.names == tuple(visit.name for visit in visits)
    last = [model.iteration_ends(LOOPS)[t] - 1 - visits[0].index for t in range(LOOPS)]
    readouts = readout_lens(model, batch, LOOPS, keep_logits=True)
    assert found.logits is not None
    assert readouts.logits is not None
    assert_close(found.logits[last], readouts.logits)


def test_inside_an_iteration_the_coda_follows_the_block() -> None:
    """Huginn, whose coda has blocks: by hand from the state inside the iteration."""
    model = TOYS["huginn"].make()
    batch = padded(TOYS["huginn"], model)
    visit = next(v for v in model.schedule(LOOPS) if v.loop == 1)
    state = model.begin(batch.tokens, batch.mask, n_loops=LOOPS, **batch.options)
    state = model.advance(state, visit.index + 1)
    coda = next(v.index for v in model.schedule(LOOPS) if v.name == "coda.0")
    expected = model.readout(model.advance(replace(state, visit=coda)), batch.readout)
    found = coda_lens(model, batch, LOOPS, keep_logits=True)
    assert found.logits is not None
    assert_close(found.logits[found.names.index(visit.name)], expected)
    assert found.heads_input.shape[0] < len(logit_lens(model, batch, LOOPS).names)


@pytest.mark.shapes
def test_a_list_of_words_is_followed_at_every_read() -> None:
    model = load("mini/multi_hop/r2")
    lens = logit_lens(model, ["<e_3><r_1>", "<e_7><r_2>"], 3)
    words = rank_trajectory(lens, ["<e_5>", "<e_9>"])
    ids = [model.to_single_token(word) for word in ("<e_5>", "<e_9>")]
    assert torch.equal(words.tokens, torch.tensor([ids, ids]))
    assert torch.equal(rank_trajectory(lens, [ids, ids]).rank, words.rank)
    assert torch.equal(words.rank[..., 1], lens.rank([ids[1]] * 2))
    with pytest.raises(ValueError, match="e_x"):
        rank_trajectory(lens, ["<e_x>"])


@pytest.mark.shapes
def test_a_shared_translator_is_one_for_all_iterations() -> None:
    model = toy()
    found = train_tuned_lens(model, padded_toy(), 3, steps=3, positions="real", shared=True)
    for block in range(2):
        same = [found.weights[t * 2 + block] for t in range(3)]
        assert same[0].abs().sum() > 0
        assert torch.equal(same[0], same[1])
        assert torch.equal(same[0], same[2])
    assert not torch.equal(found.weights[0], found.weights[1])
    alone = train_tuned_lens(model, padded_toy(), 3, steps=3, positions="real")
    assert not torch.equal(alone.weights[0], alone.weights[2])


def test_the_kl_is_that_of_the_lenses_distributions() -> None:
    model, batch = toy(), padded_toy()
    lens = logit_lens(model, batch, 3, keep_logits=True)
    assert lens.logits is not None
    final = model.readout(model.advance(model.begin(batch, n_loops=3)), batch.readout)
    p, q = final.log_softmax(-1), lens.logits.log_softmax(-1)
    by_hand = (p.exp() * (p - q)).sum(-1).mean(1)
    assert_close(tuned_lens_kl(model, batch, n_loops=3).kl[0], by_hand)
    assert_close(tuned_lens_kl(model, batch, TunedLens.identity(model, 3)).kl[0], by_hand)
    trained = train_tuned_lens(model, batch, 3, steps=1)
    assert_close(tuned_lens_kl(model, batch, trained).kl[:, -1], torch.zeros(1).double())
    with pytest.raises(ValueError, match="train one for this model"):
        tuned_lens_kl(toy("learned"), batch, trained)


def test_several_lenses_are_compared_on_one_run() -> None:
    model, batch = toy(), padded_toy()
    lenses = {
        "logit lens": None,
        "shared": train_tuned_lens(model, batch, 3, steps=2, shared=True),
        "per visit": train_tuned_lens(model, batch, 3, steps=2),
    }
    both = tuned_lens_kl(model, batch, lenses)
    for row, lens in zip(both.kl, lenses.values(), strict=True):
        assert_close(row, tuned_lens_kl(model, batch, lens, 3).kl[0])
    frame = both.frame()
    assert list(frame.columns) == ["lens", "visit", "loop", "layer", "kl"]
    row = frame[(frame.lens == "shared") & (frame.loop == 1) & (frame.layer == 0)]
    assert row["kl"].tolist() == [both.kl[1, 2].item()]
    picture = both.plot()
    assert [trace.name for trace in picture.data] == list(lenses)
    assert picture.data[1].y[2] == pytest.approx(both.kl[1, 2].item())


def test_lenses_that_cannot_be_compared_are_refused() -> None:
    model, batch = toy(), padded_toy()
    lenses = {"three": TunedLens.identity(model, 3), "two": TunedLens.identity(model, 2)}
    with pytest.raises(
        ValueError, match=r"compared on one run, but theirs have \[2, 3\] iterations"
    ):
        tuned_lens_kl(model, batch, lenses)
    with pytest.raises(ValueError, match="at least one lens is needed, got an empty mapping"):
        tuned_lens_kl(model, batch, {}, 3)
