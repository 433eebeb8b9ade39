"""Circuits in the weights of heads (QK, OV), and the composition of the heads of two visits.

Weights are shared over iterations, so a circuit has a layer and a head but no iteration. Vectors
are rows, as in TransformerLens: a residual x is compared as x @ QK @ y^T and moved as x @ OV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities.matrix import composition_scores as scores_of_factors

from loopscope.interp.common.frozen_norm import frozen_norm
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import Visit

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
    return _head(_qk(_visit(model, layer), fold_ln), model, head)


@torch.no_grad()
def ov_circuit(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """W_V W_O: the vector that a head writes (right) for a vector it reads (left), without biases.

    Args:
        layer, head: As for `qk_circuit`.
        fold_ln: As for `qk_circuit`; also take the mean out of what is written where the model's
            norms centre, as then nothing can read it.

    Returns:
        [d_model d_model], or [head d_model d_model].
    """
    return _head(_ov(_visit(model, layer), model, fold_ln), model, head)


@torch.no_grad()
def full_qk(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """W_E QK W_E^T: how much a query token attends to a key token, both as they were embedded.

    Attention reads embeddings in the first iteration only; later the stream holds what earlier
    visits wrote.

    Args:
        layer, head, fold_ln: As for `qk_circuit`.

    Returns:
        [d_vocab d_vocab], or [head d_vocab d_vocab], in factors.
    """
    circuit = qk_circuit(model, layer, head, fold_ln=fold_ln)
    return FactoredMatrix(model.W_E @ circuit.A, circuit.B @ model.W_E.T)


@torch.no_grad()
def full_ov(
    model: LoopedModel, layer: int, head: int | None = None, *, fold_ln: bool = True
) -> FactoredMatrix:
    """W_E OV W_U: which logits a head raises when it attends to a token as it was embedded.

    Args:
        layer, head: As for `qk_circuit`.
        fold_ln: As for `ov_circuit`, and also read the result through the final norm at divisor 1.

    Returns:
        [d_vocab d_vocab], or [head d_vocab d_vocab], in factors.
    """
    circuit = ov_circuit(model, layer, head, fold_ln=fold_ln)
    unembed = (
        _linear_part(model.normalize, model.final_scale_site, model.W_U) @ model.W_U
        if fold_ln
        else model.W_U
    )
    return FactoredMatrix(model.W_E @ circuit.A, circuit.B @ unembed)


@dataclass(frozen=True)
class Composition:
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
        if distance < 0:
            raise ValueError(
                f"the later head runs 0 or more iterations after the earlier one, got {distance}"
            )
        layers = torch.arange(self.values.shape[0], device=self.values.device)
        earlier = layers[:, None, None, None] < layers[:, None]
        return (earlier | (distance > 0)).expand(self.values.shape)

    def frame(self) -> pd.DataFrame:
        """One row per pair: kind, src_layer, src_head, dst_layer, dst_head, least_distance, value.

        `least_distance` is the smallest number of iterations between the two: 0 where the same
        iteration will do, else 1. All larger distances are possible too.
        """
        places = torch.cartesian_prod(*(torch.arange(size) for size in self.values.shape)).numpy()
        frame = pd.DataFrame(places, columns=["src_layer", "src_head", "dst_layer", "dst_head"])
        frame.insert(0, "kind", self.kind)
        frame["least_distance"] = (~self.possible(0)).flatten().int().cpu().numpy()
        frame["value"] = self.values.flatten().cpu().numpy()
        return frame


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
    visits = [_visit(model, layer) for layer in _layers(model)]
    written = _stacked([_ov(visit, model, fold_ln) for visit in visits])
    read = written if kind == "V" else _stacked([_qk(visit, fold_ln) for visit in visits])
    return Composition(kind, scores_of_factors(written, read.T if kind == "K" else read), fold_ln)


def _visit(model: LoopedModel, layer: int) -> Visit:
    """A visit to a block of the shared stack."""
    if not model.heads_read_stream:
        raise ValueError(
            f"keys and values of this {type(model).__name__} are not made of the residual stream,"
            " so weights alone are no circuit"
        )
    layers = _layers(model)
    if layer not in layers:
        raise ValueError(f"layer must be in {layers[0]}..{layers[-1]}, got {layer}")
    found = [
        visit for visit in model.schedule(1) if visit.loop is not None and visit.layer == layer
    ]
    if len({visit.block for visit in found}) != 1:
        raise ValueError(
            f"one block must be layer {layer} of an iteration, but this model has {len(found)}, so"
            " a layer does not name one"
        )
    return found[0]


def _layers(model: LoopedModel) -> list[int]:
    """The layers that an iteration visits."""
    if model.visit_blocks is not None:
        raise ValueError(
            "an untied copy has other weights at each visit; ask the model that it was made from"
        )
    return sorted({visit.layer for visit in model.schedule(1) if visit.loop is not None})


def _head(circuit: FactoredMatrix, model: LoopedModel, head: int | None) -> FactoredMatrix:
    if head is None:
        return circuit
    if not 0 <= head < model.cfg.n_heads:
        raise ValueError(f"head must be in 0..{model.cfg.n_heads - 1}, got {head}")
    return FactoredMatrix(circuit.A[head], circuit.B[head])


def _stacked(circuits: list[FactoredMatrix]) -> FactoredMatrix:
    return FactoredMatrix(
        torch.stack([c.A for c in circuits]), torch.stack([c.B for c in circuits])
    )


def _qk(visit: Visit, fold_ln: bool) -> FactoredMatrix:
    attn: Any = visit.block.attn
    reads = _reads(visit, attn.W_Q, fold_ln)
    keys = _for_each_head(attn.W_K, attn.W_Q.shape[0])
    return FactoredMatrix(
        reads @ attn.W_Q, rearrange(reads @ keys, "head d_model d_head -> head d_head d_model")
    )


def _ov(visit: Visit, model: LoopedModel, fold_ln: bool) -> FactoredMatrix:
    attn: Any = visit.block.attn
    values, written = _for_each_head(attn.W_V, attn.W_O.shape[0]), attn.W_O
    if fold_ln and model.cfg.normalization_type == "LN":
        written = written - written.mean(-1, keepdim=True)
    return FactoredMatrix(_reads(visit, attn.W_V, fold_ln) @ values, written)


def _for_each_head(
    weight: Float[Tensor, "kv_head d_model d_head"], n_heads: int
) -> Float[Tensor, "head d_model d_head"]:
    """Keys' or values' weights for each query head; several share one where queries are grouped."""
    return weight.repeat_interleave(n_heads // weight.shape[0], dim=0)


def _reads(visit: Visit, like: Tensor, fold_ln: bool) -> Float[Tensor, "d_model d_model"]:
    """The linear map from a residual stream to the input of attention's matrices."""
    if not fold_ln:
        return torch.eye(like.shape[-2], dtype=like.dtype, device=like.device)
    before = visit.sites[: visit.sites.index("attn.hook_q")]
    if "ln1.hook_normalized" not in before:
        raise ValueError(
            f"fold_ln needs a norm in front of the attention, but {visit.name} reads the stream"
            " itself; pass fold_ln=False"
        )
    norm: Any = visit.block.ln1
    if not getattr(norm, "fixed", True):
        raise ValueError(
            f"fold_ln needs a norm with weights of its own, but that of {visit.name} changes from"
            " run to run; pass fold_ln=False"
        )
    return _linear_part(norm, "ln1.hook_scale", like)


def _linear_part(norm: Any, site: str, like: Tensor) -> Float[Tensor, "d_model d_model"]:
    """A norm at divisor 1 as a matrix, without its bias."""
    basis = torch.eye(like.shape[-2], dtype=like.dtype, device=like.device)
    linear, _ = frozen_norm(norm, site, basis[None], torch.ones_like(basis[None, :, :1]))
    return linear[0]
