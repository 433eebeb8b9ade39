"""LoRA adapters in peft's layout, merged into the weights of a release."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.jsons import read_object
from loopscope.checkpoints.weight_files import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_PREFIX = "base_model.model."
_ROOTS = ("", "model.", "transformer.")  # what a path of a module may begin with, or lack
_HARMLESS = {
    "names the base model and the versions": (
        "auto_mapping",
        "base_model_name_or_path",
        "peft_version",
        "revision",
        "task_type",
    ),
    "acts in training alone": (
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "runtime_config",
    ),
    "says what the file of weights shows": (
        "bias",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
    ),
    "is decided by how the base stores a matrix": ("fan_in_fan_out",),
    "belongs to a kind of adapter that is off": ("megatron_core", "qalora_group_size"),
}
_SWITCHES = ("ensure_weight_tying", "lora_bias", "use_bdlora", "use_dora", "use_qalora")


@dataclass(frozen=True)
class _Settings:
    """The part of an adapter's config that a merge needs.

    Attributes:
        rank, alpha: Of every module that no pattern of `ranks` and `alphas` matches.
        by_root: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        targets: The ends of the paths of the target modules, or a regular expression for them.
        saved: The modules that are stored whole.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    by_root: bool
    targets: list[str] | str
    saved: list[str]

    def scale(self, module: str) -> float:
        """The factor of a module's update."""
        rank, alpha = self.rank_of(module), _of_pattern(self.alphas, module, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.by_root else rank)

    def rank_of(self, module: str) -> int:
        """The rank of a module's update."""
        return int(_of_pattern(self.ranks, module, self.rank))

    def is_target(self, module: str) -> bool:
        """Whether the config names a module."""
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or bool(re.fullmatch(self.targets, module))
        return any(f".{module}".endswith(f".{target}") for target in self.targets)


@dataclass
class _Pair:
    """The two factors of a module's update; those of an embedding are stored turned."""

    a: Tensor | None = None
    b: Tensor | None = None
    of_embedding: bool = False


def merged(
    tensors: Mapping[str, Tensor], folder: Path, is_input_first: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The tensors of a release with an adapter merged into them, as peft merges it.

    The matrix W of a target module becomes W + scale B A: computed in float32 at least, stored in
    W's own format. The scale is alpha / r, or alpha / sqrt(r) for rank-stabilised adapters. A
    module that is stored whole takes the place of the release's.

    Args:
        tensors: The release's tensors by its own keys; they stay as they are.
        folder: Where adapter_config.json and adapter_model.safetensors lie.
        is_input_first: Whether the matrix of a key is stored input first.

    Raises:
        FileNotFoundError: No adapter in the folder.
        CheckpointError: A setting that is not computed here, a module that the release does not
            have, or matrices that do not fit.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}; an adapter is a folder with {CONFIG} and {WEIGHTS}, as"
                " peft saves it"
            )
    path, settings = folder / WEIGHTS, _settings(folder / CONFIG)
    pairs, whole = _parts(read_tensors(path), path)
    _check_complete(settings, pairs, whole, path)
    found = dict(tensors)
    for name, value in whole.items():
        key = _key_of(name, found, path)
        _check_shape(name, value, found[key].shape, path)
        found[key] = value.to(found[key].dtype)
    for module, pair in pairs.items():
        key = _key_of(f"{module}.weight", found, path)
        delta = _update(module, pair, settings, path)
        delta = delta.T if pair.of_embedding or is_input_first(key) else delta
        _check_shape(module, delta, found[key].shape, path)
        found[key] = (found[key] + delta).to(found[key].dtype)
    return found


def _settings(path: Path) -> _Settings:
    values = read_object(path)
    fields = ConfigFields(values, path, harmless=_HARMLESS, ignorable=False)
    fields.only("peft_type", "LORA", why="only LoRA adapters are merged here")
    for name in _SWITCHES:
        fields.only(name, False, None, why="only plain LoRA is merged here")
    start = "other starts change the base's own weights"
    fields.only("init_lora_weights", True, False, None, "gaussian", "eva", why=start)
    names = {name: _names(fields, values, name) for name in ("target_modules", "modules_to_save")}
    rank, alpha = fields.integer("r"), fields.number("lora_alpha")
    ranks, alphas = (fields.mapping(f"{name}_pattern", None) or {} for name in ("rank", "alpha"))
    _check_numbers(path, [rank, *ranks.values()], alphas.values())
    by_root = fields.boolean("use_rslora", False)
    fields.done()
    targets, saved = names["target_modules"], names["modules_to_save"]
    saved = [saved] if isinstance(saved, str) else saved
    return _Settings(rank, alpha, ranks, alphas, by_root, targets, saved)


