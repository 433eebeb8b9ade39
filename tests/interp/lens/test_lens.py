"""Lenses: each statistic against plain PyTorch on full logits, what a lens shows, and what it
refuses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor

from family_toys import TOYS
from family_toys import padded as family_padded
from loopscope.interp.common.metrics import logit_diff, logit_margin, margin
from loopscope.interp.lens import record as lens_module
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.lens.record import Lens
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_MODEL,
    D_VOCAB,
    LAYERS,
    LOOPS,
    POS,
    assert_close,
    full,
    padded,
    random_tokens,
    toy,
    with_words,
)

ANSWERS = torch.tensor([4, 17, 28])
LENSES: dict[str, Callable[..., Lens]] = {"logit_lens": logit_lens, "readout_lens": readout_lens}


@pytest.fixture(params=LENSES)
def lens(request: pytest.FixtureRequest) -> Lens:
    """Each kind of lens, with all logits kept."""
    return LENSES[request.param](toy("learned", True), padded(), LOOPS, keep_logits=True)


# Statistics


def test_margin_is_the_answer_minus_the_best_other(lens: Lens) -> None:
    found = lens.margin(ANSWERS)
    assert found.shape == lens.logits.shape[:2]
    for visit, read in itertools.product(range(len(lens.logits)), range(BATCH)):
        row = lens.logits[visit, read].tolist()
        answer = row.pop(int(ANSWERS[read]))
        assert found[visit, read].item() == pytest.approx(answer - max(row), rel=1e-9)
    assert torch.equal(found > 0, lens.correct(ANSWERS))


def test_rank_counts_the_tokens_above(lens: Lens) -> None:
    order = lens.logits.argsort(-1, descending=True)
    assert torch.equal(lens.rank(ANSWERS), (order == ANSWERS[None, :, None]).int().argmax(-1))
    assert torch.equal(lens.rank(ANSWERS) == 0, lens.correct(ANSWERS))


def test_prob_is_the_softmax_of_one_token(lens: Lens) -> None:
    probs = lens.logits.exp() / lens.logits.exp().sum(-1, keepdim=True)
    assert_close(lens.prob(ANSWERS), probs[:, torch.arange(BATCH), ANSWERS])


@pytest.mark.parametrize("k", [1, 5, D_VOCAB])
def test_top_holds_the_most_likely_tokens_in_order(k: int, lens: Lens) -> None:
    top = lens.top(k)
    assert top.tokens.shape == top.probs.shape == (*lens.logits.shape[:2], k)
    assert torch.equal(top.tokens, lens.logits.argsort(-1, descending=True)[..., :k])
    assert_close(top.probs, lens.logits.softmax(-1).gather(-1, top.tokens))
    if k == D_VOCAB:
        assert_close(top.probs.sum(-1), torch.ones_like(top.probs[..., 0]))


def test_entropy_is_in_nats_and_within_its_range(lens: Lens) -> None:
    probs = lens.logits.softmax(-1)
    entropy = lens.entropy()
    assert_close(entropy, -(probs * probs.log()).sum(-1))
    assert entropy.min() > 0
    assert entropy.max() < torch.tensor(D_VOCAB).log()


def test_kl_is_of_now_from_the_same_layer_one_iteration_earlier(lens: Lens) -> None:
    per_loop = len(lens.logits) // LOOPS
    log_p = lens.logits.log_softmax(-1)
    expected = (log_p[per_loop:].exp() * (log_p[per_loop:] - log_p[:-per_loop])).sum(-1)
    kl = lens.kl()
    assert kl[:per_loop].isnan().all()
    assert_close(kl[per_loop:], expected)
    assert (kl[per_loop:] >= 0).all()


def test_kl_of_a_distribution_from_itself_is_zero() -> None:
    model = toy()
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn.W_O_flat, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                part.zero_()
    kl = readout_lens(model, padded(), 3).kl()
    assert kl[0].isnan().all()
    torch.testing.assert_close(
        kl[1:], torch.zeros(2, BATCH, dtype=torch.float64), rtol=0.0, atol=1e-12
    )


@pytest.mark.shapes
def test_first_hit_counts_from_one_and_is_nan_for_never() -> None:
    model = toy()
    lens = readout_lens(model, padded(), 6)
    tops = lens.top(1).tokens[..., 0]
    never = next(token for token in range(D_VOCAB) if not (tops[:, 2] == token).any())
    answers = torch.tensor([int(tops[0, 0]), int(tops[5, 1]), never])
    found = lens.first_hit(answers)
    assert found[0] == 1
    assert found[1] == 1 + (tops[:, 1] == answers[1]).nonzero()[0].item()
    assert found[2].isnan()
    assert not lens.correct(answers)[:, 2].any()


def test_logits_at_takes_a_visit_of_its_own_for_each_read(lens: Lens) -> None:
    visits = torch.tensor([0, 3, 1])
    assert_close(lens.logits_at(visits), lens.logits[visits, torch.arange(BATCH)])


def test_statistics_have_no_gradient(lens: Lens) -> None:
    for value in (
        lens.logits,
        lens.heads_input,
        lens.margin(ANSWERS),
        lens.kl(),
        lens.entropy(),
        lens.top(2).probs,
    ):
        assert not value.requires_grad


# What a lens shows


def test_places_of_the_logit_lens() -> None:
    lens = logit_lens(toy(), padded(), 3)
    assert lens.names == tuple(
        f"loops.{t}.blocks.{layer}" for t in range(3) for layer in range(LAYERS)
    )
    assert lens.loops == (0, 0, 1, 1, 2, 2)
    assert lens.layers == (0, 1, 0, 1, 0, 1)
    assert torch.equal(lens.example, torch.arange(BATCH))
    assert torch.equal(lens.position, padded().readout)
    assert lens.heads_input.shape == (3 * LAYERS, BATCH, D_MODEL)
    assert lens.logits is None


def test_places_of_the_readout_lens() -> None:
    lens = readout_lens(toy(), padded(), 3)
    assert lens.names == ("loops.0", "loops.1", "loops.2")
    assert lens.loops == (0, 1, 2)
    assert lens.layers == (None, None, None)
    assert lens.heads_input.shape == (3, BATCH, D_MODEL)
    assert torch.equal(lens.position, padded().readout)


def test_iterations_default_to_what_is_recorded(plain: RecurrentDepth) -> None:
    assert len(readout_lens(plain, padded()).loops) == LOOPS
    assert len(logit_lens(plain, padded()).loops) == LOOPS * LAYERS


def test_inputs_may_be_texts_or_tokens_with_a_column(plain: RecurrentDepth) -> None:
    texts = ["<t_3><t_9><t_4>", "<t_8>"]
    batch = with_words(plain).encode(texts)
    for method in LENSES.values():
        assert torch.equal(method(plain, texts, 2).heads_input, method(plain, batch, 2).heads_input)
        assert torch.equal(
            method(plain, random_tokens(), 2, readout=-2).heads_input,
            method(plain, full(read_at=POS - 2), 2).heads_input,
        )
        with pytest.raises(ValueError, match="do not say where the answer is read"):
            method(plain, random_tokens(), 2)


def test_all_positions(model: RecurrentDepth) -> None:
    batch = padded()
    lens = logit_lens(model, batch, LOOPS, positions="all", keep_logits=True)
    assert torch.equal(lens.example, torch.arange(BATCH).repeat_interleave(POS))
    assert torch.equal(lens.position, torch.arange(POS).repeat(BATCH))
    last = lens.logits[-1].view(BATCH, POS, D_VOCAB)
    assert_close(last, model(batch.tokens, n_loops=LOOPS, mask=batch.mask))


def test_listed_positions(plain: RecurrentDepth) -> None:
    everywhere = logit_lens(plain, padded(), LOOPS, positions="all")
    some = logit_lens(plain, padded(), LOOPS, positions=[5, 0])
    assert some.position.tolist() == [5, 0] * BATCH
    assert some.example.tolist() == [0, 0, 1, 1, 2, 2]
    chosen = [int(e) * POS + int(p) for e, p in zip(some.example, some.position, strict=True)]
    assert_close(some.heads_input, everywhere.heads_input[:, chosen])


@pytest.mark.parametrize("positions", [[7], [0, -1], [12]])
def test_positions_out_of_range_are_refused(positions: list[int], plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"positions must be in 0\.\.6, got"):
        logit_lens(plain, padded(), LOOPS, positions=positions)


@pytest.mark.parametrize("method", LENSES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_running_in_pieces_gives_the_same(
    batch_size: int, method: str, model: RecurrentDepth
) -> None:
    whole = LENSES[method](model, padded(), LOOPS)
    pieces = LENSES[method](model, padded(), LOOPS, batch_size=batch_size)
    assert_close(pieces.heads_input, whole.heads_input)
    assert torch.equal(pieces.position, whole.position)
    assert torch.equal(pieces.example, whole.example)


def test_statistics_in_chunks_give_the_same(lens: Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (
        lens.margin(ANSWERS),
        lens.rank(ANSWERS),
        lens.entropy(),
        lens.kl(),
        lens.top(3).probs,
        lens.prob(ANSWERS),
    )
    monkeypatch.setattr(lens_module, "LOGITS_AT_ONCE", 2 * D_VOCAB)
    chunked = (
        lens.margin(ANSWERS),
        lens.rank(ANSWERS),
        lens.entropy(),
        lens.kl(),
        lens.top(3).probs,
        lens.prob(ANSWERS),
    )
    for value, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_logits_are_kept_only_when_asked_for(plain: RecurrentDepth) -> None:
    for method in LENSES.values():
        kept = method(plain, padded(), LOOPS, keep_logits=True)
        assert kept.logits.shape == (*kept.heads_input.shape[:2], D_VOCAB)
        assert_close(kept.logits, kept.heads_input @ plain.W_U + plain.b_U)
        assert method(plain, padded(), LOOPS).logits is None


def test_lens_of_a_hooked_run_shows_the_hook(plain: RecurrentDepth) -> None:
    before = logit_lens(plain, padded(), LOOPS).heads_input
    with plain.hooks(
        [("loops.1.blocks.0.hook_resid_post", lambda value, hook: value.roll(1, dims=-1))],
        n_loops=LOOPS,
    ):
        hooked = logit_lens(plain, padded(), LOOPS).heads_input
    changed = (hooked - before).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [False] * 2 + [True] * 6


def test_kl_of_nested_cycles_is_from_the_same_visit_one_iteration_earlier() -> None:
    """HRM-Text visits four blocks under loop 0 and layer 0: low.0, low.1 and high among them."""
    family = TOYS["hrm_text"]
    model = family.make()
    lens = logit_lens(model, family_padded(family, model), 3, keep_logits=True)
    assert len(set(zip(lens.loops, lens.layers, strict=True))) < len(lens.names)
    log_p = dict(zip(lens.names, lens.logits.log_softmax(-1), strict=True))
    for name, loop, kl in zip(lens.names, lens.loops, lens.kl(), strict=True):
        if not loop:
            assert kl.isnan().all()
            continue
        now, before = log_p[name], log_p[name.replace(f"loops.{loop}", f"loops.{loop - 1}", 1)]
        assert_close(kl, (now.exp() * (now - before)).sum(-1))


# Frames


@pytest.mark.parametrize("method", LENSES)
def test_frame_has_one_row_per_visit_and_read(method: str, plain: RecurrentDepth) -> None:
    lens = LENSES[method](plain, padded(), LOOPS)
    frame = lens.frame()
    assert list(frame.columns) == [
        "visit",
        "loop",
        "layer",
        "example",
        "position",
        "top",
        "top_prob",
        "entropy",
        "kl",
    ]
    assert len(frame) == len(lens.names) * BATCH
    assert frame["visit"].tolist() == [name for name in lens.names for _ in range(BATCH)]
    assert frame["loop"].tolist() == [loop for loop in lens.loops for _ in range(BATCH)]
    assert (
        frame["layer"].isna().all()
        if method == "readout_lens"
        else frame["layer"].tolist()[:6] == [0, 0, 0, 1, 1, 1]
    )
    assert frame["top"].tolist() == lens.top(1).tokens.flatten().tolist()
    assert frame["entropy"].tolist() == lens.entropy().flatten().tolist()
    assert frame["position"].tolist() == padded().readout.tolist() * len(lens.names)
    assert frame["kl"].isna().sum() == len(lens.names) // LOOPS * BATCH


@pytest.mark.shapes
def test_frame_with_answers_has_their_statistics(plain: RecurrentDepth) -> None:
    lens = readout_lens(plain, padded(), LOOPS)
    frame = lens.frame(ANSWERS)
    assert list(frame.columns)[9:] == ["margin", "rank", "prob"]
    assert frame["margin"].tolist() == lens.margin(ANSWERS).flatten().tolist()
    assert frame["rank"].tolist() == lens.rank(ANSWERS).flatten().tolist()
    assert frame["prob"].tolist() == lens.prob(ANSWERS).flatten().tolist()
    assert pd.api.types.is_float_dtype(frame["margin"])


def test_frame_shows_words_where_there_is_a_vocabulary(plain: RecurrentDepth) -> None:
    lens = readout_lens(with_words(plain), padded(), LOOPS)
    words = [plain.vocab.words[int(token)] for token in lens.top(1).tokens.flatten()]
    assert lens.frame()["top"].tolist() == words


# What a lens refuses


@pytest.mark.parametrize("statistic", ["margin", "rank", "prob", "correct", "first_hit", "frame"])
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            torch.tensor([1, 2]),
            r"one token per read is needed: the lens has 3 reads, got the shape \[2\]",
        ),
        (torch.tensor([[1], [2], [3]]), r"got the shape \[3, 1\]"),
        (torch.tensor([1, 29, 3]), r"tokens must be in 0\.\.28 \(d_vocab=29\), got 1 to 29"),
        (torch.tensor([1, -1, 3]), r"tokens must be in 0\.\.28 \(d_vocab=29\), got -1 to 3"),
    ],
)
def test_wrong_answers_are_refused(
    answers: Tensor, message: str, statistic: str, plain: RecurrentDepth
) -> None:
    lens = readout_lens(plain, padded(), 2)
    with pytest.raises(ValueError, match=message):
        getattr(lens, statistic)(answers)


# Metrics


def test_margin_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, -1.0, 2.0]])
    assert margin(logits, torch.tensor([1, 2])).tolist() == [1.5, -1.0]
    metric = logit_margin(torch.tensor([0, 0]))
    assert metric(logits).tolist() == [-3.0, 1.0]
    assert metric.__name__ == "logit_margin"


def test_logit_difference_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, -1.0, 2.0]])
    metric = logit_diff(torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert metric(logits).tolist() == [3.0, 1.0]
    assert metric.__name__ == "logit_diff"


def test_lens_needs_no_hooks_at_the_points_it_does_not_read(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recurrence sweep reads states, so no hook point is ever called."""
    monkeypatch.setattr(
        LoopedModel, "add_hook", lambda *arguments, **options: pytest.fail("a hook was attached")
    )
    assert len(readout_lens(plain, padded(), LOOPS).names) == LOOPS
