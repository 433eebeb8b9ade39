"""Tuned lenses: one affine translator per visit, trained to foretell the answer of the run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.columns import Shown, at_positions, read_columns, shown_columns
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    checked_batch_size,
    in_chunks,
)
from loopscope.interp.common.modes import differentiated, evaluating
from loopscope.interp.common.places import loop_and_layer
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.lens.lens import residuals
from loopscope.interp.lens.record import Lens, visit_table, visits_of
from loopscope.models.basis.files import atomic_path
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CHUNK = 1 << 22  # logits held at a time while training
_ROWS = 512  # inputs run at a time before training
# nats; a visit that answers as the run does is left alone, else Adam would scale up the rounding of
# its gradient
_ENOUGH = 1e-6
_KIND = "tuned lens"


@dataclass(frozen=True)
class TunedLens(OneScreen):
    """Affine translators h -> h + A h + b, one per visit, in front of the final norm and the head.

    Attributes:
        weights: Float[Tensor, "visit d_model d_model"], A; the last axis is summed over.
        biases: Float[Tensor, "visit d_model"], b.
        names: The name of each visit, e.g. "loops.3.blocks.0".
        n_loops: Iterations of the runs that the lens reads.
        family: The model's family.
        fingerprint: A hash of the model's weights and configuration.
        losses: Float[Tensor, "step visit"], KL(final || lens) of each step's batch, in nats.
    """

    weights: Float[Tensor, "visit d_model d_model"]
    biases: Float[Tensor, "visit d_model"]
    names: tuple[str, ...]
    n_loops: int
    family: str
    fingerprint: str
    losses: Float[Tensor, "step visit"]

    @classmethod
    def identity(cls, model: LoopedModel, n_loops: int | None = None) -> TunedLens:
        """Translators that change nothing: the logit lens.

        Args:
            n_loops: Iterations; None means what the checkpoint records.
        """
        n_loops = checked_loops(n_loops, model.cfg.n_loops)
        names = tuple(visit.name for visit in model.schedule(n_loops))
        dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        weights, biases, losses = (
            torch.zeros(shape, dtype=dtype, device=model.device)
            for shape in (
                (len(names), model.cfg.d_model, model.cfg.d_model),
                (len(names), model.cfg.d_model),
                (0, len(names)),
            )
        )
        return cls(weights, biases, names, n_loops, model.cfg.family, _mark(model), losses)

    def check(self, model: LoopedModel) -> None:
        """Refuse a model that these translators were not made for.

        Raises:
            ValueError: Another family, other sizes, or other weights.
        """
        own, other = (self.family, self.weights.shape[-1]), (model.cfg.family, model.cfg.d_model)
        if own != other:
            raise ValueError(
                f"this tuned lens is for a {own[0]} model with d_model={own[1]}, got a {other[0]}"
                f" model with d_model={other[1]}; train one for this model"
            )
        if self.fingerprint != _mark(model):
            raise ValueError(
                "this tuned lens is for a model with other weights or another configuration; train"
                " one for this model"
            )

    def lens(
        self,
        model: LoopedModel,
        inputs: Inputs,
        *,
        readout: ReadoutColumn = None,
        positions: Literal["all"] | Sequence[int] | None = None,
        batch_size: int = 512,
    ) -> Lens:
        """Final norm and head of the translated residual after every visit.

        Args:
            inputs, readout, positions, batch_size: As for `logit_lens`.

        Raises:
            ValueError: A model that these translators were not made for.
        """
        self.check(model)
        batch = as_batch(model, inputs, readout)
        batch_size = checked_batch_size(batch_size)
        columns = read_columns(batch, positions)
        weights, biases = self.weights.to(model.device), self.biases.to(model.device)
        collected = []
        with torch.no_grad(), evaluating(model):
            for part, read in zip(
                in_chunks(batch, batch_size, "tuned lens"),
                columns.split(batch_size),
                strict=True,
            ):
                run = residuals(model, part, read, self.n_loops)
                resids = torch.stack(list(run.values.values()))
                collected.append(model.normalize(_translated(resids, weights, biases)))
        heads_input = torch.cat(collected, dim=1)
        return Lens.of(model, heads_input, visits_of(model, self.n_loops), columns)

    def frame(self) -> pd.DataFrame:
        """One row per training step and visit: step, visit, loop, layer, loss; step, loop and layer
        count from 0.
        """
        steps = range(len(self.losses))
        loops, layers = zip(*map(loop_and_layer, self.names), strict=True)
        table = visit_table(self.names, loops, layers, 1)
        frame = table.loc[list(table.index) * len(steps)].reset_index(drop=True)
        frame.insert(0, "step", [step for step in steps for _ in self.names])
        return frame.assign(loss=self.losses.flatten().cpu().numpy())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {
            name: getattr(self, name).detach().cpu().contiguous()
            for name in ("weights", "biases", "losses")
        }
        about = {
            "kind": _KIND,
            "names": json.dumps(self.names),
            "n_loops": str(self.n_loops),
            "d_model": str(self.weights.shape[-1]),
        }
        with atomic_path(path) as temporary:
            save_file(
                tensors, temporary, about | {"family": self.family, "fingerprint": self.fingerprint}
            )

    @classmethod
    def load(cls, path: str | Path, model: LoopedModel | None = None) -> TunedLens:
        """Read what `save` wrote.

        Args:
            model: The model that the translators must have been made for; the translators are put
                on its device. None leaves the check to `lens`.

        Raises:
            ValueError: The file holds something else, or translators for another model.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                names = file.keys() if about.get("kind") == _KIND else ()
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} does not hold a tuned lens ({error})") from None
        if not tensors:
            raise ValueError(
                f"{path} was not written by TunedLens.save: its metadata does not say that it is a"
                f" {_KIND}"
            )
        names = tuple(json.loads(about["names"]))
        found = cls(
            **tensors,
            names=names,
            n_loops=int(about["n_loops"]),
            family=about["family"],
            fingerprint=about["fingerprint"],
        )
        if model is None:
            return found
        found.check(model)
        moved = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        return replace(found, **moved)

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the loss of each visit over training."""
        from loopscope.interp.drawing.lenses import tuned_lens

        return tuned_lens(self, title)


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
    for name, visit in zip(start.names, resids, strict=True):
        refuse_nonfinite(f"the residuals at visit {name}", visit)
    refuse_nonfinite("the answers of the runs", finals)
    params = [start.weights.clone(), start.biases.clone()]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in tqdm(range(steps), desc="training a tuned lens", leave=False, disable=steps < 100):
        drawn = torch.randperm(len(finals), generator=generator)[:batch_size].to(finals.device)
        losses.append(_set_gradients(model, params, resids[:, drawn], finals[drawn]))
        optimizer.step()
        schedule.step()
    return replace(start, weights=params[0], biases=params[1], losses=torch.stack(losses))


@torch.no_grad()
def _material(
    model: LoopedModel, batch: Batch, positions: Shown, n_loops: int
) -> tuple[Float[Tensor, "visit read d_model"], Float[Tensor, "read d_read"]]:
    """The residual after every visit and the head's input at the end, without padding."""
    columns, shown = shown_columns(batch, positions)
    resids, finals = [], []
    for part, read in zip(in_chunks(batch, _ROWS, "runs"), columns.split(_ROWS), strict=True):
        run = residuals(model, part, read, n_loops)
        resids.append(torch.stack(list(run.values.values())))
        finals.append(at_positions(model.read_state(run.end), read).flatten(0, 1))
    real = shown.flatten()
    return torch.cat(resids, dim=1)[:, real], torch.cat(finals)[real]


