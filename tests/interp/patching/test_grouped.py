"""Effects by label, against means by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from toy import BATCH, LAYERS, LENGTHS, POS, assert_close, padded, toy

pytestmark = pytest.mark.shapes
LOOPS = 3
LABELS = [["a", "b", "b", None, "a", "c", "c"], ["a", "a", "a", "b", None, "b", "b"], ["c"] * POS]
METRIC = logit_diff(torch.tensor([5, 3, 2]), torch.tensor([1, 7, 4]))


@pytest.fixture(scope="module")
def swept() -> Sweep:
    return activation_patch(
        toy(), padded(0), padded(1), METRIC, LOOPS, sites="resid_pre", group_by=LABELS
    )


def test_a_group_is_the_mean_over_its_places(swept: Sweep) -> None:
    found = swept.by_group()
    assert swept.groups == LABELS
    assert set(found.labels) == {"a", "b", "c"}
    assert len(found.labels) == 3 * LOOPS * LAYERS
    for i, (key, label) in enumerate(zip(found.keys, found.labels, strict=True)):
        effect, whole, places = 0.0, 0.0, 0
        for cell, row in ((c, r) for c in range(len(swept.cells)) for r in range(BATCH)):
            here = swept.cells[cell]
            assert here.position is not None
            assert swept.present is not None
            if here.visit == key[1] and LABELS[row][here.position] == label:
                if not swept.present[cell, row]:
                    continue
                effect += float(swept.values[cell, row] - swept.corrupted[row])
                whole += float(swept.clean[row] - swept.corrupted[row])
                places += 1
        assert found.places[i].item() == places
        assert found.value[i].item() == pytest.approx(effect / whole, rel=1e-9)


def test_a_label_per_column_gives_back_the_cells(swept: Sweep) -> None:
    """Each column a group of its own: the values and the intervals are those of the cells."""
    found = swept.by_group(range(POS), level=0.9, resamples=50, seed=3)
    order = {(cell.visit, cell.position): i for i, cell in enumerate(swept.cells)}
    cells = [order[key[1], label] for key, label in zip(found.keys, found.labels, strict=True)]
    assert_close(found.value, swept.normalized()[cells])
    interval = swept.bootstrap(0.9, 50, 3)
    assert_close(found.low, interval.low[cells])
    assert_close(found.high, interval.high[cells])
    assert torch.equal(found.places, swept.examples()[cells])
    by_tensor = swept.by_group(torch.arange(POS), level=0.9, resamples=50, seed=3)
    assert_close(by_tensor.value, found.value)


def test_rows_of_labels_may_be_of_any_kind(swept: Sweep) -> None:
    numbers = [[0, 1, 1, 2, 0, 2, 2], [0, 0, 0, 1, 2, 1, 1], [2] * POS]
    expected = swept.by_group(numbers, resamples=9)
    kinds = (
        tuple(map(tuple, numbers)), np.array(numbers), list(np.array(numbers)),
        list(torch.tensor(numbers)),
    )  # fmt: skip
    for labels in kinds:
        found = swept.by_group(labels, resamples=9)
        assert found.labels == expected.labels
        assert torch.equal(found.value, expected.value)
    words = np.array(["a", "b", "c", "d", "e", "f", "g"])
    assert set(swept.by_group(words).labels) == set("abcdefg")


def test_a_label_of_absent_places_alone_is_left_out(swept: Sweep) -> None:
    """The last column is padding of the second example."""
    labels = [["a"] * POS, ["a"] * (POS - 1) + ["gone"], ["a"] * POS]
    assert LENGTHS[1] < POS
    found = swept.by_group(labels)
    assert set(found.labels) == {"a"}
    with pytest.raises(ValueError, match="other than None"):
        swept.by_group([[None] * POS, [None] * (POS - 1) + ["gone"], [None] * POS])


def test_the_frame_and_the_picture(swept: Sweep) -> None:
    frame = swept.by_group().frame()
    assert list(frame.columns[:6]) == ["site", "visit", "loop", "layer", "head", "group"]
    assert (frame["low"] <= frame["high"]).all()
    assert frame["loop"].max() == LOOPS - 1
    assert len(swept.by_group().plot().data) == 9


def test_heads_are_groups_of_their_own() -> None:
    found = activation_patch(
        toy(), padded(0), padded(1), METRIC, LOOPS, sites="z", heads=[1, 3], loops=[0], layers=[1]
    ).by_group(LABELS)
    assert {key[4] for key in found.keys} == {1, 3}
    assert len(found.labels) == 6


def test_labels_that_do_not_fit_are_refused(swept: Sweep) -> None:
    with pytest.raises(ValueError, match="3 examples and 7 columns, got 3 rows of at least 5"):
        swept.by_group(list("abcde"))
    with pytest.raises(ValueError, match="got 2 rows"):
        activation_patch(toy(), padded(0), padded(1), METRIC, LOOPS, group_by=LABELS[:2])
    with pytest.raises(ValueError, match="other than None"):
        swept.by_group([None] * POS)
    plain = activation_patch(toy(), padded(0), padded(1), METRIC, LOOPS, together="positions")
    with pytest.raises(ValueError, match="need labels"):
        plain.by_group()
    with pytest.raises(ValueError, match="one column each"):
        plain.by_group(LABELS)
