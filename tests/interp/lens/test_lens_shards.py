"""A lens in shards is the lens of one run, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopscope import coda_lens, logit_lens, merge, readout_lens, train_tuned_lens, tuned_lens_kl
from loopscope.interp.lens import tuned_job
from loopscope.interp.lens.record import Lens
from loopscope.interp.lens.tuned_lens import TunedLens
from loopscope.interp.shards.work import Work
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


TRAINING: dict[str, Any] = {"n_loops": 3, "steps": 5, "batch_size": 2}


def assert_equal(found: object, expected: TunedLens) -> None:
    assert isinstance(found, TunedLens)
    for name in ("weights", "biases", "losses"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("names", "n_loops", "family", "fingerprint"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.shapes
@pytest.mark.parametrize(("shared", "visits"), [(False, [0, 1]), (True, [0, 2, 4])])
def test_shards_of_a_training_merge_into_the_lens_of_one_run(
    shared: bool, visits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned_job, "_TOGETHER", 2)
    model, batch, options = toy("learned"), padded(), {**TRAINING, "shared": shared}
    whole = train_tuned_lens(model, batch, **options)
    assert whole.weights.abs().sum() > 0
    part = train_tuned_lens(model, batch, save_to=tmp_path, shard=(0, 2), **options)
    assert part.names == tuple(whole.names[visit] for visit in visits)
    for name in ("weights", "biases"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[visits])
    assert torch.equal(part.losses, whole.losses[:, visits])
    for refused in (lambda: part.lens(model, batch), lambda: tuned_lens_kl(model, batch, part)):
        with pytest.raises(ValueError, match=rf"a shard, with translators for {len(visits)} of 6"):
            refused()
    with pytest.raises(ValueError, match="is not complete"):
        merge(tmp_path)
    train_tuned_lens(model, batch, save_to=tmp_path, shard=(1, 2), **options)
    assert_equal(merge(tmp_path), whole)
    assert_equal(train_tuned_lens(model, batch, save_to=tmp_path, **options), whole)


def test_a_training_goes_on_and_refuses_another_call_an_empty_shard_and_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopscope.interp.shards.work._EVERY", 0.0)
    added, add = [], Work.add

    def counted(self: Work, item: int, results: Any) -> None:
        if len(added) == 1:
            added.append(-1)
            raise KeyboardInterrupt
        added.append(item)
        add(self, item, results)

    monkeypatch.setattr(Work, "add", counted)
    model, batch = toy("learned"), padded()
    with pytest.raises(KeyboardInterrupt):
        train_tuned_lens(model, batch, save_to=tmp_path, **TRAINING)
    for more, what in (({"seed": 1}, "seed"), ({"lr": 0.5}, "lr"), ({"positions": [1]}, "pos")):
        with pytest.raises(ValueError, match=rf"results of another call.*differs: {what}"):
            train_tuned_lens(model, batch, save_to=tmp_path, **{**TRAINING, **more})
    found = train_tuned_lens(model, batch, save_to=tmp_path, **TRAINING)
    assert added == [0, -1, 1]
    assert_equal(found, train_tuned_lens(model, batch, **TRAINING))
    with pytest.raises(ValueError, match=r"shard \(2, 3\) of this training is empty: there are 2"):
        train_tuned_lens(model, batch, shard=(2, 3), **TRAINING)
    part = sorted(tmp_path.glob("part-*"))[0]
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        merge(tmp_path)
