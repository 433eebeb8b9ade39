"""Probes whose states are read in shards are those of one run, to the last bit."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope import merge, probe, transfer_matrix
from loopscope.interp.shards.run import ShardWritten, into
from loopscope.interp.shards.work import Work
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BatchCentred, odd_one, toy

pytestmark = pytest.mark.shapes
ROWS, WIDTH, LOOPS = 23, 5, 2
HOW: dict[str, Any] = {"n_loops": LOOPS, "batch_size": 4}
METHODS: dict[str, Any] = {
    "ridge": partial(probe, positions="all", permutations=2, **HOW),
    "numbers": partial(probe, kind="ridge", control=False, places="hook_embed", **HOW),
    "logistic": partial(probe, kind="logistic", bits=True, places="hook_embed", **HOW),
    "matrix": partial(transfer_matrix, site="mlp_out", **HOW),
}


@pytest.fixture(scope="module")
def plain() -> RecurrentDepth:
    return toy("learned")


@pytest.fixture(autouse=True)
def written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopscope.interp.shards.work._EVERY", 0.0)


def questions() -> Batch:
    tokens = torch.randint(1, 29, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(ROWS)[:, None] % 3 + 3
    mask = (torch.arange(WIDTH) < lengths).long()
    return Batch(tokens, mask, mask.sum(1) - 1)


def targets(name: str) -> Tensor:
    first = questions().tokens[:, 0]
    return first.double() if name == "numbers" else first % 3


def assert_equal(found: Any, expected: Any) -> None:
    """Equal to the last bit, in every field."""
    assert type(found) is type(expected)
    if is_dataclass(found):
        for field in fields(found):
            assert_equal(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(found, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(found, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert found == expected


@pytest.mark.parametrize("name", METHODS)
def test_shards_in_any_order_merge_into_the_record_of_one_run(
    name: str, plain: RecurrentDepth, tmp_path: Path
) -> None:
    method, asked = METHODS[name], targets(name)
    whole = method(plain, questions(), asked)
    for i in (2, 0, 1):
        part = method(plain, questions(), asked, save_to=tmp_path, shard=(i, 3))
        assert (len(part.frame()), part.n_train) == (0, whole.n_train)
        assert list(part.frame().columns) == list(whole.frame().columns)
    assert_equal(merge(tmp_path), whole)
    assert_equal(method(plain, questions(), asked, save_to=tmp_path), whole)


def test_rows_that_depend_on_each_other_are_read_at_once(tmp_path: Path) -> None:
    model: LoopedModel = odd_one(BatchCentred)
    whole = METHODS["ridge"](model, questions(), targets(""))
    for i in range(2):
        METHODS["ridge"](model, questions(), targets(""), save_to=tmp_path, shard=(i, 2))
    assert_equal(merge(tmp_path), whole)


def test_an_interrupted_collection_goes_on_where_it_was(
    plain: RecurrentDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added, add = [], Work.add

    def counted(self: Work, item: int, results: Any) -> None:
        if len(added) == 3:
            added.append(-1)
            raise KeyboardInterrupt
        added.append(item)
        add(self, item, results)

    monkeypatch.setattr(Work, "add", counted)
    method = partial(METHODS["matrix"], plain, questions(), targets(""))
    with pytest.raises(KeyboardInterrupt):
        method(save_to=tmp_path)
    with pytest.raises(ValueError, match=r"is not complete: 4 of 7 work items are missing"):
        merge(tmp_path)
    found = method(save_to=tmp_path)
    assert added == [0, 1, 2, -1, 3, 4, 5, 6]  # only what was missing
    assert_equal(found, method())


def test_a_folder_of_another_call_a_missing_shard_and_a_damaged_file_are_refused(
    plain: RecurrentDepth, tmp_path: Path
) -> None:
    method = partial(METHODS["matrix"], plain, save_to=tmp_path)
    with pytest.raises(ValueError, match=r"a shard of transfer_matrix keeps states.*pass save_to="):
        METHODS["matrix"](plain, questions(), targets(""), shard=(0, 2))
    method(questions(), targets(""), shard=(0, 2))
    for given, more, what in (
        (questions(), {"seed": 1}, "seed, held_out"),
        (questions(), {"strength": 2.0}, "strength"),
        (questions()[slice(2, None)].repeat(2)[slice(ROWS)], {}, "inputs"),
    ):
        with pytest.raises(ValueError, match=rf"results of another call.*differs: .*{what}"):
            method(given, targets(""), **more)
    with pytest.raises(ValueError, match=r"results of another call.*targets"):
        method(questions(), targets("numbers"))
    with pytest.raises(ValueError, match="is not complete"):
        merge(tmp_path)
    method(questions(), targets(""), shard=(1, 2))
    part = sorted(tmp_path.glob("part-*"))[1]
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        merge(tmp_path)


def test_a_shard_of_a_figure_stops_where_others_are_missing(
    plain: RecurrentDepth, tmp_path: Path
) -> None:
    method = partial(METHODS["matrix"], plain, questions(), targets(""))
    with into(tmp_path, (0, 2)), pytest.raises(ShardWritten, match="4 of 7 work items"):
        method()
    with into(tmp_path, (1, 2)):
        assert_equal(method(), method(save_to=tmp_path / "other"))


def test_what_a_hook_of_the_caller_keeps_can_be_differentiated(plain: RecurrentDepth) -> None:
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: object) -> None:
        kept.append(value)

    with plain.hooks([("loops.1.hook_state_out", keep)], n_loops=LOOPS):
        METHODS["matrix"](plain, questions(), targets(""))
    assert not any(value.is_inference() for value in kept)
