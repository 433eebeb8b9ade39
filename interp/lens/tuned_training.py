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
    """Train a tuned lens: one translator per visit that makes the lens's prediction as close as
    possible to the final one. The model stays unchanged.

    The loss is KL(final || lens), and the training starts from translators that change nothing. The
    model is run once; each step then draws reads at random. The optimiser is AdamW with a learning
    rate that falls linearly to zero. Translators do not depend on each other, so they are trained a
    few at a time, and shards can train different ones.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns to train on: "readout" for the answer position, "real" for all tokens
            except padding, or a list of columns.
        steps: The number of updates.
        lr: The learning rate of the first update.
        weight_decay: How strongly A and b are pulled to zero, that is to the logit lens. It helps
            if there are few reads.
        batch_size: How many reads each update uses.
        seed: The seed of the draws; the same seed gives the same lens.
        shared: True trains one translator per block for all iterations, instead of one per visit;
            `tuned_lens_kl` compares the two on other inputs.
        save_to: A folder that keeps trained translators. If the training was interrupted, the same
            call goes on from there. `merge` joins the translators of all shards.
        shard: (i, n) trains the i-th of n shares of the translators, after running the model
            itself; None trains all.

    Returns:
        The lens; for a shard only the translators of its visits.

    Raises:
        ValueError: There is no step or no read, the learning rate is not positive, an activation is
            not finite, a shard has no translator, or the folder holds another call.

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
    """How far the predictions of some lenses are from the model's final ones, visit by visit.

    Attributes:
        names: The name of each visit, e.g. "loops.3.blocks.0".
        lenses: The name of each lens.
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
    """Measure how far the predictions of tuned lenses are from the final ones, on inputs that they
    were not trained on.

    The measure is KL(final || lens) at every visit. Several lenses are compared on one run.

    Args:
        inputs, readout, positions: The reads, as `train_tuned_lens` describes them.
        tuned: A lens, or a dictionary of lenses by name, all with one number of iterations. None
            stands for the logit lens.
        n_loops: The number of iterations if only the logit lens is measured; a tuned lens has its
            own.

    Returns:
        The mean KL by lens and visit, in nats.

    Raises:
        ValueError: A lens was not trained on this model, `n_loops` differs from that of a lens,
            there is no lens, or an activation is not finite.
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
