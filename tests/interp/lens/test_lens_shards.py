"""A lens in shards is the lens of one run, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopscope import coda_lens, logit_lens, merge, readout_lens
from loopscope.interp.lens.record import Lens
from toy import BatchCentred, odd_one, padded, toy


def test_rows_that_depend_on_each_other_are_read_at_once(tmp_path: Path) -> None:
    model, batch = odd_one(BatchCentred), padded()
    whole = logit_lens(model, batch, n_loops=2).heads_input
    for options in ({}, {"save_to": tmp_path}):
        found = logit_lens(model, batch, n_loops=2, batch_size=1, **options)
        assert torch.equal(found.heads_input, whole)


@pytest.mark.parametrize("method", [logit_lens, readout_lens, coda_lens])
def test_shards_of_a_lens_merge_into_the_lens_of_one_run(method: Any, tmp_path: Path) -> None:
    model, batch = toy("learned"), padded()
    options: dict[str, Any] = {"n_loops": 3, "batch_size": 2, "positions": [1, 0]}
    whole = method(model, batch, **options)
    second = method(model, batch, save_to=tmp_path, shard=(1, 2), **options)
    assert second.example.tolist() == [2, 2]
    assert torch.equal(second.heads_input, whole.heads_input[:, 4:])
    with pytest.raises(ValueError, match="is not complete"):
        merge(tmp_path, model)
    method(model, batch, save_to=tmp_path, shard=(0, 2), **options)
    merged = merge(tmp_path, model)
    assert isinstance(merged, Lens)
    assert merged.frame().equals(whole.frame())
    again = method(model, batch, save_to=tmp_path, **options)
    assert torch.equal(again.heads_input, whole.heads_input)
    with pytest.raises(ValueError, match=r"pass the model, as in merge\(folder, model\)"):
        merge(tmp_path)
    with pytest.raises(ValueError, match="read from another model"):
        merge(tmp_path, toy())
    with pytest.raises(ValueError, match=r"shard \(2, 3\) of this lens is empty"):
        method(model, batch, shard=(2, 3), **options)
