"""The fragment grammar: what molecules are made of, and the builder that joins it to one text."""

from __future__ import annotations

import random
import re

from loopscope.tasks.smiles import pieces

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
_CARBON = {"C", "c"}
_MOST_RINGS = 6  # all ring numbers of the vocabulary


class Builder:
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
