"""One rule of ties and none for NaN: ranks, top tokens, halting, exits and generation agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.finite import NonFinite, first_nonfinite
from loopscope.interp.common.ranking import has_no_order, rank_of, top_token, top_tokens
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.dynamics.statistics import effective_rank
from loopscope.interp.exits.exit_gate import exit_distribution
from loopscope.interp.exits.exits import TopStable, apply_criterion
from loopscope.interp.exits.halting import HaltingRule, apply_rule, halting
from loopscope.interp.generation import Sampling, generate
from loopscope.interp.lens.decoding import decodability
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.lens.tuned_training import train_tuned_lens
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, D_VOCAB, LOOPS, hook_count, padded, toy

NAN, INF = float("nan"), float("inf")
TIED = torch.tensor(
    [[1.0, 3.0, 0.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0], [5.0, 1.0, 1.0, 7.0, 1.0]]
)
ORDER = torch.tensor([[1, 3, 4, 0, 2], [0, 1, 2, 3, 4], [3, 0, 1, 2, 4]])


# The order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_equal_logits_are_ordered_by_id(dtype: torch.dtype) -> None:
    logits = TIED.to(dtype)
    for k in range(1, 6):
        assert torch.equal(top_tokens(logits, k), ORDER[:, :k])
    assert torch.equal(top_token(logits), ORDER[:, 0])
    for place in range(5):
        assert rank_of(logits, ORDER[:, place]).tolist() == [place] * 3


def test_the_order_is_that_of_a_plain_sort() -> None:
    logits = torch.randint(0, 4, (7, 3, 11), generator=torch.Generator().manual_seed(0)).double()
    for row, tokens in zip(logits.flatten(0, 1), top_tokens(logits, 6).flatten(0, 1), strict=True):
        assert tokens.tolist() == sorted(range(11), key=lambda i: (-row[i].item(), i))[:6]


@pytest.mark.parametrize("bad", [[1.0, NAN], [INF, 0.0], [-INF, -INF]])
def test_what_is_not_finite_has_no_order(bad: list[float]) -> None:
    logits = torch.tensor([[0.0, 1.0], bad])
    assert has_no_order(logits).tolist() == [False, True]
    for ask in (top_token, lambda x: top_tokens(x, 2), lambda x: rank_of(x, torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match=r"finite logits only, but those of row \[1\]"):
            ask(logits)


def test_a_token_may_be_excluded() -> None:
    logits = torch.tensor([[-INF, 0.0, -INF]])
    assert top_tokens(logits, 3).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("k", [0, 6])
def test_top_k_is_within_the_vocabulary(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in 1\.\.5 \(d_vocab=5\), got {k}"):
        top_tokens(TIED, k)


# Methods


def tied() -> RecurrentDepth:
    """A model whose tokens 3, 4 and 7 always have the same logit, which is often the largest."""
    model = toy()
    with torch.no_grad():
        model.embedding[[4, 7]] = model.embedding[3].clone()
    return model


def test_all_methods_break_ties_alike() -> None:
    model, batch = tied(), padded()
    lens = readout_lens(model, batch, LOOPS, keep_logits=True)
    assert (lens.logits[..., 3] == lens.logits[..., 7]).all()
    tokens = torch.full((BATCH,), 3)
    assert torch.equal(lens.rank(tokens + 1), lens.rank(tokens) + 1)
    assert torch.equal(lens.rank(tokens + 4), lens.rank(tokens) + 2)
    for token in range(D_VOCAB):
        answers = torch.full((BATCH,), token)
        top = lens.top(1).tokens[..., 0] == token
        assert torch.equal(lens.correct(answers), top)
        assert torch.equal(lens.first_hit(answers).isnan(), ~top.any(0))
        for stops in (
            apply_rule(lens, HaltingRule(None, None)),
            apply_criterion(lens, TopStable(hits=LOOPS + 1)),
        ):
            assert torch.equal(stops.correct(answers), top[-1])


def test_generation_and_sampling_break_ties_alike() -> None:
    logits = TIED.clone()
    draw = torch.Generator()
    assert Sampling().choose(logits, draw).tolist() == [1, 0, 3]
    many = logits[:1].expand(500, -1)
    assert set(Sampling(1.0, top_k=2).choose(many, draw).tolist()) == {1, 3}
    assert set(Sampling(1.0, top_p=0.5).choose(many, draw).tolist()) == {1, 3}


def poisoned(value: float, at: tuple[int, int]) -> Callable[[Tensor, HookPoint], Tensor]:
    def poison(x: Tensor, hook: HookPoint) -> Tensor:
        changed = x.clone()
        changed[at] = value
        return changed

    return poison


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "loops.1.blocks.0.attn.hook_q",
        "loops.1.blocks.1.attn.hook_pattern",
        "loops.2.blocks.1.hook_mlp_out",
        "ln_final.hook_scale",
    ],
)
def test_the_first_place_that_is_not_finite(name: str, value: float, plain: RecurrentDepth) -> None:
    batch = padded()
    row, position = (1, 2) if not name.startswith("ln_final") else (1, int(batch.readout[1]))
    at = (row, 0, position) if name.endswith("pattern") else (row, position)
    if name.startswith("ln_final"):
        at = (row, 0)
    with plain.hooks([(name, poisoned(value, at))], n_loops=LOOPS):
        before = hook_count(plain)
        found = first_nonfinite(plain, batch, LOOPS)
        assert hook_count(plain) == before
    assert found == NonFinite(name, row, 0 if name.startswith("ln_final") else position)
    assert first_nonfinite(plain, batch, LOOPS) is None
    assert hook_count(plain) == 0


def test_padding_and_the_head_are_looked_at() -> None:
    model = toy()
    with model.hooks([("hook_embed", poisoned(NAN, (1, 6)))], n_loops=2):
        assert first_nonfinite(model, padded(), 2) == NonFinite("hook_embed", 1, 6)
    with torch.no_grad():
        model.embedding[5, 3] = NAN
    tokens = torch.tensor([[1, 2, 3], [4, 2, 5]])
    assert first_nonfinite(model, tokens, 2) == NonFinite("hook_embed", 1, 2)
    assert first_nonfinite(model, tokens[:, :2], 2) == NonFinite("logits", 0, 1)


@pytest.fixture(scope="module")
def broken() -> RecurrentDepth:
    """A model whose logits are NaN from iteration 1 on, for rows whose state there is not zero."""
    model = toy()
    model.add_hook("loops.1.blocks.0.hook_mlp_out", poisoned(NAN, (1, slice(None))))
    return model


ANSWERS = torch.tensor([1, 2, 3])
HERE = r"those of visit loops\.1\.blocks\.0, example 1, position 3 have the maximum nan"


@pytest.mark.parametrize(
    "ask",
    [
        lambda lens: lens.rank(ANSWERS),
        lambda lens: lens.correct(ANSWERS),
        lambda lens: lens.first_hit(ANSWERS),
        lambda lens: lens.top(1),
        lambda lens: lens.top(3),
        lambda lens: lens.frame(),
    ],
)
def test_nan_is_no_rank_of_a_lens(ask: Callable[[Any], object], broken: RecurrentDepth) -> None:
    lens = logit_lens(broken, padded(), LOOPS)
    with pytest.raises(ValueError, match=HERE):
        ask(lens)
    assert lens.prob(ANSWERS)[2:, 1].isnan().all()
    assert lens.prob(ANSWERS)[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda m: halting(m, padded(), n_loops=LOOPS).correct(ANSWERS), "those of example 1 have"),
        (
            lambda m: apply_criterion(readout_lens(m, padded(), LOOPS), TopStable()),
            "visit loops.1, example 1, position 3",
        ),
        (
            lambda m: decodability(m, padded(), ANSWERS[:, None], [3], LOOPS),
            "visit loops.1.blocks.0, example 1, position 3",
        ),
        (
            lambda m: generate(m, padded(), 2, LOOPS),
            "those of row 1 after position 3 have the maximum nan; the first place that is not"
            " finite is loops.1.blocks.0.hook_mlp_out, row 1, position 0",
        ),
        (lambda m: generate(m, padded(), 2, LOOPS, sampling=Sampling(0.7)), "those of row 1 after"),
        (
            lambda m: train_tuned_lens(m, padded(), LOOPS, steps=2),
            "the residuals at visit loops.1.blocks.0 hold nan",
        ),
        (lambda m: dynamics(m, padded(), LOOPS).effective_rank(), "the rows hold nan"),
        (lambda m: dynamics(m, padded(), LOOPS).orbits(), "the states hold nan"),
    ],
)
def test_nan_is_said_by_every_method(
    ask: Callable[[RecurrentDepth], object], words: str, broken: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ask(broken)


def test_nan_is_no_exit_and_no_effective_rank() -> None:
    with pytest.raises(ValueError, match="must be numbers, got NaN in loop 2"):
        exit_distribution(torch.tensor([[0.0, 1.0], [2.0, INF], [0.0, NAN]]))
    with pytest.raises(ValueError, match="the rows hold inf"):
        effective_rank(torch.tensor([[0.0, 1.0], [INF, 2.0]]))
