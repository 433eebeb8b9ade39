"""Direct logit attribution: the terms sum to the logit, each is what a plain computation and
TransformerLens say, and refusals.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.interp.attribution.direct_logit import (
    DirectLogits,
    LogitComponent,
    direct_logit_attribution,
    frozen_norm,
)
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import unrolled, untied
from loopscope.tasks.questions import read_questions
from toy import (
    BATCH,
    D_MODEL,
    D_VOCAB,
    HEADS,
    LAYERS,
    LOOPS,
    BatchCentred,
    assert_close,
    cached,
    full,
    hook_count,
    odd_one,
    padded,
    random_tokens,
    run,
    toy,
    with_words,
)

ANSWERS, AGAINST = torch.tensor([4, 17, 28]), torch.tensor([9, 0, 4])
ROWS = torch.arange(BATCH)


@pytest.fixture(params=["none", "learned", "sinusoidal"])
def additive(request: pytest.FixtureRequest) -> RecurrentDepth:
    """A toy whose residual stream is a sum, for each kind of positions."""
    return toy(request.param)


def of_kind(found: DirectLogits, *kinds: str) -> Tensor:
    return torch.stack(
        [value for c, value in zip(found.components, found.values, strict=True) if c.kind in kinds]
    )


# Sums


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("against", [None, AGAINST])
def test_terms_and_constant_sum_to_the_logit(
    against: Tensor | None, heads: bool, additive: RecurrentDepth
) -> None:
    batch = padded()
    logits = run(additive, batch)[ROWS, batch.readout]
    expected = logits[ROWS, ANSWERS] - (0 if against is None else logits[ROWS, AGAINST])
    found = direct_logit_attribution(additive, batch, ANSWERS, against=against, heads=heads)
    assert_close(found.values.sum(0) + found.constant, expected)
    assert_close(found.logits, expected)
    assert found.frame()["value"].sum() == pytest.approx(expected.mean().item(), rel=1e-9)


def test_heads_and_bias_sum_to_the_attention(additive: RecurrentDepth) -> None:
    split, whole = (
        direct_logit_attribution(additive, padded(), ANSWERS, heads=heads)
        for heads in (True, False)
    )
    heads = of_kind(split, "head").view(LOOPS * LAYERS, HEADS, BATCH)
    assert_close(heads.sum(1) + of_kind(split, "attn_bias"), of_kind(whole, "attn"))
    assert_close(of_kind(split, "mlp"), of_kind(whole, "mlp"))
    assert of_kind(split, "attn_bias").abs().min() > 0


def test_a_difference_is_the_difference_of_two_logits(plain: RecurrentDepth) -> None:
    both = direct_logit_attribution(plain, padded(), ANSWERS, against=AGAINST)
    right, wrong = (
        direct_logit_attribution(plain, padded(), tokens) for tokens in (ANSWERS, AGAINST)
    )
    assert_close(both.values, right.values - wrong.values)
    assert_close(both.constant, right.constant - wrong.constant)


# Each term


def by_hand(model: RecurrentDepth, term: Tensor, final: Tensor) -> Tensor:
    """LayerNorm in its steps, the divisor being that of the final stream."""
    divisor = (final.var(-1, unbiased=False, keepdim=True) + model.cfg.eps).sqrt()
    normed = (term - term.mean(-1, keepdim=True)) / divisor * model.final_norm.w
    return (normed * model.W_U.T[ANSWERS]).sum(-1)


def test_each_term_by_hand(additive: RecurrentDepth) -> None:
    batch = padded()
    names = [
        "hook_*embed",
        *(f"**.hook_{site}" for site in ("z", "attn_out", "mlp_out", "state_out")),
    ]
    cache = {
        name: value[ROWS, batch.readout] for name, value in cached(additive, batch, names).items()
    }
    final = cache[f"loops.{LOOPS - 1}.hook_state_out"]
    found = direct_logit_attribution(additive, batch, ANSWERS)
    for component, value in zip(found.components, found.values, strict=True):
        term = cache[component.name]
        if component.kind == "head":
            term = (
                term[:, component.head] @ additive.blocks[component.layer].attn.W_O[component.head]
            )
        elif component.kind == "attn_bias":
            term = additive.blocks[component.layer].attn.b_O.expand(BATCH, -1)
        assert_close(value, by_hand(additive, term, final))
    assert_close(found.constant, (additive.W_U.T[ANSWERS] @ additive.final_norm.b))


def test_terms_of_transformer_lens(additive: RecurrentDepth) -> None:
    """Its cache on the folded unrolled model, at the last position, for one token at a time."""
    batch, token = full(), 11
    view = unrolled(additive, LOOPS, fold_ln=True)
    _, cache = view.run_with_cache(batch.tokens)
    tokens = torch.full((BATCH,), token)
    whole = direct_logit_attribution(additive, batch, tokens, heads=False)
    parts = cache.logit_attrs(cache.decompose_resid(), tokens=token)[..., -1]
    assert_close(whole.values, parts)
    assert_close(whole.constant, view.b_U[token].expand(BATCH))
    split = direct_logit_attribution(additive, batch, tokens)
    heads = cache.logit_attrs(cache.stack_head_results(), tokens=token)[..., -1]
    assert_close(of_kind(split, "head"), heads)


def test_an_untied_copy_has_the_same_terms(plain: RecurrentDepth) -> None:
    ours, theirs = (
        direct_logit_attribution(m, padded(), ANSWERS, n_loops=2) for m in (plain, untied(plain, 2))
    )
    assert ours.components == theirs.components
    assert_close(theirs.values, ours.values)


def test_rows_at_a_time_change_nothing(plain: RecurrentDepth) -> None:
    one, all_rows = (
        direct_logit_attribution(plain, padded(), ANSWERS, against=AGAINST, batch_size=size)
        for size in (2, 512)
    )
    assert_close(one.values, all_rows.values)
    assert_close(one.constant, all_rows.constant)
    assert one.components == all_rows.components


# The frozen norm


class RootMeanSquare(nn.Module):
    """A norm without centring and without a bias, its weight counted from one."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(
            torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2)).double()
        )

    def forward(self, x: Tensor, taps: Taps) -> Tensor:
        return (
            x
            / tap(taps, "ln_final.hook_scale", (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
            * (1 + self.extra)
        )


def test_a_norm_that_does_not_centre_is_not_centred(plain: RecurrentDepth) -> None:
    plain.final_norm = RootMeanSquare()
    batch = padded()
    found = direct_logit_attribution(plain, batch, ANSWERS)
    assert_close(found.values.sum(0), run(plain, batch)[ROWS, batch.readout, ANSWERS])
    assert found.constant.abs().max() == 0


def test_frozen_norm_at_its_own_scale_is_the_norm(plain: RecurrentDepth) -> None:
    x = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = (x.var(-1, unbiased=False, keepdim=True) + plain.cfg.eps).sqrt()
    linear, constant = frozen_norm(plain.normalize, "ln_final.hook_scale", x, scale)
    assert_close(linear + constant, plain.normalize(x))
    doubled, _ = frozen_norm(plain.normalize, "ln_final.hook_scale", 2 * x, scale)
    assert_close(doubled, 2 * linear)


class Deaf(RecurrentDepth):
    """A family whose final norm never shows its scale."""

    def normalize(self, resid: Tensor, taps: Taps | None = None) -> Tensor:
        return super().normalize(resid, {})


def test_a_norm_that_hides_its_scale_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the norm must show its divisor at 'ln_final\.hook_scale'"
    ):
        direct_logit_attribution(odd_one(Deaf), padded(), ANSWERS)


# The record


def test_components_in_the_order_in_which_they_run() -> None:
    found = direct_logit_attribution(toy("learned"), padded(), ANSWERS, n_loops=3)
    expected = [
        LogitComponent(f"hook_{kind}", kind, None, None, None) for kind in ("embed", "pos_embed")
    ]
    for t, layer in itertools.product(range(3), range(LAYERS)):
        name = f"loops.{t}.blocks.{layer}"
        expected += [
            LogitComponent(f"{name}.attn.hook_z", "head", t, layer, head) for head in range(HEADS)
        ]
        expected += [
            LogitComponent(f"{name}.hook_attn_out", "attn_bias", t, layer, None),
            LogitComponent(f"{name}.hook_mlp_out", "mlp", t, layer, None),
        ]
    assert found.components == tuple(expected)
    assert found.values.shape == (len(expected), BATCH)
    assert not found.values.requires_grad


def test_frame_has_a_row_for_the_constant(plain: RecurrentDepth) -> None:
    found = direct_logit_attribution(plain, padded(), ANSWERS, n_loops=1)
    frame = found.frame()
    assert list(frame.columns) == ["component", "loop", "layer", "head", "value"]
    assert frame["component"].tolist() == [*(c.kind for c in found.components), "constant"]
    assert frame["value"].tolist() == [*found.values.mean(1).tolist(), found.constant.mean().item()]
    assert frame.loc[frame["component"] == "head", "head"].tolist() == [*range(HEADS)] * LAYERS
    assert (
        frame.loc[frame["component"].isin(["embed", "constant"]), ["loop", "layer", "head"]]
        .isna()
        .all(axis=None)
    )


def test_inputs_may_be_texts_or_tokens_with_a_column(plain: RecurrentDepth) -> None:
    texts = ["<t_3><t_9><t_4>", "<t_8>"]
    batch = with_words(plain).encode(texts)
    assert_close(
        direct_logit_attribution(plain, texts, ANSWERS[:2]).values,
        direct_logit_attribution(plain, batch, ANSWERS[:2]).values,
    )
    by_column = direct_logit_attribution(plain, random_tokens(), ANSWERS, readout=-1)
    assert_close(by_column.values, direct_logit_attribution(plain, full(), ANSWERS).values)


def test_nothing_is_left_behind(plain: RecurrentDepth) -> None:
    direct_logit_attribution(plain, padded(), ANSWERS)
    assert hook_count(plain) == 0


def test_trained_answers_come_from_the_last_iterations() -> None:
    """The components of the trained model sum to its margin over another entity."""
    model = load("ltg_trained")
    questions = [q for q in read_questions(SHIPPED / "ltg_trained" / "test.json") if q.hops == 3][
        :16
    ]
    answers = torch.tensor([model.to_single_token(q.answer) for q in questions])
    found = direct_logit_attribution(
        model, [q.text for q in questions], answers, against=answers.roll(1), n_loops=6
    )
    frame: pd.DataFrame = found.frame()
    torch.testing.assert_close(
        found.values.sum(0) + found.constant, found.logits, rtol=1e-4, atol=1e-3
    )
    assert frame["value"].sum() > 0
    assert (
        frame.loc[frame["loop"] >= 3, "value"].sum()
        > frame.loc[frame["component"] == "embed", "value"].sum()
    )


# Refusals


def test_a_stream_that_is_no_sum_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"direct_logit_attribution needs a residual stream that is the sum.*adds the input"
            r" again before each"
        ),
    ):
        direct_logit_attribution(toy(injection=True), padded(), ANSWERS)


