"""The stream of every reader in a run of which only some edges are kept: along a kept edge comes
what the writer adds in this run, along any other what it adds in the run that replaces it.

Axes: circuit reader writer span batch pos d_model. A mask has one span, all positions, or one span
for each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.circuits.graph import ADDED, READ, Stage
from loopscope.interp.common.frozen_norm import watching
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS, Taps
from loopscope.models.core.state import State, Visit

Parts = Mapping[str, Tensor]
Lanes = tuple[Tensor, Parts, Parts]


@dataclass(frozen=True)
class Replacement:
    """The run that excluded edges carry.

    Attributes:
        outputs: Float[Tensor, "writer batch pos d_model"], what each writer adds.
        begin: The state before the first visit, with its embedding.
        kept: The state before the first visit of the run that kept edges carry.
    """

    outputs: Float[Tensor, "writer batch pos d_model"]
    begin: State
    kept: State


class SummedStreams:
    """Streams of a model whose residual stream is a plain sum: the replacing run's stream plus the
    differences of the kept writers, as one matrix product per stage.

    Where gradients are kept it is one product per pair of stages, so that what the products keep
    grows with the stages, not with their square.
    """

    def __init__(
        self, replacement: Replacement, masks: Float[Tensor, "circuit reader writer span"]
    ) -> None:
        self.outputs = replacement.outputs
        self.stream = replacement.begin.resid.to(self.outputs)
        self.masks = masks.permute(0, 3, 1, 2).contiguous()
        embedded = (replacement.kept.resid - replacement.begin.resid).to(self.outputs)
        first = by_span(embedded.expand(len(masks), 1, *embedded.shape), masks.shape[-1])
        whole = *first.shape[:2], len(self.outputs), first.shape[-1]
        self.together = None if masks.requires_grad else first.new_empty(whole)
        self.changes: list[Tensor] = []
        self._keep(slice(0, 1), first)

    def read(self, stage: Stage) -> Float[Tensor, "circuit reader batch pos d_model"]:
        """The streams of a stage's readers."""
        return self._at(stage.readers)

    def write(
        self, stage: Stage, outputs: Float[Tensor, "writer circuit batch pos d_model"]
    ) -> None:
        """Add what a stage's writers add in this run."""
        replaced = self.outputs[stage.writers]
        change = (outputs.to(replaced) - replaced[:, None]).transpose(0, 1)
        self._keep(stage.writers, by_span(change, self.masks.shape[1]))
        self.stream = self.stream + replaced.sum(0) + stage.constant(replaced)

    def last(self) -> Float[Tensor, "circuit batch pos d_model"]:
        """The stream of the readout."""
        return self._at(slice(-1, None))[:, 0]

    def _at(self, readers: slice) -> Float[Tensor, "circuit reader batch pos d_model"]:
        sizes = [changes.shape[2] for changes in self.changes]
        masks = self.masks[:, :, readers, : sum(sizes)].split(sizes, dim=3)
        found = masks[0] @ self.changes[0]
        for mask, changes in zip(masks[1:], self.changes[1:], strict=True):
            found = found + mask @ changes
        return self.stream + over_positions(found, self.stream)

    def _keep(self, writers: slice, change: Float[Tensor, "circuit span writer moved"]) -> None:
        """Put changes behind those of the writers before: into one tensor, or apart where gradients
        need all of them.
        """
        if self.together is None:
            self.changes.append(change)
        else:
            self.together[:, :, writers] = change
            self.changes = [self.together[:, :, : writers.stop]]


