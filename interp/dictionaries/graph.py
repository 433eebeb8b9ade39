"""A graph of features: how much each feature of one input gives to later features and the answer.

Axes: batch, pos, loop, feature, d_in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.attribution.gradients import alone, logits_read
from loopscope.interp.common.collecting import collect
from loopscope.interp.common.columns import used_columns
from loopscope.interp.common.frozen_norm import held_divisors
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn, as_batch, begin_batch
from loopscope.interp.common.metrics import measure, metric_name
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.places import one_in_range
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dictionaries.attribution import FeatureAttribution, feature_attribution
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.reading import Reading
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel


class FeatureNode(NamedTuple):
    """A node of a graph of features.

    Attributes:
        kind: "embed" the embedding of a token; "feature"; "error" what the dictionary leaves out of
            a state; "other" the dictionary's bias with the features that are no nodes; "answer" the
            metric.
        loop: The iteration; None for embeddings and the answer.
        position: The column of the token.
        feature: The feature, from 0; None for other nodes.
    """

    kind: Literal["embed", "feature", "error", "other", "answer"]
    loop: int | None
    position: int
    feature: int | None = None


class FeatureLink(NamedTuple):
    """An effect of one node on another.

    Attributes:
        source, target: The nodes' numbers.
        weight: The gradient of the target's activation (or of the metric) along what the source
            adds, times what it adds.
    """

    source: int
    target: int
    weight: float


@dataclass(frozen=True)
class FeatureGraph(OneScreen):
    """Features of one input, and first-order effects between them.

    Attributes:
        nodes: In the order of the run; the answer is the last one.
        links: By target.
        activations: Of features; None for other nodes.
        effects: Of features, the effect on the metric along all paths: `feature_attribution` of a
            run in which divisors of norms are held, as they are for links. None for other nodes.
        value: The metric of the run.
        metric: The metric's name.
        hook: Where the dictionary writes, within an iteration.
        n_loops: Iterations of the run.
        n_features: Of the dictionary.
        same_features: Whether a feature is the same at every iteration.
    """

    nodes: tuple[FeatureNode, ...]
    links: tuple[FeatureLink, ...]
    activations: tuple[float | None, ...]
    effects: tuple[float | None, ...]
    value: float
    metric: str
    hook: str
    n_loops: int
    n_features: int
    same_features: bool

    @property
    def total(self) -> float:
        """The sum of the links into the answer: the first-order change of the metric, divisors of
        norms held, when the embedding and all that stands at the hooks grow by the same share.
        """
        last = len(self.nodes) - 1
        return sum(link.weight for link in self.links if link.target == last)

    def frame(self) -> pd.DataFrame:
        """One row per link: source, source_loop, source_position, source_feature, the same of the
        target, weight.
        """
        sides = [
            f"{side}{part}"
            for side in ("source", "target")
            for part in ("", "_loop", "_position", "_feature")
        ]
        rows = [
            (*self.nodes[link.source], *self.nodes[link.target], link.weight) for link in self.links
        ]
        frame = pd.DataFrame(rows, columns=[*sides, "weight"])
        return frame.astype({side: "Int64" for side in sides if "_" in side})


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
    run = _LocalRun.of(model, dictionary, batch, metric, row, _largest(effects, most))
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


@dataclass(frozen=True)
class _LocalRun:
    """One run as a function of the embedding and of what stands at the dictionary's hooks.

    Attributes:
        position: Where the answer is read.
        row: The example that is meant.
        sources: The embedding, and what stands at the hook of each iteration; each is held, with a
            gradient.
        codes: Float[Tensor, "pos feature"] of each iteration, as functions of the sources.
        value: The metric, as a function of the sources.
        chosen: The features that are nodes.
    """

    dictionary: Dictionary
    position: int
    row: int
    sources: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    value: Float[Tensor, ""]
    chosen: Bool[Tensor, "loop pos feature"]

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        dictionary: Dictionary,
        batch: Batch,
        metric: Metric,
        row: int,
        chosen: Bool[Tensor, "loop pos feature"],
    ) -> _LocalRun:
        """Run twice: once for what is held, once with it held."""
        reading, n_loops = dictionary.reading, dictionary.n_loops
        names, seen = ["hook_embed", *reading.written], dict[str, Tensor]()
        with torch.no_grad():
            values = collect(model, batch, names, n_loops).values
        held = {name: values[name].detach().clone().requires_grad_() for name in names}

        def keep(value: Tensor, hook: HookPoint) -> None:
            seen[str(hook.name)] = value

        def hold(value: Tensor, hook: HookPoint) -> Tensor:
            return held[str(hook.name)]

        # what is read is read before it is written
        hooks = [(reading.names, keep), (names, hold), held_divisors(model, n_loops)]
        with torch.enable_grad(), model.hooks(hooks, n_loops=n_loops):
            end = model.advance(begin_batch(model, batch, n_loops))
            value = measure(metric, logits_read(model, end, batch.readout))[row]
            codes = tuple(
                dictionary.coder(loop).encode(seen[name][row])
                for loop, name in enumerate(reading.names)
            )
        position = int(batch.readout[row])
        return cls(dictionary, position, row, tuple(held.values()), codes, value, chosen)

    def graph(self) -> tuple[list[FeatureNode], list[tuple[FeatureNode, FeatureNode, float]]]:
        """All nodes in the order of the run, and all links that are not zero."""
        answer = FeatureNode("answer", None, self.position)
        targets = [FeatureNode("feature", loop, at, n) for loop, at, n in self.chosen.nonzero()
                   .tolist()]  # fmt: skip
        links = [
            (source, target, weight)
            for target in [*targets, answer]
            for source, weight in self.given(target)
            if weight
        ]
        order = ("embed", "feature", "error", "other", "answer")
        found = dict.fromkeys([*targets, *(source for source, *_ in links)])
        nodes = sorted(
            found,
            key=lambda node: (
                -1 if node.loop is None else node.loop,
                node.position,
                order.index(node.kind),
                node.feature or 0,
            ),
        )
        return [*nodes, answer], links

    def given(self, target: FeatureNode) -> Iterator[tuple[FeatureNode, float]]:
        """The weight of every source for a target."""
        goal = self.value
        if target.loop is not None:
            goal = self.codes[target.loop][target.position, target.feature]
        if not goal.requires_grad:
            return
        found = torch.autograd.grad(goal, self.sources, retain_graph=True, allow_unused=True)
        slopes = [None if slope is None else slope[self.row] for slope in found]
        if slopes[0] is not None:
            embedding = widened(self.sources[0][self.row])
            yield from _at_tokens("embed", None, (widened(slopes[0]) * embedding).sum(-1))
        for loop, slope in enumerate(slopes[1:]):
            if slope is not None:
                yield from self._from(loop, widened(slope))

    def _from(
        self, loop: int, slope: Float[Tensor, "pos d_in"]
    ) -> Iterator[tuple[FeatureNode, float]]:
        """The weights of the parts of the vector at the hook of one iteration."""
        code, directions, bias, error = self._parts[loop]
        along = slope.to(code)
        effects = code * (along @ directions.T)
        chosen = self.chosen[loop]
        for at, feature in chosen.nonzero().tolist():
            yield FeatureNode("feature", loop, at, feature), float(effects[at, feature])
        yield from _at_tokens("error", loop, (along * error).sum(-1))
        yield from _at_tokens("other", loop, effects.masked_fill(chosen, 0).sum(-1) + along @ bias)

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The code "pos feature", the directions "feature d_out", the bias "d_out" and the error
        "pos d_out" of each iteration.
        """
        found = []
        for loop, held in enumerate(self.sources[1:]):
            code = self.codes[loop].detach()
            directions = self.dictionary.directions(loop).to(code)
            bias = self.dictionary.bias(loop).to(code)
            error = held.detach()[self.row].to(code) - code @ directions - bias
            found.append((code, directions, bias, error))
        return found


def _at_tokens(
    kind: Literal["embed", "error", "other"], loop: int | None, weights: Float[Tensor, " pos"]
) -> Iterator[tuple[FeatureNode, float]]:
    """One node for each token."""
    for at, weight in enumerate(weights.tolist()):
        yield FeatureNode(kind, loop, at), weight
