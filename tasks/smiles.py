"""Molecules as text: SMILES tokens, the state that a reader must keep, and a fragment grammar.

A molecule has many writings; a ring number or a bracket must be closed after any number of tokens.
Axes: pos (a token of a text).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer
from tqdm.auto import tqdm

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
WORDS = (
    PAD, BOS, EOS, "(", ")", "1", "2", "3", "4", "5", "6", "-", "=", "#", "/", "\\",
    "C", "N", "O", "S", "F", "Cl", "Br", "c", "n", "o", "s",
    "[nH]", "[N+]", "[O-]", "[NH+]", "[NH3+]", "[C@H]", "[C@@H]",
)  # fmt: skip
# What molecules are made of, with weights. A fragment is bound by its first atom; its rings are
# numbered from 1; * is a slot for any substituent and ^ one on a nitrogen, for those that start
# with a carbon.
RINGS = {
    "c1c*c*c*c*c1*": 40,
    "c1c*c*c*c*n1": 6,
    "c1c*c*c*nc1*": 6,
    "c1c*c*nc*c1*": 5,
    "c1nc*c*c*n1": 3,
    "c1c*nc*nc1*": 3,
    "c1c*nc*c*n1": 2,
    "c1c*c*c*nn1": 1,
    "c1c*c*c*o1": 3,
    "c1c*c*oc1*": 1,
    "c1c*c*c*s1": 4,
    "c1c*c*sc1*": 2,
    "c1c*c*c*[nH]1": 1,
    "c1c*c*[nH]n1": 2,
    "c1c*[nH]nc1*": 2,
    "c1nc*c*[nH]1": 1,
    "c1c*sc*n1": 3,
    "c1nc*c*s1": 3,
    "c1nc*c*o1": 1,
    "c1c*onc1*": 2,
    "c1nnc*o1": 2,
    "c1nc*no1": 2,
    "n1c*c*c*n1": 3,
    "n1c*c*nc1*": 3,
    "n1c*c*nn1": 2,
    "n1c*c*c*c1*": 1,
    "n1c*c*c*c*c1=O": 2,
    "c1c*c*c*[nH]c1=O": 2,
    "C1C*C1*": 4,
    "C1C*C*C1*": 2,
    "C1C*C*C*C1*": 4,
    "C1C*C*C*C*C1*": 6,
    "C1=CC*C*C*C1*": 1,
    "C1C*OC1*": 1,
    "C1C*C*C*O1": 3,
    "C1C*C*OC*C1*": 3,
    "C1C*N^C*1": 1,
    "C1C*C*N^C1*": 3,
    "C1C*C*N^C*C1*": 5,
    "C1C*N^C*C*C1*": 3,
    "C1C*C(=O)N^C1*": 1,
    "N1C*C*C1*": 2,
    "N1C*C*C*C1*": 6,
    "N1C*C*C*C*C1*": 8,
    "N1C*CN^CC1*": 8,
    "N1C*COCC1*": 8,
    "N1C*CSCC1*": 1,
    "N1C*C*C*C1=O": 2,
    "N1C*C(=O)N^C1=O": 1,
    "N1CCC2(CC1)CCOC2*": 1,
    "N1CC2CC(C1)C2*": 1,
    "C1C*C2CCC1C2*": 1,
    "c1c*c*c2c*c*c*c*c2c1*": 3,
    "c1c*c*c2c*c*c*c*c2n1": 2,
    "c1c*nc2c*c*c*c*c2c1*": 2,
    "c1nc*c*c2c*c*c*c*c12": 1,
    "c1nc*nc2c*c*c*c*c12": 2,
    "c1nc2c*c*c*c*c2c(=O)[nH]1": 1,
    "c1c*[nH]c2c*c*c*c*c12": 2,
    "c1c*c2c*c*c*c*c2[nH]1": 2,
    "n1c*c*c2c*c*c*c*c12": 2,
    "c1nc2c*c*c*c*c2[nH]1": 2,
    "c1nc2c*c*c*c*c2s1": 2,
    "c1c*c2c*c*c*c*c2o1": 1,
    "c1c*c2c*c*c*c*c2s1": 1,
    "c1c*c*c2OCOc2c1*": 3,
    "c1c*c*c2OCCOc2c1*": 2,
    "c1c*n2c*c*c*c*c2n1": 1,
    "c1c*[nH]c2nc*c*c*c12": 1,
    "n1cnc2c*ncnc12": 1,
    "C1C*C*c2c*c*c*c*c12": 1,
    "C1C*C*C*c2c*c*c*c*c12": 1,
    "N1C*C*c2c*c*c*c*c2C1*": 2,
    "N1C*C*c2c*c*c*c*c12": 2,
    "C1C*c2c*c*c*c*c2O1": 1,
}
LINKERS = {
    "C*": 20,
    "CC*": 6,
    "CCC": 2,
    "C(=O)": 8,
    "C(=O)N": 20,
    "C(=O)N(C)": 3,
    "C(=O)NC": 8,
    "C(=O)O": 1,
    "CC(=O)N": 4,
    "COC": 2,
    "CNC(=O)": 2,
    "CN": 3,
    "CO": 3,
    "CS": 2,
    "C(O)": 2,
    "C#C": 1,
    "/C=C/": 2,
    "/C=C\\": 1,
    "NC(=O)": 14,
    "NC": 6,
    "N": 6,
    "NC(=O)N": 4,
    "NC(=O)C*": 4,
    "N(C)C": 2,
    "NS(=O)(=O)": 3,
    "O": 7,
    "OC": 8,
    "OCC": 2,
    "OC(=O)": 1,
    "S": 2,
    "SC": 2,
    "SCC(=O)N": 2,
    "S(=O)(=O)": 4,
    "S(=O)(=O)N": 4,
}
CHAINS = {
    "C*C*C": 3,
    "CC*C*C": 3,
    "C*CC*O": 1,
    "CC*O": 2,
    "CCN^C": 2,
    "C(=O)N^CC*": 2,
    "C(=O)C*C": 1,
    "CC(=O)N^C": 2,
    "NC*CC*": 2,
    "NC(=O)C*C": 2,
    "OC*CC": 2,
    "N(CC*)CC*": 1,
    "CCCC*C": 1,
    "C=CC*": 1,
    "CC#C": 1,
}
TERMINALS = {
    "C": 40,
    "CC": 8,
    "CCC": 2,
    "C(C)C": 6,
    "C(C)(C)C": 3,
    "C#N": 6,
    "C(F)(F)F": 9,
    "C(F)F": 1,
    "C=O": 1,
    "C(=O)O": 4,
    "C(=O)N": 4,
    "C(=O)OC": 4,
    "C(=O)OCC": 2,
    "C(C)=O": 4,
    "CO": 4,
    "COC": 2,
    "CN": 1,
    "CC#N": 1,
    "CN(C)C": 2,
    "CC=C": 1,
    "F": 18,
    "Cl": 16,
    "Br": 5,
    "O": 10,
    "OC": 18,
    "OCC": 4,
    "OC(F)F": 1,
    "OC(F)(F)F": 2,
    "OC(C)=O": 1,
    "N": 6,
    "NC": 2,
    "N(C)C": 5,
    "NC(C)=O": 4,
    "NS(C)(=O)=O": 2,
    "S(C)(=O)=O": 3,
    "S(N)(=O)=O": 2,
    "SC": 2,
    "[N+](=O)[O-]": 4,
    "C(=O)[O-]": 1,
    "C[NH3+]": 1,
    "C[NH+](C)C": 1,
}
_TOKEN = re.compile(r"<[a-z]+>|\[[^\[\]<>]*\]|Br|Cl|%[0-9]{2}|.", re.DOTALL)
_RING = re.compile(r"%?([0-9]+)")
# Pieces only where a bracket atom or a ring number of two digits is not complete.
_BROKEN = {"[", "]", "%"}
_CARBON = {"C", "c"}
_MOST_RINGS = 6  # all ring numbers of the vocabulary
_PATIENCE = 2000  # draws in a row that give nothing new
_CHIRAL_SHARE = 0.08  # molecules with a stereocentre


# Tokens


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


# Checks


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


def valid(text: str) -> bool:
    """Whether rdkit reads the text as a molecule, valences included.

    Raises:
        ImportError: rdkit is not installed.
    """
    return _read(_chem(), text) is not None


# Molecules


def make_molecules(
    count: int, seed: int = 0, *, atoms: tuple[int, int] = (9, 27), progress: bool = False
) -> list[str]:
    """Distinct random molecules of a fragment grammar, as canonical SMILES; a smaller count gives
    the first of them.

    Args:
        atoms: Fewest and most heavy atoms, at most 99.
        progress: Show a progress bar.

    Raises:
        ValueError: Numbers out of range, or more molecules than the grammar makes of this size.
        ImportError: rdkit is not installed.
    """
    low, high = atoms
    if count < 0 or not 1 <= low <= high <= 99:  # ring numbers have two digits
        raise ValueError(
            "count must not be negative, and atoms are the fewest and the most of 1 to 99, got"
            f" {count} and {atoms}"
        )
    chem, rng = _chem(), random.Random(seed)
    found: dict[str, None] = {}
    missed = 0
    with tqdm(total=count, desc="making molecules", unit="molecule", disable=not progress) as bar:
        while len(found) < count:
            before = len(found)
            molecule = _checked(chem, _Builder(rng, rng.randint(low, high)).molecule(), rng)
            if low <= molecule.GetNumHeavyAtoms() <= high:
                found[chem.MolToSmiles(molecule)] = None
            missed = missed + 1 if len(found) == before else 0
            bar.update(len(found) - before)
            if missed > _PATIENCE:
                raise ValueError(
                    f"{count:,} distinct molecules of {low} to {high} heavy atoms were asked for,"
                    f" but the grammar made no new one after {len(found):,}; ask for fewer, or for"
                    " more atoms"
                )
    return list(found)


def random_writings(
    molecules: Sequence[str], times: int, seed: int = 0, *, progress: bool = False
) -> list[str]:
    """`times` random writings of each molecule, from random starting atoms and in random branch
    order; two may be alike.

    Args:
        progress: Show a progress bar.

    Returns:
        All writings of the first molecule, then those of the second, and so on.

    Raises:
        ValueError: A text that is no molecule.
        ImportError: rdkit is not installed.
    """
    chem, rng = _chem(), random.Random(seed)
    written: list[str] = []
    for text in tqdm(molecules, desc="writing molecules", unit="molecule", disable=not progress):
        molecule = _read(chem, text)
        if molecule is None:
            raise ValueError(
                f"only molecules can be written in other ways, but rdkit reads none in {text!r}"
            )
        seed = rng.randint(1, 2**31 - 1)  # 0 would mean no seed
        written += chem.MolToRandomSmilesVect(molecule, times, randomSeed=seed)
    return written


class _Builder:
    """One molecule in the making. Every ring gets a number of its own; rdkit numbers them anew.

    Args:
        rng: Where choices come from.
        size: Heavy atoms to aim at.
    """

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng, self.left, self.rings = rng, size, 0

    def molecule(self) -> str:
        """The text of the whole molecule; its first atom is a carbon."""
        ring = self.left >= 6 and self.rng.random() < 0.8
        return self.place(self.pick(RINGS if ring else CHAINS, True), at_least=1)

    def pick(self, table: dict[str, int], carbon: bool) -> str:
        """A random template of a table; with `carbon` only one that starts with a carbon."""
        allowed = [template for template in table if not carbon or pieces(template)[0] in _CARBON]
        return self.rng.choices(allowed, [table[template] for template in allowed])[0]

    def place(self, template: str, at_least: int = 0) -> str:
        """A template with its rings numbered and some of its slots filled."""
        self.left -= sum(part[0].isalpha() or part[0] == "[" for part in pieces(template))
        first = 10 + self.rings
        self.rings += len(set(re.findall(r"[0-9]", re.sub(r"\[.*?\]", "", template))))
        parts = pieces(template)
        slots = [i for i, part in enumerate(parts) if part in "*^"]
        wanted = max(at_least, self.rng.choices((0, 1, 2, 3), (12, 45, 33, 10))[0])
        filled = set(self.rng.sample(slots, min(wanted, len(slots))))
        for i, part in enumerate(parts):
            if part in "*^":
                parts[i] = (
                    f"({self.substituent(part == '^')})" if i in filled and self.left > 0 else ""
                )
            elif part.isdigit():
                parts[i] = f"%{first + int(part) - 1}"
        return "".join(parts)

    def substituent(self, carbon: bool) -> str:
        """The content of a slot: a ring, directly or through a linker, a chain, or an end. On a
        nitrogen the content starts with a carbon.
        """
        kind = self.rng.random()
        if self.left >= 6 and kind < 0.3:
            return self.place(self.pick(self.ring_or_end(), carbon))
        if self.left >= 8 and kind < 0.75:
            linker = self.place(self.pick(LINKERS, carbon))
            return linker + self.place(self.pick(self.ring_or_end(), linker[-1] in "ONS/\\"))
        return self.place(self.pick(CHAINS if kind > 0.9 else TERMINALS, carbon))

    def ring_or_end(self) -> dict[str, int]:
        """The rings while two ring numbers are left, else the ends."""
        return RINGS if self.rings <= _MOST_RINGS - 2 else TERMINALS


def _checked(chem: Any, text: str, rng: random.Random) -> Any:
    """The molecule of a text; sometimes one stereocentre is given a chirality."""
    molecule = chem.MolFromSmiles(text)
    assert molecule is not None, f"the grammar makes only molecules, but wrote {text}"
    if rng.random() < _CHIRAL_SHARE:
        centres = chem.FindMolChiralCenters(
            molecule, includeUnassigned=True, useLegacyImplementation=False
        )
        carbons = [i for i, _ in centres if molecule.GetAtomWithIdx(i).GetSymbol() == "C"]
        if carbons:
            hand = rng.choice((chem.CHI_TETRAHEDRAL_CW, chem.CHI_TETRAHEDRAL_CCW))
            molecule.GetAtomWithIdx(rng.choice(carbons)).SetChiralTag(hand)
    return chem.MolFromSmiles(chem.MolToSmiles(molecule))


def _read(chem: Any, text: str) -> Any:
    """The molecule of a text, or None."""
    if not text or re.search(
        r"\s", text
    ):  # rdkit would read no atoms, and take what follows a space as a name
        return None
    with import_module("rdkit.rdBase").BlockLogs():
        return chem.MolFromSmiles(text)


def _chem() -> Any:
    try:
        return import_module("rdkit.Chem")
    except ImportError:
        raise ImportError(
            "making and checking molecules needs the package rdkit; install it with pip install"
            " 'loopscope[dev]'"
        ) from None
