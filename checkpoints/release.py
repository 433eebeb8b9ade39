"""The released pickles of "Loop, Think, & Generalize": `checkpoint_epoch_<N>.pt`.

Torch pickles with `epoch`, `model_state_dict` and optimiser state. Heads, iterations, injection and
where answers are read are not in the file. As in our own weights, projections are stored
input-first (GPT-2's Conv1D).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, MissingFacts, config_errors, shown
from loopscope.checkpoints.fill import drop_tied_head
from loopscope.checkpoints.pickles import WHAT_IT_IS
from loopscope.checkpoints.weight_files import plain_weights
from loopscope.models.basis.files import atomic_path
from loopscope.models.basis.numbers import checked_count
from loopscope.models.families.recurrent_depth import (
    Positions,
    RecurrentDepth,
    RecurrentDepthConfig,
)

PAPER_D_MODEL, PAPER_HEADS = 768, 12
_MASK_BUFFER = re.compile(r"blocks\.\d+\.attn\.(bias|masked_bias)")
_BLOCK = re.compile(r"blocks\.([0-9]{1,9})\.")
_EDGE_KEYS = {
    "token_embedding.weight": "embedding",
    "position_embedding.weight": "W_pos",
    "pe": "W_pos",
    "ln_f.weight": "final_norm.w",
    "ln_f.bias": "final_norm.b",
}
BLOCK_KEYS = {
    "ln_1.weight": "ln1.w",
    "ln_1.bias": "ln1.b",
    "attn.c_attn.weight": "attn.W_QKV",
    "attn.c_attn.bias": "attn.b_QKV",
    "attn.c_proj.weight": "attn.W_O_flat",
    "attn.c_proj.bias": "attn.b_O",
    "ln_2.weight": "ln2.w",
    "ln_2.bias": "ln2.b",
    "mlp.c_fc.weight": "mlp.W_in",
    "mlp.c_fc.bias": "mlp.b_in",
    "mlp.c_proj.weight": "mlp.W_out",
    "mlp.c_proj.bias": "mlp.b_out",
}


@dataclass(frozen=True)
class ReleaseFacts:
    """Facts about a model that its release file does not hold; None where a fact is not known."""

    n_heads: int | None = None
    input_injection: bool | None = None
    n_loops: int | None = None


def key_names(n_layers: int) -> dict[str, str]:
    """Our parameter name for each key of a release with this many blocks."""
    blocks = {
        f"blocks.{i}.{key}": f"blocks.{i}.{name}"
        for i in range(n_layers)
        for key, name in BLOCK_KEYS.items()
    }
    return {**_EDGE_KEYS, **blocks}


def state_dict_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The model's tensors in the content of a release file; the optimiser's state is never read.

    The tied head is compared with the embedding and left out; so are the causal-mask buffers of old
    transformers versions.

    Raises:
        CheckpointError: Content without a model, or with a head that is not tied.
    """
    state = content.get("model_state_dict")
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(v, Tensor) for v in state.values())
    ):
        raise CheckpointError(
            f"{path} holds no model: {WHAT_IT_IS}, but this file holds"
            f" {shown(sorted(map(str, content)))}"
        )
    tensors = plain_weights(state, path)
    drop_tied_head(
        tensors, "lm_head.weight", "token_embedding.weight", path, "this family's head is tied"
    )
    return {key: value for key, value in tensors.items() if not _MASK_BUFFER.fullmatch(key)}


