"""A sweep in shards: whoever computes which cells, and however often it stops, the record is that
of one run, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope import activation_patch, attribution_patch, logit_diff, logit_margin, merge
from loopscope.interp.common.inputs import Metric
from loopscope.interp.patching.sweep import Sweep
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.run import into
from loopscope.interp.shards.work import Results, Work, on_device
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BatchCentred, odd_one, padded, projection, toy

CLEAN, CORRUPTED = padded(1), padded(2)
ANSWERS = torch.tensor([3, 5, 7])


@pytest.fixture(scope="module")
def plain() -> RecurrentDepth:
    return toy("learned")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopscope.interp.patching.packed._LEAST", 40)
    monkeypatch.setattr("loopscope.interp.shards.work._EVERY", 0.0)


def patched(model: LoopedModel, metric: Metric | None = None, **options: Any) -> Sweep:
    return activation_patch(
        model, CLEAN, CORRUPTED, projection() if metric is None else metric, 3, **options
    )


def by_gradients(model: LoopedModel, **options: Any) -> Sweep:
    return attribution_patch(model, CLEAN, CORRUPTED, projection(), 3, steps=2, **options)


def assert_equal(found: Sweep, expected: Sweep) -> None:
    assert found.cells == expected.cells
    for name in ("values", "clean", "corrupted", "present"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert (found.metric, found.direction, list(found.also)) == (
        expected.metric,
        expected.direction,
        list(expected.also),
    )
    for name in found.also:
        assert_equal(found.also[name], expected.also[name])
    assert found.frame().equals(expected.frame())


@pytest.mark.parametrize("model", [toy("learned"), odd_one(BatchCentred)], ids=["packed", "whole"])
def test_shards_in_any_order_merge_into_the_record_of_one_run(
    model: LoopedModel, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "sites": ["resid_pre", "z"],
        "positions": [2, 3],
        "direction": "noise",
        "also": {"other": projection(1)},
        "group_by": ["a", "b", None, "b", "a", "c", "c"],
    }
    whole = patched(model, **options)
    shares = [patched(model, save_to=tmp_path, shard=(i, 3), **options) for i in (2, 0, 1)]
    assert sorted(str(cell) for part in shares for cell in part.cells) == sorted(
        map(str, whole.cells)
    )
    assert all(0 < len(part.cells) < len(whole.cells) for part in shares)
    merged = merge(tmp_path)
    assert isinstance(merged, Sweep)
    assert_equal(merged, whole)
    assert merged.groups == options["group_by"]
    assert_equal(patched(model, save_to=tmp_path, **options), whole)


def test_labels_belong_to_the_call_in_whatever_they_are_given(
    plain: RecurrentDepth, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_to": tmp_path, "positions": [1], "loops": [0]}
    rows = [[0, 1, 2, 3, 4, 5, 6], [1] * 7, [2] * 7]
    patched(plain, group_by=[[np.int64(x) for x in row] for row in rows], **options)
    for same in ([list(map(torch.tensor, row)) for row in rows], torch.tensor(rows), rows):
        patched(plain, group_by=same, **options)
    merged = merge(tmp_path)
    assert isinstance(merged, Sweep)
    assert merged.groups == rows
    with pytest.raises(ValueError, match=r"results of another call.*group_by"):
        patched(plain, group_by=rows[::-1], **options)
    with pytest.raises(TypeError, match=r"a label must be a word, a number or None, got \{"):
        patched(plain, group_by=[{"a"}] * 7, **options)


def test_a_shard_without_items_is_an_empty_record(plain: RecurrentDepth, tmp_path: Path) -> None:
    found = patched(plain, save_to=tmp_path, shard=(998, 999))
    assert (found.cells, len(found.frame())) == ((), 0)


def test_a_manifest_that_another_process_wrote_first_counts(
    plain: RecurrentDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(self: Manifest, folder: Path) -> None:
        write(replace(self, inputs="others"), folder)
        write(self, folder)

    write = Manifest.write
    monkeypatch.setattr(Manifest, "write", late)
    with pytest.raises(ValueError, match=r"results of another call.*inputs"):
        patched(plain, save_to=tmp_path)


def test_estimates_in_shards_merge_into_those_of_one_run(
    plain: RecurrentDepth, tmp_path: Path
) -> None:
    whole = by_gradients(plain)
    for i in range(2):
        by_gradients(plain, save_to=tmp_path, shard=(i, 2))
    merged = merge(tmp_path)
    assert isinstance(merged, Sweep)
    assert_equal(merged, whole)


def test_estimates_from_a_folder_are_moved_to_where_the_inputs_are(
    plain: RecurrentDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device "meta" stands for a GPU: only the results go there, behind the computation."""

    def moved(results: Results, device: torch.device) -> Results:
        assert device == plain.device
        return on_device(results, torch.device("meta"))

    monkeypatch.setattr("loopscope.interp.attribution.patching.on_device", moved)
    found = by_gradients(plain, save_to=tmp_path, positions=[1], loops=[0])
    for name in ("values", "clean", "corrupted", "present"):
        assert getattr(found, name).device.type == "meta"


