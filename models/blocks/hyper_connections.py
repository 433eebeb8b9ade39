"""Hyper-connections: a residual stream kept as several parallel ones, with weights for reading,
mixing and writing them.

The weights are functions of all streams of a position. Two published variants are here; they differ
in where the scale of the streams is divided out, in the order of the Sinkhorn steps, and in which
index of the mixing matrix is the source.

Source:
    Hyper-connections: arXiv 2409.19606. Manifold-constrained ones (mHC): arXiv 2512.24880.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Streams = Float[Tensor, "batch pos stream d_model"]
OfEach = Float[Tensor, "batch pos stream"]
Matrix = Float[Tensor, "batch pos to from"]


class Mixing(NamedTuple):
    """The weights of one hyper-connection.

    Attributes:
        read: Float[Tensor, "batch pos stream"], of each stream in what the sub-layer is given.
        write: Float[Tensor, "batch pos stream"], of the sub-layer's output in each stream.
        keep: Float[Tensor, "batch pos to from"], of each old stream in each new one.
    """

    read: OfEach
    write: OfEach
    keep: Matrix


def copies(resid: Float[Tensor, "batch pos d_model"], n_streams: int) -> Streams:
    """The same residual stream n times."""
    return resid[:, :, None].expand(-1, -1, n_streams, -1).contiguous()


def collapsed(streams: Streams, read: OfEach) -> Float[Tensor, "batch pos d_model"]:
    """The weighted sum of the streams: what a sub-layer is given."""
    return (streams * read[..., None]).sum(2)


def mixed(
    streams: Streams, keep: Matrix, write: OfEach, out: Float[Tensor, "batch pos d_model"]
) -> Streams:
    """The streams after a sub-layer: new_i = sum_j keep[i, j] old_j + write_i out."""
    return keep @ streams + write[..., None] * out[:, :, None]


def nanbeige_mixing(
    streams: Streams,
    projection: Float[Tensor, "row flat"],
    alphas: Float[Tensor, "group=3"],
    bias: Float[Tensor, " row"],
    iterations: int,
) -> Mixing:
    """The weights of Nanbeige's mHC.

    The flattened streams are projected as they are; the result is divided by (their root mean
    square + 1e-6), scaled by one alpha per group of rows, and shifted. read = sigmoid, write = 2
    sigmoid, keep = Sinkhorn.

    Args:
        projection, bias: Rows in the order read (n), write (n), keep (n * n, row by row); flat is
            stream-major.
        alphas: One factor for each of the three groups.
        iterations: Of the Sinkhorn steps, see `alternating_sinkhorn`.

    Source:
        The released code of Nanbeige4.2, where no released configuration turns it on.
    """
    n, flat = streams.shape[2], streams.flatten(2)
    scale = 1 / (flat.norm(dim=-1, keepdim=True) / math.sqrt(flat.shape[-1]) + 1e-6)
    logits = scale * F.linear(flat, projection) * _per_row(alphas, n) + bias
    read, write, keep = _groups(logits, n)
    return Mixing(read.sigmoid(), 2 * write.sigmoid(), alternating_sinkhorn(keep, iterations))


def deepseek_mixing(
    streams: Streams,
    projection: Float[Tensor, "row flat"],
    scales: Float[Tensor, "group=3"],
    base: Float[Tensor, " row"],
    iterations: int,
    *,
    eps: float | int = 1e-6,
    norm_eps: float | int = 1e-6,
) -> Mixing:
    """The weights of DeepSeek-V4's mHC, at least in float32.

    The flattened streams are normed (RMS, no weight) and then projected. read = sigmoid + eps,
    write = 2 sigmoid. The matrix that the release calls comb has the source stream as its first
    index; `keep` here is its transpose.

    Args:
        projection, base: The release's fn and base; rows in the order read (n), write (n), comb (n
            * n, row by row).
        scales: The release's scale, one factor for each of the three groups.
        iterations: Column steps of `column_first_sinkhorn`.
        eps: The release's hc_eps.
        norm_eps: Inside the norm of the streams.

    Source:
        DeepSeek-V4 in transformers 5.23.
    """
    n = streams.shape[2]
    logits = _normed_projection(streams, projection, norm_eps) * _per_row(scales, n) + base
    read, write, comb = _groups(logits, n)
    return Mixing(
        read.sigmoid() + eps, 2 * write.sigmoid(), column_first_sinkhorn(comb, iterations, eps).mT
    )


def deepseek_readout_weights(
    streams: Streams,
    projection: Float[Tensor, "stream flat"],
    scale: Float[Tensor, "group=1"],
    base: Float[Tensor, " stream"],
    *,
    eps: float | int = 1e-6,
    norm_eps: float | int = 1e-6,
) -> OfEach:
    """The weights with which DeepSeek-V4 sums the streams before its final norm; the arguments are
    those of `deepseek_mixing`.
    """
    return (_normed_projection(streams, projection, norm_eps) * scale + base).sigmoid() + eps


def alternating_sinkhorn(logits: Matrix, iterations: int) -> Matrix:
    """exp(logits - row maximum), divided by its row sums and then its column sums, `iterations`
    times; sums are at least 1e-6.
    """
    matrix = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=1e-6)
        matrix = matrix / matrix.sum(-2, keepdim=True).clamp(min=1e-6)
    return matrix


def column_first_sinkhorn(logits: Matrix, iterations: int, eps: float | int) -> Matrix:
    """Softmax of the rows + eps, then one column step, then `iterations - 1` row and column steps;
    every sum has eps added.
    """
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def _normed_projection(streams: Streams, projection: Tensor, norm_eps: float | int) -> Tensor:
    flat = streams.flatten(2)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    return F.linear(F.rms_norm(wide, wide.shape[-1:], None, norm_eps), projection.to(wide.dtype))


def _per_row(factors: Float[Tensor, "group=3"], n: int) -> Tensor:
    """One factor for each row of a projection."""
    return torch.cat(
        [factor.expand(rows) for factor, rows in zip(factors, (n, n, n * n), strict=True)]
    )


def _groups(logits: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows for reading, for writing, and for the mixing matrix."""
    read, write, matrix = logits.split((n, n, n * n), dim=-1)
    return read, write, matrix.unflatten(-1, (n, n))
