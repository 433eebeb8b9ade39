"""The parts of circuits: a layer's block, and its matrices through the norms of an attention."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.frozen_norm import frozen_norm, watching
from loopscope.interp.common.places import one_in_range
from loopscope.interp.common.precision import widened
from loopscope.models.basis.numbers import checked_integer
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import Visit


def visit_of_layer(model: LoopedModel, layer: int) -> Visit:
    """A visit to a block of the shared stack."""
    if not model.heads_read_stream:
        raise ValueError(
            f"keys and values of this {type(model).__name__} are not made of the residual stream,"
            " so its weights alone give no circuit"
        )
    layers, layer = layers_of(model), checked_integer(layer, "layer")
    if layer not in layers:
        raise ValueError(f"layer must be in {layers[0]}..{layers[-1]}, got {layer}")
    found = [
        visit for visit in model.schedule(1) if visit.loop is not None and visit.layer == layer
    ]
    if len({visit.block for visit in found}) != 1:
        raise ValueError(
            f"one block must be layer {layer} of an iteration, but in this model {len(found)}"
            " blocks are, so a layer does not say whose weights to take"
        )
    return found[0]


def layers_of(model: LoopedModel) -> list[int]:
    """The layers that an iteration visits."""
    if model.visit_blocks is not None:
        raise ValueError(
            "an untied copy has other weights at each visit; ask the model that it was made from"
        )
    return sorted({visit.layer for visit in model.schedule(1) if visit.loop is not None})


def of_head(circuit: FactoredMatrix, model: LoopedModel, head: int | None) -> FactoredMatrix:
    """One head of a circuit, or all."""
    if head is None:
        return circuit
    head = one_in_range("head", head, model.cfg.n_heads)
    return FactoredMatrix(circuit.A[head], circuit.B[head])


def stacked(circuits: list[FactoredMatrix]) -> FactoredMatrix:
    """The circuits of several layers along a new first axis."""
    return FactoredMatrix(
        torch.stack([c.A for c in circuits]), torch.stack([c.B for c in circuits])
    )


def embedded(model: LoopedModel) -> Float[Tensor, "d_vocab d_model"]:
    """The token embeddings as the loop's first visit reads them."""
    first = next(visit for visit in model.schedule(1) if visit.loop is not None)
    injected = first.index > 0 and "hook_injected" in first.opening
    if injected or any(site.startswith("hook_state_in.") for site in first.opening):
        raise ValueError(
            f"{first.name} of this {type(model).__name__} reads a mix of states and inputs, not"
            " token embeddings, so weights alone give no circuit between tokens; use qk_circuit and"
            " ov_circuit, which are between streams"
        )
    return widened(model.W_E) * float(getattr(model, "embedding_scale", 1.0))


def qk_of(visit: Visit, fold_ln: bool) -> FactoredMatrix:
    """The QK circuits of all heads of a visit; see `qk_circuit`."""
    if "attn.hook_q_scale" in visit.sites:
        raise ValueError(
            f"{visit.name} multiplies each channel of its rotated queries by a factor, so how two"
            " streams compare depends on their positions, and weights alone are no QK circuit"
        )
    queries, keys = _queries_and_keys(visit)
    reads, keys = _reads(visit, queries, fold_ln), _for_each_head(keys, len(queries))
    return FactoredMatrix(
        reads @ queries, rearrange(reads @ keys, "head d_model d_head -> head d_head d_model")
    )


def ov_of(visit: Visit, model: LoopedModel, fold_ln: bool) -> FactoredMatrix:
    """The OV circuits of all heads of a visit; see `ov_circuit`."""
    if "attn.hook_gated" in visit.sites:
        raise ValueError(
            f"{visit.name} multiplies what its heads found by a gate that changes from run to run,"
            " so weights alone do not say what the heads write"
        )
    attn: Any = visit.block.attn
    written = _through_output_norm(visit, widened(attn.W_O))
    values = _for_each_head(widened(attn.W_V), len(written))
    if fold_ln and model.cfg.normalization_type == "LN":
        written = written - written.mean(-1, keepdim=True)
    return FactoredMatrix(_reads(visit, values, fold_ln) @ values, written)


def _for_each_head(
    weight: Float[Tensor, "kv_head d_model d_head"], n_heads: int
) -> Float[Tensor, "head d_model d_head"]:
    """Keys' or values' weights for each query head; several share one where queries are grouped."""
    return weight.repeat_interleave(n_heads // weight.shape[0], dim=0)


def _queries_and_keys(
    visit: Visit,
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "kv_head d_model d_head"]]:
    """The weights of queries and keys, through the norms of them that the attention has."""
    attn: Any = visit.block.attn
    weights = [widened(attn.W_Q), widened(attn.W_K)]
    taps: dict[str, HookPoint] = {}
    for site in ("attn.q_norm.hook_scale", "attn.k_norm.hook_scale"):
        if site in visit.sites:
            taps |= watching(site, lambda value, hook: torch.ones_like(value))
    if not taps:
        return weights[0], weights[1]
    rows = [rearrange(w, "head d_model d_head -> 1 d_model head d_head") for w in weights]
    offsets = attn.normed(*(torch.zeros_like(row) for row in rows), taps)
    normed = [x - offset for x, offset in zip(attn.normed(*rows, taps), offsets, strict=True)]
    q, k = (rearrange(x, "1 d_model head d_head -> head d_model d_head") for x in normed)
    return q, k


def _through_output_norm(
    visit: Visit, written: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head d_head d_model"]:
    """The vectors that heads write, behind the norm of the attention's output where there is
    one.
    """
    if "attn.hook_out" not in visit.sites:
        return written
    first, last = (visit.sites.index(site) for site in ("attn.hook_out", "hook_attn_out"))
    scales = [site for site in visit.sites[first:last] if site.endswith(".hook_scale")]
    if len(scales) != 1:
        raise ValueError(
            f"{visit.name} adds its attention's output through a gate that changes from run to run,"
            " so weights alone do not say what its heads write"
        )
    norm: Any = visit.block.get_submodule(scales[0].removesuffix(".hook_scale"))
    return written @ linear_part(norm, scales[0], written)


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
    return linear_part(norm, "ln1.hook_scale", like.transpose(-1, -2))


def linear_part(norm: Any, site: str, like: Tensor) -> Float[Tensor, "d_model d_model"]:
    """A norm at divisor 1 as a matrix, without its bias; `like` has d_model as its last axis."""
    basis = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    linear, _ = frozen_norm(norm, site, basis[None], torch.ones_like(basis[None, :, :1]))
    return linear[0]
