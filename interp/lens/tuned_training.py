"""Training of tuned lenses, and how far their answers are from the model's on inputs held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.columns import Shown
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch, checked_batch_size
from loopscope.interp.common.modes import differentiated, evaluated
from loopscope.interp.common.places import loop_and_layer
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.lens.record import visit_table
from loopscope.interp.lens.tuned_job import (
    TrainingSettings,
    TunedJob,
    log_probabilities,
    material,
)
from loopscope.interp.lens.tuned_lens import TunedLens, translated
from loopscope.interp.shards.share import Shard
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go


@differentiated
def train_tuned_lens(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "readout",
    steps: int = 500,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    seed: int = 0,
    shared: bool = False,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> TunedLens:
    """Train one translator per visit, from the identity, to minimise KL(final || lens); the model
    itself stays as it is.

    The runs are made once; each step then draws reads at random. AdamW, with a learning rate that
    falls linearly to zero. A translator's gradient depends on no other translator, so that they are
    trained a few at a time, and shards share them out.

    Args:
        inputs: A batch, texts, or tokens with `readout`.
        n_loops: Iterations; None means what the checkpoint records.
        positions: "readout" for the column at which answers are read, "real" for all tokens that
            are not padding, or columns.
        steps: Updates.
        lr: The learning rate of the first update.
        weight_decay: Pulls A and b to zero, that is to the logit lens. Of use for few reads.
        batch_size: Reads in each update.
        seed: The seed of the draws; the same seed gives the same lens.
        shared: One translator for all iterations of a block instead of one per visit;
            `tuned_lens_kl` compares the two on other inputs.
        save_to: A folder in which trained translators are kept: a training that was interrupted and
            is called again goes on from there, and `merge` makes one lens of all shards.
        shard: (i, n) trains the i-th of n shares of the translators, after runs of its own; None
            trains all.

    Returns:
        The lens; of a shard, the translators of its visits.

    Raises:
        ValueError: Fewer than one step or read, a learning rate that is not positive, runs that are
            not finite, a shard without translators, or a folder of another call.

    Source:
        Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv
        2303.08112.
    """
    steps, batch_size = checked_count(steps, "steps"), checked_batch_size(batch_size)
    lr = checked_number(lr, "lr", above=0)
    weight_decay = checked_number(weight_decay, "weight_decay", least=0)
    start = TunedLens.identity(model, n_loops)
    batch = as_batch(model, inputs, readout)
    settings = TrainingSettings(positions, steps, lr, weight_decay, batch_size, seed)
    job = TunedJob(model, batch, start, settings, _owners(model, start.n_loops, shared))
    return job.lens(save_to, shard)


def _owners(model: LoopedModel, n_loops: int, shared: bool) -> tuple[int, ...]:
    """Which translator each visit has."""
    blocks = [
        visit.name.removeprefix(f"loops.{visit.loop}.") if shared else visit.name
        for visit in model.schedule(n_loops)
    ]
    numbers = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    return tuple(numbers[block] for block in blocks)


@dataclass(frozen=True)
class TunedLensKL(OneScreen):
    """How far the answers of some lenses are from the model's, visit by visit.

    Attributes:
        names: The name of each visit, e.g. "loops.3.blocks.0".
        lenses: What each lens is called.
        kl: Float[Tensor, "lens visit"], KL(final || lens) in nats, a mean over reads.
    """

    names: tuple[str, ...]
    lenses: tuple[str, ...]
    kl: Float[Tensor, "lens visit"]

    def frame(self) -> pd.DataFrame:
        """One row per lens and visit: lens, visit, loop, layer, kl (nats)."""
        loops, layers = zip(*map(loop_and_layer, self.names), strict=True)
        table = pd.concat([visit_table(self.names, loops, layers, 1)] * len(self.lenses))
        table.insert(0, "lens", [name for name in self.lenses for _ in self.names])
        return table.reset_index(drop=True).assign(kl=self.kl.flatten().cpu().numpy())

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the KL over visits, one curve per lens."""
        from loopscope.interp.drawing.lenses import tuned_kl

        return tuned_kl(self, title)


@torch.no_grad()
@evaluated
def tuned_lens_kl(
    model: LoopedModel,
    inputs: Inputs,
    tuned: TunedLens | Mapping[str, TunedLens | None] | None = None,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "readout",
) -> TunedLensKL:
    """KL(final || lens) at every visit, in nats, as a mean over reads of inputs that the lens was
    not trained on; of several lenses beside one another, from one run.

    Args:
        inputs, readout, positions: As for `train_tuned_lens`.
        tuned: A lens, or lenses of one number of iterations by name, such as one translator for all
            iterations against one per visit; None stands for the logit lens.
        n_loops: Iterations of the logit lens; a tuned lens has its own.

    Raises:
        ValueError: A model that a lens was not made for, another n_loops than a lens has, no lens,
            or runs that are not finite.
    """
    asked = tuned if isinstance(tuned, Mapping) else {_word(tuned): tuned}
    if not asked:
        raise ValueError("at least one lens is needed, got an empty mapping")
    plain = TunedLens.identity(model, _loops_of(asked.values(), n_loops))
    lenses = [lens or plain for lens in asked.values()]
    for lens in lenses:
        lens.check(model)
    batch = as_batch(model, inputs, readout)
    resids, finals = material(model, batch, positions, plain.n_loops, range(len(plain.names)))
    target = log_probabilities(model, finals[None])
    found = []
    for lens in lenses:
        for i, resid in enumerate(resids):
            own = [x[i : i + 1].to(model.device) for x in (lens.weights, lens.biases)]
            log_probs = log_probabilities(model, model.normalize(translated(resid[None], *own)))
            found.append((target.exp() * (target - log_probs)).sum(-1).mean())
    return TunedLensKL(plain.names, tuple(asked), torch.stack(found).view(len(lenses), -1))


def _word(tuned: TunedLens | None) -> str:
    return "logit lens" if tuned is None else "tuned lens"


def _loops_of(lenses: Iterable[TunedLens | None], n_loops: int | None) -> int | None:
    """The iterations that all lenses have.

    Raises:
        ValueError: They differ, or are others than n_loops.
    """
    own = sorted({lens.n_loops for lens in lenses if lens is not None})
    if len(own) > 1:
        raise ValueError(f"lenses are compared on one run, but theirs have {own} iterations")
    if own and n_loops not in (None, own[0]):
        raise ValueError(
            f"a tuned lens has its own n_loops, here {own[0]}, got n_loops={n_loops}; leave it out"
        )
    return own[0] if own else n_loops