class Renormed(RecurrentDepth):
    """Says that something other than an injection happens to its stream."""

    @property
    def additive_residual(self) -> bool:
        return False


def test_the_reason_of_a_refusal_is_the_familys() -> None:
    with pytest.raises(
        ValueError, match="normalises or mixes the stream after components have added to it"
    ):
        direct_logit_attribution(odd_one(Renormed), padded(), ANSWERS)


def test_a_family_that_declares_a_sum_and_is_none_is_found_out() -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"components' outputs must sum to the logit, but are off by up to.*or the family itself"
        ),
    ):
        direct_logit_attribution(odd_one(BatchCentred), padded(), ANSWERS)


def test_a_hook_that_steers_the_stream_is_found_out(plain: RecurrentDepth) -> None:
    with plain.hooks(
        [("loops.2.blocks.0.hook_resid_post", lambda value, hook: value + 1.0 * (value > 0))],
        n_loops=LOOPS,
    ):
        before = hook_count(plain)
        with pytest.raises(
            ValueError, match="a hook at resid_pre, resid_mid or resid_post that is attached now"
        ):
            direct_logit_attribution(plain, padded(), ANSWERS)
        assert hook_count(plain) == before


def test_a_hook_on_a_component_is_part_of_the_run(plain: RecurrentDepth) -> None:
    name = "loops.2.blocks.0.hook_mlp_out"
    with plain.hooks([(name, lambda value, hook: value * 0)], n_loops=LOOPS):
        found = direct_logit_attribution(plain, padded(), ANSWERS)
        expected = run(plain, padded())[ROWS, padded().readout, ANSWERS]
    assert_close(found.logits, expected)
    assert [
        value.abs().max()
        for c, value in zip(found.components, found.values, strict=True)
        if c.name == name
    ] == [0]


