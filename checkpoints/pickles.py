"""Torch pickles, read without running anything that is in them."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loopscope.checkpoints.errors import CheckpointError, shown

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
    zipped = _is_zip(path)
    stand_ins: list[Any] = [
        (type(name.rpartition(".")[2], (Record,), {}), name) for name in records
    ]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_refusal(error)}") from None
    except Exception as error:  # torch raises many types on damaged files
        raise CheckpointError(
            f"{path} is damaged or cut short: {WHAT_IT_IS}, and reading it failed with"
            f" {type(error).__name__}"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds no model: {WHAT_IT_IS}, but this file holds {type(content).__name__}"
        )
    return dict(content)


def _is_zip(path: Path) -> bool:
    """Whether a file is a zip archive as torch writes it, and not an older torch pickle.

    Raises:
        CheckpointError: A file of neither kind, or an archive that was compressed.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start not in (b"PK", b"\x80\x02"):
        raise CheckpointError(
            f"{path} is not a checkpoint: {WHAT_IT_IS}, and this file does not begin like one"
        )
    if start == b"PK":
        _check_archive(path)
    return start == b"PK"


def _check_archive(path: Path) -> None:
    """Refuse an archive whose entries are not stored as they are: torch maps them into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short: {WHAT_IT_IS}, and reading it failed with"
            f" {type(error).__name__}"
        ) from None
    packed = [
        each for each in entries if each.compress_type or each.file_size != each.compress_size
    ]
    if packed or sum(each.file_size for each in entries) > path.stat().st_size:
        name = packed[0].filename if packed else entries[0].filename
        raise CheckpointError(
            f"{path} was zipped again with compression ({shown(name)}); unzip it, and zip it"
            " without compression, as torch.save does"
        )


def _refusal(error: pickle.UnpicklingError) -> str:
    named = re.search(r"(?:GLOBAL|global|class|function)\s+`?([A-Za-z_][\w.]*\.[\w.]+)", str(error))
    if named is None and "nsupported" not in str(error):
        return f"is damaged or cut short: {WHAT_IT_IS}, and it cannot be unpickled"
    what = f" ({named.group(1)})" if named else ""
    return (
        f"holds code{what}, not only tensors; it is refused, because unpickling classes and"
        " functions can run anything"
    )
