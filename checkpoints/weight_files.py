"""Tensors in safetensors files or pickles, whole or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.gguf.reader import SUFFIX
from loopscope.checkpoints.jsons import read_object
from loopscope.checkpoints.pickles import read_pickle

_COMPILED, _PARALLEL = "_orig_mod.", "module."


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of a file (safetensors, or a pickle of tensors), or of all shards of an index, on
    disk until used.

    Raises:
        CheckpointError: A damaged or missing shard, or shards that do not hold what the index says.
    """
    if weights.suffix != ".json":
        return plain_weights(_read_whole(weights), weights)
    where = _shard_names(weights)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = _read_whole(_shard(weights, name))
        tensors |= {key: value for key, value in shard.items() if where.get(key) == name}
    absent = sorted(set(where) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{weights} promises {absent[0]!r} in {where[absent[0]]!r}, which does not hold it"
        )
    return plain_weights(tensors, weights)


def config_file(weights: Path) -> Path:
    """The file of a checkpoint's config: config.json beside the weights, or the one file that holds
    both.
    """
    return weights if weights.suffix == SUFFIX else weights.with_name("config.json")


def plain_weights(tensors: Mapping[Any, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file under the names that they have without wrappers such as torch.compile.

    Args:
        path: The file, for messages.

    Raises:
        CheckpointError: Names that are the same without their wrapper, a sparse tensor, one without
            data, or one whose elements share memory.
    """
    parallel = all(str(key).startswith(_PARALLEL) for key in tensors)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = str(key).removeprefix(_PARALLEL if parallel else "").replace(_COMPILED, "")
        if name in found:
            raise CheckpointError(
                f"{path} holds some keys both with and without the prefix {_COMPILED!r}, first"
                f" {shown(name)}; it must be one or the other"
            )
        _check_dense(name, tensor, path)
        found[name] = tensor
    return found


def _check_dense(key: str, tensor: Tensor, path: Path) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path}: {shown(key)} must be a dense tensor with data, got one of the layout"
            f" {tensor.layout} on the device {tensor.device.type!r}"
        )
    if tensor.is_quantized:
        raise CheckpointError(f"{path}: {shown(key)} must not be quantized, got {tensor.dtype}")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointError(
            f"{path}: {shown(key)} must have a stored number for each of its {tensor.numel()}"
            " elements, but some share one"
        )


def _shard_names(index: Path) -> dict[str, str]:
    """The shard of each key."""
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} must map each key to its shard under 'weight_map'")
    for key, name in where.items():
        if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) < 256:
            raise CheckpointError(
                f"{index}: weight_map.{key} must be the name of a file, got {shown(name)}"
            )
    return where


def _shard(index: Path, name: str) -> Path:
    """The file of a shard, which must lie beside the index."""
    shard = index.parent / name
    if "\0" in name or shard.name != name or name == "..":
        raise CheckpointError(f"{index} names the shard {name!r}, which is not beside it")
    if not shard.is_file():
        raise CheckpointError(
            f"{index} names the shard {name!r}, which is missing; the download is not complete"
        )
    return shard


def _read_whole(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_pickle(path)
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} must hold tensors by name, got {shown(sorted(map(str, content)))}"
        )
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
