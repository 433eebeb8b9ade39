"""SMILES: tokens, what is open at each of them, the checks, and the molecules of the grammar."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import Lipinski

from loopscope.tasks.fragments import CHAINS, LINKERS, RINGS, TERMINALS
from loopscope.tasks.molecules import make_molecules, random_writings, valid
from loopscope.tasks.smiles import BOS, EOS, PAD, WORDS, SmilesVocabulary, pieces, well_formed


@pytest.fixture(scope="module")
def molecules() -> list[str]:
    return make_molecules(400, seed=3)


@pytest.fixture(scope="module")
def writings(molecules: list[str]) -> list[str]:
    return random_writings(molecules, 3, seed=5)


# Tokens


def test_pieces_are_bracket_atoms_elements_bonds_brackets_and_ring_numbers() -> None:
    assert pieces("<bos>Clc1cc[nH]c1C(Br)[C@@H]2C%12") == [
        "<bos>",
        "Cl",
        "c",
        "1",
        "c",
        "c",
        "[nH]",
        "c",
        "1",
        "C",
        "(",
        "Br",
        ")",
        "[C@@H]",
        "2",
        "C",
        "%12",
    ]
    assert pieces("/C=C\\C#N.[Na+]") == ["/", "C", "=", "C", "\\", "C", "#", "N", ".", "[Na+]"]


def test_ids_and_text_are_inverse(writings: list[str]) -> None:
    vocabulary = SmilesVocabulary()
    assert len(vocabulary) == len(WORDS) == len(set(WORDS))
    assert vocabulary.ids("".join(WORDS)) == list(range(len(WORDS)))
    assert vocabulary.words[0] == PAD
    for text in writings:
        assert vocabulary.text(vocabulary.ids(f"{BOS}{text}{EOS}")) == f"{BOS}{text}{EOS}"


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("CCP", "P"),
        ("C[Si]C", "[Si]"),
        ("C[nH", "["),
        ("C C", " "),
        ("C%12", "%12"),
        ("C%1", "%"),
        ("C<mask>", "<mask>"),
    ],
)
def test_an_unknown_piece_is_named(text: str, piece: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SmilesVocabulary().ids(text)
    assert str(error.value).startswith(
        f"{piece!r} is not one of the {len(WORDS)} tokens of this vocabulary: <pad> <bos>"
    )


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token, got an empty one"):
        SmilesVocabulary().ids("")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["C", PAD], "the first word must be '<pad>', got C"),
        ([], "the first word must be '<pad>', got none"),
        ([PAD, "C", "N", "C"], "each word must be one SMILES token and occur once, got 'C'"),
        ([PAD, "CC"], "each word must be one SMILES token and occur once, got 'CC'"),
    ],
)
def test_a_wrong_vocabulary_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SmilesVocabulary(words)


# What is open


@pytest.mark.shapes
def test_labels_of_an_example() -> None:
    vocabulary = SmilesVocabulary()
    ids = np.array(vocabulary.ids("<bos>C1C(C(c2cc1)F)2<eos>"))
    #                                   <bos> C 1 C ( C ( c 2 c c 1 ) F ) 2 <eos>
    assert vocabulary.branch_depth(ids).tolist() == [
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        2,
        2,
        2,
        2,
        1,
        1,
        0,
        0,
        0,
    ]
    assert vocabulary.open_rings(ids).tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
        1,
        1,
        2,
        2,
        2,
        1,
        1,
        1,
        1,
        0,
        0,
    ]


def test_one_ring_number_may_be_written_in_two_ways() -> None:
    vocabulary = SmilesVocabulary([PAD, "C", "2", "%02", "%12", "1"])
    assert vocabulary.open_rings(np.array(vocabulary.ids("C2C%12C1CC%02C1%12"))).tolist() == [
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
        2,
        2,
        1,
        0,
    ]


def counted(found: list[str]) -> tuple[list[int], list[int]]:
    """Branch depth and open rings, kept token by token as a reader would."""
    branches, rings = [], set()
    depths, opens = [], []
    for piece in found:
        if piece == "(":
            branches.append(piece)
        elif piece == ")":
            branches.pop()
        elif piece.isdigit() and piece in rings:
            rings.remove(piece)
        elif piece.isdigit():
            rings.add(piece)
        depths.append(len(branches))
        opens.append(len(rings))
    return depths, opens


def test_labels_of_a_padded_batch_equal_those_of_a_reader(writings: list[str]) -> None:
    vocabulary = SmilesVocabulary()
    rows = np.zeros(
        (len(writings), 1 + max(len(pieces(text)) for text in writings)), dtype=np.uint8
    )
    for i, text in enumerate(writings):
        rows[i, : len(pieces(text))] = vocabulary.ids(text)
    depths, opens = vocabulary.branch_depth(rows), vocabulary.open_rings(rows)
    for i, text in enumerate(writings):
        n = len(pieces(text))
        assert (depths[i, :n].tolist(), opens[i, :n].tolist()) == counted(pieces(text))
        assert not depths[i, n:].any()
        assert not opens[i, n:].any()
    assert depths.max() >= 3
    assert opens.max() >= 3


# Checks


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "C1CC1",
        "C(C)C",
        "C%12CC%12",
        "C%01CC1",
        "C(C)(C)(C)(C)C",
        "c1cccc1",
        "[nH]1cccc1",
        "C1CC1C1CC1",
    ],
)
def test_well_formed(text: str) -> None:
    assert well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "C(",
        "C)",
        "C)(C",
        "C(C))C(",
        "C1CC",
        "C1CC2",
        "C1CC1C1",
        "[nH",
        "C]",
        "C%1C%1",
        "<bos>C",
        "C<eos>",
        "C%12CC1",
    ],
)
def test_not_well_formed(text: str) -> None:
    assert not well_formed(text)


def test_a_molecule_without_one_bracket_or_ring_number_is_not_well_formed(
    writings: list[str],
) -> None:
    for text in writings[::20]:
        found = pieces(text)
        assert well_formed(text)
        for i, piece in enumerate(found):
            assert well_formed("".join(found[:i] + found[i + 1 :])) == (
                piece not in "()" and not piece.isdigit()
            )


@pytest.mark.parametrize(
    "text", ["C(C)(C)(C)(C)C", "c1cccc1", "C=F", "", "CC name", "C(", "C11", "()", "<bos>C"]
)
def test_not_valid(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert not valid(text)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "call", [lambda: valid("C"), lambda: make_molecules(1), lambda: random_writings(["C"], 1)]
)
def test_without_rdkit_a_sentence_says_what_to_install(
    call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    with pytest.raises(ImportError, match="needs the package rdkit; install it with"):
        call()
    assert well_formed("C1CC1")


# Molecules


@pytest.mark.parametrize(
    "table", [RINGS, LINKERS, CHAINS, TERMINALS], ids=["rings", "linkers", "chains", "terminals"]
)
@pytest.mark.parametrize("methyl", ["", "(C)"], ids=["empty", "filled"])
def test_every_fragment_is_a_molecule_with_its_slots_empty_or_filled(
    table: dict[str, int], methyl: str
) -> None:
    for template, weight in table.items():
        bound = (
            "C"
            + template.replace("*", methyl).replace("^", methyl)
            + ("C" if table is LINKERS else "")
        )
        assert valid(bound), template
        assert all(
            atom.GetNumRadicalElectrons() == 0 for atom in Chem.MolFromSmiles(bound).GetAtoms()
        ), template
        assert weight >= 1


def test_molecules_are_distinct_canonical_and_of_the_size_asked_for(molecules: list[str]) -> None:
    assert len(set(molecules)) == 400
    for text in molecules:
        molecule = Chem.MolFromSmiles(text)
        assert Chem.MolToSmiles(molecule) == text
        assert 9 <= molecule.GetNumHeavyAtoms() <= 27
        assert "." not in text


def test_large_molecules_need_no_other_tokens() -> None:
    large = make_molecules(60, seed=1, atoms=(45, 99))
    read = [Chem.MolFromSmiles(text) for text in large]
    assert max(molecule.GetNumBonds() - molecule.GetNumAtoms() + 1 for molecule in read) == 6
    vocabulary = SmilesVocabulary()
    assert all(vocabulary.text(vocabulary.ids(text)) == text for text in random_writings(large, 3))


def test_molecules_have_rings_branches_charges_and_stereo(molecules: list[str]) -> None:
    read = [Chem.MolFromSmiles(text) for text in molecules]
    sizes = {len(ring) for molecule in read for ring in molecule.GetRingInfo().AtomRings()}
    assert sizes == {3, 4, 5, 6}
    aromatic, saturated = (
        sum(map(bool, map(count, read)))
        for count in (Lipinski.NumAromaticRings, Lipinski.NumSaturatedRings)
    )
    assert 200 < aromatic < 400
    assert 100 < saturated < 400
    assert 0 < sum("+" in text for text in molecules) < 60
    assert 0 < sum("@" in text for text in molecules) < 60
    assert sum("/" in text for text in molecules) < 40
    assert sum("(" in text for text in molecules) > 300


def test_a_seed_gives_the_same_molecules_and_a_smaller_count_the_first_of_them(
    molecules: list[str],
) -> None:
    assert make_molecules(57, seed=3) == molecules[:57]
    assert len(set(make_molecules(57, seed=4)) & set(molecules)) < 10


@pytest.mark.parametrize(
    ("count", "atoms", "sentence"),
    [
        (-1, (9, 27), "count must not be negative, .* got -1 and"),
        (1, (0, 5), "the fewest and the most of 1 to 99, got 1 and \\(0, 5\\)"),
        (1, (7, 5), "got 1 and \\(7, 5\\)"),
        (1, (7, 100), "got 1 and \\(7, 100\\)"),
        (
            1000,
            (3, 3),
            (
                "1,000 distinct molecules of 3 to 3 heavy atoms were asked for, but the grammar"
                " made no new one after [1-9]"
            ),
        ),
    ],
)
def test_impossible_molecules_are_refused(
    count: int, atoms: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_molecules(count, atoms=atoms)


def test_writings_are_of_the_same_molecule_and_mostly_new(
    molecules: list[str], writings: list[str]
) -> None:
    assert len(writings) == 3 * len(molecules)
    assert [Chem.MolToSmiles(Chem.MolFromSmiles(text)) for text in writings[::7]] == [
        molecules[i // 3] for i in range(0, len(writings), 7)
    ]
    assert len(set(writings)) > 0.95 * len(writings)
    assert sum(a == b for a, b in zip(writings[::3], molecules, strict=True)) < 0.2 * len(molecules)


def test_writings_depend_on_their_seed_alone(molecules: list[str], writings: list[str]) -> None:
    random.seed(1)
    Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(molecules[5]), 4, randomSeed=9)
    assert random_writings(molecules[:30], 3, seed=5) == writings[:90]
    assert random_writings(molecules[:30], 3, seed=6) != writings[:90]


def test_writing_what_is_no_molecule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rdkit reads none in 'C\(C'"):
        random_writings(["CC", "C(C"], 2)
