"""The number format and the device of a loaded model's weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fill import FORMATS, is_weight, of_one_format
from loopscope.models.basis.arguments import Argument
from loopscope.models.core.base import LoopedModel


def checked_format(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A number format from itself or its name.

    Raises:
        ValueError: No format that models compute in.
    """
    names = {str(each).removeprefix("torch."): each for each in FORMATS}
    found = names.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(names)}, got {dtype!r}")
    return found


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """A device of this machine.

    Raises:
        ValueError: No such device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"device must be one of this machine, such as 'cpu' or 'cuda', got {device!r}: {said}"
        ) from None
    if found.type == "meta":
        raise ValueError("device must be one that keeps numbers, got 'meta'")
    return found


def place_(
    model: LoopedModel, dtype: torch.dtype | None, device: torch.device | None, path: Path
) -> None:
    """Give a model's weights one number format, and bring them to a device.

    Each tensor goes from the file to its place in one step. Tables of angles keep their format.

    Args:
        dtype: None means the format of the file, and float32 with a warning where the file mixes
            formats: then no weight is rounded.
        device: None means the CPU.
        path: The file, for messages.

    Raises:
        CheckpointError: A weight that float16 cannot hold.
    """
    state = {name: each.detach() for name, each in model.state_dict().items()}
    kinds = sorted({str(each.dtype) for each in of_one_format(model, state).values()})
    if dtype is None and len(kinds) > 1:
        dtype = torch.float32
        warnings.warn(
            f"{path} mixes the number formats {', '.join(kinds)}; all weights are loaded in"
            " float32, unless dtype= names another format",
            stacklevel=3,
        )
    placed = {name: _placed(name, each, dtype, device, path) for name, each in state.items()}
    if any(placed[name] is not state[name] for name in state):
        model.load_state_dict(placed, assign=True)
    if device is not None:
        model.to(device)


def _placed(
    name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None, path: Path
) -> Tensor:
    """One tensor of a model's state in its format, at its place."""
    kind = dtype if dtype is not None and is_weight(name) else tensor.dtype
    if kind == torch.float16 and tensor.dtype != kind:
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if largest > torch.finfo(kind).max:
            raise CheckpointError(
                f"{path}: {name!r} holds the magnitude {largest:g}, which float16 cannot hold;"
                " pass ",
                Argument("dtype", "bfloat16"),
                " or ",
                Argument("dtype", "float32"),
            )
    return tensor.to(device=device or tensor.device, dtype=kind)
