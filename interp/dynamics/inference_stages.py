"""Stages of inference within each cycle: how the states and the attention of every block look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.collecting import keeping
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    begin_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import loop_and_layer, points_by_block
from loopscope.interp.common.shown import OneScreen
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PATTERN = "attn.hook_pattern"
STATISTICS = ("entropy", "concentration", "mixing", "sink")


@dataclass(frozen=True)
class InferenceStages(OneScreen):
    """Four statistics of every block of the loop at every iteration, each a mean over examples and
    heads.

    Attributes:
        names: The name of each visit, e.g. "loops.3.blocks.0".
        entropy: Float[Tensor, " visit"], how many directions the states after the block use. It is
            the entropy, in nats, of the squared singular values of an example's states (one row per
            token), each as a share of their sum.
        concentration: Float[Tensor, " visit"], 1 minus the entropy of the attention that each key
            receives, over the largest possible entropy. It is 1 if all queries attend to one key.
        mixing: Float[Tensor, " visit"], the entropy of each query's attention, over the largest
            entropy that its keys allow (in a causal model, the keys up to the query). It is 1 for
            even attention.
        sink: Float[Tensor, " visit"], the mean attention (0 to 1) that later tokens give to the
            first one.
    """

    names: tuple[str, ...]
    entropy: Float[Tensor, " visit"]
    concentration: Float[Tensor, " visit"]
    mixing: Float[Tensor, " visit"]
    sink: Float[Tensor, " visit"]

    def frame(self) -> pd.DataFrame:
        """One row per visit. The columns are visit, loop, layer, entropy, concentration, mixing and
        sink.
        """
        loops, layers = zip(*map(loop_and_layer, self.names), strict=True)
        frame = pd.DataFrame({"visit": self.names, "loop": loops, "layer": layers})
        return frame.assign(**{name: getattr(self, name).cpu().numpy() for name in STATISTICS})

    def plot(self, title: str = "") -> go.Figure:
        """A picture: each statistic over the blocks of a cycle, one curve per iteration."""
        from loopscope.interp.drawing.motion import stages

        return stages(self, title)


@torch.no_grad()
@evaluated
def inference_stages(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    batch_size: int = 64,
) -> InferenceStages:
    """Measure for every block of every iteration how spread its states are and how its attention
    looks, to see stages that repeat in each cycle.

    Args:
        inputs: A `Batch`, texts, or token ids. Each input needs at least two tokens.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        batch_size: How many rows run at a time.

    Returns:
        Entropy of the states, and concentration, mixing and sink of the attention, by visit.

    Raises:
        ValueError: No block of the loop has attention patterns, an input has a single token, or a
            state is not finite.

    Source:
        Stages of inference that repeat in each cycle: arXiv 2604.11791.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    lengths = batch.mask.sum(1)
    if int(lengths.min()) < 2:
        raise ValueError(
            "attention between tokens needs inputs of at least two tokens, got an input of"
            f" {int(lengths.min())}"
        )
    with_pattern = points_by_block(model, n_loops, _PATTERN)
    patterns = {name for points in with_pattern.values() for name in points.values()}
    visits = [v for v in model.schedule(n_loops) if f"{v.name}.{_PATTERN}" in patterns]
    names = [f"{visit.name}.{site}" for visit in visits for site in (model.lens_site, _PATTERN)]
    totals: dict[str, Tensor] = {}
    for part in in_chunks(batch, rows_at_once(model, batch, batch_size), "stages"):
        reduce = partial(_summed, lengths=part.mask.sum(1).tolist(), causal=model.causal)
        with keeping(model, names, n_loops, reduce) as values:
            model.advance(begin_batch(model, part, n_loops), model.iteration_ends(n_loops)[-1])
        totals = {name: value + totals.get(name, 0.0) for name, value in values.items()}
    means = torch.stack([totals[name] / len(batch) for name in names if name.endswith(_PATTERN)])
    entropy = [totals[name] / len(batch) for name in names if not name.endswith(_PATTERN)]
    return InferenceStages(
        tuple(visit.name for visit in visits), torch.stack(entropy), *means.unbind(1)
    )


def _summed(value: Tensor, name: str, lengths: Sequence[int], causal: bool) -> Tensor:
    """The statistics of one activation, summed over its examples without their padding."""
    rows = zip(value.double(), lengths, strict=True)
    if name.endswith(_PATTERN):
        return torch.stack([_of_pattern(x[:, :n, :n], causal) for x, n in rows]).sum(0)
    real = [x[:n] for x, n in rows]
    for states in real:
        refuse_nonfinite(f"the states at {name}", states)
    return torch.stack([_of_states(states) for states in real]).sum(0)


def _of_states(states: Float[Tensor, "pos d"]) -> Float[Tensor, ""]:
    """The entropy of one example's states."""
    sizes = torch.linalg.svdvals(states).square()
    entropy: Tensor = torch.special.entr(sizes / sizes.sum()).sum()
    return entropy


def _of_pattern(
    pattern: Float[Tensor, "head pos key"], causal: bool
) -> Float[Tensor, " statistic"]:
    """Concentration, mixing and sink of one example, means over the heads."""
    length = pattern.shape[1]
    got = pattern.sum(1) / length
    concentration = 1 - torch.special.entr(got).sum(-1) / math.log(length)
    seen = range(1, length + 1) if causal else [length] * length
    largest = pattern.new_tensor(seen).log()[1:]
    mixing = torch.special.entr(pattern).sum(-1)[:, 1:] / largest
    return torch.stack([concentration.mean(), mixing.mean(), pattern[:, 1:, 0].mean()])
