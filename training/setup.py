"""The model of a recipe, its optimiser, and the batches that it is trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.tokens import Batch, Readout, Vocabulary
from loopscope.models.core.packed_rows import advance_unpadded
from loopscope.models.core.registry import build
from loopscope.models.families.recurrent_depth import (
    FusedBlock,
    RecurrentDepth,
    RecurrentDepthConfig,
)
from loopscope.tasks.facts import FactBatch, vocabulary
from loopscope.training.recipes import Recipe

_WORTH_PACKING = (
    0.9  # above this share of rows that matter, leaving the others out costs more than it saves
)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainingBatch:
    """Questions with their answers.

    Attributes:
        inputs: Tokens, mask, and the column at which each answer is read.
        answers: Int[Tensor, " batch"].
        n_loops: Iterations to run.
    """

    inputs: Batch
    answers: Int[Tensor, " batch"]
    n_loops: int

    def share(self, rank: int, ranks: int) -> TrainingBatch:
        """One rank's equal part."""
        rows = slice(rank, None, ranks)
        return TrainingBatch(self.inputs[rows], self.answers[rows], self.n_loops)

    def to(self, device: torch.device) -> TrainingBatch:
        """The batch on another device."""
        return TrainingBatch(self.inputs.to(device), self.answers.to(device), self.n_loops)


def readout_of(recipe: Recipe) -> Readout:
    """The place where the model of a recipe is read."""
    if recipe.readout == "last_real":
        return Readout("last_real")
    assert recipe.padded_to is not None, "a recipe that reads the last column says which that is"
    return Readout("column", recipe.padded_to - 1)


def pack(recipe: Recipe, facts: Sequence[FactBatch], n_loops: int) -> TrainingBatch:
    """Facts of several hop counts as one right-padded batch.

    The columns reach to the end of the longest question. Without positions, answers at the last
    column need one padding column more. No other padding column changes the loss or a gradient, so
    that padding is computed only where an answer is read.
    """
    lengths = np.concatenate([np.full(len(batch), batch.hops + 1) for batch in facts])
    columns, width = readout_of(recipe).place(
        lengths.tolist(), recipe.padded_to, recipe.positions != "none"
    )
    tokens = np.zeros((len(lengths), width), dtype=np.int64)
    start = 0
    for batch in facts:
        tokens[start : start + len(batch), : batch.hops + 1] = batch.tokens
        start += len(batch)
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    inputs = Batch(
        torch.from_numpy(tokens), torch.from_numpy(mask), torch.tensor(columns, device="cpu")
    )
    return TrainingBatch(
        inputs, torch.from_numpy(np.concatenate([batch.answers for batch in facts])), n_loops
    )


class Answering(nn.Module):
    """A model as a function from a batch to its answers' logits, for data-parallel training."""

    def __init__(self, model: RecurrentDepth) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainingBatch) -> Float[Tensor, "batch d_vocab"]:
        state = self.model.begin(batch.inputs.tokens, batch.inputs.mask, n_loops=batch.n_loops)
        read_only = ~state.mask[
            torch.arange(len(state.mask), device=state.mask.device), batch.inputs.readout
        ]
        if int(state.mask.sum() + read_only.sum()) > _WORTH_PACKING * state.mask.numel():
            return self.model.readout(self.model.advance(state), batch.inputs.readout)
        read = advance_unpadded(self.model, state, batch.inputs.readout)
        return self.model.readout(read, torch.zeros_like(batch.inputs.readout))


@contextmanager
def random_numbers(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Inside the `with` block PyTorch's random numbers are those of a seed; afterwards the caller's
    own go on.

    Args:
        device: Where numbers are drawn besides the CPU; no other device is touched.
    """
    own = device.type == "cpu"
    with torch.random.fork_rng([] if own else [device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif not own:
            torch.get_device_module(device).manual_seed(seed)
        yield


def fresh_model(recipe: Recipe) -> RecurrentDepth:
    """A new model. With `zero_init` the loop is the identity: both output projections of every
    block are zero (c_scale = 0).
    """
    words = Vocabulary(vocabulary(recipe.task.n_entities, recipe.task.n_relations))
    cfg = RecurrentDepthConfig(
        n_layers=recipe.n_layers,
        n_loops=recipe.eval_loops,
        d_model=recipe.d_model,
        n_heads=recipe.n_heads,
        d_mlp=4 * recipe.d_model,
        d_vocab=len(words),
        n_ctx=None if recipe.positions == "none" else recipe.padded_to,
        positions=recipe.positions,
        dropout=recipe.dropout,
    )
    with random_numbers(recipe.seed), CPU:
        model = build(cfg)
        assert isinstance(model, RecurrentDepth), "the config's family is recurrent-depth"
        nn.init.normal_(model.embedding, std=recipe.d_model**-0.5)
    for block in model.blocks if recipe.zero_init else ():
        assert isinstance(block, FusedBlock), "a recurrent-depth model is made of these blocks"
        nn.init.zeros_(block.attn.W_O_flat)
        nn.init.zeros_(block.mlp.W_out)
    model.vocab, model.read_at = words, readout_of(recipe)
    return model


def finite_loss(loss: Float[Tensor, ""], update: int) -> float:
    """The number of a loss; FloatingPointError where it is none, before anything is changed."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss became {value} at update {update}; resume with a lower learning rate"
        )
    return value


def descend(
    loss: Float[Tensor, ""],
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    clip: float | None,
) -> None:
    """One step down the gradient of a loss, whose norm over all parameters is cut at `clip`."""
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        clip_(parameters, clip)
    optimizer.step()


def clip_(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Cut the norm of the gradients of some parameters at `most`, as PyTorch's `clip_grad_norm_`
    does, without a pass over gradients that are short enough: PyTorch multiplies those by 1.
    """
    kept = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in kept if p.grad is not None])
    if not most / (norm + 1e-6) >= 1:
        nn.utils.clip_grads_with_norm_(kept, most, norm)


def fresh_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW; the learning rate is set before each update."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    decayed = {"params": matrices, "weight_decay": recipe.weight_decay}
    rest = {"params": others, "weight_decay": 0.0}
    groups = [decayed, rest] if recipe.decay_matrices_only else list(model.parameters())
    return torch.optim.AdamW(
        groups, lr=1.0, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
