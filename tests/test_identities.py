"""Identities 2 to 8 that every looped model must satisfy, by the facts that its family declares."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from interp.gradients import gradients
from interp.halting import HaltingRule, halting
from interp.lens import logit_lens, readout_lens
from interp.patching import activation_patch
from models.attention import KeyValues
from models.base import LoopedModel
from models.recurrent_depth import RecurrentDepth
from models.state import State, cat_states
from models.tokens import Batch
from models.views import Unrolled, unrolled, untied
from toy import (
    BATCH,
    HEAD_SITES,
    LAYERS,
    LENGTHS,
    LOOPS,
    POS,
    SWITCHING_SITES,
    BatchCentred,
    Bidirectional,
    ShortEnding,
    assert_close,
    expected_shape,
    explode,
    full,
    hook_count,
    index_at,
    is_close,
    nothing,
    odd_one,
    padded,
    projection,
    put,
    random_tokens,
    site_of,
    toy,
)

POSITION, HEAD = 2, 3
SHORT, SHORTEST = 3, 2  # iterations where every hook point is tried; not what the checkpoint records


@pytest.fixture(params=[Bidirectional, ShortEnding, BatchCentred])
def odd_model(request: pytest.FixtureRequest) -> LoopedModel:
    """A family that says no to one of the declared facts."""
    return odd_one(request.param)


def run(model: LoopedModel, batch: Batch, n_loops: int = LOOPS) -> Tensor:
    return model(batch.tokens, n_loops=n_loops, mask=batch.mask)


def run_hooked(model: LoopedModel, batch: Batch, name: str, hook: Callable[..., Tensor | None], n_loops: int = LOOPS) -> Tensor:
    return model.run_with_hooks(batch.tokens, n_loops=n_loops, mask=batch.mask, fwd_hooks=[(name, hook)])


def cached(model: LoopedModel, batch: Batch, names: str | list[str] = "**", n_loops: int = LOOPS) -> dict[str, Tensor]:
    return dict(model.run_with_cache(batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter=names)[1])


def noise_at(index: tuple[slice | int, ...]) -> Callable[..., Tensor]:
    """A hook that adds noise at one place."""

    def disturb(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        changed[index] += torch.randn(value[index].shape, generator=torch.Generator().manual_seed(3), dtype=value.dtype)
        return changed

    return disturb


# 2. No-op self-patch


def seen_at(model: LoopedModel, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """What a hook that returns None sees at one point, and the logits of that run."""
    seen: list[Tensor] = []
    logits = run_hooked(model, batch, name, lambda value, hook: seen.append(value.clone()), SHORT)
    assert len(seen) == 1, name
    return seen[0], logits


def test_self_patch_at_one_position_and_head_changes_nothing(model: RecurrentDepth) -> None:
    batch = padded()
    for name in model.hook_names(SHORT):
        own, logits = seen_at(model, batch, name)
        assert own.shape == expected_shape(name), name
        patched = run_hooked(model, batch, name, put(own, index_at(name, POSITION, HEAD)), SHORT)
        assert torch.equal(patched, logits), name


def test_the_same_place_with_another_value_changes_the_logits(model: RecurrentDepth) -> None:
    batch = full()
    logits = run(model, batch, SHORT)
    for name in model.hook_names(SHORT):
        disturbed = run_hooked(model, batch, name, noise_at(index_at(name, POSITION, HEAD)), SHORT)
        assert not is_close(disturbed, logits), name


# 3. Untied and unrolled oracles


def visit_name(name: str) -> str:
    """The unrolled name of a block's hook point: loops.2.blocks.1.hook_z is blocks.5.hook_z."""
    _, loop, _, layer, site = name.split(".", 4)
    return f"blocks.{int(loop) * LAYERS + int(layer)}.{site}"


def block_names(model: LoopedModel, n_loops: int = LOOPS) -> list[str]:
    return [name for name in model.hook_names(n_loops) if ".blocks." in name]


def test_untied_copy_has_the_same_activations_and_logits(model: RecurrentDepth) -> None:
    batch, twin = padded(), untied(model, LOOPS)
    assert_close(run(twin, batch), run(model, batch))
    theirs = cached(twin, batch)
    ours = cached(model, batch)
    assert list(ours) == list(theirs) == model.hook_names(LOOPS)
    for name, value in ours.items():
        assert_close(theirs[name], value)


