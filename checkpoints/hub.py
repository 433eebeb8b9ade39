"""Models in the layouts of their public releases: config.json with safetensors, whole or sharded,
or a pickle beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fill import build_from
from loopscope.checkpoints.jsons import read_object
from loopscope.checkpoints.pickles import read_pickle
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig

Release = tuple[Mapping[str, Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Table:
    """How one family's releases are read.

    Attributes:
        family: Its name among the configs.
        recognizes: Whether a config and the keys of its weights are of this family.
        config: Our config from the released fields; takes the fields, the tensors by key, and the
            options that were passed to `load`, which it removes as it reads them.
        names: Our parameter name for each key that the file may have.
        skipped: Keys that hold nothing which the forward pass needs.
        tied: The key of a head and of the embedding that it must equal where the config ties them.
        options: What `config` takes of the caller's options, and what each says.
        readout: Where answers are read unless the caller says otherwise.
        records: Foreign classes that the release's pickle holds, "module.Class"; they are read as
            inert records.
        unpack: The config and the tensors in the content of the release's pickle; None where it is
            a state dict.
    """

    family: str
    recognizes: Callable[[Mapping[str, Any], frozenset[str]], bool]
    config: Callable[[ConfigFields, Mapping[str, Tensor], dict[str, Any]], LoopedConfig]
    names: Callable[[Any], Mapping[str, str]]
    skipped: str = r".*rotary_emb\.inv_freq"
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    options: Mapping[str, str] = field(default_factory=dict)
    readout: str | None = "last_real"
    records: tuple[str, ...] = ()
    unpack: Callable[[Mapping[str, Any]], Release | None] = field(default=lambda content: None)


def load_hub(
    release: Release, weights: Path, tables: tuple[Table, ...], options: Mapping[str, Any]
) -> tuple[LoopedModel, Table]:
    """A model from a release, and the table that it was read by.

    Args:
        release: Its config and its tensors by key.
        weights: The file that they come from, for messages.
        options: What the release does not say, by the names that the family's loader knows.

    Raises:
        CheckpointError: No family is recognised, or the config, a key or an option does not fit it.
    """
    values, tensors = release
    path = weights.with_name("config.json")
    table = _recognize(values, tensors, tables, path)
    fields, left = ConfigFields(values, path), dict(options)
    try:
        cfg = table.config(fields, tensors, left)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fields.done()
    if left:
        raise CheckpointError(
            f"{weights}: a {table.family} release takes no {next(iter(left))}=, got"
            f" {next(iter(left.values()))!r}"
        )
    kept = {key: tensor for key, tensor in tensors.items() if not re.fullmatch(table.skipped, key)}
    if getattr(cfg, "tied", False):
        _drop_tied_head(kept, table.tied, weights)
    return build_from(cfg, kept, table.names(cfg), weights), table


def recognized_family(release: Release, weights: Path, tables: tuple[Table, ...]) -> str:
    """The family of a release."""
    return _recognize(*release, tables, weights.with_name("config.json")).family


def open_release(weights: Path, tables: tuple[Table, ...]) -> Release:
    """The config and the tensors of a released folder: model.safetensors, its index or a pickle,
    with config.json beside it.
    """
    values = read_object(weights.with_name("config.json"))
    if weights.suffix in (".safetensors", ".json"):
        return values, read_tensors(weights)
    content = read_foreign(weights, tables)
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(content):
        raise CheckpointError(
            f"{weights} must hold tensors by name, got {sorted(map(str, content))[:6]}"
        )
    return values, tensors


def read_foreign(weights: Path, tables: tuple[Table, ...]) -> dict[str, Any]:
    """The content of a pickle, with the classes that known releases hold as inert records."""
    return read_pickle(weights, tuple(record for table in tables for record in table.records))


def unpack(content: Mapping[str, Any], tables: tuple[Table, ...]) -> Release | None:
    """The config and the tensors in a pickle that holds both in the way of one of the families;
    None where it does not.
    """
    return next(
        (found for found in (table.unpack(content) for table in tables) if found is not None), None
    )


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all shards that an index names; they stay on disk
    until used.

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
        shard = weights.parent / str(name)
        if shard.resolve().parent != weights.parent.resolve() and not shard.is_symlink():
            raise CheckpointError(f"{weights} names the shard {name!r}, which is not beside it")
        if not shard.is_file():
            raise CheckpointError(
                f"{weights} names the shard {name!r}, which is missing; the download is not"
                " complete"
            )
        tensors.update(
            {
                key: value
                for key, value in _read_safetensors(shard).items()
                if where.get(key) == name
            }
        )
    absent = sorted(set(where) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{weights} promises {absent[0]!r} in {where[absent[0]]!r}, which does not hold it"
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None


def _recognize(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], tables: tuple[Table, ...], path: Path
) -> Table:
    keys = frozenset(tensors)
    for table in tables:
        if table.recognizes(values, keys):
            return table
    kind = values.get("model_type", "none")
    known = ", ".join(sorted({table.family for table in tables}))
    raise CheckpointError(
        f"{path} names no family that can be loaded (its model_type is {kind!r}); those are {known}"
    )


def _drop_tied_head(tensors: dict[str, Tensor], tied: tuple[str, str], path: Path) -> None:
    head, embedding = tensors.pop(tied[0], None), tensors.get(tied[1])
    if (
        head is not None
        and embedding is not None
        and not torch.equal(head.nan_to_num(), embedding.nan_to_num())
    ):
        raise CheckpointError(
            f"{path}: {tied[0]} differs from {tied[1]}, but the config ties the head to the"
            " embedding"
        )
