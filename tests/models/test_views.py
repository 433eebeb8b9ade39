"""The same computation as a TransformerLens model: its own tools give the same numbers, or
refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.tools import analysis

from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import Unrolled, unrolled, untied
from toy import (
    BATCH,
    D_MODEL,
    D_VOCAB,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    assert_close,
    full,
    hook_count,
    is_close,
    nothing,
    padded,
    projection,
    random_tokens,
    toy,
    with_words,
)

VISITS = LOOPS * LAYERS
ADDITIVE = ["none", "learned", "sinusoidal"]


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens shows one for every sweep."""
    monkeypatch.setattr(patching, "tqdm", lambda rows: rows)


@pytest.fixture(params=ADDITIVE)
def additive(request: pytest.FixtureRequest) -> RecurrentDepth:
    """A toy whose residual stream is a sum, for each kind of positions."""
    return toy(request.param)


def last_column_sum(logits: Tensor) -> Tensor:
    return projection()(logits[:, -1]).mean()


# Names and the model's surface


def test_names_are_transformer_lens_names(model: RecurrentDepth) -> None:
    plain = unrolled(model, LOOPS)
    sites = [
        name.split(".", 4)[4]
        for name in model.hook_names(1)
        if name.startswith("loops.0.blocks.0.")
    ]
    expected = {f"blocks.{i}.{site}" for i in range(VISITS) for site in sites}
    edges = {
        "hook_embed",
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
        "ln_final.hook_out",
    } | ({"hook_pos_embed"} if model.positional else set())
    assert set(plain.hook_dict) == expected | edges
    assert all(point.name == name for name, point in plain.hook_dict.items())
    assert plain.cfg.n_layers == VISITS
    assert (plain.cfg.n_heads, plain.cfg.d_model, plain.cfg.d_vocab) == (HEADS, D_MODEL, D_VOCAB)


def test_iterations_default_to_what_is_recorded(plain: RecurrentDepth) -> None:
    assert unrolled(plain).cfg.n_layers == VISITS
    assert len(untied(plain).visit_blocks) == VISITS
    with pytest.raises(ValueError, match="records no number of iterations"):
        unrolled(toy(n_loops=None))
    with pytest.raises(ValueError, match="n_loops must be at least 1"):
        untied(plain, 0)


@pytest.mark.shapes
def test_surface_that_transformer_lens_tools_read(plain: RecurrentDepth) -> None:
    model = with_words(plain)
    view = unrolled(model, LOOPS)
    assert torch.equal(view.W_U, model.W_U)
    assert torch.equal(view.W_E, model.W_E)
    assert torch.equal(view.b_U, model.b_U)
    assert torch.equal(view.blocks[5].attn.W_O, model.blocks[1].attn.W_O)
    assert torch.equal(view.blocks[4].mlp.W_out, model.blocks[0].mlp.W_out)
    assert not any(module.training for module in view.modules())
    assert all(block.hook_out_is_single_residual_stream for block in view.blocks)
    assert view.to_single_token("<t_9>") == 9
    assert view.to_tokens("<t_9><t_3>").tolist() == [[9, 3]]
    assert view.to_str_tokens(torch.tensor([9, 3])) == ["<t_9>", "<t_3>"]
    assert torch.equal(view.tokens_to_residual_directions("<t_9>"), model.W_U[:, 9])
    assert torch.equal(
        view.tokens_to_residual_directions(torch.tensor([[1, 2]])),
        model.W_U[:, [[1, 2]]].permute(1, 2, 0),
    )


@pytest.mark.shapes
def test_accumulated_bias_is_the_sum_of_output_biases(plain: RecurrentDepth) -> None:
    view = unrolled(plain, LOOPS)
    attn, mlp = (
        [getattr(getattr(block, part), bias) for block in plain.blocks]
        for part, bias in (("attn", "b_O"), ("mlp", "b_out"))
    )
    assert_close(view.accumulated_bias(3), 2 * attn[0] + attn[1] + 2 * mlp[0] + mlp[1])
    assert_close(
        view.accumulated_bias(3, mlp_input=True), 2 * attn[0] + 2 * attn[1] + 2 * mlp[0] + mlp[1]
    )
    assert_close(view.accumulated_bias(2, include_mlp_biases=False), attn[0] + attn[1])
    assert view.accumulated_bias(0).abs().max() == 0


