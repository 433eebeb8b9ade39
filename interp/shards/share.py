"""A shard: which of a call's work items one process does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from loopscope.models.basis.numbers import checked_integer

Shard = tuple[int, int]
_Item = TypeVar("_Item")


def checked_shard(shard: Sequence[int] | None) -> Shard:
    """The index of a shard and the number of shards; None is the one shard of an undivided call.

    Raises:
        TypeError: Something else than two integers.
        ValueError: An index outside of 0..n - 1.
    """
    if shard is None:
        return 0, 1
    try:
        index, count = (checked_integer(number, "a shard") for number in shard)
    except (TypeError, ValueError):
        raise TypeError(f"shard must be two integers (i, n), got {shard!r}") from None
    if not 0 <= index < count:
        raise ValueError(
            f"shard=(i, n) is one of n shards, with i in 0..n - 1, got ({index}, {count})"
        )
    return index, count


def parse_shard(text: str) -> Shard:
    """A shard written as "i/n"; shards count from 0."""
    if not re.fullmatch(r"[0-9]+/[0-9]+", text):
        raise ValueError(f"a shard is written i/n, such as 0/8 to 7/8, got {text!r}")
    index, count = map(int, text.split("/"))
    return checked_shard((index, count))


def own(items: Sequence[_Item], shard: Shard) -> list[_Item]:
    """The items of a shard: one of each n neighbours, which cost about the same; the first of one n
    and the last of the next, since in a sweep the costs fall from item to item.
    """
    index, count = shard
    turns = (index, count - 1 - index)
    places = (start + turns[turn % 2] for turn, start in enumerate(range(0, len(items), count)))
    return [items[place] for place in places if place < len(items)]
