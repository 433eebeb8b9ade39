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
    """Compute the QK circuit of a head from its weights, W_Q W_K^T: to which keys a query attends.

    The left vector is what the query reads, the right vector what the key reads. The biases and the
    division by sqrt(d_head) are left out. With rotary positions this is the comparison at distance
    0.

    Args:
        layer: The block of the shared stack, from 0. The circuit is the same at every iteration.
        head: The head, from 0; None for all heads.
        fold_ln: True includes the norm before the attention, with its weight and its centring, at a
            divisor of 1. False takes the bare matrices.

    Returns:
        The matrix in factors, [d_model d_model], or [head d_model d_model] for all heads.

    Raises:
        ValueError: The layer or the head is out of range, or there is no norm before the attention
            to include.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    return of_head(qk_of(visit_of_layer(model, layer), fold_ln), model, head)


@torch.no_grad()
def ov_circuit(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """Compute the OV circuit of a head from its weights, W_V W_O: which vector the head writes for
    a vector that it reads.

    The left vector is read, the right vector is written. Biases are left out. A norm of the
    attention's output is included, a norm of the stream after the addition is not.

    Args:
        layer: The block of the shared stack, from 0. The circuit is the same at every iteration.
        head: The head, from 0; None for all heads.
        fold_ln: True includes the norm before the attention, at a divisor of 1. If the model's
            norms subtract the mean, the mean of the written vector is removed too, because no later
            component can read it. False takes the bare matrices.

    Returns:
        The matrix in factors, [d_model d_model], or [head d_model d_model] for all heads.

    Raises:
        ValueError: The layer or the head is out of range, or there is no norm before the attention
            to include.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    return of_head(ov_of(visit_of_layer(model, layer), model, fold_ln), model, head)


@torch.no_grad()
def full_qk(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """Compute the QK circuit between tokens, W_E QK W_E^T: how much a query token attends to a key
    token.

    Both tokens are taken as embedded, with a factor on the embeddings if the model has one.
    Attention reads embeddings in the first iteration only; later the stream also holds what earlier
    visits wrote.

    Args:
        layer, head, fold_ln: The head and the norm, as `qk_circuit` describes them.

    Returns:
        The matrix in factors, [d_vocab d_vocab], or [head d_vocab d_vocab] for all heads.

    Raises:
        ValueError: The loop does not read token embeddings, or `qk_circuit` would refuse the call.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    W_E, circuit = embedded(model), qk_circuit(model, layer, head, fold_ln=fold_ln)
    return FactoredMatrix(W_E @ circuit.A, circuit.B @ W_E.T)


@torch.no_grad()
def full_ov(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """Compute the OV circuit between tokens, W_E OV W_U: which logits a head raises if it attends
    to a token as embedded.

    Args:
        layer, head: The head, as `ov_circuit` describes it.
        fold_ln: True includes the norms of `ov_circuit`, and the final norm at a divisor of 1.
            False takes the bare matrices.

    Returns:
        The matrix in factors, [d_vocab d_vocab], or [head d_vocab d_vocab] for all heads.

    Raises:
        ValueError: `full_qk` would refuse the call.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    W_E, circuit = embedded(model), ov_circuit(model, layer, head, fold_ln=fold_ln)
    unembed = widened(model.W_U)
    if fold_ln:
        unembed = linear_part(model.normalize, model.final_scale_site, unembed.T) @ unembed
    return FactoredMatrix(W_E @ circuit.A, circuit.B @ unembed)


@dataclass(frozen=True)
class Composition(OneScreen):
    """How strongly each head reads what each earlier head wrote, from the weights.

    Weights are shared, so a score holds for every two visits at which it is possible: from an
    earlier layer to a later one of the same iteration, and from any layer to any layer of a later
    iteration, the head itself included.

    Attributes:
        kind: The input through which the later head reads: "Q", "K" or "V".
        values: Float[Tensor, "src_layer src_head dst_layer dst_head"], between 0 and 1; src is the
            earlier head, dst the later one.
        fold_ln: Whether norms were included.
    """

    kind: Kind
    values: Float[Tensor, "src_layer src_head dst_layer dst_head"]
    fold_ln: bool

    def possible(self, distance: int) -> Bool[Tensor, "src_layer src_head dst_layer dst_head"]:
        """Which pairs of heads exist if the later head runs `distance` iterations after the earlier
        one.

        Raises:
            ValueError: The distance is negative.
        """
        distance = checked_count(distance, "distance", least=0)
        layers = torch.arange(self.values.shape[0], device=self.values.device)
        earlier = layers[:, None, None, None] < layers[:, None]
        return (earlier | (distance > 0)).expand(self.values.shape)

    def frame(self) -> pd.DataFrame:
        """One row per pair. The columns are kind, src_layer, src_head, dst_layer, dst_head,
        least_distance and value.

        `least_distance` is the smallest number of iterations between the two heads: 0 if both can
        be in the same iteration, else 1. All larger distances are possible too.
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
    """Score how strongly each head can read what each earlier head writes, from the weights: ||OV
    C|| / (||OV|| ||C||) in Frobenius norms.

    OV belongs to the earlier head. C belongs to the later head: QK for "Q", its transpose for "K",
    OV for "V". The changes that a family makes to the stream between two visits (a boundary norm,
    damping) are left out.

    Args:
        kind: The input through which the later head reads: "Q", "K" or "V".
        fold_ln: Whether norms are included, as `ov_circuit` describes it.

    Returns:
        The score of each pair of heads.

    Raises:
        ValueError: The kind is unknown, or there is no norm before the attention to include.

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
