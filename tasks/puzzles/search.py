"""The search that fills the blank cells of a Sudoku and counts its guesses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Solutions:
    """The outcome of a search.

    Attributes:
        boards: The solutions that were found, each a text of digits.
        guesses: Digits that were tried, where no cell had one candidate left, until the first
            solution was found.
    """

    boards: tuple[str, ...]
    guesses: int


class SearchLimit(Exception):  # it ends a search that may take hours
    """A search that was given up."""


class Search:
    """A depth-first search that fills cells with one candidate and tries digits elsewhere.

    Args:
        side: Digits of the board.
        peers: For each cell the cells that must hold other digits.
        rng: Tries digits in random order; None in increasing order.
        limit: The most guesses; None for any number.
    """

    def __init__(
        self,
        side: int,
        peers: Sequence[Sequence[int]],
        rng: np.random.Generator | None = None,
        limit: int | None = None,
    ) -> None:
        self.side, self.peers, self.rng, self.limit = side, peers, rng, limit
        self.guesses, self.guesses_at_first = 0, 0
        self._found_one = False

    def from_masks(self, masks: list[int]) -> Iterator[str]:
        """The solutions within some candidates."""
        if self._settle(masks, [c for c, mask in enumerate(masks) if mask.bit_count() == 1]):
            yield from self._branch(masks)

    def _branch(self, masks: list[int]) -> Iterator[str]:
        open_cells = [c for c, mask in enumerate(masks) if mask.bit_count() > 1]
        if not open_cells:
            if not self._found_one:
                self._found_one, self.guesses_at_first = True, self.guesses
            yield "".join(str(mask.bit_length()) for mask in masks)
            return
        cell = min(open_cells, key=lambda c: masks[c].bit_count())
        digits = [k for k in range(self.side) if masks[cell] >> k & 1]
        if self.rng is not None:
            self.rng.shuffle(digits)
        for k in digits:
            self.guesses += 1
            if self.limit is not None and self.guesses > self.limit:
                raise SearchLimit(f"no answer after {self.limit} guesses")
            tried = list(masks)
            tried[cell] = 1 << k
            if self._settle(tried, [cell]):
                yield from self._branch(tried)

    def _settle(self, masks: list[int], filled: list[int]) -> bool:
        """Take the digits of filled cells from their peers until nothing changes; False where a
        cell is left without a candidate.
        """
        while filled:
            cell = filled.pop()
            digit = masks[cell]
            for peer in self.peers[cell]:
                if masks[peer] & digit:
                    masks[peer] ^= digit
                    if not masks[peer]:
                        return False
                    if masks[peer].bit_count() == 1:
                        filled.append(peer)
        return True
