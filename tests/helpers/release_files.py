"""Checkpoint files in the layout of the public releases, at toy size: good ones and ones with code
in them; models to save; loading.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.models.basis.tokens import Readout, Vocabulary
from loopscope.models.core.registry import build
from loopscope.models.families.recurrent_depth import RecurrentDepth, RecurrentDepthConfig

FACTS: dict[str, Any] = {"n_heads": 5, "input_injection": False}  # what a toy file does not say
D_MODEL, N_LAYERS, D_MLP, D_VOCAB, N_POSITIONS = 15, 2, 60, 11, 7
WORDS = [
    "<pad>",
    "<e_0>",
    "<e_1>",
    "<e_2>",
    "<e_3>",
    "<e_4>",
    "<r_0>",
    "<r_1>",
    "<r_2>",
    "<q>",
    "</q>",
]


def release_tensors(
    positions: str = "none",
    *,
    d_model: int = D_MODEL,
    n_layers: int = N_LAYERS,
    d_mlp: int = D_MLP,
    d_vocab: int = D_VOCAB,
    n_positions: int = N_POSITIONS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A release's `model_state_dict` with random values; the head is the embedding, as in the
    releases.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    tensors = {"token_embedding.weight": draw(d_vocab, d_model)}
    if positions != "none":
        tensors["position_embedding.weight" if positions == "learned" else "pe"] = draw(
            n_positions, d_model
        )
    for layer in range(n_layers):
        tensors.update(
            {f"blocks.{layer}.{key}": value for key, value in _block(draw, d_model, d_mlp).items()}
        )
    tensors.update({"ln_f.weight": 1 + draw(d_model), "ln_f.bias": draw(d_model)})
    return {**tensors, "lm_head.weight": tensors["token_embedding.weight"]}


def _block(draw: Any, d_model: int, d_mlp: int) -> dict[str, Tensor]:
    norms = {
        f"{norm}.{part}": draw(d_model) + (part == "weight")
        for norm in ("ln_1", "ln_2")
        for part in ("weight", "bias")
    }
    shapes = {
        "attn.c_attn": (d_model, 3 * d_model),
        "attn.c_proj": (d_model, d_model),
        "mlp.c_fc": (d_model, d_mlp),
        "mlp.c_proj": (d_mlp, d_model),
    }
    matrices = {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}
    return {
        **norms,
        **matrices,
        **{f"{name}.bias": draw(shape[1]) for name, shape in shapes.items()},
    }


def adam_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What AdamW keeps: two tensors of each parameter's size."""
    moments = {
        i: {"step": 3, "exp_avg": v.clone(), "exp_avg_sq": v.square()}
        for i, v in enumerate(tensors.values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}


def write_release(
    path: Path, tensors: Mapping[str, Tensor] | None = None, *, legacy: bool = False, **content: Any
) -> Path:
    """Write a release file; `content` replaces or adds entries beside the model."""
    tensors = release_tensors() if tensors is None else tensors
    about = {
        "epoch": 41,
        "optimizer_state_dict": {} if "optimizer_state_dict" in content else adam_state(tensors),
        "scheduler_state_dict": {"last_epoch": 7},
        "loss": 0.25,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"model_state_dict": dict(tensors), **about, **content}
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    return path


def loaded(path: Path, positions: str = "none", **arguments: Any) -> RecurrentDepth:
    """A toy release, written and loaded."""
    model = load(write_release(path, release_tensors(positions)), **{**FACTS, **arguments})
    assert isinstance(model, RecurrentDepth)
    return model


def toy_model(
    positions: str = "none",
    injection: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
    n_loops: int | None = 4,
    read_at: str | None = None,
    seed: int = 0,
) -> RecurrentDepth:
    """A model of the toy files' sizes with random weights; it has a vocabulary where it is told
    where answers are read.
    """
    n_ctx = None if positions == "none" else N_POSITIONS
    sizes = {
        "d_model": D_MODEL,
        "n_layers": N_LAYERS,
        "d_mlp": D_MLP,
        "d_vocab": D_VOCAB,
        "n_ctx": n_ctx,
        "n_heads": FACTS["n_heads"],
    }
    model = build(
        RecurrentDepthConfig(
            **sizes, n_loops=n_loops, positions=positions, input_injection=injection
        )
    ).to(dtype)
    assert isinstance(model, RecurrentDepth)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    if read_at:
        model.read_at, model.vocab = Readout.parse(read_at), Vocabulary(WORDS)
    return model


class Bomb:
    """Unpickling it makes a folder: the proof that code in a file was run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def write_bomb(path: Path, marker: Path, kind: str) -> Path:
    """A file with code in it: a release with the code beside its weights (zip, legacy), or a bare
    pickle (pickle2, pickle4).
    """
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model_state_dict": Bomb(marker)}, protocol=int(kind[-1])))
        return path
    return write_release(path, legacy=kind == "legacy", scheduler_state_dict=Bomb(marker))


def files_under(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its time of change and content, and every folder: what a call
    must leave alone.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = (
            (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"folder")
        )
    return found


def check_refused(
    source: Path | str,
    match: str,
    *,
    error: type[Exception] = CheckpointError,
    within: Path,
    **arguments: Any,
) -> str:
    """Check that loading is refused in one sentence and leaves the folder as it was; returns the
    sentence.
    """
    before = files_under(within)
    with pytest.raises(error, match=match) as caught:
        load(source, **arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert files_under(within) == before
    return sentence
