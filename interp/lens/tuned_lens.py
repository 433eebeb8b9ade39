"""Tuned lenses: one affine translator per visit, trained to foretell the answer of the run."""

from __future__ import annotations

import hashlib
import json
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

from loopscope.interp.common.columns import read_columns
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.modes import evaluating
from loopscope.interp.common.places import loop_and_layer
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.lens.lens import residuals
from loopscope.interp.lens.record import Lens, visit_table, visits_of
from loopscope.models.basis.files import atomic_path
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

_KIND = "tuned lens"


@dataclass(frozen=True)
class TunedLens(OneScreen):
    """A tuned lens: one trained affine translator h -> h + A h + b per visit, in front of the final
    norm and the unembedding.

    Attributes:
        weights: Float[Tensor, "visit d_model d_model"], A; the last axis is summed over.
        biases: Float[Tensor, "visit d_model"], b.
        names: The name of each visit, e.g. "loops.3.blocks.0".
        n_loops: The number of iterations of the runs that the lens reads.
        family: The model's family.
        fingerprint: A hash of the model's weights and configuration.
        losses: Float[Tensor, "step visit"], KL(final || lens) of the batch of each training step,
            in nats.
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
        """Make translators that change nothing, so that the lens is the logit lens.

        Args:
            n_loops: The number of iterations; None means the number that the checkpoint records.
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
        """Refuse a model that the translators were not trained on.

        Raises:
            ValueError: The model has another family, other sizes or other weights, or the
                translators are those of a single shard.
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
        count = len(model.schedule(self.n_loops))
        if len(self.names) < count:
            raise ValueError(
                f"this tuned lens is that of a shard, with translators for {len(self.names)} of"
                f" {count} visits; merge the folder that all shards wrote"
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
        """Read a prediction from the translated residual stream after every visit.

        Args:
            inputs, readout, positions, batch_size: The run and the reads, as `logit_lens` describes
                them.

        Returns:
            A `Lens` with one entry per visit.

        Raises:
            ValueError: The translators were not trained on this model.
        """
        self.check(model)
        batch = as_batch(model, inputs, readout)
        size = rows_at_once(model, batch, batch_size)
        columns = read_columns(batch, positions)
        weights, biases = self.weights.to(model.device), self.biases.to(model.device)
        collected = []
        with torch.no_grad(), evaluating(model):
            for part, read in zip(
                in_chunks(batch, size, "tuned lens"),
                columns.split(size),
                strict=True,
            ):
                run = residuals(model, part, read, self.n_loops)
                resids = torch.stack(list(run.values.values()))
                collected.append(model.normalize(translated(resids, weights, biases)))
        heads_input = torch.cat(collected, dim=1)
        return Lens.of(model, heads_input, visits_of(model, self.n_loops), columns)

    def frame(self) -> pd.DataFrame:
        """One row per training step and visit. The columns are step, visit, loop, layer (all but
        visit from 0) and loss (nats).
        """
        steps = range(len(self.losses))
        loops, layers = zip(*map(loop_and_layer, self.names), strict=True)
        table = visit_table(self.names, loops, layers, 1)
        frame = table.loc[list(table.index) * len(steps)].reset_index(drop=True)
        frame.insert(0, "step", [step for step in steps for _ in self.names])
        return frame.assign(loss=self.losses.flatten().cpu().numpy())

    def save(self, path: str | Path) -> None:
        """Write the lens into one safetensors file, whole or not at all."""
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
        """Read a lens from a file that `save` wrote.

        Args:
            model: The model on which the translators must have been trained; they are put on its
                device. None checks the model only when `lens` is called.

        Raises:
            ValueError: The file holds no tuned lens, or translators of another model.
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


def translated(
    resids: Float[Tensor, "visit read d_model"],
    weights: Float[Tensor, "visit d_model d_model"],
    biases: Float[Tensor, "visit d_model"],
) -> Float[Tensor, "visit read d_model"]:
    """The residuals h + A h + b."""
    added = (
        einsum(resids.to(weights.dtype), weights, "visit read d, visit out d -> visit read out")
        + biases[:, None]
    )
    return resids + added.to(resids.dtype)


def _mark(model: LoopedModel) -> str:
    """A hash of a model's configuration and weights; hooks are on the runs, not on the model."""
    digest = hashlib.sha256(repr(model.cfg).encode())
    for name, weight in model.state_dict().items():
        whole = weight.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
