"""Dictionaries in SAELens's format: a folder with cfg.json and sae_weights.safetensors.

What is read and written here are the fields of SAELens 6: `architecture`, `d_in`, `d_sae`, `d_out`,
`k`, `apply_b_dec_to_input`, `normalize_activations`, `reshape_activations`, `metadata`; and the
tensors `W_enc`, `b_enc`, `W_dec`, `b_dec`, `threshold`. What is ours stands in the metadata under
`loopscope`, which SAELens keeps and does not read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from itertools import count, takewhile
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopscope.interp.dictionaries.coder import Coder
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.reading import Reading
from loopscope.models.basis.files import usual_mode

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_FORMAT = "6.54.12"  # the version of SAELens whose fields these are
_BY_THRESHOLD = ("jumprelu", "standard", "transcoder", "jumprelu_transcoder")
_KNOWN = ("topk", *_BY_THRESHOLD)


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Write a dictionary into a new folder in the format of SAELens, whole or not at all.

    Args:
        dictionary: The dictionary to write.
        folder: The folder to make. It holds cfg.json and sae_weights.safetensors, or for a
            dictionary with several coders one such folder per iteration (loop_0, loop_1, ...).

    Raises:
        FileExistsError: The folder exists already.
        ValueError: SAELens has no such dictionary, as is so for a transcoder with a fixed k.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; give the name of a new folder")
    configs = [_config(dictionary, coder) for coder in dictionary.coders]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for loop, (config, coder) in enumerate(zip(configs, dictionary.coders, strict=True)):
            inside = temporary / f"loop_{loop}" if len(configs) > 1 else temporary
            inside.mkdir(exist_ok=True)
            save_file(_tensors(coder), inside / WEIGHTS)
            (inside / CONFIG).write_text(json.dumps(config, indent=1))
        usual_mode(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_dictionary(folder: str | Path, reading: Reading | None = None) -> Dictionary:
    """Read a dictionary from a folder that `save_dictionary` or SAELens wrote.

    Args:
        folder: The folder.
        reading: The hook points. They must be given for a folder that SAELens wrote; its one coder
            is then used at all iterations.

    Returns:
        The dictionary.

    Raises:
        ValueError: A file is not of the format, the architecture is not supported, or `reading` is
            missing.
    """
    folder = Path(folder)
    inside = list(takewhile(Path.exists, (folder / f"loop_{loop}" for loop in count())))
    several = bool(inside) and not (folder / CONFIG).exists()
    read = [_read(each) for each in (inside if several else [folder])]
    own = _ours(read[0][0])
    if reading is None and not own:
        raise ValueError(
            f"{folder} does not say which hook points of a looped model it reads; pass reading="
        )
    places = reading if reading is not None else _reading(folder, own)
    kind = own.get("kind", "transcoder" if "transcoder" in read[0][0]["architecture"] else "shared")
    coders = tuple(coder for _, coder in read)
    return Dictionary(kind, coders, places, coders[0].W_enc.new_zeros(len(coders), 0))


def _ours(config: dict[str, Any]) -> dict[str, Any]:
    """The part of the metadata that `save_dictionary` wrote; nothing where it wrote none."""
    metadata = config.get("metadata")
    own = metadata.get("loopscope") if isinstance(metadata, dict) else None
    return own if isinstance(own, dict) else {}


def _reading(folder: Path, own: dict[str, Any]) -> Reading:
    """The hook points that are written in the metadata."""
    given = own.get("reading")
    types = get_type_hints(Reading.__init__)
    types.pop("return")
    if not isinstance(given, dict) or {n: type(v) for n, v in given.items()} != types:
        raise ValueError(
            f"the reading in {folder / CONFIG} must have the fields"
            f" {', '.join(f'{name} ({kind.__name__})' for name, kind in types.items())}, got"
            f" {given!r}"
        )
    return Reading(**given)


def _config(dictionary: Dictionary, coder: Coder) -> dict[str, Any]:
    across = dictionary.kind == "transcoder"
    if across and coder.k is not None:
        raise ValueError(
            "SAELens has no transcoder that keeps the k largest features; train one with"
            " activation='batch_topk' or 'jumprelu' to save it"
        )
    by_k = {"architecture": "topk", "k": coder.k, "rescale_acts_by_decoder_norm": False}
    named = {"architecture": "jumprelu_transcoder" if across else "jumprelu"}
    reading = dictionary.reading
    return {
        **(named if coder.k is None else by_k),
        **({"d_out": coder.d_out} if across else {}),
        "d_in": coder.d_in,
        "d_sae": coder.n_features,
        "dtype": str(coder.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": coder.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _FORMAT,
            "sae_lens_training_version": None,
            "hook_name": reading.hook,
            "model_name": reading.family,
            "loopscope": {"kind": dictionary.kind, "reading": asdict(reading)},
        },
    }


def _tensors(coder: Coder) -> dict[str, Tensor]:
    named = {name: getattr(coder, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if coder.threshold is not None:
        named["threshold"] = coder.threshold
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _read(folder: Path) -> tuple[dict[str, Any], Coder]:
    """The config and the coder of one folder."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is no dictionary in SAELens's format ({CONFIG} and {WEIGHTS}): {error}"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} must hold one object, got a {type(config).__name__}")
    kind = config.get("architecture")
    if kind not in _KNOWN:
        raise ValueError(f"the architecture must be one of {', '.join(_KNOWN)}, got {kind!r}")
    for field in ("normalize_activations", "reshape_activations"):
        if config.get(field, "none") != "none":
            raise ValueError(
                f"{field} must be 'none', got {config[field]!r}; fold it into the weights first"
            )
    _check_integers(config, folder)
    sizes = {
        "W_enc": [config["d_in"], config["d_sae"]],
        "b_enc": [config["d_sae"]],
        "W_dec": [config["d_sae"], config.get("d_out", config["d_in"])],
        "b_dec": [config.get("d_out", config["d_in"])],
        **({"threshold": [config["d_sae"]]} if kind.startswith("jumprelu") else {}),
    }
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != sizes:
        raise ValueError(f"{folder / WEIGHTS} must hold {sizes}, got {found}")
    return config, _coder(config, tensors)


def _check_integers(config: dict[str, Any], folder: Path) -> None:
    for field in ("d_in", "d_sae", *(["k"] if config["architecture"] == "topk" else [])):
        if type(config.get(field)) is not int:
            raise ValueError(
                f"{field} in {folder / CONFIG} must be an integer, got {config.get(field)!r}"
            )


def _coder(config: dict[str, Any], tensors: dict[str, Tensor]) -> Coder:
    """The coder; where activations are measured in units of the decoder's norm, this unit is
    multiplied into the encoder, which leaves every code and every output as it was.
    """
    if config.get("rescale_acts_by_decoder_norm", False):
        norm = tensors["W_dec"].norm(dim=1)
        tensors |= {
            "W_enc": tensors["W_enc"] * norm,
            "b_enc": tensors["b_enc"] * norm,
            "W_dec": tensors["W_dec"] / norm[:, None],
        }
    if config["architecture"] != "topk":
        tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
    return Coder(**tensors, k=config.get("k"), centred=config.get("apply_b_dec_to_input", True))