def test_heads_behind_an_output_norm_are_refused(plain: RecurrentDepth) -> None:
    plain._schedules.made[2] = [
        replace(visit, sites=(*visit.sites, "attn.hook_out")) for visit in plain.schedule(2)
    ]
    with pytest.raises(
        ValueError,
        match=(
            r"loops\.0\.blocks\.0 normalises its attention's output, so its heads do not add up;"
            r" pass heads=False"
        ),
    ):
        direct_logit_attribution(plain, padded(), ANSWERS, n_loops=2)
    assert direct_logit_attribution(
        plain, padded(), ANSWERS, n_loops=2, heads=False
    ).values.shape == (1 + 2 * 2 * LAYERS, BATCH)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([4, 17, D_VOCAB]), r"answers must be in 0\.\.28 \(d_vocab=29\), got 4 to 29"),
        (torch.tensor([-1, 17, 3]), "got -1 to 17"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(
    tokens: Tensor, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        direct_logit_attribution(plain, padded(), tokens)
    with pytest.raises(ValueError, match=message):
        direct_logit_attribution(plain, padded(), ANSWERS, against=tokens)


def test_one_answer_per_row(plain: RecurrentDepth) -> None:
    with pytest.raises(
        ValueError, match=r"one token per row is needed: the batch has 3 rows, got the shape \[2\]"
    ):
        direct_logit_attribution(plain, padded(), ANSWERS[:2])
