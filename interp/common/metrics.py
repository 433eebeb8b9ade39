"""Metrics of the logits at the readout: Float[Tensor, "batch d_vocab"] to Float[Tensor, " batch"].

Every method calls a metric through `measure`, which checks what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.inputs import LOGITS_AT_ONCE, Metric
from loopscope.interp.common.precision import widened
from loopscope.models.basis.numbers import given_tensor

Answers = Int[Tensor, " batch"] | Sequence[int] | int
AnyMetric = TypeVar("AnyMetric", bound=Metric)


def of_many(metric: AnyMetric) -> AnyMetric:
    """Declare that a metric also takes the logits of many runs, "cell batch d_vocab"."""
    metric.of_many = metric  # type: ignore[attr-defined]  # a wrapper that copies it is another
    return metric


def margin(
    logits: Float[Tensor, "*any d_vocab"], answers: Int[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """Logit of the answer minus the largest other logit (arXiv 2604.07822, figure 8)."""
    right = logits.gather(-1, answers[..., None])[..., 0]
    others = logits.scatter(-1, answers[..., None], -torch.inf)
    return right - others.amax(-1)


def logit_margin(answers: Answers) -> Metric:
    """Make the metric "logit of the answer minus the largest other logit", in logits.

    Args:
        answers: The token id of each row's answer; an int means the same token in all rows.

    Returns:
        A function from logits Float[Tensor, "batch d_vocab"] to Float[Tensor, " batch"]. It is
        above 0 exactly if the answer is the top token.
    """

    @of_many
    def logit_margin(logits: Float[Tensor, "*any d_vocab"]) -> Float[Tensor, "*any"]:
        return margin(logits, _tokens_of("answers", answers, logits))

    return logit_margin


def logit_diff(right: Answers, wrong: Answers) -> Metric:
    """Make the metric "logit of the right token minus logit of a wrong token", in logits.

    Args:
        right, wrong: The two token ids of each row; an int means the same token in all rows.

    Returns:
        A function from logits Float[Tensor, "batch d_vocab"] to Float[Tensor, " batch"].
    """

    @of_many
    def logit_diff(logits: Float[Tensor, "*any d_vocab"]) -> Float[Tensor, "*any"]:
        sides = [_tokens_of("right", right, logits), _tokens_of("wrong", wrong, logits)]
        picked = logits.gather(-1, torch.stack(sides, dim=-1))
        return picked[..., 0] - picked[..., 1]

    return logit_diff


def minus_kl(logits: Float[Tensor, "batch d_vocab"]) -> Metric:
    """The metric "minus the divergence from a run's distribution", in nats; 0 for the run itself.

    Args:
        logits: Float[Tensor, "batch d_vocab"], of that run.
    """
    given = widened(logits).log_softmax(-1)

    @of_many
    def minus_kl(logits: Float[Tensor, "*any d_vocab"]) -> Float[Tensor, "*any"]:
        return -(given.exp() * (given - logits.log_softmax(-1))).sum(-1)

    return minus_kl


def _tokens_of(what: str, tokens: Answers, logits: Tensor) -> Int[Tensor, "*any"]:
    *_, rows, d_vocab = logits.shape
    return one_per_row(what, tokens, rows, d_vocab, logits.device).expand(logits.shape[:-1])


def one_per_row(
    what: str, tokens: Answers, rows: int, d_vocab: int, device: torch.device
) -> Int[Tensor, " batch"]:
    """One token for each row, checked where the tokens are: from the CPU no GPU is waited for.

    Raises:
        TypeError: Tokens that are no integers.
        ValueError: Another number of tokens than rows, or tokens outside the vocabulary.
    """
    given = given_tensor(tokens)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(f"{what} must be integers, got {given.dtype}")
    if given.ndim == 0 and not isinstance(tokens, Tensor):
        given = given.expand(rows)
    if given.shape != (rows,):
        raise ValueError(
            f"one token per row is needed: the batch has {rows} rows, got the shape"
            f" {list(given.shape)} for {what}; an int means the same token in all rows"
        )
    if bool(((given < 0) | (given >= d_vocab)).any()):
        raise ValueError(
            f"{what} must be in 0..{d_vocab - 1} (d_vocab={d_vocab}), got"
            f" {int(given.min())} to {int(given.max())}"
        )
    given = given.to(device, torch.long)
    return given.clone() if given.is_inference() else given


def measure(metric: Metric, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
    """The metric of some logits, in float32 or wider.

    Raises:
        TypeError: The metric gives something else than a tensor.
        ValueError: The metric does not give one number per row.
    """
    values = metric(widened(logits))
    if not isinstance(values, Tensor):
        raise TypeError(
            f"the metric {metric_name(metric)!r} must return a tensor of the shape [batch], got"
            f" {type(values).__name__}"
        )
    if values.shape != logits.shape[:1]:
        raise ValueError(
            f"the metric {metric_name(metric)!r} must return one number per row, so the shape"
            f" {list(logits.shape[:1])} for logits {list(logits.shape)}, got {list(values.shape)};"
            " take no mean over the batch, and leave no axis of one"
        )
    return widened(values)


def measure_graphed(
    metric: Metric, logits: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, " batch"]:
    """The metric of some logits, as `measure`, where its gradient is to be taken.

    Raises:
        ValueError: As for `measure`; or the logits have no gradient, or the metric has none.
    """
    if not logits.requires_grad:
        raise ValueError(
            "a gradient needs logits that depend on what it is taken for, but this model computes"
            " them under torch.no_grad() or from detached tensors; let its forward keep gradients"
        )
    values = measure(metric, logits)
    if not values.requires_grad:
        raise ValueError(
            f"the metric {metric_name(metric)!r} has no gradient, as it does not depend on the"
            " logits, or only through argmax, a comparison or detach; give one that does, such as"
            " logit_diff(right, wrong)"
        )
    return values


def measure_each(
    metric: Metric, logits: Float[Tensor, "cell batch d_vocab"]
) -> Float[Tensor, "cell batch"]:
    """The metric of several runs of a batch, as `measure` gives it for one."""
    if getattr(metric, "of_many", None) is not metric:
        return torch.stack([measure(metric, part) for part in logits])
    pieces = logits.split(max(1, LOGITS_AT_ONCE // logits[0].numel()))
    return torch.cat([widened(metric(widened(piece))) for piece in pieces])


def row_by_row(
    metric: Metric, size: int, logits: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """The metric of several batches side by side, each of `size` rows."""
    return measure_each(metric, logits.unflatten(0, (-1, size))).flatten()


def metric_or_kl(metric: Metric | Literal["kl"], clean: Float[Tensor, "batch d_vocab"]) -> Metric:
    """The metric; "kl" is minus the divergence from the distribution of the clean run.

    Raises:
        ValueError: Another word.
    """
    if isinstance(metric, str) and metric != "kl":
        raise ValueError(
            "a metric is a function of the logits, such as logit_diff(right, wrong) or"
            f" logit_margin(answers), or the word 'kl'; got {metric!r}"
        )
    return minus_kl(clean) if isinstance(metric, str) else metric


def metric_name(metric: Metric) -> str:
    """The name of a metric in a record."""
    return str(getattr(metric, "__name__", type(metric).__name__))
