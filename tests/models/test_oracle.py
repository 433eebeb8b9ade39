"""Identity 3: untied copies and unrolled models have the same activations, patched logits and
gradients.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from loopscope.interp.attribution.gradients import gradients
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import Unrolled, unrolled, untied
from toy import (
    HEAD,
    LAYERS,
    LENGTHS,
    LOOPS,
    POSITION,
    SHORTEST,
    assert_close,
    cached,
    every_variant,
    index_at,
    padded,
    projection,
    put,
    row_each,
    run,
)


def visit_name(name: str) -> str:
    """The unrolled name of a block's hook point: loops.2.blocks.1.hook_z is blocks.5.hook_z."""
    _, loop, _, layer, site = name.split(".", 4)
    return f"blocks.{int(loop) * LAYERS + int(layer)}.{site}"


def block_names(model: LoopedModel, n_loops: int = LOOPS) -> list[str]:
    return [name for name in model.hook_names(n_loops) if ".blocks." in name]


@every_variant
def test_untied_copy_has_the_same_activations_and_logits(model: RecurrentDepth) -> None:
    batch, twin = padded(), untied(model, LOOPS)
    assert_close(run(twin, batch), run(model, batch))
    theirs = cached(twin, batch)
    ours = cached(model, batch)
    assert list(ours) == list(theirs) == model.hook_names(LOOPS)
    for name, value in ours.items():
        assert_close(theirs[name], value)


@every_variant
def test_unrolled_model_has_the_same_activations_and_logits(model: RecurrentDepth) -> None:
    batch, plain = padded(), unrolled(model, LOOPS)
    logits, cache = plain.run_with_cache(batch.tokens, mask=batch.mask)
    assert_close(logits, run(model, batch))
    ours = cached(model, batch)
    for name in block_names(model):
        assert_close(cache[visit_name(name)], ours[name])
    for name in model.edge_sites()[0] + model.edge_sites()[1]:
        assert_close(cache[name], ours[name])


@every_variant
def test_untied_and_unrolled_have_the_same_patched_logits(model: RecurrentDepth) -> None:
    twin, plain = untied(model, SHORTEST), unrolled(model, SHORTEST)
    batch = padded(lengths=LENGTHS * 4)
    source = cached(model, padded(seed=1, lengths=LENGTHS * 4), n_loops=SHORTEST)
    for rows in row_each(block_names(model, SHORTEST), len(batch)):
        patches = {
            name: put(source[name], (row, *index_at(name, POSITION, HEAD)[1:]))
            for name, row in rows.items()
        }
        with (
            model.hooks(list(patches.items()), n_loops=SHORTEST),
            twin.hooks(list(patches.items()), n_loops=SHORTEST),
            plain.hooks([(visit_name(name), patch) for name, patch in patches.items()]),
        ):
            logits = run(model, batch, SHORTEST)
            assert_close(run(twin, batch, SHORTEST), logits)
            assert_close(plain(batch.tokens, mask=batch.mask), logits)


@every_variant
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

    def watch(value: Tensor, hook: object) -> Tensor:
        seen[hook.name] = value.view_as(
            value
        )  # of this point alone: the first block reads the very tensor that is injected later
        return seen[hook.name]

    with model.hooks(fwd_hooks=[(name, watch) for name in names]):
        logits = model(batch.tokens, mask=batch.mask)
    read = logits[torch.arange(len(batch)), batch.readout]
    return dict(
        zip(seen, torch.autograd.grad(projection()(read).sum(), list(seen.values())), strict=True)
    )


@every_variant
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
            copies = [
                twin.visit_blocks[t * LAYERS + layer].get_parameter(name).grad for t in range(LOOPS)
            ]
            assert all(copy.abs().max() > 0 for copy in copies)
            assert_close(torch.stack(copies).sum(0), tied.grad)
    assert_close(twin.embedding.grad, model.embedding.grad)


BIAS_READ_BY = {
    "hook_attn_out": "attn.b_O",
    "hook_mlp_out": "mlp.b_out",
    "mlp.hook_pre": "mlp.b_in",
    "ln1.hook_out": "ln1.b",
}


@pytest.mark.parametrize(("site", "bias"), BIAS_READ_BY.items())
def test_gradients_carry_their_own_iteration(site: str, bias: str, model: RecurrentDepth) -> None:
    """A site's gradient, summed over its rows, is the gradient of the bias that is added there, in
    that iteration's own copy.
    """
    batch, twin = padded(), untied(model, LOOPS)
    backward(twin, batch)
    _, grads = gradients(model, batch, projection(), f"loops.*.blocks.*.{site}", LOOPS)
    for loop, layer in itertools.product(range(LOOPS), range(LAYERS)):
        expected = twin.visit_blocks[loop * LAYERS + layer].get_parameter(bias).grad
        assert_close(grads[f"loops.{loop}.blocks.{layer}.{site}"].sum((0, 1)), expected)


def test_gradients_do_not_need_weights_that_require_them(plain: RecurrentDepth) -> None:
    batch = padded()
    _, expected = gradients(
        plain, batch, projection(), ["hook_embed", "loops.2.blocks.1.attn.hook_z"], LOOPS
    )
    plain.requires_grad_(False)
    _, grads = gradients(
        plain, batch, projection(), ["hook_embed", "loops.2.blocks.1.attn.hook_z"], LOOPS
    )
    for name, grad in expected.items():
        assert_close(grads[name], grad)
