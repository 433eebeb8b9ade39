"""Inputs of the methods: a batch, texts, or tokens with a readout column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.models.basis.numbers import checked_count, given_tensor
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import LoopHookPoint, module_hooked
from loopscope.models.core.state import State, checked_tokens

Inputs = Batch | str | Sequence[str] | Sequence[Sequence[int]] | Tensor
Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
ReadoutColumn = int | Sequence[int] | Int[Tensor, " batch"] | None
LOGITS_AT_ONCE = 1 << 22  # numbers held at a time where logits are made in pieces


def as_batch(model: LoopedModel, inputs: Inputs, readout: ReadoutColumn = None) -> Batch:
    """Bring inputs into the form of a `Batch` on the model's device.

    Args:
        inputs: A `Batch`, texts to encode, or unpadded token ids Int[Tensor, "batch pos"], also as
            lists of equal length.
        readout: For token ids only: the column at which answers are read, one for all rows or one
            per row. A negative number counts from the end.

    Raises:
        TypeError: The readout is not an integer.
        ValueError: Token ids have no readout, the readout is outside the input, or there is not one
            readout per row.
    """
    if isinstance(inputs, Batch):
        if readout is not None:
            raise ValueError(
                "a Batch says where its answers are read; readout= goes with tokens only"
            )
        return _fit(_checked_batch(inputs).to(model.device))
    if not isinstance(inputs, Tensor):
        _refuse_unsized(inputs)
        texts = [inputs] if isinstance(inputs, str) else [x for x in inputs if isinstance(x, str)]
        if isinstance(inputs, str) or len(texts) == len(inputs):
            return model.encode(texts)
    if readout is None:
        raise ValueError(
            "tokens do not say where the answer is read; pass readout= (a column), or a Batch from"
            " model.encode"
        )
    tokens = checked_tokens(_token_matrix(inputs), model.cfg.d_vocab).to(model.device)
    return _fit(Batch(tokens, torch.ones_like(tokens), _read_at(readout, tokens)))


def _checked_batch(batch: Batch) -> Batch:
    """A caller's batch, of which each row is read at one of its columns.

    Raises:
        TypeError: A readout that is no integer.
        ValueError: No row, another number of readouts than rows, or a column outside the input.
    """
    rows = len(batch)
    if not rows:
        raise ValueError("at least one input is needed, got a Batch without rows")
    if batch.readout.shape != (rows,):
        raise ValueError(
            f"a Batch needs one readout column per row: there are {rows} rows, got the shape"
            f" {list(batch.readout.shape)}"
        )
    if bool((batch.readout < 0).any()):
        raise ValueError(
            f"the readout columns of a Batch count from 0, got {int(batch.readout.min())}"
        )
    return replace(batch, readout=_read_at(batch.readout, batch.tokens))


def _token_matrix(inputs: Tensor | Sequence[Any]) -> Tensor:
    """Tokens as a tensor, given as one or as lists."""
    if isinstance(inputs, Tensor):
        return inputs
    try:
        return given_tensor(inputs)
    except (TypeError, ValueError):
        raise _no_inputs(
            inputs, " that is no matrix of integers; rows of unequal length go through model.encode"
        ) from None


def _refuse_unsized(inputs: object) -> None:
    """Refuse what can be no inputs, such as a generator of texts."""
    if not isinstance(inputs, Sized):
        raise _no_inputs(inputs, "; make a list of several")


def _no_inputs(inputs: object, advice: str) -> TypeError:
    return TypeError(
        "inputs must be a Batch, texts, or unpadded tokens [batch, pos], got a"
        f" {type(inputs).__name__}{advice}"
    )


def _read_at(readout: ReadoutColumn, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    rows, width = tokens.shape
    columns = torch.as_tensor(readout, device=tokens.device)
    if columns.is_floating_point() or columns.dtype == torch.bool:
        raise TypeError(f"the readout column must be an integer, got {readout!r}")
    if columns.ndim > 1 or (columns.ndim == 1 and len(columns) not in (1, rows)):
        raise ValueError(
            f"one readout column per row is needed: there are {rows} rows, got the shape"
            f" {list(columns.shape)}"
        )
    columns = torch.where(columns < 0, columns + width, columns).long().expand(rows)
    if bool(((columns < 0) | (columns >= width)).any()):
        raise ValueError(
            f"the readout column must be within the {width} positions of the input, got {readout}"
        )
    return columns


def _fit(batch: Batch) -> Batch:
    """The batch with ordinary tensors where inference mode is off, since gradients need them."""
    if torch.is_inference_mode_enabled() or not batch.tokens.is_inference():
        return batch
    return batch[slice(None)].repeat(1)


def reference_batch(model: LoopedModel, inputs: Inputs) -> Batch:
    """A batch of which no answer is read, so that tokens need no readout column."""
    return as_batch(model, inputs, -1 if isinstance(inputs, Tensor) else None)


def begin_batch(model: LoopedModel, batch: Batch, n_loops: int | None) -> State:
    """The state of a batch before the first visit."""
    return model.begin(batch.tokens, batch.mask, n_loops=n_loops, **batch.options)


def in_chunks(batch: Batch, size: int, label: str) -> Iterator[Batch]:
    """The batch in pieces of at most `size` rows, with a progress bar when there are several.

    Raises:
        TypeError, ValueError: A size that is no integer of at least 1.
    """
    size = checked_batch_size(size)
    starts = range(0, len(batch), size)
    for start in tqdm(starts, desc=label, leave=False, disable=len(starts) < 2):
        yield batch[slice(start, start + size)]


def checked_batch_size(size: int) -> int:
    """How many rows are run at a time; at least 1."""
    return checked_count(size, "batch_size")


def rows_apart(model: LoopedModel) -> bool:
    """Whether each row's result is its own: neither the family nor a hook that is attached now may
    look at other rows, or tell rows apart by their place in the batch.
    """
    return (
        model.batch_independent
        and not any(
            not isinstance(point, LoopHookPoint) or point.may_join_rows()
            for point in model.hooked_points().values()
        )
        and not module_hooked(model)
    )


def sample_of(model: LoopedModel, batch: Batch) -> Batch:
    """One row, to look at what a run of it holds; all rows where one cannot be run alone."""
    return batch[:1] if rows_apart(model) else batch


def rows_at_once(model: LoopedModel, batch: Batch, batch_size: int) -> int:
    """How many rows of a batch are run at a time: at most `batch_size`, but all of them where rows
    may depend on each other.

    Raises:
        TypeError, ValueError: A size that is no integer of at least 1.
    """
    size = checked_batch_size(batch_size)
    return size if rows_apart(model) else max(size, len(batch))


def runs_side_by_side(model: LoopedModel, batch: Batch, batch_size: int) -> int:
    """How many copies of a batch are run at once: as many as `batch_size` rows allow, but one where
    rows may depend on each other.
    """
    copies = max(1, checked_batch_size(batch_size) // len(batch))
    return copies if rows_apart(model) else 1
