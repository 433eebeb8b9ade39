"""Probes, against scikit-learn's own fits on cached states, and against their controls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from torch import Tensor

from loopscope.interp.probes.logistic import description_length
from loopscope.interp.probes.probe import Kind, Probe, probe
from loopscope.interp.probes.ridge import RidgeSums
from loopscope.interp.probes.states import split_rows
from loopscope.interp.probes.tasks import Task
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import D_MODEL, D_VOCAB, LAYERS, hook_count, toy

pytestmark = pytest.mark.shapes
ROWS, WIDTH, LOOPS, CLASSES, STRENGTH = 61, 5, 3, 4, 0.7
SITE = "loops.*.blocks.*.hook_resid_post"
Sklearn = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@cache
def subject() -> tuple[RecurrentDepth, Batch]:
    tokens = torch.randint(1, D_VOCAB, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))
    columns = torch.full((ROWS,), WIDTH - 1)
    model = toy()
    with torch.no_grad():  # the class of a token is a direction of its embedding
        model.W_E[:, :CLASSES] = 4.0 * torch.eye(CLASSES)[torch.arange(D_VOCAB) % CLASSES]
    return model, Batch(tokens, torch.ones_like(tokens), columns)


@cache
def stored() -> Tensor:
    """The states after every visit at the readout, from a cache: [visit, row, d_model]."""
    model, batch = subject()
    _, kept = model.run_with_cache(batch.tokens, n_loops=LOOPS, names_filter=SITE)
    return torch.stack([kept[name][:, -1] for name in model.resolve_names(SITE, LOOPS)])


def classes() -> Tensor:
    """A property that is in the states: the class of the last token."""
    return subject()[1].tokens[:, -1] % CLASSES


def found(kind: Kind, targets: Tensor, **more: object) -> Probe:
    model, batch = subject()
    given = {"strength": STRENGTH, "batch_size": 17, **more}
    return probe(model, batch, targets, n_loops=LOOPS, kind=kind, **given)  # type: ignore[arg-type]


def ridge_numbers(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, ...]:
    fit = Ridge(alpha=STRENGTH).fit(x, y)
    return fit.predict(new), fit.coef_[None], np.atleast_1d(fit.intercept_)


def ridge_classes(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, ...]:
    fit = RidgeClassifier(alpha=STRENGTH).fit(x, y)
    return fit.predict(new), fit.coef_, fit.intercept_


def logistic_classes(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, ...]:
    fit = LogisticRegression(C=1 / STRENGTH, solver="newton-cholesky", tol=1e-10).fit(x, y)
    return fit.predict(new), fit.coef_, fit.intercept_


@pytest.mark.parametrize(
    ("kind", "numbers", "oracle"),
    [
        ("ridge", True, ridge_numbers),
        ("ridge", False, ridge_classes),
        ("logistic", False, logistic_classes),
    ],
)
def test_a_probe_is_scikit_learns_fit_on_stored_states(
    kind: Kind, numbers: bool, oracle: Sklearn
) -> None:
    targets = subject()[1].tokens.double().mean(1) if numbers else classes()
    record = found(kind, targets)
    train, test = split_rows(ROWS, 0.25, 0)
    assert (record.n_train, record.n_test) == (46, 15) == (len(train), len(test))
    for i, states in enumerate(stored()):
        x, y = states[train].numpy(), targets[train].numpy()
        answers, weight, bias = oracle(x, y, states[test].numpy())
        torch.testing.assert_close(
            record.maps[i].weight, torch.from_numpy(weight), atol=1e-6, rtol=1e-6
        )
        torch.testing.assert_close(
            record.maps[i].bias, torch.from_numpy(bias), atol=1e-6, rtol=1e-6
        )
        truth = targets[test].numpy()
        off = ((answers - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
        right = 1 - off if numbers else (answers == truth).mean()
        assert record.score[i].item() == pytest.approx(right, abs=1e-9)


def test_the_places_are_those_of_the_run() -> None:
    record = found("ridge", classes())
    assert [place.name for place in record.places] == subject()[0].resolve_names(SITE, LOOPS)
    frame = record.frame()
    assert len(frame) == LOOPS * LAYERS
    assert frame["visit"][3] == "loops.1.blocks.1"
    few = probe(*subject(), classes(), "loops.1.blocks.*.attn.hook_z", LOOPS)
    assert [place.site for place in few.places] == ["attn.hook_z"] * LAYERS
    assert few.maps[0].weight.shape == (CLASSES, D_MODEL)


def test_every_column_is_a_read() -> None:
    model, batch = subject()
    record = probe(model, batch, batch.tokens % 3, "hook_embed", LOOPS, positions="all")
    assert (record.n_train, record.n_test) == (46 * WIDTH, 15 * WIDTH)
    assert record.score.item() == 1.0  # 28 tokens in 35 dimensions
    one = probe(model, batch, batch.tokens[:, 2] % 3, "hook_embed", LOOPS, positions=[2])
    assert one.n_test == 15


def test_padding_is_no_read() -> None:
    """What stands in the padding, and what is said of it, changes nothing."""
    model, batch = subject()
    lengths = torch.arange(ROWS)[:, None] % WIDTH + 1
    mask = (torch.arange(WIDTH) < lengths).long()
    ragged, targets = Batch(batch.tokens, mask, mask.sum(1) - 1), batch.tokens % 3
    how = {"n_loops": LOOPS, "positions": "all", "permutations": 2, "batch_size": 17}
    one, other = (
        probe(model, ragged, targets.where(mask > 0, pad), "hook_embed", **how) for pad in (0, -100)
    )
    assert one.n_train + one.n_test == mask.sum()
    assert one.classes is not None
    assert one.classes.tolist() == [0, 1, 2] == other.classes.tolist()
    assert torch.equal(one.score, other.score)
    assert torch.equal(one.permuted, other.permuted)


def test_random_values_of_types_have_no_selectivity() -> None:
    """Targets that are themselves a control task: drawn at random for each token."""
    drawn = torch.randint(3, (D_VOCAB,), generator=torch.Generator().manual_seed(3))
    model, batch = subject()
    tokens = batch.tokens
    record = probe(model, batch, drawn[tokens], "hook_embed", LOOPS, positions="all", strength=1e-3)
    assert record.score.item() == 1.0
    assert record.selectivity().abs().item() < 0.05
    other = probe(model, batch, drawn[tokens], "hook_embed", LOOPS, positions="all",
                  types=torch.arange(ROWS))  # fmt: skip
    assert other.selectivity().item() > 0.3


def test_permutations_tell_a_property_from_noise() -> None:
    real = found("ridge", classes(), permutations=19)
    noise = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(5))
    none = found("ridge", noise, permutations=19)
    assert real.permuted.shape == none.permuted.shape == (19, LOOPS * LAYERS)
    assert real.p_value()[0].item() == pytest.approx(1 / 20)
    assert none.p_value().min().item() > 1 / 20
    by_hand = (1 + (none.permuted[:, 2] >= none.score[2]).sum().item()) / 20
    assert none.p_value()[2].item() == by_hand


def test_scores_that_are_nan_are_no_evidence() -> None:
    nan = torch.nan
    record = replace(
        found("ridge", classes(), places="loops.0.blocks.*.hook_resid_post"),
        score=torch.tensor([nan, 0.7]),
        permuted=torch.tensor([[0.1, nan], [nan, 0.9], [0.2, 0.3]]),
    )
    assert record.p_value()[0].isnan()
    assert record.p_value()[1].item() == 3 / 4


def test_equal_numbers_have_no_variance() -> None:
    task = Task(torch.tensor([0.1, 0.1, 0.1, 0.4], dtype=torch.float64), None)
    answers, held = torch.tensor([0.2, 0.0, 0.4]), torch.arange(3)
    assert math.isnan(task.score(answers, held))
    assert math.isnan(task.constant(torch.tensor([3]), held))


def test_a_control_task_has_more_than_one_value() -> None:
    values, types = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0])
    task = Task(values, torch.tensor([0, 1]))
    for seed in range(9):
        drawn = task.control(types, torch.Generator().manual_seed(seed)).values
        assert drawn[0] == drawn[3] != drawn[1] == drawn[2]
    same = Task(torch.full((4,), 0.5), None)
    assert torch.equal(same.control(types, torch.Generator()).values, same.values)


def test_the_description_length_of_a_known_code() -> None:
    """One state tells the class at once: only what precedes the first sight of each class costs."""
    values = torch.arange(400) % 2
    told = torch.stack([values * 2.0 - 1, torch.zeros(400)], dim=1)
    short = description_length(told, values, 2, 1e-3)
    blind = description_length(torch.zeros(400, 2), values, 2, 1e-3)
    assert short < 30
    assert blind == pytest.approx(400, abs=8)


def test_bits_compress_what_the_states_tell() -> None:
    record = found("logistic", classes(), bits=True)
    assert record.code is not None
    assert record.code.uniform == 46 * 2  # four classes
    assert record.code.compression()[0].item() > 1
    assert {"bits", "compression", "selectivity"} <= set(record.frame().columns)


def test_sums_do_not_grow_with_the_reads() -> None:
    sums, generator = RidgeSums(), torch.Generator().manual_seed(0)
    for _ in range(5):
        sums.add(torch.randn(200, 7, generator=generator), torch.ones(200, 3).double())
    assert [list(x.shape) for x in sums._sums] == [[7, 7], [7, 3], [7], [3]]


def test_a_large_mean_costs_no_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 4, generator=generator).double(), torch.arange(4.0).double()
    sums = RidgeSums()
    for part in (x + 1e6).split(100):
        sums.add(part, ((part - 1e6) @ w)[:, None])
    torch.testing.assert_close(sums.solve(1e-9).weight[0], w, atol=1e-6, rtol=0)


def test_rows_to_hold_out_can_be_named() -> None:
    held_out = torch.arange(ROWS) < 20
    record = found("ridge", classes(), held_out=held_out)
    assert (record.n_train, record.n_test) == (41, 20)
    for given in (held_out.numpy(), held_out.tolist()):
        again = split_rows(ROWS, given, 3)
        assert all(map(torch.equal, again, split_rows(ROWS, held_out, 3)))
    train, test = split_rows(ROWS, held_out, 3)
    assert set(test.tolist()) == set(range(20))
    assert set(train.tolist()) == set(range(20, ROWS))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"targets": torch.zeros(ROWS).long()}, "at least two classes, got 1"),
        ({"targets": torch.zeros(7).long()}, "one target per row"),
        ({"targets": torch.full((ROWS,), torch.nan)}, "must be finite"),
        ({"types": torch.zeros(ROWS).long()}, "reads of several types"),
        ({"types": torch.zeros(ROWS)}, "types must be integers"),
        ({"strength": 0.0}, "strength must be finite and above 0"),
        ({"bits": True}, "pass kind='logistic'"),
        ({"kind": "logistic", "targets": torch.rand(ROWS)}, "tells classes apart"),
        ({"held_out": 0.001}, "rows to fit and rows held out"),
        ({"held_out": torch.zeros(3).bool()}, "one bool per row"),
        ({"places": "ln_final.hook_normalized"}, "comes after it"),
        ({"permutations": -1}, "at least 0"),
    ],
)
def test_what_cannot_be_probed_is_refused(more: dict[str, object], message: str) -> None:
    model, batch = subject()
    given = {"targets": classes(), "n_loops": LOOPS, **more}
    with pytest.raises(ValueError, match=message):
        probe(model, batch, **given)  # type: ignore[arg-type]
    assert hook_count(model) == 0


def test_what_was_not_asked_for_is_refused() -> None:
    record = found("ridge", classes(), control=False)
    with pytest.raises(ValueError, match="control=True"):
        record.selectivity()
    with pytest.raises(ValueError, match="permutations=99"):
        record.p_value()
    with pytest.raises(KeyError):
        probe(*subject(), classes(), "loops.7.blocks.0.hook_resid_post", LOOPS)


def test_states_that_are_not_finite_are_refused() -> None:
    model = toy()
    with torch.no_grad():
        model.W_E.fill_(torch.nan)
    with pytest.raises(ValueError, match="the states at loops"):
        probe(model, subject()[1], classes(), n_loops=LOOPS)


def test_the_picture_shows_the_controls() -> None:
    picture = found("ridge", classes(), permutations=2).plot("a title")
    names = [trace.name for trace in picture.data]
    assert names == ["held out", "control task", "best of 2 permutations", "without any state"]
    assert len(found("logistic", classes(), bits=True).plot().data) == 4