def test_an_interrupted_sweep_goes_on_where_it_was(
    plain: RecurrentDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added, add = [], Work.add

    def counted(self: Work, item: int, results: Any) -> None:
        if len(added) == 4:
            added.append(-1)
            raise KeyboardInterrupt
        added.append(item)
        add(self, item, results)

    monkeypatch.setattr(Work, "add", counted)
    with pytest.raises(KeyboardInterrupt):
        patched(plain, save_to=tmp_path)
    with pytest.raises(ValueError, match=r"is not complete: .* work items are missing"):
        merge(tmp_path)
    found = patched(plain, save_to=tmp_path)
    last = added[-1]
    assert added == [0, 1, 2, 3, -1, *range(4, last + 1)]  # only what was missing
    assert_equal(found, patched(plain))
    patched(plain, save_to=tmp_path)
    assert added[-1] == last  # nothing is computed twice


def test_results_of_another_call_are_refused(plain: RecurrentDepth, tmp_path: Path) -> None:
    patched(plain, save_to=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"results of another call.*direction"):
        patched(plain, save_to=tmp_path, direction="noise")
    other = toy("learned")
    with torch.no_grad():
        other.embedding.add_(1.0)
    with pytest.raises(ValueError, match=r"results of another call.*weights"):
        patched(other, save_to=tmp_path)
    with pytest.raises(ValueError, match=r"results of another call.*inputs"):
        activation_patch(plain, CORRUPTED, CLEAN, projection(), 3, save_to=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("something else")
    with pytest.raises(ValueError, match=r"but .*file is a file"):
        patched(plain, save_to=tmp_path / "file")


def doubled(value: Tensor, hook: object) -> Tensor:
    return 2.0 * value


def halved(value: Tensor, hook: object) -> Tensor:
    return 0.5 * value


class First:
    """A metric whose code is in a class."""

    def __call__(self, logits: Tensor) -> Tensor:
        return self.column(logits)

    def column(self, logits: Tensor) -> Tensor:
        return logits[:, 3]


def test_a_folder_belongs_to_a_metric_its_answers_and_the_hooks(
    plain: RecurrentDepth, tmp_path: Path
) -> None:
    def sweep(metric: Metric, hook: Callable[..., Tensor] = doubled, **options: Any) -> Sweep:
        with plain.hooks([("loops.0.blocks.0.hook_mlp_out", hook)], n_loops=3):
            return patched(plain, metric, save_to=tmp_path, positions=[1], **options)

    first = sweep(logit_margin(ANSWERS), also={"other": logit_diff(ANSWERS, 2)})
    again = sweep(logit_margin(ANSWERS.clone()), also={"other": logit_diff(ANSWERS, 2)})
    assert torch.equal(first.values, again.values)
    for metric, options in (
        (logit_margin(torch.tensor([3, 5, 8])), {"also": {"other": logit_diff(ANSWERS, 2)}}),
        (logit_margin(ANSWERS), {"also": {"other": logit_diff(ANSWERS, 4)}}),
        (logit_margin(ANSWERS), {"also": {"other": logit_diff(ANSWERS, 2)}, "hook": halved}),
        (partial(torch.Tensor.mean, dim=-1), {"also": {"other": logit_diff(ANSWERS, 2)}}),
    ):
        with pytest.raises(ValueError, match="results of another call"):
            sweep(metric, **options)
    with pytest.raises(ValueError, match="a generator that one of them holds cannot"):
        sweep(logit_margin(ANSWERS), hook=partial(doubled, hook=(i for i in range(2))))


def test_another_metric_of_the_same_name_is_refused_also_where_its_code_is_in_a_class(
    plain: RecurrentDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"save_to": tmp_path, "positions": [1], "loops": [0]}
    patched(plain, First(), **options)
    patched(plain, First(), **options)
    monkeypatch.setattr(First, "column", lambda self, logits: logits[:, 4])
    with pytest.raises(ValueError, match=r"results of another call.*metric First"):
        patched(plain, First(), **options)


def test_a_damaged_part_and_a_missing_shard_are_one_sentence(
    plain: RecurrentDepth, tmp_path: Path
) -> None:
    patched(plain, save_to=tmp_path, shard=(0, 2))
    with pytest.raises(ValueError, match="is not complete"):
        merge(tmp_path)
    patched(plain, save_to=tmp_path, shard=(1, 2))
    merge(tmp_path)
    part = sorted(tmp_path.glob("part-*"))[0]
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        merge(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json"):
        merge(tmp_path / "nothing")
    content = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(content.replace("denoise", "noise"))
    with pytest.raises(ValueError, match="or was changed"):
        merge(tmp_path)


def test_a_shard_and_a_folder_are_of_one_process_in_a_team_too(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    halves = [patched(plain, shard=(i, 2)) for i in range(2)]
    monkeypatch.setattr(
        "loopscope.interp.patching.activation.team", lambda facts: pytest.fail("a team")
    )
    monkeypatch.setattr("loopscope.interp.shards.run.n_ranks", lambda: 2)
    for i, half in enumerate(halves):
        assert_equal(patched(plain, shard=(i, 2)), half)
    with into(tmp_path), pytest.raises(ValueError, match="results are kept by one process"):
        patched(plain)
    assert not list(tmp_path.iterdir())