def _check_numbers(path: Path, ranks: Iterable[object], alphas: Iterable[object]) -> None:
    """Refuse ranks below 1 and scales that are no numbers."""
    for rank in ranks:
        if not isinstance(rank, int) or rank < 1:
            raise CheckpointError(f"{path}: r and rank_pattern must be at least 1, got {rank!r}")
    for alpha in alphas:
        if not isinstance(alpha, int | float):
            raise CheckpointError(f"{path}: alpha_pattern must hold numbers, got {alpha!r}")


def _names(fields: ConfigFields, values: Mapping[str, Any], name: str) -> list[str] | str:
    """A list of names of modules, or one regular expression."""
    fields.unused(name)
    value = values.get(name) or []
    if isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    ):
        return value
    raise CheckpointError(f"{fields.path}: {name} must be a list of names, got {shown(value)}")


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's path matches."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _parts(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """The factors by module, and the tensors that are stored whole by key."""
    pairs: dict[str, _Pair] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(name)
        if factor is None:
            whole[name.replace(".modules_to_save.default", "")] = tensor
            continue
        pair = pairs.setdefault(factor[1], _Pair(of_embedding=bool(factor[2])))
        setattr(pair, factor[3].lower(), tensor)
    half = [module for module, pair in pairs.items() if pair.a is None or pair.b is None]
    if half:
        raise CheckpointError(f"{path} must hold both factors of {shown(half[0])}, but lacks one")
    return pairs, whole


def _check_complete(
    settings: _Settings, pairs: Mapping[str, _Pair], whole: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse a file that holds other modules than the config names."""
    for module in pairs:
        if not settings.is_target(module):
            raise CheckpointError(
                f"{path} holds factors of {shown(module)}, which is none of the target_modules of"
                f" {CONFIG} ({shown(settings.targets)})"
            )
    if not pairs and not whole:
        raise CheckpointError(f"{path} holds no tensors")
    kept = {key.rpartition(".")[0] for key in whole}
    named = settings.targets if isinstance(settings.targets, list) else []
    _check_present(named, set(pairs), path)
    _check_present(settings.saved, kept, path)


def _check_present(ends: Sequence[str], modules: Set[str], path: Path) -> None:
    """Refuse a name with which no module's path ends."""
    for end in ends:
        if not any(f".{module}".endswith(f".{end}") for module in modules):
            raise CheckpointError(f"{path} holds nothing of {shown(end)}, which {CONFIG} names")


def _key_of(name: str, tensors: Mapping[str, Tensor], path: Path) -> str:
    """The release's key for a name in the adapter, which may have another root."""
    bare = next((name.removeprefix(root) for root in _ROOTS[1:] if name.startswith(root)), name)
    for key in (name, *(root + bare for root in _ROOTS)):
        if key in tensors:
            return key
    raise CheckpointError(
        f"{path} cannot be merged: the release holds no {shown(name)}, which the adapter changes"
    )


def _update(module: str, pair: _Pair, settings: _Settings, path: Path) -> Tensor:
    """The scaled product of a module's factors, output first."""
    assert pair.a is not None, "checked when the file was read"
    assert pair.b is not None, "likewise"
    rank = settings.rank_of(module)
    if pair.a.ndim != 2 or pair.b.ndim != 2 or not pair.a.shape[0] == pair.b.shape[1] == rank:
        raise CheckpointError(
            f"{path}: the factors of {shown(module)} must have the shapes [{rank}, in] and [out,"
            f" {rank}], got {list(pair.a.shape)} and {list(pair.b.shape)}"
        )
    kind = torch.promote_types(pair.a.dtype, torch.float32)
    return (pair.b.to(kind) @ pair.a.to(kind)) * settings.scale(module)


def _check_shape(name: str, tensor: Tensor, shape: torch.Size, path: Path) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{path}: {shown(name)} must fit a tensor of the shape {list(shape)} of the release,"
            f" got {list(tensor.shape)}"
        )
