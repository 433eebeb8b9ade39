"""A graph of features: how much each feature of one input gives to later features and the answer.

Axes: batch, pos, loop, feature, d_in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.interp.attribution.gradients import alone
from loopscope.interp.common.columns import used_columns
from loopscope.interp.common.frozen_norm import held_divisors
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn, as_batch
from loopscope.interp.common.metrics import metric_name
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.places import one_in_range
from loopscope.interp.dictionaries.attribution import FeatureAttribution, feature_attribution
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.graphs.local_run import LocalRun
from loopscope.interp.dictionaries.graphs.record import FeatureGraph, FeatureLink, FeatureNode
from loopscope.interp.dictionaries.reading import Reading
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel


@differentiated
def feature_graph(
    model: LoopedModel,
    dictionary: Dictionary,
    inputs: Inputs,
    metric: Metric,
    *,
    row: int = 0,
    most: int = 64,
    readout: ReadoutColumn = None,
) -> FeatureGraph:
    """The features of one input that matter most to a metric, with what each gives to features of
    later iterations and to the metric.

    The run is seen as a function of the embedding and of what stands at the dictionary's hooks: the
    sum of the active features, the bias and the error there, all held. A link's weight is what the
    source adds times the gradient of the target with respect to it, through everything between two
    hooks but not through another hook.

    Divisors of norms are held too, or all weights into the answer would sum to 0 where a norm
    stands before it. This takes norms that show their divisor, at a point named "hook_scale". Those
    that show none, such as the norms of queries and keys in some families, are differentiated, and
    so is attention.

    Args:
        dictionary: Of this model; no crosscoder.
        inputs: A batch, texts, or tokens with `readout`.
        metric: Of the logits at the readout, Float[Tensor, "batch d_vocab"] to Float[Tensor, "
            batch"]. The logits of other examples are held.
        row: The example of the inputs that is meant, from 0.
        most: Features to show, those with the largest effect on the metric along all paths; the
            others are counted in the nodes of kind "other".

    Raises:
        KeyError, ValueError: As for `feature_attribution`; or a crosscoder, a dictionary that reads
            after it writes, a row out of range, or fewer than one feature.
        TypeError: A row that is no integer.

    Source:
        Marks et al. 2024 (arXiv 2403.19647), links between features with error nodes, by gradient
        times activation.
    """
    batch = as_batch(model, inputs, readout)
    row = _one_row(row, len(batch))
    most = checked_count(most, "most")
    if dictionary.kind == "crosscoder":
        raise ValueError(
            "a graph of features needs a dictionary with a code for each iteration, got a"
            " crosscoder"
        )
    name = metric_name(metric)
    batch, metric, row = alone(model, batch, metric, row, dictionary.n_loops)
    with model.hooks([held_divisors(model, dictionary.n_loops)], n_loops=dictionary.n_loops):
        found = feature_attribution(model, dictionary, batch, metric)
    _refuse_late_reading(model, dictionary.reading)
    effects = _by_place(found, batch, row)
    run = LocalRun.of(model, dictionary, batch, metric, row, _largest(effects, most))
    nodes, links = run.graph()
    numbers = {node: number for number, node in enumerate(nodes)}
    return FeatureGraph(
        tuple(nodes),
        tuple(FeatureLink(numbers[a], numbers[b], weight) for a, b, weight in links),
        tuple(_at(run.codes, node) for node in nodes),
        tuple(_at(effects, node) for node in nodes),
        float(run.value.detach()),
        name,
        dictionary.reading.target,
        dictionary.n_loops,
        dictionary.n_features,
        dictionary.same_features,
    )


def _one_row(row: int, rows: int) -> int:
    """The number of one example.

    Raises:
        TypeError: Something else than an integer, such as None, "all" or a list.
        ValueError: A number out of range.
    """
    try:
        return one_in_range("row", row, rows)
    except TypeError:
        raise TypeError(
            f"row must be the number of one example, in 0..{rows - 1}, got {row!r}; a graph of"
            " features is of one input"
        ) from None


def _refuse_late_reading(model: LoopedModel, reading: Reading) -> None:
    """Refuse a dictionary of which a feature would be a function of what it writes itself."""
    order = {name: number for number, name in enumerate(model.hook_names(reading.n_loops))}
    for read, written in zip(reading.names, reading.written, strict=True):
        if order[read] > order[written]:
            raise ValueError(
                "a graph of features needs a dictionary that reads before it writes within an"
                f" iteration, but {read!r} comes after {written!r}; train one that writes where it"
                " reads, or later"
            )


def _by_place(
    effects: FeatureAttribution, batch: Batch, row: int
) -> Float[Tensor, "loop pos feature"]:
    """The effects in one example by the position of the token; 0 for padding at which no answer is
    read.
    """
    values, used = effects.values[row].transpose(0, 1), used_columns(batch)[row]
    found = values.new_zeros(len(values), len(used), values.shape[2])
    found[:, effects.columns[row]] = values
    return found * used[:, None]


def _largest(
    effects: Float[Tensor, "loop pos feature"], most: int
) -> Bool[Tensor, "loop pos feature"]:
    """The places of the largest effects that are not zero."""
    order = effects.abs().flatten().argsort(descending=True, stable=True)
    found = torch.zeros_like(effects, dtype=torch.bool)
    found.view(-1)[order[:most]] = True
    return found & (effects != 0)


def _at(
    values: Sequence[Float[Tensor, "pos feature"]] | Float[Tensor, "loop pos feature"],
    node: FeatureNode,
) -> float | None:
    """The value of a feature; None for another node."""
    if node.loop is None or node.feature is None:
        return None
    return float(values[node.loop][node.position, node.feature].detach())
