"""Weights of experts that are stored as codes with scales: NVFP4 and MXFP8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError

_FP4 = torch.tensor(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6],
    dtype=torch.float32,
    device="cpu",
)
_FP4_GROUP, _FP8_GROUP = 16, 32


def decoded(tensors: Mapping[str, Tensor], like: str, path: Path) -> dict[str, Tensor]:
    """Tensors with plain numbers in the place of NVFP4 or MXFP8 codes.

    Args:
        tensors: By key; codes have their scales beside them, under the same key with `_scale`.
        like: The key of a tensor in the number format that the numbers are to have.
        path: The file, for messages.

    Raises:
        CheckpointError: Codes and scales that do not fit each other.
    """
    found = dict(tensors)
    dtype = tensors[like].dtype if like in tensors else torch.float32
    for key in [name for name in tensors if f"{name}_scale" in tensors]:
        extra = {
            part: found.pop(f"{key}_{part}")
            for part in ("scale", "amax", "outer_scale_denominator")
            if f"{key}_{part}" in tensors
        }
        decode = _nvfp4 if "amax" in extra else _mxfp8
        try:
            found[key] = decode(tensors[key], dtype=dtype, **extra)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{path}: the codes under {key!r} and their scales do not fit: {error}"
            ) from None
    return found


def _nvfp4(
    codes: Tensor,
    scale: Tensor,
    amax: Tensor,
    outer_scale_denominator: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Two codes of four bits a byte, the low one first, times a scale for 16 values and one for
    each expert.
    """
    _require(codes, torch.uint8)
    outer = (amax.float() / outer_scale_denominator.float()).reshape(-1).expand(len(codes))
    out = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=dtype, device="cpu")
    for expert, mine in enumerate(codes):  # one at a time, as floats take eight times the memory
        values = _FP4[torch.stack([mine & 15, mine >> 4], dim=-1).flatten(-2).long()]
        scales = scale[expert].float() * outer[expert]
        out[expert] = _scaled(values, scales, _FP4_GROUP)
    return out


def _mxfp8(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Values of eight bits, times 2^(scale - 127) for 32 values."""
    _require(codes, torch.float8_e4m3fn)
    _require(scale, torch.uint8, torch.float8_e8m0fnu)
    powers = torch.exp2(scale.view(torch.uint8).float() - 127)
    out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    for expert, mine in enumerate(codes):
        out[expert] = _scaled(mine.float(), powers[expert], _FP8_GROUP)
    return out


def _scaled(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """Values times one scale for each group of a row."""
    needed = [values.shape[0], values.shape[1] // group]
    if list(scales.shape) != needed:
        raise ValueError(f"an expert's scales must be {needed}, got {list(scales.shape)}")
    grouped: Tensor = values.unflatten(-1, (-1, group))
    return (grouped * scales[..., None]).flatten(-2)


def _require(codes: Tensor, *kinds: torch.dtype) -> None:
    if codes.dtype not in kinds or codes.ndim != 3:
        raise ValueError(
            f"three axes of {' or '.join(map(str, kinds))} are needed, got {list(codes.shape)} of"
            f" {codes.dtype}"
        )
