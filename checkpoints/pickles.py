"""Torch pickles, read without running anything that is in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loopscope.checkpoints.errors import CheckpointError

WHAT_IT_IS = (
    "a released checkpoint is a torch file with a 'model_state_dict', or the one of a family that"
    " is known"
)


class Record:
    """A stand-in for an object of a foreign class: its attributes, and none of its code."""


def read_pickle(path: Path, records: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a torch file, with memory-mapped tensors.

    Args:
        records: Foreign classes, "module.Class", whose objects are read as inert `Record`s; any
            other class is refused.

    Raises:
        CheckpointError: Not a torch file, or one that is cut short, holds code, or holds no
            mapping.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start not in (b"PK", b"\x80\x02"):
        raise CheckpointError(
            f"{path} is not a checkpoint: {WHAT_IT_IS}, and this file does not begin like one"
        )
    stand_ins: list[Any] = [
        (type(name.rpartition(".")[2], (Record,), {}), name) for name in records
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=start == b"PK")
    except pickle.UnpicklingError as error:
        named = re.search(
            r"(?:GLOBAL|global|class|function)\s+`?([A-Za-z_][\w.]*\.[\w.]+)", str(error)
        )
        what = f" ({named.group(1)})" if named else ""
        raise CheckpointError(
            f"{path} holds code{what}, not only tensors; it is refused, because unpickling classes"
            " and functions can run anything"
        ) from None
    except (
        Exception
    ) as error:  # torch raises many types on damaged files; each is the same fact to the caller
        raise CheckpointError(
            f"{path} is damaged or cut short: {WHAT_IT_IS}, and reading it failed with"
            f" {type(error).__name__}"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds no model: {WHAT_IT_IS}, but this file holds {type(content).__name__}"
        )
    return dict(content)
