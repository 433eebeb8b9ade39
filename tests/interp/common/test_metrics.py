"""What a metric gives is checked in one place, whichever method calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.circuits.edge_attribution import edge_attribution
from loopscope.interp.common.metrics import (
    logit_diff,
    logit_margin,
    measure,
    measure_each,
    minus_kl,
    of_many,
)
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import path_patch, path_patch_sweep
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import D_VOCAB, padded, projection

METRIC, READ, SENDER = projection(), Receiver("readout"), Sender("mlp", 0, 0)
METHODS: dict[str, Callable[..., Any]] = {
    "activation_patch": activation_patch,
    "also": lambda m, a, b, metric, n: activation_patch(m, a, b, METRIC, n, also={"x": metric}),
    "attribution_patch": attribution_patch,
    "steps": lambda *arguments: attribution_patch(*arguments, steps=2),
    "edge_attribution": edge_attribution,
    "path_patch": lambda *given: path_patch(*given[:4], SENDER, READ, given[4]),
    "path_patch_sweep": lambda *given: path_patch_sweep(*given[:4], READ, given[4]),
    "gradients": lambda m, a, b, metric, n: gradients(m, a, metric, "hook_embed", n),
}
WRONG: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "a mean": (
        lambda logits: METRIC(logits).mean(),
        ValueError,
        r"one number per row, so the shape \[3\] for logits \[3, 29\], got \[\]; take no mean",
    ),
    "an axis of one": (lambda logits: METRIC(logits)[:, None], ValueError, r"got \[3, 1\]"),
    "a number": (lambda logits: METRIC(logits).sum().item(), TypeError, r"a tensor .* got float"),
    "fewer answers": (
        logit_margin(torch.tensor([3])),
        ValueError,
        r"the batch has 3 rows, got the shape \[1\] for answers; an int means the same token",
    ),
    "fewer pairs": (
        lambda logits: logit_diff([3, 4, 5], [1, 2])(logits),
        ValueError,
        r"the batch has 3 rows, got the shape \[2\] for wrong",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_a_metric_gives_one_number_per_row(method: str, wrong: str, plain: RecurrentDepth) -> None:
    metric, kind, message = WRONG[wrong]
    with pytest.raises(kind, match=message):
        METHODS[method](plain, padded(1), padded(2), metric, 1)
    assert not plain.any_hook()


@pytest.mark.shapes
@pytest.mark.parametrize("method", ["attribution_patch", "steps", "edge_attribution", "gradients"])
def test_a_metric_without_a_gradient_is_refused(method: str, plain: RecurrentDepth) -> None:
    def is_right(logits: Tensor) -> Tensor:
        return (logits.argmax(-1) == 3).float()

    with pytest.raises(ValueError, match="the metric 'is_right' has no gradient, as it does not"):
        METHODS[method](plain, padded(1), padded(2), is_right, 1)
    assert not plain.any_hook()


def test_an_int_is_the_answer_of_every_row() -> None:
    logits = torch.randn(3, D_VOCAB, generator=torch.Generator().manual_seed(0))
    each = torch.tensor([4, 4, 4])
    assert torch.equal(logit_margin(4)(logits), logit_margin(each)(logits))
    assert torch.equal(logit_margin([4, 4, 4])(logits), logit_margin(each)(logits))
    right = torch.tensor([1, 2, 3])
    assert torch.equal(logit_diff(right, 4)(logits), logit_diff(right, each)(logits))


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        ([3, 5, D_VOCAB], ValueError, r"answers must be in 0\.\.28 \(d_vocab=29\), got 3 to 29"),
        ([3, -1, 5], ValueError, "got -1 to 5"),
        ([0.5, 1.0, 2.0], TypeError, r"answers must be integers, got torch\.float32"),
    ],
)
def test_answers_are_tokens(answers: list[int], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        logit_margin(answers)(torch.zeros(3, D_VOCAB))


def test_a_metric_is_measured_in_float32_or_wider() -> None:
    logits = torch.zeros(2, 3, dtype=torch.bfloat16)
    logits[:, 0], logits[:, 1] = 300.0, 1.0
    found = measure(logit_diff(0, 1), logits)
    assert found.tolist() == [299.0, 299.0]  # in bfloat16 it would be 300
    assert found.dtype == torch.float32
    assert measure(lambda x: x.argmax(-1) == 0, logits.double()).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "metric",
    [
        logit_margin([1, 4, 0]),
        logit_diff(torch.tensor([2, 2, 5]), 1),
        minus_kl(torch.arange(21.0).view(3, 7).sin()),
        lambda logits: logits.amax(-1),
    ],
    ids=["margin", "diff", "kl", "one of the user's"],
)
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_many_runs_are_measured_as_each_is(metric: Any, kind: torch.dtype) -> None:
    logits = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)).to(kind)
    found = measure_each(metric, logits)
    assert torch.equal(found, torch.stack([measure(metric, each) for each in logits]))


def test_many_runs_are_measured_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopscope.interp.common.metrics.LOGITS_AT_ONCE", 50)
    logits, seen = torch.randn(5, 3, 7), []

    def metric(piece: Tensor) -> Tensor:
        seen.append(len(piece))
        return piece[..., 0]

    assert torch.equal(measure_each(of_many(metric), logits), logits[..., 0])
    assert seen == [2, 2, 1]
