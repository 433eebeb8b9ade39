"""Circuits in the weights of heads (QK, OV), and the composition of the heads of two visits.

Weights are shared over iterations, so a circuit has a layer and a head but no iteration. Vectors
are rows, as in TransformerLens: a residual x is compared as x @ QK @ y^T and moved as x @ OV.

Circuits are float32 or wider. The norms inside an attention, of its queries, of its keys and of its
output before that is added to the stream, belong to the circuit, with their divisors at 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities.matrix import composition_scores as scores_of_factors

from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.weights.heads import (
    embedded,
    layers_of,
    linear_part,
    of_head,
    ov_of,
    qk_of,
    stacked,
    visit_of_layer,
)
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

Kind = Literal["Q", "K", "V"]


@torch.no_grad()
def qk_circuit(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """W_Q W_K^T: the keys (right) to which a query (left) attends.

    The biases and the division by sqrt(d_head) are left out. Where keys are rotated, this is the
    comparison at distance 0.

    Args:
        layer: A block of the shared stack; the circuit is the same in every iteration.
        head: One head; None for all.
        fold_ln: Read through the norm in front at divisor 1, weight and centring included; False
            takes the bare matrices.

    Returns:
        [d_model d_model], or [head d_model d_model].

    Raises:
        ValueError: A layer or head out of range, or no norm to fold in front of the attention.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    return of_head(qk_of(visit_of_layer(model, layer), fold_ln), model, head)


@torch.no_grad()
def ov_circuit(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """W_V W_O: the vector that a head writes (right) for a vector it reads (left), without biases.

    A norm of the attention's output belongs to what is written. A norm of the stream after the
    addition does not.

    Args:
        layer, head: As for `qk_circuit`.
        fold_ln: As for `qk_circuit`; also take the mean out of what is written where the model's
            norms centre, as then nothing can read it.

    Returns:
        [d_model d_model], or [head d_model d_model].
    """
    return of_head(ov_of(visit_of_layer(model, layer), model, fold_ln), model, head)


@torch.no_grad()
def full_qk(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """W_E QK W_E^T: how much a query token attends to a key token, both as they were embedded.

    Attention reads embeddings in the first iteration only; later the stream holds what earlier
    visits wrote. A factor on the embeddings is included.

    Args:
        layer, head, fold_ln: As for `qk_circuit`.

    Raises:
        ValueError: As for `qk_circuit`, or the loop does not read token embeddings.

    Returns:
        [d_vocab d_vocab], or [head d_vocab d_vocab], in factors.
    """
    W_E, circuit = embedded(model), qk_circuit(model, layer, head, fold_ln=fold_ln)
    return FactoredMatrix(W_E @ circuit.A, circuit.B @ W_E.T)


@torch.no_grad()
def full_ov(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """W_E OV W_U: which logits a head raises when it attends to a token as it was embedded.

    Args:
        layer, head: As for `qk_circuit`.
        fold_ln: As for `ov_circuit`, and also read the result through the final norm at divisor 1.

    Raises:
        ValueError: As for `full_qk`.

    Returns:
        [d_vocab d_vocab], or [head d_vocab d_vocab], in factors.
    """
    W_E, circuit = embedded(model), ov_circuit(model, layer, head, fold_ln=fold_ln)
    unembed = widened(model.W_U)
    if fold_ln:
        unembed = linear_part(model.normalize, model.final_scale_site, unembed.T) @ unembed
    return FactoredMatrix(W_E @ circuit.A, circuit.B @ unembed)


@dataclass(frozen=True)
class Composition(OneScreen):
    """How strongly heads read what heads wrote before.

    Weights are shared, so a score holds for every two visits at which it is possible: from an
    earlier layer to a later one of the same iteration, and from any layer to any, its own head
    included, of a later iteration.

    Attributes:
        kind: What the later head makes of what it reads: "Q", "K" or "V".
        values: Float[Tensor, "src_layer src_head dst_layer dst_head"], between 0 and 1.
        fold_ln: Whether norms were folded in.
    """

    kind: Kind
    values: Float[Tensor, "src_layer src_head dst_layer dst_head"]
    fold_ln: bool

    def possible(self, distance: int) -> Bool[Tensor, "src_layer src_head dst_layer dst_head"]:
        """Which pairs there are when the later head runs `distance` iterations after the earlier
        one.

        Raises:
            ValueError: A negative distance.
        """
        distance = checked_count(distance, "distance", least=0)
        layers = torch.arange(self.values.shape[0], device=self.values.device)
        earlier = layers[:, None, None, None] < layers[:, None]
        return (earlier | (distance > 0)).expand(self.values.shape)

    def frame(self) -> pd.DataFrame:
        """One row per pair: kind, src_layer, src_head, dst_layer, dst_head, least_distance, value.

        `least_distance` is the smallest number of iterations between the two: 0 where the same
        iteration will do, else 1. All larger distances are possible too.
        """
        places = list(itertools.product(*map(range, self.values.shape)))
        frame = pd.DataFrame(places, columns=["src_layer", "src_head", "dst_layer", "dst_head"])
        frame.insert(0, "kind", self.kind)
        frame["least_distance"] = (~self.possible(0)).flatten().int().cpu().numpy()
        frame["value"] = self.values.flatten().cpu().numpy()
        return frame

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the score of each pair of heads, later heads by earlier ones."""
        from loopscope.interp.drawing.effects import composition

        return composition(self, title)


@torch.no_grad()
def composition_scores(model: LoopedModel, kind: Kind, *, fold_ln: bool = True) -> Composition:
    """||OV C|| / (||OV|| ||C||) in Frobenius norms, for every earlier head's OV and every later
    head's circuit C.

    C is QK for "Q" (the later head's queries read the earlier one), its transpose for "K", and OV
    for "V". What a family does between two visits (a boundary norm, damping) is left out.

    Args:
        kind: "Q", "K" or "V".
        fold_ln: As for `ov_circuit`.

    Raises:
        ValueError: Another kind, or a norm to fold where attention reads the stream itself.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", the section on
        two-layer models.
    """
    if kind not in ("Q", "K", "V"):
        raise ValueError(f"kind must be 'Q', 'K' or 'V', got {kind!r}")
    visits = [visit_of_layer(model, layer) for layer in layers_of(model)]
    written = stacked([ov_of(visit, model, fold_ln) for visit in visits])
    read = written if kind == "V" else stacked([qk_of(visit, fold_ln) for visit in visits])
    return Composition(kind, scores_of_factors(written, read.T if kind == "K" else read), fold_ln)
