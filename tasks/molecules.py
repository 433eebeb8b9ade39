"""Random molecules of the fragment grammar and their many writings, made and checked by rdkit."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tqdm.auto import tqdm

from loopscope.tasks.fragments import Builder

_PATIENCE = 2000  # draws in a row that give nothing new
_CHIRAL_SHARE = 0.08  # molecules with a stereocentre


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
            molecule = _checked(chem, Builder(rng, rng.randint(low, high)).molecule(), rng)
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


def valid(text: str) -> bool:
    """Whether rdkit reads the text as a molecule, valences included.

    Raises:
        ImportError: rdkit is not installed.
    """
    return _read(_chem(), text) is not None


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
