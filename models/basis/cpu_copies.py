"""Copies to the CPU: from a GPU they are only begun, into pinned memory, while the run goes on."""

from __future__ import annotations

import torch
from torch import Tensor


def begun_copy(value: Tensor) -> Tensor:
    """A value on the CPU; from a GPU it is on its way there until `wait_for_copies`."""
    if value.device.type != "cuda":
        return value.cpu()
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True, device="cpu")
    return pinned.copy_(value, non_blocking=True)


def wait_for_copies(device: torch.device) -> None:
    """Wait until all copies that were begun from a device are there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CpuCopies(dict[str, Tensor]):
    """A dictionary that keeps its values on the CPU; they are there after `finish`."""

    def __init__(self) -> None:
        super().__init__()
        self._devices: set[torch.device] = set()

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, begun_copy(value))
        self._devices.add(value.device)

    def finish(self) -> None:
        """Wait until all values are there."""
        for device in self._devices:
            wait_for_copies(device)
