"""Runs in which only some edges are kept, many circuits side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import length_hint
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from loopscope.interp.circuits.gradients import Written
from loopscope.interp.circuits.graph import Graph, Stage
from loopscope.interp.circuits.streams import CarriedStreams, Replacement, Streams, SummedStreams
from loopscope.interp.common.columns import used_columns
from loopscope.interp.common.inputs import begin_batch, rows_apart
from loopscope.models.basis.draws import checked_seed, other_rows
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

Replace = Literal["corrupted", "mean", "zero", "resample"]
MAX_BYTES = 1 << 29
"""About how many bytes runs side by side take where a caller says nothing."""


@dataclass(frozen=True)
class MaskedRuns:
    """One batch of a model, run with any of the graph's edges excluded.

    Attributes:
        model, graph, batch: What runs.
        replacement: What excluded edges carry.
        max_bytes: About how much memory the runs side by side may take.
    """

    model: LoopedModel
    graph: Graph
    batch: Batch
    replacement: Replacement
    max_bytes: int

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        graph: Graph,
        clean: Batch,
        corrupted: Written,
        how: Replace,
        seed: int,
        max_bytes: int,
    ) -> MaskedRuns:
        """Prepare the runs of the clean batch.

        Raises:
            ValueError: No such replacement, or inputs of unequal length to resample from.
        """
        max_bytes = checked_count(max_bytes, "max_bytes")
        outputs, embedding = _replaced(corrupted, how, checked_seed(seed))
        with model.hooks([("hook_embed", lambda value, hook: embedding)], n_loops=graph.n_loops):
            begin = begin_batch(model, clean, graph.n_loops)
        kept = begin_batch(model, clean, graph.n_loops)
        return cls(model, graph, clean, Replacement(outputs, begin, kept), max_bytes)

    def logits(
        self, masks: Shaped[Tensor, "circuit reader writer span"]
    ) -> Float[Tensor, "circuit batch d_vocab"]:
        """The logits at the readout with only the masked edges kept; between 0 and 1 a reader is
        given a mixture.
        """
        return torch.cat(list(self.parts(masks)))

    def parts(
        self, masks: Iterable[Shaped[Tensor, "reader writer span"]], total: int | None = None
    ) -> Iterator[Float[Tensor, "part batch d_vocab"]]:
        """The same logits, some circuits at a time; masks are asked for when their turn comes.

        Args:
            total: How many masks there are, for the bar; by default what `masks` says.
        """
        left = iter(masks)
        with tqdm(total=total or length_hint(masks), desc="circuits", leave=False, delay=2) as bar:
            while part := list(islice(left, self.side_by_side)):
                yield self._run(torch.stack(part))
                bar.update(len(part))

    def _run(
        self, masks: Shaped[Tensor, "circuit reader writer span"]
    ) -> Float[Tensor, "circuit batch d_vocab"]:
        masks = masks.to(self.replacement.outputs)
        streams: Streams = (
            SummedStreams(self.replacement, masks)
            if self.model.additive_residual
            else CarriedStreams(self.model, self.replacement, masks)
        )
        batch = self.batch.repeat(len(masks))
        hooks = [pair for stage in self.graph.stages for pair in _hooks(stage, streams, len(masks))]
        with self.model.hooks(hooks, n_loops=self.graph.n_loops):
            end = self.model.advance(begin_batch(self.model, batch, self.graph.n_loops))
        end = replace(end, resid=streams.last().flatten(0, 1).to(end.resid))
        logits: Tensor = self.model.readout(end, batch.readout).unflatten(0, (len(masks), -1))
        return logits

    def by_examples(self) -> list[MaskedRuns]:
        """The runs of some examples each, so that the gradient of one circuit keeps about
        `max_bytes`; examples that depend on each other stay together.
        """
        if not rows_apart(self.model) or len(self.batch) == 1:
            return [self]
        most = max(1, self.max_bytes // self._of_rows(slice(1))._kept_by_gradient())
        starts = range(0, len(self.batch), most)
        return [self._of_rows(slice(start, start + most)) for start in starts]

    def _kept_by_gradient(self) -> int:
        """The bytes that the gradient of one circuit keeps besides the weights."""
        own = chain(self.model.parameters(), self.model.buffers())
        weights = {value.untyped_storage().data_ptr() for value in own}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            kept[storage.data_ptr()] = storage
            return value

        gates = self.graph.every[None].to(self.replacement.outputs).requires_grad_()
        with torch.enable_grad(), saved_tensors_hooks(keep, lambda value: value):
            self.logits(gates)
        return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)

    def _of_rows(self, rows: slice) -> MaskedRuns:
        """The same runs of some examples."""
        old = self.replacement
        new = Replacement(
            old.outputs[:, rows], *(state.map(lambda x: x[rows]) for state in (old.begin, old.kept))
        )
        return replace(self, batch=self.batch[rows], replacement=new)

    @property
    def side_by_side(self) -> int:
        """How many circuits are run at once."""
        if not rows_apart(self.model):
            return 1
        one = self.replacement.outputs
        streams = (
            len(self.graph.writers) if self.model.additive_residual else 4 * len(self.graph.readers)
        )
        values = 3 * streams * one[0].numel() + 2 * self.graph.every.numel()  # with copies
        return max(1, self.max_bytes // (values * one.element_size()))


def _replaced(run: Written, how: Replace, seed: int) -> tuple[Tensor, Tensor]:
    """The values that excluded edges carry, and the embedding that belongs to them."""
    batch = run.batch
    if how not in get_args(Replace):
        raise ValueError(f"replace must be one of {', '.join(get_args(Replace))}, got {how!r}")
    outputs, embedding = run.outputs, run.added[0]
    if how == "zero":
        return torch.zeros_like(outputs), torch.zeros_like(embedding)
    if how == "mean":
        used = used_columns(batch).to(outputs)[:, :, None]
        mean = (outputs * used).sum(1, keepdim=True) / used.sum(0).clamp(min=1)
        mean = mean.expand_as(outputs)
        return mean, mean[0].to(embedding)
    if how == "resample":
        if not bool((batch.mask == batch.mask[:1]).all()):
            raise ValueError(
                "to resample, all inputs must have one length; use replace='corrupted'"
            )
        order = other_rows(len(batch), seed).to(outputs.device)
        return outputs[:, order], embedding[order]
    return outputs, embedding


def _hooks(
    stage: Stage, streams: Streams, n_circuits: int
) -> Iterator[tuple[str, Callable[..., Tensor | None]]]:
    """The hooks that give a stage what its readers read, and take what its writers write."""

    def read(value: Tensor, hook: HookPoint) -> Tensor | None:
        found = streams.read(stage)
        if not stage.heads:
            return found.flatten(0, 2).to(value)
        by_reader = found.transpose(0, 1).flatten(1, 2).to(value)
        given.extend(stage.projected(by_reader))
        return None

    def write(value: Tensor, hook: HookPoint) -> None:
        streams.write(stage, stage.outputs(value).unflatten(1, (n_circuits, -1)))

    def put(value: Tensor, hook: HookPoint) -> Tensor:
        return given.pop(0)

    given: list[Tensor] = []
    yield stage.stream, read
    if stage.heads:
        yield from ((name, put) for name in stage.head_names()[:3])
    yield stage.written, write
