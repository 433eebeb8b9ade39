"""Sharing work among the processes of `accelerate launch`; with one process nothing is shared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

_Item = TypeVar("_Item")


def n_ranks() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(items: list[_Item]) -> list[_Item]:
    """This process's part: every n-th item."""
    if n_ranks() == 1:
        return items
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def gathered(found: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What all processes found, on the CPU where there are several."""
    if n_ranks() == 1:
        return dict(found)
    parts = gather_object([(index, value.cpu()) for index, value in found.items()])
    return dict(parts)