def test_unrolled_refuses_what_is_not_a_flat_stack() -> None:
    with pytest.raises(
        TypeError,
        match=(
            r"blocks form one flat causal stack, as those of this Linear do not;"
            r" untied\(model, n_loops\) takes every family"
        ),
    ):
        inspect.unwrap(unrolled)(torch.nn.Linear(3, 5), 2)


# The source stays as it was


def surface(model: LoopedModel) -> tuple:
    points = {
        name: (id(point), point.name, point.training) for name, point in model.hook_dict.items()
    }
    modules = {
        name: (id(module), getattr(module, "name", None), module.training)
        for name, module in model.named_modules()
    }
    return (
        model.cfg,
        list(model.state_dict()),
        points,
        modules,
        model.hook_names(LOOPS),
        hook_count(model),
    )


MAKERS: dict[str, Callable[[RecurrentDepth], object]] = {
    "unrolled": lambda model: unrolled(model, LOOPS),
    "unrolled, folded": lambda model: unrolled(model, LOOPS, fold_ln=True),
    "untied": lambda model: untied(model, LOOPS),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_source_model_is_unchanged(maker: str, model: RecurrentDepth) -> None:
    model.grow(LOOPS)
    model.add_hook("loops.1.blocks.0.hook_mlp_out", nothing)
    before, weights = (
        surface(model),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    logits = model(random_tokens())
    view = MAKERS[maker](model)
    view(random_tokens())
    view.run_with_cache(random_tokens())
    assert hook_count(view) == 0
    assert surface(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(random_tokens()), logits)


def test_hooks_of_the_source_and_of_the_view_are_apart(plain: RecurrentDepth) -> None:
    view, tokens = unrolled(plain, LOOPS), random_tokens()
    logits = plain(tokens)
    plain.add_hook("loops.1.blocks.0.hook_mlp_out", lambda value, hook: value * 0)
    assert_close(view(tokens), logits)
    plain.reset_hooks()
    view.add_hook("blocks.2.hook_mlp_out", lambda value, hook: value * 0)
    assert_close(plain(tokens), logits)
    assert not torch.allclose(view(tokens), logits)


def test_hooks_do_not_stay_on_a_view_after_an_exception(plain: RecurrentDepth) -> None:
    view = unrolled(plain, LOOPS)

    def fail(value: Tensor, hook: object) -> None:
        raise RuntimeError("a hook failed")

    with pytest.raises(RuntimeError, match="a hook failed"):
        view.run_with_hooks(random_tokens(), fwd_hooks=[("blocks.3.hook_resid_mid", fail)])
    with pytest.raises(ValueError, match="d_vocab"):
        view.run_with_cache(random_tokens() + 100)
    assert hook_count(view) == 0


def test_views_share_or_copy_the_weights_as_they_say(plain: RecurrentDepth) -> None:
    shared, copied = unrolled(plain, LOOPS), untied(plain, LOOPS)
    tokens = random_tokens()
    before = plain(tokens)
    with torch.no_grad():
        plain.blocks[0].mlp.W_out.mul_(2)
    after = plain(tokens)
    assert_close(shared(tokens), after)
    assert_close(copied(tokens), before)


def test_views_refuse_bad_inputs_as_the_model_does() -> None:
    view = unrolled(toy("learned"), LOOPS)
    with pytest.raises(ValueError, match="at most n_ctx=11 positions"):
        view(random_tokens(pos=12))
    with pytest.raises(ValueError, match="left padding is not supported"):
        view(random_tokens(), mask=torch.tensor([[0] + [1] * 6] * BATCH))


# TransformerLens's patching


def cells(sweep_values: Tensor, *sizes: int) -> Tensor:
    return sweep_values.mean(1).view(*sizes)


def test_residual_patching_of_transformer_lens(model: RecurrentDepth) -> None:
    view, clean, corrupted = unrolled(model, LOOPS), full(1), full(2)
    _, cache = view.run_with_cache(clean.tokens)
    theirs = patching.get_act_patch_resid_pre(view, corrupted.tokens, cache, last_column_sum)
    ours = activation_patch(model, clean, corrupted, projection(), LOOPS, sites=["resid_pre"])
    assert theirs.shape == (VISITS, POS)
    torch.testing.assert_close(
        theirs.double(), cells(ours.values, VISITS, POS).double(), rtol=1e-5, atol=1e-5
    )


def test_head_patching_of_transformer_lens() -> None:
    model, clean, corrupted = toy("learned"), full(1), full(2)
    view = unrolled(model, 2)
    _, cache = view.run_with_cache(clean.tokens)
    theirs = patching.get_act_patch_attn_head_out_by_pos(
        view, corrupted.tokens, cache, last_column_sum
    )
    ours = activation_patch(model, clean, corrupted, projection(), 2, sites=["z"], heads="all")
    assert theirs.shape == (2 * LAYERS, POS, HEADS)
    torch.testing.assert_close(
        theirs.double(), cells(ours.values, 2 * LAYERS, POS, HEADS), rtol=1e-5, atol=1e-5
    )


def test_attribution_patching_of_transformer_lens() -> None:
    """Each MLP's score is (clean - corrupted) times the gradient of the corrupted run."""
    model, clean, corrupted = toy(), full(1), full(2)
    result = analysis.attribution_patch(
        unrolled(model, 2), clean.tokens, corrupted.tokens, last_column_sum
    )
    values, _ = gradients(model, clean, projection(), "**.hook_mlp_out", 2)
    base, grads = gradients(model, corrupted, projection(), "**.hook_mlp_out", 2)
    scores = {
        (node.layer, node.position): score
        for node, score in result.node_scores.items()
        if node.kind == "mlp_out"
    }
    assert len(scores) == 2 * LAYERS * POS
    for (visit, position), score in scores.items():
        name = f"loops.{visit // LAYERS}.blocks.{visit % LAYERS}.hook_mlp_out"
        expected = ((values[name] - base[name]) * grads[name]).sum(-1).mean(0)[position]
        assert score == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


# TransformerLens's cache and lens


def test_accumulated_residual(model: RecurrentDepth) -> None:
    batch = full()
    _, cache = unrolled(model, LOOPS).run_with_cache(batch.tokens)
    stack, labels = cache.accumulated_resid(return_labels=True, incl_mid=True)
    _, ours = model.run_with_cache(batch.tokens, n_loops=LOOPS)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"]
    assert labels[-1] == "final_post"
    for i in range(VISITS):
        assert_close(stack[2 * i], ours["resid_pre", i // LAYERS, i % LAYERS])
        assert_close(stack[2 * i + 1], ours["resid_mid", i // LAYERS, i % LAYERS])
    assert_close(stack[-1], ours["resid_post", -1, -1])


def test_logit_lens_of_transformer_lens(model: RecurrentDepth) -> None:
    batch = full()
    theirs = analysis.logit_lens(unrolled(model, LOOPS), batch.tokens)
    ours = logit_lens(model, batch, LOOPS, keep_logits=True)
    assert theirs.labels == [f"{i}_pre" for i in range(VISITS)] + ["final_post"]
    same = [
        is_close(value, expected)
        for value, expected in zip(theirs.values[1:], ours.logits, strict=True)
    ]
    injected_before = [model.cfg.input_injection and i % LAYERS == 0 for i in range(1, VISITS)]
    assert same == [not injected for injected in injected_before] + [True]


def test_head_results_sum_to_the_attention_output(model: RecurrentDepth) -> None:
    view = unrolled(model, LOOPS)
    _, cache = view.run_with_cache(random_tokens())
    heads = cache.stack_head_results().view(VISITS, HEADS, BATCH, POS, D_MODEL)
    for i in range(VISITS):
        assert_close(heads[i].sum(0) + view.blocks[i].attn.b_O, cache[f"blocks.{i}.hook_attn_out"])


def test_decomposition_sums_to_the_residual(additive: RecurrentDepth) -> None:
    view = unrolled(additive, LOOPS)
    _, cache = view.run_with_cache(random_tokens())
    final = cache[f"blocks.{VISITS - 1}.hook_resid_post"]
    parts, labels = cache.decompose_resid(return_labels=True)
    assert len(labels) == 2 * VISITS + 1 + additive.positional
    assert_close(parts.sum(0), final)
    full_parts, full_labels = cache.get_full_resid_decomposition(
        expand_neurons=False, return_labels=True
    )
    assert full_labels[-1] == "bias"
    assert_close(full_parts.sum(0), final)


@pytest.mark.parametrize("token", [3, 28])
def test_folded_attributions_plus_bias_sum_to_the_logit(
    token: int, additive: RecurrentDepth
) -> None:
    view = unrolled(additive, LOOPS, fold_ln=True)
    logits, cache = view.run_with_cache(random_tokens())
    assert view.b_U.abs().min() > 0
    for parts in (cache.decompose_resid(), cache.get_full_resid_decomposition(expand_neurons=True)):
        attributions = cache.logit_attrs(parts, tokens=token)
        assert attributions.shape == (len(parts), BATCH, POS)
        assert_close(attributions.sum(0) + view.b_U[token], logits[..., token])


def test_unfolded_attributions_do_not_sum_to_the_logit(plain: RecurrentDepth) -> None:
    view = unrolled(plain, LOOPS)
    logits, cache = view.run_with_cache(random_tokens())
    attributions = cache.logit_attrs(cache.decompose_resid(), tokens=3)
    assert not torch.allclose(attributions.sum(0) + view.b_U[3], logits[..., 3], atol=0.1)


def test_folding_changes_no_logit(model: RecurrentDepth) -> None:
    view = unrolled(model, LOOPS, fold_ln=True)
    assert (view.cfg.normalization_type, unrolled(model, LOOPS).cfg.normalization_type) == (
        "LNPre",
        "LN",
    )
    batch = padded()
    assert_close(
        view(batch.tokens, mask=batch.mask), model(batch.tokens, n_loops=LOOPS, mask=batch.mask)
    )
    normalized = view.ln_final(3 * torch.randn(2, 5, model.cfg.d_model, dtype=model.W_E.dtype) + 1)
    torch.testing.assert_close(
        normalized.mean(-1), torch.zeros_like(normalized[..., 0]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        normalized.var(-1, unbiased=False), torch.ones_like(normalized[..., 0]), atol=1e-2, rtol=0
    )


def test_a_view_cannot_be_converted_apart_from_its_source(plain: RecurrentDepth) -> None:
    with pytest.raises(TypeError, match="an unrolled view has no weights of its own"):
        unrolled(plain, LOOPS).float()
    assert plain.W_E.dtype == torch.float64
    assert list(unrolled(plain, LOOPS).parameters()) == []


def test_an_untied_copy_can_be_read_after_every_iteration(model: RecurrentDepth) -> None:
    batch = padded()
    theirs, ours = (
        readout_lens(untied(model, LOOPS), batch, LOOPS),
        readout_lens(model, batch, LOOPS),
    )
    assert_close(theirs.heads_input, ours.heads_input)


REFUSED: dict[str, Callable[[object], object]] = {
    "decompose_resid": lambda cache: cache.decompose_resid(),
    "get_full_resid_decomposition": lambda cache: cache.get_full_resid_decomposition(),
    "logit_attrs": lambda cache: cache.logit_attrs(cache.accumulated_resid(), tokens=3),
}


@pytest.mark.parametrize("fold_ln", [False, True])
@pytest.mark.parametrize("method", REFUSED)
def test_decompositions_are_refused_where_the_residual_is_no_sum(
    method: str, fold_ln: bool
) -> None:
    view: Unrolled = unrolled(toy(injection=True), LOOPS, fold_ln=fold_ln)
    _, cache = view.run_with_cache(random_tokens())
    with pytest.raises(
        ValueError,
        match=(
            f"{method} needs a residual stream that is the sum of its components.*adds the input"
            " again"
        ),
    ):
        REFUSED[method](cache)


def test_views_take_a_padded_batch_and_remove_the_batch_axis(plain: RecurrentDepth) -> None:
    view, one = unrolled(plain, LOOPS), padded()[1:2]
    _, cache = view.run_with_cache(one.tokens, mask=one.mask, remove_batch_dim=True)
    _, ours = plain.run_with_cache(one.tokens, n_loops=LOOPS, mask=one.mask)
    assert not cache.has_batch_dim
    assert_close(cache["blocks.5.hook_resid_post"], ours["resid_post", 2, 1][0])
    assert cache.decompose_resid().shape == (2 * VISITS + 1, POS, D_MODEL)
