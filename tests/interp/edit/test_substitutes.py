"""Means and resampled rows that stand in for ablated outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ablations import ATTN, ATTN_OUT, MLP, MLP_OUT, Z, ablated
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.models.basis.draws import other_rows
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    LOOPS,
    BatchCentred,
    assert_close,
    cached,
    full,
    is_close,
    odd_one,
    padded,
    random_tokens,
    with_words,
)


def site_values(model: RecurrentDepth, reference: Batch, name: str) -> Tensor:
    return cached(model, reference, name)[name]


@pytest.mark.parametrize(("what", "name"), [(ATTN, ATTN_OUT), (MLP, MLP_OUT)])
def test_mean_is_over_what_is_real_or_read(
    what: Component, name: str, plain: RecurrentDepth
) -> None:
    reference = padded(seed=3, lengths=(4, 7, 2, 5))
    reference = replace(
        reference, readout=torch.tensor([4, 6, 1, 4])
    )  # the first row is read at a padded column
    values = site_values(plain, reference, name)
    rows = [values[i, p] for i, length in enumerate((4, 7, 2, 5)) for p in range(length)] + [
        values[0, 4]
    ]
    found = ablated(plain, what, padded(), how="mean", reference=reference)[name]
    assert_close(found, torch.stack(rows).mean(0).expand_as(found))


def test_mean_is_of_the_same_iteration(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    found = ablated(plain, Component("mlp"), padded(), how="mean", reference=reference)
    means = [
        site_values(plain, reference, f"loops.{t}.blocks.1.hook_mlp_out").mean((0, 1))
        for t in range(LOOPS)
    ]
    for t in range(LOOPS):
        assert_close(found[f"loops.{t}.blocks.1.hook_mlp_out"][1, 2], means[t])
    assert not is_close(means[0], means[1])


def test_mean_of_one_head(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    found = ablated(
        plain, Component("head", [1], [0], [3]), padded(), how="mean", reference=reference
    )[Z]
    expected = cached(plain, padded(), Z)[Z].clone()
    expected[:, :, 3] = site_values(plain, reference, Z)[:, :, 3].mean((0, 1))
    assert_close(found, expected)


def test_mean_per_position(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    found = ablated(plain, ATTN, padded(), how="mean_per_position", reference=reference)[ATTN_OUT]
    assert_close(found, site_values(plain, reference, ATTN_OUT).mean(0).expand_as(found))


def test_resample_takes_another_row_of_the_reference(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    values, order = site_values(plain, reference, Z), other_rows(BATCH, 7)
    found = ablated(
        plain, Component("head", [1], [0], [2]), full(), how="resample", reference=reference, seed=7
    )[Z]
    assert_close(found[:, :, 2], values[order][:, :, 2])
    assert_close(found[:, :, 3], site_values(plain, full(), Z)[:, :, 3])


def test_resample_starts_over_where_the_run_has_more_rows(plain: RecurrentDepth) -> None:
    reference, order = full(seed=3), other_rows(BATCH, 0)
    tokens = random_tokens(5, batch=BATCH + 1)
    with ablate(plain, ATTN, how="resample", n_loops=LOOPS, reference=reference):
        _, cache = plain.run_with_cache(tokens, n_loops=LOOPS, names_filter=ATTN_OUT)
    assert_close(
        cache[ATTN_OUT], site_values(plain, reference, ATTN_OUT)[torch.cat([order, order[:1]])]
    )


def test_a_reference_in_pieces_gives_the_same(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how, reference in (
        ("mean", padded(3)),
        ("mean_per_position", full(3)),
        ("resample", full(3)),
    ):
        whole = ablated(plain, [ATTN, MLP], padded(), how=how, reference=reference)["logits"]
        monkeypatch.setattr("loopscope.interp.edit.substitutes._CHUNK", 2)
        assert_close(
            ablated(plain, [ATTN, MLP], padded(), how=how, reference=reference)["logits"], whole
        )
        monkeypatch.undo()


def test_a_reference_is_run_whole_where_rows_depend_on_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loopscope.interp.edit.substitutes._CHUNK", 1)
    model = odd_one(BatchCentred)
    found = ablated(model, MLP, padded(), how="mean", reference=full(3))[MLP_OUT]
    assert_close(found, site_values(model, full(3), MLP_OUT).mean((0, 1)).expand_as(found))


def test_the_reference_is_run_with_the_hooks_of_the_moment(plain: RecurrentDepth) -> None:
    with ablate(plain, Component("iteration", [0]), n_loops=LOOPS):
        expected = site_values(plain, full(3), ATTN_OUT).mean((0, 1))
        found = ablated(plain, ATTN, padded(), how="mean", reference=full(3))[ATTN_OUT]
    assert_close(found, expected.expand_as(found))
    assert not is_close(expected, site_values(plain, full(3), ATTN_OUT).mean((0, 1)))


def test_references_may_be_texts_or_tokens(plain: RecurrentDepth) -> None:
    model = with_words(plain)
    texts = ["<t_3><t_9><t_4>", "<t_8>"]
    expected = ablated(model, MLP, padded(), how="mean", reference=model.encode(texts))["logits"]
    assert_close(ablated(model, MLP, padded(), how="mean", reference=texts)["logits"], expected)
    expected = ablated(model, MLP, padded(), how="mean", reference=full(3))["logits"]
    assert_close(
        ablated(model, MLP, padded(), how="mean", reference=random_tokens(3))["logits"], expected
    )
