"""Training of tuned lenses, and how far their answers are from the model's on inputs held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.columns import Shown, at_positions, shown_columns
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import (
    LOGITS_AT_ONCE,
    Inputs,
    ReadoutColumn,
    as_batch,
    in_chunks,
)
from loopscope.interp.common.modes import differentiated, evaluated
from loopscope.interp.common.places import loop_and_layer
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.lens.lens import residuals
from loopscope.interp.lens.record import visit_table
from loopscope.interp.lens.tuned_lens import TunedLens, translated
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ROWS = 512  # inputs run at a time before training
# nats; a visit that answers as the run does is left alone, else Adam would scale up the rounding of
# its gradient
_ENOUGH = 1e-6


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
) -> TunedLens:
    """Train one translator per visit, from the identity, to minimise KL(final || lens); the model
    itself stays as it is.

    The runs are made once; each step then draws reads at random. AdamW, with a learning rate that
    falls linearly to zero.

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

    Raises:
        ValueError: Fewer than one step or read, a learning rate that is not positive, or runs
            that are not finite.

    Source:
        Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv
        2303.08112.
    """
    if steps < 1 or batch_size < 1 or not 0 < lr < math.inf:
        raise ValueError(
            f"steps and batch_size must be at least 1 and lr positive, got steps={steps},"
            f" batch_size={batch_size}, lr={lr}"
        )
    start = TunedLens.identity(model, n_loops)
    resids, finals = _material(model, as_batch(model, inputs, readout), positions, start.n_loops)
    owner = _owners(model, start.n_loops, shared)
    params = [start.weights[: owner.max() + 1].clone(), start.biases[: owner.max() + 1].clone()]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in tqdm(range(steps), desc="training a tuned lens", leave=False, disable=steps < 100):
        drawn = torch.randperm(len(finals), generator=generator)[:batch_size].to(finals.device)
        losses.append(_set_gradients(model, params, owner, resids[:, drawn], finals[drawn]))
        optimizer.step()
        schedule.step()
    return replace(
        start, weights=params[0][owner], biases=params[1][owner], losses=torch.stack(losses)
    )


def _owners(model: LoopedModel, n_loops: int, shared: bool) -> Int[Tensor, " visit"]:
    """Which translator each visit has."""
    blocks = [
        visit.name.removeprefix(f"loops.{visit.loop}.") if shared else visit.name
        for visit in model.schedule(n_loops)
    ]
    numbers = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    return torch.tensor([numbers[block] for block in blocks], device=model.device)


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
    resids, finals = _material(model, batch, positions, plain.n_loops)
    target = _log_probs(model, finals[None])
    found = []
    for lens in lenses:
        for i, resid in enumerate(resids):
            own = [x[i : i + 1].to(model.device) for x in (lens.weights, lens.biases)]
            log_probs = _log_probs(model, model.normalize(translated(resid[None], *own)))
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


@torch.no_grad()
def _material(
    model: LoopedModel, batch: Batch, positions: Shown, n_loops: int
) -> tuple[Float[Tensor, "visit read d_model"], Float[Tensor, "read d_read"]]:
    """The residual after every visit and the head's input at the end, without padding.

    Raises:
        ValueError: Runs that are not finite.
    """
    columns, shown = shown_columns(batch, positions)
    resids, finals = [], []
    for part, read in zip(in_chunks(batch, _ROWS, "runs"), columns.split(_ROWS), strict=True):
        run = residuals(model, part, read, n_loops)
        resids.append(torch.stack(list(run.values.values())))
        finals.append(at_positions(model.read_state(run.end), read).flatten(0, 1))
    real = shown.flatten()
    whole, ends = torch.cat(resids, dim=1)[:, real], torch.cat(finals)[real]
    for visit, found in zip(model.schedule(n_loops), whole, strict=True):
        refuse_nonfinite(f"the residuals at visit {visit.name}", found)
    refuse_nonfinite("the answers of the runs", ends)
    return whole, ends


def _log_probs(
    model: LoopedModel, normalized: Float[Tensor, "visit read d_read"]
) -> Float[Tensor, "visit read d_vocab"]:
    logits = model.unembed(normalized)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _set_gradients(
    model: LoopedModel,
    params: list[Tensor],
    owner: Int[Tensor, " visit"],
    resids: Float[Tensor, "visit read d_model"],
    finals: Float[Tensor, "read d_read"],
) -> Float[Tensor, " visit"]:
    """Set the gradients of every visit's mean KL, a few visits at a time; return the mean KL.

    The model's own parameters get no gradient.
    """
    with torch.no_grad():
        target = _log_probs(model, finals[None])
    losses = []
    for param in params:
        param.grad = torch.zeros_like(param)
    size = max(1, LOGITS_AT_ONCE // target.numel())
    for visits in (slice(first, first + size) for first in range(0, len(resids), size)):
        own = [param[owner[visits]].requires_grad_() for param in params]
        with torch.enable_grad():
            log_probs = _log_probs(model, model.normalize(translated(resids[visits], *own)))
            kl = (target.exp() * (target - log_probs)).sum(-1).mean(1)
            grads = torch.autograd.grad(kl.clamp(min=_ENOUGH).sum(), own)
        for param, grad in zip(params, grads, strict=True):
            assert param.grad is not None, "gradients were set to zero"
            param.grad.index_add_(0, owner[visits], grad)
        losses.append(kl.detach())
    return torch.cat(losses)
