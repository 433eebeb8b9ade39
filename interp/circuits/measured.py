"""The metric of masked runs, and the share of its difference that the edges of a circuit keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.interp.circuits.building import close, graph_with
from loopscope.interp.circuits.gradients import Written
from loopscope.interp.circuits.masked import MaskedRuns, Replace
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.common.inputs import Metric, begin_batch
from loopscope.interp.common.metrics import measure, metric_or_kl
from loopscope.interp.common.pairs import Pair
from loopscope.models.core.base import LoopedModel


def share_kept(
    values: Float[Tensor, "circuit batch"],
    whole: Float[Tensor, " batch"],
    replaced: Float[Tensor, " batch"],
) -> Float[Tensor, " circuit"]:
    """The share of the metric's mean difference between two runs that values keep.

    Raises:
        ValueError: The two runs do not differ by more than rounding, so there is nothing to share.
    """
    low, high = replaced.mean(), whole.mean()
    scale = torch.maximum(whole.abs().max(), replaced.abs().max())
    if not (high - low).abs() > 8 * torch.finfo(whole.dtype).eps * scale:
        raise ValueError(
            "faithfulness is a share of the metric's difference between the whole model and the"
            f" replaced one, but both give {high:.6g}; choose inputs whose metrics differ"
        )
    return (values.mean(1) - low) / (high - low)


def masked_runs(
    model: LoopedModel,
    pair: Pair,
    circuits: Sequence[Circuit],
    replace: Replace,
    seed: int,
    max_bytes: int,
) -> MaskedRuns:
    """The runs in which circuits of one model are measured."""
    graph = graph_with(model, pair.clean, circuits)
    corrupted = Written.of(model, pair.corrupted, graph)
    return MaskedRuns.of(model, graph, pair.clean, corrupted, replace, seed, max_bytes)


def own_logits(
    runs: MaskedRuns, pair: Pair, whole: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, "batch d_vocab"]:
    """The model's own logits on the clean inputs.

    Args:
        whole: The logits of the masked run that keeps all edges.

    Raises:
        ValueError: With all edges kept the run is not the model's own.
    """
    model = runs.model
    end = model.advance(begin_batch(model, pair.clean, runs.graph.n_loops))
    own = model.readout(end, pair.clean.readout)
    check_whole(whole, own)
    return own


def check_whole(whole: Float[Tensor, "batch d_vocab"], own: Float[Tensor, "batch d_vocab"]) -> None:
    """Raise unless a run with all edges kept is the model's own.

    Args:
        whole, own: The logits of the two.

    Raises:
        ValueError: It is not.
    """
    if not close(whole, own):
        raise ValueError(
            "with all edges kept the logits must be the model's own, but are off by up to"
            f" {float((whole - own).abs().max()):.3g}; something else writes to the residual"
            " stream: a hook that is attached now, or the family itself"
        )


@dataclass(frozen=True)
class Measured:
    """The metric of masked runs.

    Attributes:
        runs: The runs.
        metric: Of logits at the readout.
        whole, replaced: Float[Tensor, " batch"], with all edges kept and with none.
    """

    runs: MaskedRuns
    metric: Metric
    whole: Float[Tensor, " batch"]
    replaced: Float[Tensor, " batch"]

    @classmethod
    def of(cls, runs: MaskedRuns, pair: Pair, metric: Metric | Literal["kl"]) -> Measured:
        """The two ends.

        Raises:
            ValueError: With all edges kept the run is not the model's own.
        """
        every = runs.graph.every
        whole, replaced = runs.logits(torch.stack([every, torch.zeros_like(every)]))
        chosen = metric_or_kl(metric, own_logits(runs, pair, whole))
        return cls(runs, chosen, measure(chosen, whole), measure(chosen, replaced))

    def values(
        self, masks: Iterable[Bool[Tensor, "reader writer span"]], total: int | None = None
    ) -> Float[Tensor, "circuit batch"]:
        """The metric with only the masked edges kept.

        Args:
            masks, total: As for `MaskedRuns.parts`.
        """
        parts = self.runs.parts(masks, total)
        return torch.stack([measure(self.metric, logits) for part in parts for logits in part])

    def shares(
        self, masks: Iterable[Bool[Tensor, "reader writer span"]], total: int | None = None
    ) -> Float[Tensor, " circuit"]:
        """The share of the metric's mean difference that the masked edges alone keep.

        Args:
            masks, total: As for `MaskedRuns.parts`.
        """
        return share_kept(self.values(masks, total), self.whole, self.replaced)
