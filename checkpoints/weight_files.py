"""Tensors in safetensors files, whole or in shards."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.jsons import read_object


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all shards of an index, on disk until used.

    Raises:
        CheckpointError: A damaged or missing shard, or shards that do not hold what the index says.
    """
    if weights.suffix != ".json":
        return _read_safetensors(weights)
    where = read_object(weights).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{weights} must map each key to its shard under 'weight_map'")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = _read_safetensors(_shard(weights, str(name)))
        tensors |= {key: value for key, value in shard.items() if where.get(key) == name}
    absent = sorted(set(where) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{weights} promises {absent[0]!r} in {where[absent[0]]!r}, which does not hold it"
        )
    return tensors


def _shard(index: Path, name: str) -> Path:
    """The file of a shard, which must lie beside the index."""
    shard = index.parent / name
    if shard.resolve().parent != index.parent.resolve() and not shard.is_symlink():
        raise CheckpointError(f"{index} names the shard {name!r}, which is not beside it")
    if not shard.is_file():
        raise CheckpointError(
            f"{index} names the shard {name!r}, which is missing; the download is not complete"
        )
    return shard


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