class CarriedStreams:
    """Streams of any other model: each later reader's own stream is carried through the norms,
    injections and other maps between components, with what components add held.

    Rows are (circuit, reader, batch).
    """

    def __init__(
        self,
        model: LoopedModel,
        replacement: Replacement,
        masks: Float[Tensor, "circuit reader writer span"],
    ) -> None:
        self.model, self.masks, self.outputs = model, masks, replacement.outputs
        kept, begin = replacement.kept, replacement.begin
        self.begin, self.first = begin, 0
        self.resid = self._chosen(kept.resid, begin.resid)
        self.parts: Parts = {
            name: self._chosen(kept.parts[name], part) for name, part in begin.parts.items()
        }
        self.added: dict[str, Tensor] = {}

    def read(self, stage: Stage) -> Float[Tensor, "circuit reader batch pos d_model"]:
        """The streams of a stage's readers."""
        visit, count = stage.visit, stage.readers.stop - stage.readers.start
        if stage.kind == "attn":
            if visit.opening:
                self.resid, self.parts = self._each(
                    lambda resid, parts, _: self.model.enter(_own(visit), resid, parts, NO_TAPS),
                    (self.resid, self.parts, {}),
                )
            mine = self.resid
        else:
            mine = self._between(visit, count)
        found = self._lanes(mine)[:, :count]
        self._drop(count)
        return found

    def write(
        self, stage: Stage, outputs: Float[Tensor, "writer circuit batch pos d_model"]
    ) -> None:
        """Add what a stage's writers add in this run."""
        replaced = self.outputs[stage.writers]
        change = (outputs.to(replaced) - replaced[:, None]).transpose(0, 1)
        kept = summed(self.masks[:, self.first :, stage.writers], change)
        total = kept + replaced.sum(0) + stage.constant(replaced)
        self.added[stage.kind] = total.flatten(0, 2).to(self.resid)
        if stage.kind == "mlp":
            visit = _own(stage.visit)
            self.resid, self.parts = self._each(
                lambda resid, parts, added: self._block(visit, resid, parts, held(added)),
                (self.resid, self.parts, self.added),
            )
            if visit.closing:
                self.resid, self.parts = self._each(
                    lambda resid, parts, _: self.model.leave(visit, resid, parts, NO_TAPS),
                    (self.resid, self.parts, {}),
                )
            self.added = {}

    def last(self) -> Float[Tensor, "circuit batch pos d_model"]:
        """The stream of the readout."""
        return self._lanes(self.resid)[:, 0]

    def _between(self, visit: Visit, count: int) -> Tensor:
        """The streams of the next `count` readers between attention and MLP."""
        resid, attn = (
            self._lanes(x)[:, :count].flatten(0, 2) for x in (self.resid, self.added["attn"])
        )
        parts = {name: self._lanes(x)[:, :count].flatten(0, 2) for name, x in self.parts.items()}
        seen: list[Tensor] = []
        watch = {READ["mlp"]: watched(READ["mlp"], seen.append)}
        self._each(
            lambda resid, parts, added: self._block(
                _own(visit), resid, parts, {**held(added), **watch}
            ),
            (resid, parts, {"attn": attn}),
        )
        return torch.cat(seen)

    def _each(
        self, act: Callable[[Tensor, Parts, Parts], tuple[Tensor, Parts]], rows: Lanes
    ) -> tuple[Tensor, Parts]:
        """All streams as `act` leaves them; each is acted on by itself where rows depend on each
        other.

        Args:
            rows: The stream, the other parts, and what components add.
        """
        if self.model.batch_independent:
            return act(*rows)
        size = len(self.begin.resid)
        lanes = [slice(at, at + size) for at in range(0, len(rows[0]), size)]
        made = [act(rows[0][lane], _of(rows[1], lane), _of(rows[2], lane)) for lane in lanes]
        parts = {name: torch.cat([own[name] for _, own in made]) for name in made[0][1]}
        return torch.cat([resid for resid, _ in made]), parts

    def _block(self, visit: Visit, resid: Tensor, parts: Parts, taps: Taps) -> tuple[Tensor, Parts]:
        times = len(resid) // len(self.begin.resid)
        state = self.begin.map(lambda x: x.repeat(times, *[1] * (x.ndim - 1)))
        rows = Rows.make(state, type(self.model).visible, None)
        return self.model.visit_block(visit, resid, parts, rows, taps)

    def _chosen(self, kept: Tensor, replaced: Tensor) -> Tensor:
        """A part of the first state for every stream: of the one run or the other, by whether the
        reader's edge from the embedding is kept.
        """
        n_circuits, n_readers, _, n_spans = self.masks.shape
        if not kept.is_floating_point():
            return kept.expand(n_circuits, n_readers, *kept.shape).flatten(0, 2)
        behind = (n_spans, *[1] * (kept.ndim - 2)) if kept.ndim > 1 else ()
        wanted = self.masks[:, :, 0].reshape(n_circuits, n_readers, 1, *behind)
        return (replaced + wanted.to(kept) * (kept - replaced)).flatten(0, 2)

    def _lanes(self, rows: Tensor) -> Tensor:
        """Rows as "circuit reader batch ..."."""
        return rows.view(len(self.masks), -1, *self.begin.resid.shape[:1], *rows.shape[1:])

    def _drop(self, count: int) -> None:
        """Leave out the streams of readers that have read."""
        self.first += count
        self.resid = self._lanes(self.resid)[:, count:].flatten(0, 2)
        self.parts = {n: self._lanes(x)[:, count:].flatten(0, 2) for n, x in self.parts.items()}
        self.added = {n: self._lanes(x)[:, count:].flatten(0, 2) for n, x in self.added.items()}


Streams = SummedStreams | CarriedStreams


def summed(
    masks: Float[Tensor, "circuit reader writer span"],
    changes: Float[Tensor, "circuit writer batch pos d_model"],
) -> Float[Tensor, "circuit reader batch pos d_model"]:
    """The sum of the kept writers' changes for every reader, position by position."""
    found = masks.permute(0, 3, 1, 2) @ by_span(changes, masks.shape[-1])
    return over_positions(found, changes[0, 0])


def by_span(
    changes: Float[Tensor, "circuit writer batch pos d_model"], spans: int
) -> Float[Tensor, "circuit span writer moved"]:
    """Changes with everything that one mask decides on one axis: batch, positions of the span and
    width.
    """
    each: Tensor = changes.unflatten(3, (spans, -1))
    return each.permute(0, 3, 1, 2, 4, 5).flatten(3)


def over_positions(
    found: Float[Tensor, "circuit span reader moved"],
    like: Float[Tensor, "*circuit batch pos d_model"],
) -> Float[Tensor, "circuit reader batch pos d_model"]:
    """The reverse of `by_span`, for streams of the shape of `like`."""
    batch, _, d_model = like.shape[-3:]
    each: Tensor = found.unflatten(3, (batch, -1, d_model))
    return each.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def _of(parts: Parts, rows: slice) -> Parts:
    """Some rows of every part."""
    return {name: part[rows] for name, part in parts.items()}


def _own(visit: Visit) -> Visit:
    return visit.acts_as or visit


def held(added: Parts) -> dict[str, HookPoint]:
    """Hook points of our own that hold what attention ("attn") and MLP ("mlp") add."""
    return {ADDED[kind]: watched(ADDED[kind], partial(_to, to)) for kind, to in added.items()}


def _to(to: Tensor, value: Tensor) -> Tensor:
    return to.to(value)  # autocast may have made it narrower


def watched(site: str, react: Callable[[Tensor], Tensor | None]) -> HookPoint:
    """A hook point of our own."""
    return watching(site, lambda value, hook: react(value))[site]
