"""How the releases of one family are read: the form of a table in `tables/`, and reading by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loopscope.checkpoints.contents import Contents
from loopscope.checkpoints.errors import CheckpointError, config_errors, shown
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.harmless import Reasons
from loopscope.checkpoints.fill import build_from, drop_tied_head
from loopscope.checkpoints.weight_files import config_file
from loopscope.models.basis.arguments import Argument
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig

Release = tuple[Mapping[str, Any], Mapping[str, Tensor]]


Recognizes = Callable[[Mapping[str, Any], frozenset[str]], bool]


def of_type(model_type: str) -> Recognizes:
    """A table's `recognizes` by the config's field model_type alone."""
    return lambda values, keys: values.get("model_type") == model_type


@dataclass(frozen=True)
class Table:
    """How one family's releases are read.

    Attributes:
        family: The family's name among the configs.
        recognizes: Whether a config and the keys of its weights are of this family. No release is
            recognised by two tables.
        config: Our config from the released fields. `config` takes the fields, the tensors by key,
            and the options that were passed to `load`; it removes the options that it reads.
        names: Our parameter name for each key that a file of this config may have.
        harmless: The fields that never change a result of this family, by the reason; those that
            never change one of any family are listed in `fields/harmless.py`.
        skipped: Keys that hold nothing which the forward pass needs, as a regular expression.
        tied: Where the config ties the head to the embedding: the key of the head, and the key of
            the embedding. A head that is stored must equal the embedding.
        input_first: The keys whose matrices are stored input first, as a regular expression.
        options: The options that `config` reads, and a sentence on each.
        readout: Where answers are read unless the caller says otherwise.
        records: Foreign classes that the release's pickle holds, "module.Class"; their objects are
            read as inert records.
        unpack: The config and the tensors in the content of the release's pickle; None for the
            content of another family's pickle.
        decode: Plain tensors in the place of codes, from the tensors by key and their file.
        releases: The public releases that are known: a Hugging Face repository id, and a note that
            helps to choose.
    """

    family: str
    recognizes: Recognizes
    config: Callable[[ConfigFields, Mapping[str, Tensor], dict[str, Any]], LoopedConfig]
    names: Callable[[Any], Mapping[str, str]]
    harmless: Reasons = field(default_factory=dict)
    skipped: str = r".*rotary_emb\.inv_freq"
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    input_first: str = r"(?!)"
    options: Mapping[str, str] = field(default_factory=dict)
    readout: str | None = "last_real"
    records: tuple[str, ...] = ()
    unpack: Callable[[Mapping[str, Any]], Release | None] = field(default=lambda content: None)
    decode: Callable[[Mapping[str, Tensor], Path], Mapping[str, Tensor]] = field(
        default=lambda tensors, path: tensors
    )
    releases: tuple[tuple[str, str], ...] = ()

    def is_input_first(self, key: str) -> bool:
        """Whether the matrix of a key is stored input first."""
        return re.fullmatch(self.input_first, key) is not None


def recognize(release: Release, tables: tuple[Table, ...], path: Path) -> Table:
    """The one table that recognises a release.

    Args:
        path: The file of the release's config, for messages.

    Raises:
        CheckpointError: No table recognises the release, or several do.
    """
    values, tensors = release
    keys = frozenset(tensors)
    found = [table for table in tables if table.recognizes(values, keys)]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} could be of the families {' and '.join(table.family for table in found)};"
            " remove the fields that belong to the other one"
        )
    if not found:
        kind = shown(values.get("model_type", "none"))
        known = ", ".join(sorted({table.family for table in tables}))
        raise CheckpointError(
            f"{path} names no family that can be loaded (its model_type is {kind}); those are"
            f" {known}"
        )
    return found[0]


def load_by(
    table: Table,
    release: Release,
    weights: Path,
    options: Mapping[str, Any],
    ignore: Sequence[str] = (),
) -> LoopedModel:
    """A model from a release of a table's family.

    Args:
        release: The config, and the tensors by key.
        weights: The file that holds the tensors, for messages.
        options: Facts that the release does not say, by the names that the table knows.
        ignore: Fields of the config that are read as if they were not there.

    Raises:
        CheckpointError: The config, a key or an option does not fit the family.
    """
    values, tensors = release
    path = config_file(weights)
    kept_values = _without(values, ignore, path)
    fields = ConfigFields(kept_values, path, tensors, harmless=table.harmless)
    left = dict(options)
    with config_errors(path):
        cfg = table.config(fields, tensors, left)
    fields.done()
    Contents.of(tensors).check_ours(path, cfg.to_dict())
    if left:
        raise CheckpointError(
            f"{weights}: a {table.family} release does not take ",
            Argument(*next(iter(left.items()))),
        )
    kept = {key: tensor for key, tensor in tensors.items() if not re.fullmatch(table.skipped, key)}
    kept = dict(table.decode(kept, weights))
    if getattr(cfg, "tied", False):
        drop_tied_head(kept, *table.tied, weights, "the config ties the head to the embedding")
    return build_from(cfg, kept, table.names(cfg), weights)


def _without(values: Mapping[str, Any], ignore: Sequence[str], path: Path) -> dict[str, Any]:
    """A config without the fields that the caller ignores, each of which it must have."""
    for name in ignore:
        if name not in values:
            raise CheckpointError(
                f"{path} has no field {shown(name)}, so ",
                Argument("ignore"),
                f" cannot name it; its fields are {', '.join(sorted(values))}",
            )
    return {name: value for name, value in values.items() if name not in ignore}
