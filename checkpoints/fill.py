"""Putting tensors into a model: checked key by key, without copying them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.registry import build

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 1e15
_ANGLES = "rotation."  # the tables of angles in releases have a number format of their own


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
    model = _empty(cfg, path)
    _check_second_copies(cfg, tensors, names or {}, path)
    expected = model.state_dict()
    found = _keys_by_name(cfg, list(expected), list(tensors), names, path)
    check_formats([tensors[found[name]] for name in expected if is_weight(name)], path)
    for name, want in expected.items():
        _check_tensor(found[name], tensors[found[name]], want.shape, path)
    model.load_state_dict({name: tensors[found[name]] for name in expected}, assign=True)
    return model


def _empty(cfg: LoopedConfig, path: Path) -> LoopedModel:
    """A model without memory for its weights."""
    try:
        with torch.device("meta"):
            return build(cfg)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: a {cfg.family} model of these sizes cannot be made: {error}"
        ) from None


def _keys_by_name(
    cfg: LoopedConfig,
    expected: list[str],
    keys: list[str],
    names: Mapping[str, str] | None,
    path: Path,
) -> dict[str, str]:
    """The file's key for each of our names; every name has a key, and every key a name."""
    ours = {name: name for name in expected} if names is None else names
    wanted = set(expected)
    unexpected = [key for key in keys if ours.get(key) not in wanted]
    if unexpected:
        raise CheckpointError(
            f"{path} has {len(unexpected)} unexpected key(s), first {shown(unexpected[0])}; a"
            f" {cfg.family} model has none of that name"
        )
    found = {ours[key]: key for key in keys}
    theirs = {name: key for key, name in reversed(list(ours.items()))}
    missing = [theirs[name] for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} key(s) of a {cfg.family} model with {cfg.n_layers}"
            f" layers, first {missing[0]!r}"
        )
    return found


def _check_second_copies(
    cfg: LoopedConfig, tensors: Mapping[str, Tensor], names: Mapping[str, str], path: Path
) -> None:
    """Refuse two keys that are one weight of the model, but hold different numbers."""
    first: dict[str, str] = {}
    for key in tensors:
        other = first.setdefault(names.get(key, key), key)
        if other != key and not same_values(tensors[other], tensors[key]):
            raise CheckpointError(
                f"{path}: {shown(other)} and {shown(key)} are one weight of a {cfg.family} model,"
                " but differ"
            )


def is_weight(name: str) -> bool:
    """Whether a tensor of a model's state has the number format of the weights."""
    return _ANGLES not in name


def of_one_format(model: LoopedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's state that have one number format in a file: neither tables of
    angles, nor weights that the family computes in float32 and that are stored so.
    """
    return {
        name: each
        for name, each in tensors.items()
        if is_weight(name)
        and not (each.dtype == torch.float32 and re.fullmatch(model.wide_weights, name))
    }


def check_formats(weights: Sequence[Tensor], path: Path, *, mixed: bool = True) -> None:
    """Refuse weights of several number formats.

    Args:
        mixed: Whether formats of 16 and 32 bits may stand beside each other.
    """
    kinds = {tensor.dtype for tensor in weights if tensor.is_floating_point()}
    if len(kinds) > 1 and not (mixed and kinds <= set(FORMATS[:3])):
        also = ", or have formats of 16 and 32 bits" if mixed else ""
        raise CheckpointError(
            f"{path} mixes the number formats {sorted(map(str, kinds))}; all weights of a model"
            f" must have one{also}"
        )


def _check_tensor(key: str, tensor: Tensor, shape: torch.Size, path: Path) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{path}: {key!r} must have the shape {list(shape)}, got {list(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: {key!r} must hold floating-point numbers, got {tensor.dtype}"
        )
    if tensor.dtype not in FORMATS:
        raise CheckpointError(
            f"{path}: {key!r} must hold numbers of 16, 32 or 64 bits, got {tensor.dtype}"
        )
    _check_values(key, tensor, path)


def _check_values(key: str, tensor: Tensor, path: Path) -> None:
    """Refuse values that are not finite, or so large that no model is trained to them.

    One look at the extremes, which are NaN where any value is, passes a good tensor in a fraction
    of the time that counting takes.
    """
    if tensor.numel() == 0 or all(abs(float(end)) <= _LARGEST for end in tensor.detach().aminmax()):
        return
    bad = large = 0
    for chunk in tensor.detach().flatten().split(1 << 20):
        finite = chunk.isfinite()
        bad += int(finite.logical_not().sum())
        if chunk.dtype != torch.float16:  # whose largest number is below the bound
            large += int((chunk.abs() > _LARGEST).logical_and(finite).sum())
    if bad:
        raise CheckpointError(
            f"{path}: {key!r} holds {bad} value(s) that are NaN or infinite; the weights are"
            " damaged"
        )
    if large:
        raise CheckpointError(
            f"{path}: {key!r} holds {large} value(s) beyond {_LARGEST:g}, whose products are not"
            " finite; the weights are damaged"
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
    if not same_values(ours, theirs):
        raise CheckpointError(f"{path}: {head} differs from {embedding}, but {why}")


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same format; NaN counts as 0, because
    `build_from` refuses it later.
    """
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype not in FORMATS:
        return False
    return torch.equal(one.nan_to_num(), other.nan_to_num())
