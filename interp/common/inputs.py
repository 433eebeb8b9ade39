"""What the methods accept as inputs: a batch, texts, or tokens with a readout column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State, checked_tokens
from loopscope.models.core.tokens import Batch

Inputs = Batch | str | Sequence[str] | Tensor
Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
ReadoutColumn = int | Int[Tensor, " batch"] | None


def as_batch(model: LoopedModel, inputs: Inputs, readout: ReadoutColumn = None) -> Batch:
    """A `Batch` on the model's device.

    Args:
        inputs: A batch, texts to encode, or unpadded tokens Int[Tensor, "batch pos"].
        readout: The column at which answers are read, for tokens only; negative counts from the
            end.

    Raises:
        ValueError: Tokens without a readout column, or a column outside the input.
    """
    if isinstance(inputs, Batch):
        if readout is not None:
            raise ValueError(
                "a Batch says where its answers are read; readout= goes with tokens only"
            )
        return inputs.to(model.device)
    if not isinstance(inputs, Tensor):
        return model.encode(inputs)
    if readout is None:
        raise ValueError(
            "tokens do not say where the answer is read; pass readout= (a column), or a Batch from"
            " model.encode"
        )
    tokens = checked_tokens(inputs, model.cfg.d_vocab).to(model.device)
    width = tokens.shape[1]
    columns = torch.as_tensor(readout, device=model.device).expand(tokens.shape[0])
    columns = torch.where(columns < 0, columns + width, columns)
    if bool(((columns < 0) | (columns >= width)).any()):
        raise ValueError(
            f"the readout column must be within the {width} positions of the input, got {readout}"
        )
    return Batch(tokens, torch.ones_like(tokens), columns)


def reference_batch(model: LoopedModel, inputs: Inputs) -> Batch:
    """A batch of which no answer is read, so that tokens need no readout column."""
    return as_batch(model, inputs, -1 if isinstance(inputs, Tensor) else None)


def begin_batch(model: LoopedModel, batch: Batch, n_loops: int | None) -> State:
    """The state of a batch before the first visit."""
    return model.begin(batch.tokens, batch.mask, n_loops=n_loops, **batch.options)


def in_chunks(batch: Batch, size: int, label: str) -> Iterator[Batch]:
    """The batch in pieces of at most `size` rows, with a progress bar when there are several."""
    starts = range(0, len(batch), size)
    for start in tqdm(starts, desc=label, leave=False, disable=len(starts) < 2):
        yield batch[slice(start, start + size)]
