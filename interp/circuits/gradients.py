"""The gradient of a metric through one reader alone, and back from a reader to each writer.

A reader's own gradient does not flow past it: what flows past a branch is the gradient at what the
branch adds, so the branch's own is the difference across it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.attribution.direct_logit import check_sum
from loopscope.interp.circuits.graph import Graph, Stage
from loopscope.interp.common.collecting import collect
from loopscope.interp.common.inputs import Metric, begin_batch
from loopscope.interp.common.metrics import measure_graphed
from loopscope.interp.common.precision import widened
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State

Values = Mapping[str, Tensor]
NODES = 32  # of the quadrature along the last stream; exact to rounding for smooth metrics


@dataclass(frozen=True)
class Written:
    """The additions of every writer to the stream in one run.

    Attributes:
        batch: What ran.
        outputs: Float[Tensor, "writer batch pos d_model"].
        added: The embedding and what each stage adds, each "batch pos d_model".
        end: The state at the end.
    """

    batch: Batch
    outputs: Float[Tensor, "writer batch pos d_model"]
    added: tuple[Tensor, ...]
    end: State

    @classmethod
    def of(cls, model: LoopedModel, batch: Batch, graph: Graph) -> Written:
        """Run once and keep it.

        Raises:
            ValueError: A stream that should be the plain sum of the writers' additions is not.
        """
        before, last = model.edge_sites()[0], last_stream(model, graph.n_loops)
        added = ["hook_embed", *(stage.added for stage in graph.stages)]
        names = dict.fromkeys([*before, *added, *(s.written for s in graph.stages), last])
        with torch.no_grad():
            seen, end = collect(model, batch, list(names), graph.n_loops)
            if model.additive_residual:
                check_stream(seen, [*before, *added[1:]], last)
            outputs = [seen["hook_embed"][None]]
            outputs += [stage.outputs(seen[stage.written]) for stage in graph.stages]
        return cls(batch, widened(torch.cat(outputs)), tuple(seen[name] for name in added), end)


def check_stream(values: Values, added: Sequence[str], last: str) -> None:
    """Raise unless a stream is the sum of what is added to it.

    Args:
        values: Activations by name.
        added: The names of all that is added.
        last: The name of the stream at the end.

    Raises:
        ValueError: It is not.
    """
    parts = torch.stack([widened(values[name]) for name in added])
    check_sum(parts, widened(values[last]), "the residual stream", values[last].dtype)


def last_stream(model: LoopedModel, n_loops: int) -> str:
    """The hook point of the stream that the readout reads."""
    names = model.schedule(n_loops)[-1].hook_names()
    return [name for name in names if not name.endswith("_logit")][-1]


def sites_of(stages: Sequence[Stage]) -> list[str]:
    """The hook points whose values and gradients `reader_gradients` needs of some stages."""
    return [
        name
        for stage in stages
        for name in (stage.stream, stage.added, *(stage.head_names()[:3] if stage.heads else ()))
    ]


def reader_gradients(
    stage: Stage, values: Values, grads: Values
) -> Float[Tensor, "reader batch pos d_model"]:
    """The gradient at the stream through each reader of a stage alone."""
    if not stage.heads:
        return widened(grads[stage.stream] - grads[stage.added])[None]
    stream = values[stage.stream].detach()
    inputs = [grads[name] for name in stage.head_names()[:3]]
    n_readers = stage.readers.stop - stage.readers.start
    with torch.enable_grad():
        streams = stream.expand(n_readers, *stream.shape).clone().requires_grad_()
        (found,) = torch.autograd.grad(stage.projected(streams), streams, inputs)
    return widened(found)


def by_stage(
    graph: Graph, values: Values, grads: Values, last: str
) -> Iterator[tuple[int, slice, str, Tensor]]:
    """For each stage, and then for the readout: how many stages are before it, its readers, the
    stream that they read, and the gradient through each, "reader batch pos d_model".
    """
    for number, stage in enumerate(graph.stages):
        if stage.stream in grads:
            found = reader_gradients(stage, values, grads)
            yield number, stage.readers, stage.stream, found
    final = len(graph.readers) - 1
    yield len(graph.stages), slice(final, final + 1), last, widened(grads[last])[None]


@dataclass(frozen=True)
class Skeleton:
    """The residual stream of a run as a function of what components write, everything that they
    write held; it has a graph for gradients.

    Attributes:
        written: The embedding and what each stage adds.
        streams: The stream where a stage reads, and at the end, by hook name.
    """

    written: tuple[Tensor, ...]
    streams: Values

    @classmethod
    def of(cls, model: LoopedModel, batch: Batch, graph: Graph, values: Values) -> Skeleton:
        """The skeleton of a run.

        Args:
            values: The run's embedding, streams and additions by hook name.

        Raises:
            ValueError: The stream is not made of these alone.
        """
        added = ["hook_embed", *(stage.added for stage in graph.stages)]
        last = last_stream(model, graph.n_loops)
        leaves = {name: values[name].detach().clone().requires_grad_() for name in added}
        streams: dict[str, Tensor] = {}

        def hold(value: Tensor, hook: HookPoint) -> Tensor:
            return leaves[str(hook.name)]

        def keep(value: Tensor, hook: HookPoint) -> None:
            streams[str(hook.name)] = value

        read = [*(stage.stream for stage in graph.stages), last]
        with (
            torch.enable_grad(),
            model.hooks([(added, hold), (read, keep)], n_loops=graph.n_loops),
        ):
            model.advance(begin_batch(model, batch, graph.n_loops))
        for name in read:
            held = streams[name].detach()
            if name in values:
                check_sum(widened(held)[None], widened(values[name]), name, held.dtype)
        return cls(tuple(leaves.values()), streams)

    def pulled(
        self, stream: str, n_stages: int, grads: Float[Tensor, "reader batch pos d_model"]
    ) -> list[Tensor]:
        """Gradients at a stream taken back to the embedding and to what the stages before add, each
        "reader batch pos d_model".
        """
        read, before = self.streams[stream], self.written[: n_stages + 1]
        found = torch.autograd.grad(
            read,
            before,
            grads.to(read),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        return [torch.zeros_like(grads) if grad is None else widened(grad) for grad in found]


def integrated_readout(
    model: LoopedModel, batch: Batch, metric: Metric, start: State, end: State
) -> Float[Tensor, "batch pos d_model"]:
    """The gradient of the metric at the last stream, as its mean along the straight line from one
    state's stream to another's; times their difference it is the difference of the metrics.
    """
    places, weights = np.polynomial.legendre.leggauss(NODES)
    total = torch.zeros_like(widened(start.resid))
    with torch.enable_grad():
        for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
            stream = torch.lerp(start.resid, end.resid, float(place)).requires_grad_()
            logits = model.readout(replace(start, resid=stream), batch.readout)
            (found,) = torch.autograd.grad(measure_graphed(metric, logits).sum(), stream)
            total += float(weight) * widened(found)
    return total
