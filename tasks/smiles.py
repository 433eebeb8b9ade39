"""Molecules as text: SMILES tokens, and the state that a reader must keep.

A molecule has many writings; a ring number or a bracket must be closed after any number of tokens.
Axes: pos (a token of a text).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
WORDS = (
    PAD, BOS, EOS, "(", ")", "1", "2", "3", "4", "5", "6", "-", "=", "#", "/", "\\",
    "C", "N", "O", "S", "F", "Cl", "Br", "c", "n", "o", "s",
    "[nH]", "[N+]", "[O-]", "[NH+]", "[NH3+]", "[C@H]", "[C@@H]",
)  # fmt: skip
_TOKEN = re.compile(r"<[a-z]+>|\[[^\[\]<>]*\]|Br|Cl|%[0-9]{2}|.", re.DOTALL)
_RING = re.compile(r"%?([0-9]+)")
# Pieces only where a bracket atom or a ring number of two digits is not complete.
_BROKEN = {"[", "]", "%"}


def pieces(text: str) -> list[str]:
    """The SMILES tokens of a text: bracket atoms, elements, bonds, brackets, ring numbers, and
    words such as <bos>.
    """
    return _TOKEN.findall(text)


class SmilesVocabulary:
    """Tokens of SMILES; a text's ids hold <bos> and <eos> only where the text writes them.

    Args:
        words: The tokens in the order of their ids, <pad> first; those of the grammar by default.

    Raises:
        ValueError: A word that comes twice, is more than one token, or another first word.
    """

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.words: tuple[str, ...] = tuple(words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if self.words[:1] != (PAD,):
            raise ValueError(
                f"the first word must be {PAD!r}, got {', '.join(self.words[:1]) or 'none'}"
            )
        wrong = [
            word for word in self.words if pieces(word) != [word] or self.words.count(word) > 1
        ]
        if wrong:
            raise ValueError(f"each word must be one SMILES token and occur once, got {wrong[0]!r}")

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids of a text, with <bos> in front where `prepend_bos` asks for it; ValueError
        names the first piece that is not in the vocabulary.
        """
        found = pieces(text)
        if not found:
            raise ValueError("a text must hold at least one token, got an empty one")
        for piece in found:
            if piece not in self._ids:
                raise ValueError(
                    f"{piece!r} is not one of the {len(self)} tokens of this vocabulary:"
                    f" {' '.join(self.words)}"
                )
        return [self._ids[piece] for piece in ([BOS, *found] if prepend_bos else found)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids; the inverse of `ids`."""
        return "".join(self.words[i] for i in ids)

    def branch_depth(self, tokens: Integer[np.ndarray, "... pos"]) -> Int64[np.ndarray, "... pos"]:
        """The number of open branches after each token: "(" counts as inside, ")" as outside."""
        depth: Int64[np.ndarray, "... pos"] = np.cumsum(
            self._is(tokens, ["("]) - self._is(tokens, [")"]), axis=-1
        )
        return depth

    def open_rings(self, tokens: Integer[np.ndarray, "... pos"]) -> Int64[np.ndarray, "... pos"]:
        """The number of rings that are open after each token."""
        count: Int64[np.ndarray, "... pos"] = np.zeros(tokens.shape, dtype=np.int64)
        for number in {ring_number(word) for word in self.words} - {None}:
            count += (
                np.cumsum(
                    self._is(tokens, [word for word in self.words if ring_number(word) == number]),
                    axis=-1,
                )
                % 2
            )
        return count

    def _is(
        self, tokens: Integer[np.ndarray, "... pos"], words: Sequence[str]
    ) -> Int64[np.ndarray, "... pos"]:
        return np.isin(tokens, [self._ids[word] for word in words if word in self._ids]).astype(
            np.int64
        )


def ring_number(piece: str) -> int | None:
    """The ring number of a token ("3" and "%03" are the same); None for another token."""
    found = _RING.fullmatch(piece)
    return int(found[1]) if found else None


def well_formed(text: str) -> bool:
    """Whether brackets are balanced and ring numbers paired. A text with a word such as <bos>, or
    without a token, is not well formed.
    """
    found = pieces(text)
    depth = 0
    waiting: set[int] = set()
    for piece in found:
        depth += (piece == "(") - (piece == ")")
        if depth < 0 or piece in _BROKEN or piece.startswith("<"):
            return False
        number = ring_number(piece)
        if number is not None:
            waiting ^= {number}
    return bool(found) and depth == 0 and not waiting
