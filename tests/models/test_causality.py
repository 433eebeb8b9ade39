"""Identity 7: later tokens, other rows and padding never change a result, where the family declares
so.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    LENGTHS,
    LOOPS,
    POS,
    POSITION,
    Bidirectional,
    assert_close,
    is_close,
    nothing,
    odd_one,
    padded,
    random_tokens,
    run,
)


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


@pytest.mark.parametrize(
    "names",
    [[], ["loops.*.blocks.*.attn.hook_pattern"], ["loops.*.blocks.*.attn.hook_attn_scores"]],
)
def test_later_tokens_never_change_an_earlier_result_in_any_kernel(
    names: list[str], model: RecurrentDepth
) -> None:
    """With padding, and with scores and patterns written out, as well as in the fused causal
    kernel.
    """
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
        assert_close(
            logits[row : row + 1, :length],
            model(batch.tokens[row : row + 1, :length], n_loops=LOOPS),
        )


def test_what_stands_in_the_padding_does_not_matter(model: RecurrentDepth) -> None:
    batch = padded()
    filled = replace(
        batch, tokens=torch.where(batch.mask.bool(), batch.tokens, random_tokens(seed=9))
    )
    assert not torch.equal(filled.tokens, batch.tokens)
    assert_close(run(model, filled)[batch.mask.bool()], run(model, batch)[batch.mask.bool()])


def test_padding_is_not_the_same_as_no_mask(model: RecurrentDepth) -> None:
    batch = padded()
    assert not is_close(
        model(batch.tokens, n_loops=LOOPS)[1, LENGTHS[1] :], run(model, batch)[1, LENGTHS[1] :]
    )
