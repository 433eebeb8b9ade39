"""What the card and the vocabulary beside the weights tell, and the arguments that win over
them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loopscope.checkpoints.load import load
from loopscope.models.basis.tokens import Readout
from release_files import D_VOCAB, FACTS, WORDS, loaded, write_release

# The card


def test_a_card_beside_the_weights_tells_what_the_file_does_not(tmp_path: Path) -> None:
    card = {"n_heads": 3, "input_injection": True, "n_loops": 6, "readout": "column:9"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    model = load(write_release(tmp_path / "a.pt"))
    assert (model.cfg.n_heads, model.cfg.input_injection, model.cfg.n_loops) == (3, True, 6)
    assert model.read_at == Readout("column", 9)


def test_arguments_win_over_the_card(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(
        json.dumps({"n_heads": 3, "input_injection": True, "n_loops": 6, "readout": "column:9"})
    )
    model = load(
        write_release(tmp_path / "a.pt"),
        n_heads=5,
        input_injection=False,
        n_loops=2,
        readout="last_real",
    )
    assert (model.cfg.n_heads, model.cfg.input_injection, model.cfg.n_loops) == (5, False, 2)
    assert model.read_at == Readout("last_real")


# Where answers are read, and the vocabulary


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    (tmp_path / "words").mkdir()
    path = tmp_path / "words" / "vocab.json"
    path.write_text(json.dumps(WORDS))
    return path


def test_a_bare_file_runs_but_does_not_encode(tmp_path: Path, vocab_file: Path) -> None:
    model = loaded(tmp_path / "a.pt", vocab=vocab_file)
    assert model.read_at is None
    assert model(torch.tensor([[1, 6, 7]]), n_loops=2).shape == (1, 3, D_VOCAB)
    assert model.to_tokens("<e_0><r_0><r_1>").tolist() == [[1, 6, 7]]
    with pytest.raises(
        ValueError,
        match=r"does not say where its answers are read; load it with readout='last_real'",
    ):
        model.encode("<e_0><r_0>")


def test_without_a_vocabulary_texts_are_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a.pt", readout="last_real")
    with pytest.raises(
        ValueError, match=r"has no vocabulary; load it with vocab='path/to/vocab\.json'"
    ):
        model.encode("<e_0><r_0>")


@pytest.mark.parametrize(
    ("readout", "columns", "width"),
    [
        ("last_real", [1, 2], 3),
        ("first_pad", [2, 3], 4),
        ("column:9", [3, 3], 4),
        ("column:2", [2, 2], 3),
    ],
)
def test_encode_pads_as_the_readout_argument_needs(
    tmp_path: Path, vocab_file: Path, readout: str, columns: list[int], width: int
) -> None:
    model = loaded(tmp_path / "a.pt", vocab=vocab_file, readout=readout)
    assert str(model.read_at) == readout
    batch = model.encode(["<e_0><r_0>", "<e_1><r_1><r_2>"])
    assert batch.tokens.shape == batch.mask.shape == (2, width)
    assert batch.mask.sum(1).tolist() == [2, 3]
    assert batch.readout.tolist() == columns


@pytest.mark.parametrize(
    "readout", ["first_real", "column", "column:", "column:-1", "column:x", "last_real:3"]
)
def test_an_unknown_readout_is_refused(tmp_path: Path, readout: str) -> None:
    path = write_release(tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=f"readout must be 'last_real', 'first_pad' or 'column:K', got '{readout}'"
    ):
        load(path, **FACTS, readout=readout)


def test_a_vocabulary_beside_the_weights_is_found(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS[1:]))
    model = loaded(tmp_path / "a.pt")
    assert model.vocab is not None
    assert model.vocab.words == tuple(WORDS), "padding is put in front"


def test_the_vocabulary_argument_wins_over_the_one_beside_the_weights(
    tmp_path: Path, vocab_file: Path
) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(["<x>"]))
    model = loaded(tmp_path / "a.pt", vocab=str(vocab_file))
    assert model.to_single_token("<e_4>") == 5