def save_release(model: RecurrentDepth, path: str | Path, epoch: int | None = None) -> None:
    """Write a model in the format of the released pickles of arXiv 2604.07822
    (`checkpoint_epoch_<N>.pt`), whole or not at all.

    Args:
        path: The file to write.
        epoch: The epoch of training that the file records, counted from 0. In the releases
            checkpoint_epoch_<N>.pt holds epoch N - 1, and checkpoint_final.pt none (None).

    Raises:
        TypeError: The model is of another family than `recurrent_depth`, for which the format does
            not exist.
    """
    if not isinstance(model, RecurrentDepth):
        raise TypeError(
            f"the released layout is that of recurrent-depth models, got {type(model).__name__}"
        )
    epoch = None if epoch is None else checked_count(epoch, "epoch", least=0)
    ours = model.state_dict()
    table = "pe" if model.cfg.positions == "sinusoidal" else "position_embedding.weight"
    names = {
        key: name
        for key, name in key_names(model.cfg.n_layers).items()
        if name in ours and (name != "W_pos" or key == table)
    }
    tensors = {key: ours[name].detach().cpu() for key, name in names.items()}
    tensors["lm_head.weight"] = tensors["token_embedding.weight"]
    content = {"model_state_dict": tensors, "optimizer_state_dict": {}, "loss": None}
    with atomic_path(path) as temporary:
        torch.save(content if epoch is None else {"epoch": epoch, **content}, temporary)


def infer_config(
    tensors: Mapping[str, Tensor], path: Path, facts: ReleaseFacts, unsaid: tuple[str, ...] = ()
) -> RecurrentDepthConfig:
    """The configuration that the shapes imply, completed by facts that are known beside the file.

    At the paper's size (d_model 768) the releases have 12 heads and no injection.

    Args:
        unsaid: Further arguments of `load` that nothing says, for the message.

    Raises:
        MissingFacts: Heads or injection are not known.
        CheckpointError: A tensor that the sizes depend on is missing.
    """
    for key in ("token_embedding.weight", "blocks.0.mlp.c_fc.weight"):
        if key not in tensors or tensors[key].ndim != 2:
            raise CheckpointError(
                f"{path} lacks the matrix {key!r}, so the model's sizes cannot be told"
            )
    d_vocab, d_model = tensors["token_embedding.weight"].shape
    n_heads, injection = facts.n_heads, facts.input_injection
    if d_model == PAPER_D_MODEL:
        n_heads = PAPER_HEADS if n_heads is None else n_heads
        injection = bool(injection)
    if n_heads is None or injection is None:
        questions = {
            "n_heads": (n_heads, f"into how many heads its d_model={d_model} is split"),
            "input_injection": (
                injection,
                "whether the embedding is added again before each later iteration",
            ),
        }
        needed = {name: what for name, (known, what) in questions.items() if known is None}
        raise MissingFacts(path, needed, unsaid)
    positions, n_ctx = _positions(tensors, d_model, path)
    with config_errors(path):
        return RecurrentDepthConfig(
            n_layers=_number_of_blocks(tensors, path),
            n_loops=facts.n_loops,
            d_model=d_model,
            n_heads=n_heads,
            d_mlp=tensors["blocks.0.mlp.c_fc.weight"].shape[1],
            d_vocab=d_vocab,
            n_ctx=n_ctx,
            positions=positions,
            input_injection=injection,
        )


def _number_of_blocks(tensors: Mapping[str, Tensor], path: Path) -> int:
    """The number of blocks that the keys count, at most one per tensor."""
    numbers = [int(found.group(1)) for found in map(_BLOCK.match, tensors) if found]
    if max(numbers) >= len(tensors):
        raise CheckpointError(
            f"{path} has keys of the block {max(numbers)}, but it holds only {len(tensors)} tensors"
        )
    return 1 + max(numbers)


def _positions(
    tensors: Mapping[str, Tensor], d_model: int, path: Path
) -> tuple[Positions, int | None]:
    """The kind of positions, and the number of rows of their table."""
    kinds: dict[str, Positions] = {"position_embedding.weight": "learned", "pe": "sinusoidal"}
    tables = [key for key in kinds if key in tensors]
    if len(tables) > 1:
        raise CheckpointError(
            f"{path} has both pe and position_embedding.weight, but positions are sinusoidal or"
            " learned"
        )
    if not tables:
        return "none", None
    table = tensors[tables[0]]
    if table.ndim != 2:
        raise CheckpointError(
            f"{path}: {tables[0]!r} must have the shape [n_positions, {d_model}], got"
            f" {list(table.shape)}"
        )
    return kinds[tables[0]], table.shape[0]
