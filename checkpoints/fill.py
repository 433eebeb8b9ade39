"""Putting tensors into a model: checked key by key, without copying them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.registry import build


def build_from(
    cfg: LoopedConfig, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None, path: Path
) -> LoopedModel:
    """A model of `cfg` that holds exactly these tensors, assigned without copying.

    Args:
        tensors: The tensors by the file's own keys; memory-mapped ones stay on disk until used.
        names: Our parameter name for each possible key; None where the keys are our names.
        path: The file, for messages.

    Raises:
        CheckpointError: A missing or unexpected key, a wrong shape, a type that is not floating
            point, or a value that is not finite; the first is named by the file's own key.
    """
    with torch.device("meta"):
        model = build(cfg)
    expected = model.state_dict()
    ours = {name: name for name in expected} if names is None else names
    unexpected = [key for key in tensors if ours.get(key) not in expected]
    if unexpected:
        raise CheckpointError(
            f"{path} has {len(unexpected)} unexpected key(s), first {unexpected[0]!r}; a"
            f" {cfg.family} model has none of that name"
        )
    found = {ours[key]: key for key in tensors}
    theirs = {name: key for key, name in reversed(list(ours.items()))}
    missing = [theirs[name] for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} key(s) of a {cfg.family} model with {cfg.n_layers}"
            f" layers, first {missing[0]!r}"
        )
    weights = dict(
        model.named_parameters()
    )  # tables of angles and the like are stored in a format of their own
    kinds = {
        tensor.dtype
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and ours[key] in weights
    }
    if len(kinds) > 1:
        raise CheckpointError(
            f"{path} mixes the number formats {sorted(map(str, kinds))}; all weights of a model"
            " must have one"
        )
    for name, want in expected.items():
        _check_tensor(found[name], tensors[found[name]], want.shape, path)
    model.load_state_dict({name: tensors[found[name]] for name in expected}, assign=True)
    return model


def _check_tensor(key: str, tensor: Tensor, shape: torch.Size, path: Path) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{path}: {key!r} must have the shape {list(shape)}, got {list(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: {key!r} must hold floating-point numbers, got {tensor.dtype}"
        )
    bad: int = sum(
        int(chunk.isfinite().logical_not().sum())
        for chunk in tensor.detach().flatten().split(1 << 20)
    )
    if bad:
        raise CheckpointError(
            f"{path}: {key!r} holds {bad} value(s) that are NaN or infinite; the weights are"
            " damaged"
        )


def drop_tied_head(
    tensors: dict[str, Tensor], head: str, embedding: str, path: Path, why: str
) -> None:
    """Take away a stored head that equals the embedding.

    Args:
        head, embedding: Their keys.
        why: The fact that ties the two, for the message.

    Raises:
        CheckpointError: A head that differs from the embedding.
    """
    ours, theirs = tensors.pop(head, None), tensors.get(embedding)
    if ours is None or theirs is None:
        return
    if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        raise CheckpointError(f"{path}: {head} differs from {embedding}, but {why}")
