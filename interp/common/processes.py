"""Sharing work among the processes of `accelerate launch`; with one process nothing is shared.

Every process must make the same calls in the same order. Calls with different inputs, models or
options are not shared: each process then computes its own. Where an `Accelerator` exists, as in
training, its owner may ask one process alone, so there nothing is shared and each process computes
everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from loopscope.interp.common.fingerprint import described, facts_of
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

_Item = TypeVar("_Item")
_LONGEST = 1 << 16  # entries of one tensor that are compared between processes


def n_ranks() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Team:
    """The processes that share one computation.

    Attributes:
        rank: Which of them this process is, from 0.
        size: How many they are.
    """

    rank: int = 0
    size: int = 1

    def share(self, items: list[_Item]) -> list[_Item]:
        """This process's part: every n-th item. Where there are fewer items than processes, the
        first one is given out again.
        """
        return items[self.rank :: self.size] or items[:1]

    def gathered(self, found: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The findings of all processes, on the CPU where there are several."""
        if self.size == 1:
            return dict(found)
        return dict(_gather([(index, value.cpu()) for index, value in found.items()]))


def team(task: Callable[[], object]) -> Team:
    """The processes that were launched together, if all of them have the same task; else this
    process alone.

    Args:
        task: Gives all that the result depends on. It is compared by its hash; a task that holds
            objects without a hash is shared with no one.
    """
    rank, ranks = _rank()
    if ranks == 1:
        return Team()
    try:
        mine = described(task(), longest=_LONGEST)
    except ValueError:
        mine = f"no hash in process {rank}"
    return Team(rank, ranks) if len(set(_gather([mine]))) == 1 else Team()


def over_ranks(
    model: LoopedModel, batch: Batch, compute: Callable[[Batch], Tensor], dim: int = 0
) -> Tensor:
    """A result for every example of a batch, each process computing its contiguous part; all return
    the whole.

    Where a row's result can depend on the others, because the family or a hook of the caller's may
    look at the whole batch, each process computes everything; so it does where the processes have
    different models, batches or options.

    Args:
        compute: From some examples to a result in which they (or an equal number of entries for
            each) lie along `dim`.
    """
    if not model.batch_independent or model.any_hook():
        return compute(batch)
    ours = team(lambda: (facts_of(model, (), [batch], ()), compute))
    if ours.size == 1:
        return compute(batch)
    first, last = (len(batch) * rank // ours.size for rank in (ours.rank, ours.rank + 1))
    mine = batch[slice(first, last)]
    parts: list[Tensor] = _gather([compute(mine).cpu()] if len(mine) else [])
    return torch.cat(parts, dim).to(batch.tokens.device)


def _rank() -> tuple[int, int]:
    """Which of the processes that share their work this one is, and how many there are."""
    if n_ranks() == 1:
        return 0, 1
    from accelerate import (
        PartialState,
    )  # late: the import takes a second, and one process needs none of it
    from accelerate.state import is_initialized
    from accelerate.utils import parse_flag_from_env

    if is_initialized():
        return 0, 1
    state: Any = PartialState(
        cpu=not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    )
    return state.process_index, state.num_processes


def _gather(mine: list[_Item]) -> list[_Item]:
    """The lists of all processes one after another, by rank."""
    from accelerate.utils import gather_object

    items: list[_Item] = gather_object(mine)
    return items