def test_unrolled_model_has_the_same_activations_and_logits(model: RecurrentDepth) -> None:
    batch, plain = padded(), unrolled(model, LOOPS)
    logits, cache = plain.run_with_cache(batch.tokens, mask=batch.mask)
    assert_close(logits, run(model, batch))
    ours = cached(model, batch)
    for name in block_names(model):
        assert_close(cache[visit_name(name)], ours[name])
    for name in model.edge_sites()[0] + model.edge_sites()[1]:
        assert_close(cache[name], ours[name])


def test_untied_and_unrolled_have_the_same_patched_logits(model: RecurrentDepth) -> None:
    batch, twin, plain = padded(), untied(model, SHORTEST), unrolled(model, SHORTEST)
    source = cached(model, padded(seed=1), n_loops=SHORTEST)
    for name in block_names(model, SHORTEST):
        patch = put(source[name], index_at(name, POSITION, HEAD))
        logits = run_hooked(model, batch, name, patch, SHORTEST)
        assert_close(run_hooked(twin, batch, name, patch, SHORTEST), logits)
        assert_close(plain.run_with_hooks(batch.tokens, mask=batch.mask, fwd_hooks=[(visit_name(name), patch)]), logits)


def test_untied_copy_has_the_same_gradients(model: RecurrentDepth) -> None:
    batch = padded()
    values, grads = gradients(model, batch, projection(), "**", LOOPS)
    twin_values, twin_grads = gradients(untied(model, LOOPS), batch, projection(), "**", LOOPS)
    assert list(grads) == list(twin_grads) == model.hook_names(LOOPS)
    for name in grads:
        assert_close(values[name], twin_values[name])
        assert grads[name].abs().max() > 0, name
        assert_close(grads[name], twin_grads[name])