def _translated(
    resids: Float[Tensor, "visit read d_model"],
    weights: Float[Tensor, "visit d_model d_model"],
    biases: Float[Tensor, "visit d_model"],
) -> Float[Tensor, "visit read d_model"]:
    added = (
        einsum(resids.to(weights.dtype), weights, "visit read d, visit out d -> visit read out")
        + biases[:, None]
    )
    return resids + added.to(resids.dtype)


def _log_probs(
    model: LoopedModel, normalized: Float[Tensor, "visit read d_read"]
) -> Float[Tensor, "visit read d_vocab"]:
    logits = model.unembed(normalized)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _set_gradients(
    model: LoopedModel,
    params: list[Tensor],
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
    size = max(1, _CHUNK // target.numel())
    for visits in (slice(first, first + size) for first in range(0, len(resids), size)):
        own = [param[visits].clone().requires_grad_() for param in params]
        with torch.enable_grad():
            log_probs = _log_probs(model, model.normalize(_translated(resids[visits], *own)))
            kl = (target.exp() * (target - log_probs)).sum(-1).mean(1)
            grads = torch.autograd.grad(kl.clamp(min=_ENOUGH).sum(), own)
        for param, grad in zip(params, grads, strict=True):
            assert param.grad is not None, "gradients were set to zero"
            param.grad[visits] = grad
        losses.append(kl.detach())
    return torch.cat(losses)


def _mark(model: LoopedModel) -> str:
    """A hash of a model's configuration and weights; hooks are on the runs, not on the model."""
    digest = hashlib.sha256(repr(model.cfg).encode())
    for name, weight in model.state_dict().items():
        whole = weight.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
