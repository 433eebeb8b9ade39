"""The run behind a graph of features, with the gradient of each target by what is held.

Axes: batch, pos, loop, feature, d_in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.attribution.gradients import logits_read
from loopscope.interp.common.collecting import collect
from loopscope.interp.common.frozen_norm import held_divisors
from loopscope.interp.common.inputs import Metric, begin_batch
from loopscope.interp.common.metrics import measure
from loopscope.interp.common.precision import widened
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.graphs.record import FeatureNode
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel


@dataclass(frozen=True)
class LocalRun:
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
    ) -> LocalRun:
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