def unrolled_gradients(model: Unrolled, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def watch(value: Tensor, hook: object) -> None:
        seen[hook.name] = value

    with model.hooks(fwd_hooks=[(name, watch) for name in names]):
        logits = model(batch.tokens, mask=batch.mask)
    read = logits[torch.arange(len(batch)), batch.readout]
    return dict(zip(seen, torch.autograd.grad(projection()(read).sum(), list(seen.values())), strict=True))


def test_unrolled_model_has_the_same_gradients(model: RecurrentDepth) -> None:
    batch = padded()
    names = block_names(model)
    _, grads = gradients(model, batch, projection(), names, LOOPS)
    theirs = unrolled_gradients(unrolled(model, LOOPS), batch, [visit_name(name) for name in names])
    for name in names:
        assert_close(grads[name], theirs[visit_name(name)])


def backward(model: LoopedModel, batch: Batch) -> None:
    read = run(model, batch)[torch.arange(len(batch)), batch.readout]
    projection()(read).sum().backward()


def test_untied_weight_gradients_sum_to_the_tied_one(model: RecurrentDepth) -> None:
    batch, twin = padded(), untied(model, LOOPS)
    backward(model, batch)
    backward(twin, batch)
    for layer, block in enumerate(model.blocks):
        for name, tied in block.named_parameters():
            copies = [twin.visit_blocks[t * LAYERS + layer].get_parameter(name).grad for t in range(LOOPS)]
            assert all(copy.abs().max() > 0 for copy in copies)
            assert_close(torch.stack(copies).sum(0), tied.grad)
    assert_close(twin.embedding.grad, model.embedding.grad)


BIAS_READ_BY = {"hook_attn_out": "attn.b_O", "hook_mlp_out": "mlp.b_out", "mlp.hook_pre": "mlp.b_in", "ln1.hook_normalized": "ln1.b"}


@pytest.mark.parametrize(("site", "bias"), BIAS_READ_BY.items())
def test_gradients_carry_their_own_iteration(site: str, bias: str, model: RecurrentDepth) -> None:
    """A site's gradient, summed over its rows, is the gradient of the bias that is added there, in that iteration's own copy."""
    batch, twin = padded(), untied(model, LOOPS)
    backward(twin, batch)
    _, grads = gradients(model, batch, projection(), f"loops.*.blocks.*.{site}", LOOPS)
    for loop, layer in itertools.product(range(LOOPS), range(LAYERS)):
        expected = twin.visit_blocks[loop * LAYERS + layer].get_parameter(bias).grad
        assert_close(grads[f"loops.{loop}.blocks.{layer}.{site}"].sum((0, 1)), expected)


def test_gradients_do_not_need_weights_that_require_them(plain: RecurrentDepth) -> None:
    batch = padded()
    _, expected = gradients(plain, batch, projection(), ["hook_embed", "loops.2.blocks.1.attn.hook_z"], LOOPS)
    plain.requires_grad_(False)
    _, grads = gradients(plain, batch, projection(), ["hook_embed", "loops.2.blocks.1.attn.hook_z"], LOOPS)
    for name, grad in expected.items():
        assert_close(grads[name], grad)


# 4. A hook that returns None changes nothing; hooks never stay behind


def test_hook_that_returns_none_changes_nothing(model: RecurrentDepth) -> None:
    batch = padded()
    logits = run(model, batch, SHORT)
    for name in model.hook_names(SHORT):
        hooked = run_hooked(model, batch, name, nothing, SHORT)
        if name.endswith(SWITCHING_SITES):
            assert_close(hooked, logits)
        else:
            assert torch.equal(hooked, logits), name


BAD_IN_THE_MIDDLE = [("loops.0.blocks.0.hook_resid_pre", nothing), ("loops.0.nowhere", nothing), ("hook_embed", nothing)]


def failing_metric(logits: Tensor) -> Tensor:
    raise RuntimeError("a metric failed")


def names_that_fail(name: str) -> bool:
    raise RuntimeError("a predicate failed")


FAILURES: dict[str, tuple[type[Exception], str, Callable[[LoopedModel, Batch], object]]] = {
    "run_with_hooks, hook": (RuntimeError, "a hook failed", lambda m, b: run_hooked(m, b, "loops.1.blocks.0.hook_resid_mid", explode)),
    "run_with_hooks, name": (KeyError, "nowhere", lambda m, b: m.run_with_hooks(b.tokens, fwd_hooks=BAD_IN_THE_MIDDLE)),
    "run_with_hooks, predicate": (
        RuntimeError,
        "a predicate failed",
        lambda m, b: m.run_with_hooks(b.tokens, fwd_hooks=[("hook_embed", nothing), (names_that_fail, nothing)]),
    ),
    "hooks, name": (KeyError, "nowhere", lambda m, b: m.hooks(BAD_IN_THE_MIDDLE).__enter__()),
    "run_with_cache, name": (
        KeyError,
        "nowhere",
        lambda m, b: m.run_with_cache(b.tokens, names_filter=["hook_embed", "loops.0.nowhere", "**.hook_z"]),
    ),
    "run_with_cache, tokens": (ValueError, "d_vocab", lambda m, b: m.run_with_cache(b.tokens + 1000, names_filter="**")),
    "add_hook, name": (KeyError, "nowhere", lambda m, b: m.add_hook(["hook_embed", "loops.0.nowhere"], nothing)),
    "logit_lens, tokens": (ValueError, "d_vocab", lambda m, b: logit_lens(m, replace(b, tokens=b.tokens + 1000))),
    "logit_lens, column": (RuntimeError, "out of bounds", lambda m, b: logit_lens(m, replace(b, readout=b.readout + 1000))),
    "readout_lens, tokens": (ValueError, "d_vocab", lambda m, b: readout_lens(m, replace(b, tokens=b.tokens + 1000))),
    "halting, tokens": (
        ValueError,
        "d_vocab",
        lambda m, b: halting(m, replace(b, tokens=b.tokens + 1000), HaltingRule(inject_input=False)),
    ),
    "activation_patch, metric": (RuntimeError, "a metric failed", lambda m, b: activation_patch(m, b, b, failing_metric)),
    "activation_patch, site": (KeyError, "nowhere", lambda m, b: activation_patch(m, b, b, projection(), sites=["z", "nowhere"])),
    "gradients, metric": (RuntimeError, "a metric failed", lambda m, b: gradients(m, b, failing_metric, "**")),
    "gradients, name": (KeyError, "nowhere", lambda m, b: gradients(m, b, projection(), ["hook_embed", "loops.0.nowhere", "**"])),
}


@pytest.mark.parametrize("injection", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_leaves_the_hook_count_as_it_was(failure: str, injection: bool) -> None:
    model, batch = toy(injection=injection), full()
    error, message, call = FAILURES[failure]
    model.add_hook("loops.1.blocks.1.hook_mlp_out", nothing)
    model.add_perma_hook("hook_embed", nothing)
    before, logits = hook_count(model), run(model, batch)
    with pytest.raises(error, match=message):
        call(model, batch)
    assert hook_count(model) == before > 0
    assert model.context_level == 0
    assert torch.equal(run(model, batch), logits)


METHODS: dict[str, Callable[[LoopedModel, Batch], object]] = {
    "run_with_hooks": lambda m, b: run_hooked(m, b, "**.hook_z", nothing),
    "run_with_cache": lambda m, b: cached(m, b),
    "logit_lens": lambda m, b: logit_lens(m, b, LOOPS),
    "readout_lens": lambda m, b: readout_lens(m, b, LOOPS),
    "halting": lambda m, b: halting(m, b, HaltingRule(), LOOPS),
    "halting without injection": lambda m, b: halting(m, b, HaltingRule(inject_input=False), LOOPS),
    "activation_patch": lambda m, b: activation_patch(m, b, b, projection(), LOOPS, sites=["z", "embed"]),
    "gradients": lambda m, b: gradients(m, b, projection(), "**", LOOPS),
}


@pytest.mark.parametrize("calls_before_it_fails", [0, 1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_failing_hook_of_the_users_leaves_the_hook_count_as_it_was(method: str, calls_before_it_fails: int) -> None:
    model, batch = toy(injection=True), full()
    countdown = itertools.count(calls_before_it_fails, -1)

    def fail_later(value: Tensor, hook: object) -> None:
        if next(countdown) <= 0:
            raise RuntimeError("a hook failed")

    model.add_hook("loops.*.blocks.*.hook_mlp_out", fail_later, n_loops=LOOPS)
    before = hook_count(model)
    with pytest.raises(RuntimeError, match="a hook failed"):
        METHODS[method](model, batch)
    assert hook_count(model) == before > 0
    assert model.context_level == 0
    model.reset_hooks()
    assert hook_count(model) == 0
    assert run(model, batch).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_users_own_hooks_survive_and_act(method: str) -> None:
    model, batch = toy(injection=True), full()
    calls = []
    model.add_hook("loops.2.blocks.0.hook_resid_mid", lambda value, hook: calls.append(hook.name))
    before = hook_count(model)
    METHODS[method](model, batch)
    assert hook_count(model) == before > 0
    assert set(calls) == {"loops.2.blocks.0.hook_resid_mid"}


# 5. Sweep = naive

SWEEP_MODELS = [("none", False), ("sinusoidal", False), ("learned", True)]


def site_names(model: LoopedModel) -> list[str]:
    return list(dict.fromkeys(map(site_of, model.hook_names(SHORTEST))))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("heads", [None, [1, 4]])
@pytest.mark.parametrize(("positions", "injection"), SWEEP_MODELS)
def test_each_cell_of_a_sweep_is_one_run_with_that_patch(positions: str, injection: bool, heads: list[int] | None, direction: str) -> None:
    model = toy(positions, injection)
    clean, corrupted = padded(seed=1), padded(seed=2)
    sites = [site for site in site_names(model) if heads is None or site in HEAD_SITES]
    places = {"positions": [0, 5], "heads": heads}
    sweep = activation_patch(model, clean, corrupted, projection(), SHORTEST, sites=sites, **places, direction=direction, batch_size=8)
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    names = [name for name in model.hook_names(SHORTEST) if site_of(name) in sites]
    expected_cells = list(itertools.product(names, places["positions"], heads or [None]))
    assert [(cell.name, cell.position, cell.head) for cell in sweep.cells] == expected_cells
    values = {name: cached(model, source, name, SHORTEST)[name] for name in {cell.name for cell in sweep.cells}}
    read = torch.arange(BATCH), base.readout
    naive = []
    for name, position, head in expected_cells:
        patch = put(values[name], index_at(name, position, head))
        naive.append(projection()(run_hooked(model, base, name, patch, SHORTEST)[read]))
    assert_close(sweep.values, torch.stack(naive))
    assert_close(sweep.clean, projection()(run(model, clean, SHORTEST)[read]))
    assert_close(sweep.corrupted, projection()(run(model, corrupted, SHORTEST)[read]))
    assert sweep.values.std(0).min() > 0


# 6. Lens


def at_readout(logits: Tensor, batch: Batch) -> Tensor:
    return logits[torch.arange(len(batch)), batch.readout]


def test_last_visit_of_the_logit_lens_is_the_models_answer(model: RecurrentDepth) -> None:
    batch = padded()
    lens = logit_lens(model, batch, LOOPS, keep_logits=True)
    assert lens.names[-1] == model.schedule(LOOPS)[-1].name
    assert_close(lens.logits[-1], at_readout(run(model, batch), batch))


def test_logit_lens_is_norm_and_head_of_every_residual(model: RecurrentDepth) -> None:
    batch = padded()
    lens = logit_lens(model, batch, LOOPS, keep_logits=True)
    cache = cached(model, batch)
    for visit, (loop, layer) in enumerate(itertools.product(range(LOOPS), range(LAYERS))):
        resid = at_readout(cache[f"loops.{loop}.blocks.{layer}.hook_resid_post"], batch)
        normed = torch.nn.functional.layer_norm(resid, resid.shape[-1:], model.final_norm.w, model.final_norm.b, model.cfg.eps)
        assert_close(lens.logits[visit], normed @ model.W_U + model.b_U)


def prefixes_agree(model: LoopedModel, batch: Batch) -> list[bool]:
    lens = readout_lens(model, batch, LOOPS, keep_logits=True)
    return [is_close(lens.logits[t], at_readout(run(model, batch, t + 1), batch)) for t in range(LOOPS)]


def test_readout_lens_is_a_call_of_that_length_where_declared(model: RecurrentDepth) -> None:
    assert model.prefix_readout
    assert prefixes_agree(model, padded()) == [True] * LOOPS


def test_prefix_readout_is_declared_as_it_is(odd_model: LoopedModel) -> None:
    batch = full()
    state = odd_model.begin(batch.tokens, batch.mask, n_loops=LOOPS)
    for t in range(LOOPS - 1):
        state = odd_model.advance(state, f"loops.{t + 1}")
        assert is_close(odd_model.readout(state), run(odd_model, batch, t + 1)) == odd_model.prefix_readout


# 7. Causality, padding, batching; and what the residual stream is a sum of


def later_tokens_matter(model: LoopedModel) -> bool:
    tokens, changed = random_tokens(), random_tokens()
    changed[:, POSITION + 1 :] = random_tokens(seed=8)[:, POSITION + 1 :]
    logits, others = model(tokens, n_loops=LOOPS), model(changed, n_loops=LOOPS)
    assert not is_close(others[:, POSITION + 1 :], logits[:, POSITION + 1 :])
    return not is_close(others[:, : POSITION + 1], logits[:, : POSITION + 1])


def other_rows_matter(model: LoopedModel) -> bool:
    tokens, changed = random_tokens(), random_tokens()
    changed[1:] = random_tokens(seed=8)[1:]
    return not is_close(model(changed, n_loops=LOOPS)[0], model(tokens, n_loops=LOOPS)[0])


def test_later_tokens_never_change_an_earlier_result(model: RecurrentDepth) -> None:
    assert model.causal
    assert not later_tokens_matter(model)


@pytest.mark.parametrize("names", [[], ["loops.*.blocks.*.attn.hook_pattern"], ["loops.*.blocks.*.attn.hook_attn_scores"]])
def test_later_tokens_never_change_an_earlier_result_in_any_kernel(names: list[str], model: RecurrentDepth) -> None:
    """With padding, and with scores and patterns written out, as well as in the fused causal kernel."""
    batch = padded(lengths=(7, 6, 5))
    changed = batch.tokens.clone()
    changed[:, POSITION + 1 :] = random_tokens(seed=8)[:, POSITION + 1 :]
    with model.hooks([(name, nothing) for name in names], n_loops=LOOPS):
        logits, others = run(model, batch), run(model, replace(batch, tokens=changed))
    assert_close(others[:, : POSITION + 1], logits[:, : POSITION + 1])
    assert not is_close(others[:, POSITION + 1], logits[:, POSITION + 1])


def test_other_rows_never_change_a_result(model: RecurrentDepth) -> None:
    assert model.batch_independent
    assert not other_rows_matter(model)
    batch = padded()
    together = run(model, batch)
    for row in range(BATCH):
        assert_close(run(model, batch[row : row + 1]), together[row : row + 1])
    order = torch.tensor([2, 0, 1])
    assert_close(run(model, batch[order]), together[order])


def test_causality_and_batching_are_declared_as_they_are(odd_model: LoopedModel) -> None:
    assert later_tokens_matter(odd_model) == (not odd_model.causal)
    assert other_rows_matter(odd_model) == (not odd_model.batch_independent)


@pytest.mark.parametrize("width", [POS, POS + 3])
def test_right_padding_never_changes_a_result(width: int, model: RecurrentDepth) -> None:
    batch = padded(width=width)
    logits = run(model, batch)
    for row, length in enumerate(LENGTHS):
        alone = model(batch.tokens[row : row + 1, :length], n_loops=LOOPS)
        assert_close(logits[row : row + 1, :length], alone)


def test_right_padding_never_changes_a_result_without_causality() -> None:
    model, batch = odd_one(Bidirectional), padded()
    logits = run(model, batch)
    for row, length in enumerate(LENGTHS):
        assert_close(logits[row : row + 1, :length], model(batch.tokens[row : row + 1, :length], n_loops=LOOPS))


def test_what_stands_in_the_padding_does_not_matter(model: RecurrentDepth) -> None:
    batch = padded()
    filled = replace(batch, tokens=torch.where(batch.mask.bool(), batch.tokens, random_tokens(seed=9)))
    assert not torch.equal(filled.tokens, batch.tokens)
    assert_close(run(model, filled)[batch.mask.bool()], run(model, batch)[batch.mask.bool()])


def test_padding_is_not_the_same_as_no_mask(model: RecurrentDepth) -> None:
    batch = padded()
    assert not is_close(model(batch.tokens, n_loops=LOOPS)[1, LENGTHS[1] :], run(model, batch)[1, LENGTHS[1] :])


@pytest.mark.parametrize("make_batch", [full, padded])
def test_residual_is_the_sum_of_components_exactly_where_declared(model: RecurrentDepth, make_batch: Callable[[], Batch]) -> None:
    cache = cached(model, make_batch())
    parts = [name for name in cache if name in ("hook_embed", "hook_pos_embed") or name.endswith(("hook_attn_out", "hook_mlp_out"))]
    assert len(parts) == 2 * LOOPS * LAYERS + 1 + model.positional
    total = torch.stack([cache[name].expand_as(cache["hook_embed"]) for name in parts]).sum(0)
    final = cache[f"loops.{LOOPS - 1}.hook_state_out"]
    assert is_close(total, final) == model.additive_residual == (not model.cfg.input_injection)


# 8. Resume


def start(model: LoopedModel, batch: Batch) -> State:
    return model.begin(batch.tokens, batch.mask, n_loops=LOOPS)


def test_stopping_and_resuming_at_any_visit_equals_the_full_run(model: RecurrentDepth) -> None:
    batch = padded()
    logits = run(model, batch)
    for stop in range(LOOPS * LAYERS + 1):
        state = model.advance(start(model, batch), stop)
        assert state.visit == stop
        assert_close(model.readout(model.advance(state)), logits)


def test_stopping_at_every_visit_equals_the_full_run(model: RecurrentDepth) -> None:
    batch = padded()
    state = start(model, batch)
    for visit in model.schedule(LOOPS):
        state = model.advance(state, visit.name)
    assert_close(model.readout(model.advance(state)), run(model, batch))


def test_resuming_after_slicing_moving_and_joining_states(model: RecurrentDepth) -> None:
    batch = padded()
    logits = run(model, batch)
    for stop in range(LOOPS * LAYERS + 1):
        state = model.advance(start(model, batch), stop)
        swapped = cat_states([state.rows(slice(1, None)).to("cpu"), state.rows(torch.tensor([0]))])
        assert_close(model.readout(model.advance(swapped)), logits[[1, 2, 0]])
        shorter = state.rows(pos=slice(0, POSITION + 1))
        assert_close(model.readout(model.advance(shorter)), logits[:, : POSITION + 1])


def test_states_leave_an_earlier_state_as_it_was(model: RecurrentDepth) -> None:
    before = start(model, padded())
    resid, parts = before.resid.clone(), {name: part.clone() for name, part in before.parts.items()}
    model.advance(before)
    assert before.visit == 0
    assert torch.equal(before.resid, resid)
    assert all(torch.equal(before.parts[name], part) for name, part in parts.items())
    assert set(parts) == ({"input"} if model.cfg.input_injection else set())


def recorded(model: LoopedModel, batch: Batch) -> dict[str, KeyValues]:
    store: dict[str, KeyValues] = {}
    model.advance(start(model, batch), store=store)
    return store


@pytest.mark.parametrize("first", [1, POSITION, POS - 1])
def test_later_rows_with_supplied_keys_equal_the_full_run(first: int, model: RecurrentDepth) -> None:
    batch = full()
    logits, store = run(model, batch), recorded(model, batch)
    assert list(store) == [visit.name for visit in model.schedule(LOOPS)]
    for stop in (0, 1, LAYERS, LOOPS * LAYERS - 1):
        state = model.advance(start(model, batch), stop).rows(pos=slice(first, None))
        assert_close(model.readout(model.advance(state, supplied=store)), logits[:, first:])


def test_later_rows_with_supplied_keys_and_padding_equal_the_full_run(model: RecurrentDepth) -> None:
    batch = padded()
    logits, store = run(model, batch), recorded(model, batch)
    state = model.advance(start(model, batch), 3).rows(torch.tensor([1, 2]), slice(POSITION, None))
    others = {name: KeyValues(kv.k[1:], kv.v[1:], kv.positions[1:], kv.mask[1:]) for name, kv in store.items()}
    assert_close(model.readout(model.advance(state, supplied=others)), logits[1:, POSITION:])


def test_changed_later_rows_see_the_supplied_earlier_ones(model: RecurrentDepth) -> None:
    batch = full()
    changed = replace(batch, tokens=torch.cat([batch.tokens[:, :4], random_tokens(seed=4)[:, 4:]], dim=1))
    later = start(model, changed).rows(pos=slice(4, None))
    assert_close(model.readout(model.advance(later, supplied=recorded(model, batch))), run(model, changed)[:, 4:])


@pytest.mark.parametrize("site", ["attn.hook_attn_scores", "attn.hook_pattern", "ln1.hook_scale", "attn.hook_q", "hook_resid_mid"])
def test_hooks_act_on_a_subset_of_rows(site: str, model: RecurrentDepth) -> None:
    batch, name = full(), f"loops.1.blocks.1.{site}"
    store, last = recorded(model, batch), index_at(name, -1)

    def halve_last(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        changed[last] *= 0.5
        return changed

    expected = run_hooked(model, batch, name, halve_last)
    later = start(model, batch).rows(pos=slice(POS - 2, None))
    with model.hooks([(name, halve_last)], n_loops=LOOPS):
        logits = model.readout(model.advance(later, supplied=store))
    assert not is_close(logits, run(model, batch)[:, POS - 2 :])
    assert_close(logits, expected[:, POS - 2 :])


def test_rows_that_would_see_no_key_are_refused(plain: RecurrentDepth) -> None:
    padding = start(plain, padded()).rows(torch.tensor([1]), slice(5, None))
    with pytest.raises(ValueError, match="must see at least one key"):
        plain.advance(padding)


def test_states_of_different_places_do_not_join(plain: RecurrentDepth) -> None:
    state = start(plain, full())
    with pytest.raises(ValueError, match="must stand at one visit"):
        cat_states([state, plain.advance(state, 1)])
