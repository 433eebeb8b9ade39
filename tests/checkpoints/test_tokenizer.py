"""A tokenizer beside the weights is read by transformers, and nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from golden_cases import GOLDEN
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, save
from loopscope.checkpoints.tokenizer import HubTokenizer
from small_tokenizer import make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "ouro"
    shutil.copytree(GOLDEN / "ouro", target)
    make_tokenizer(target, 40)
    return target


def test_texts_are_encoded_as_the_tokenizer_does_without_special_tokens(folder: Path) -> None:
    model = load(folder)
    assert isinstance(model.vocab, HubTokenizer)
    theirs = model.vocab.tokenizer
    batch = model.encode(["the cat", "a dog sat on the mat"])
    for row, text in enumerate(["the cat", "a dog sat on the mat"]):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert batch.tokens[row, : len(ids)].tolist() == ids
        assert int(batch.mask[row].sum()) == len(ids)
        assert int(batch.readout[row]) == len(ids) - 1
        assert "".join(model.to_str_tokens(text)) == text
    assert model.to_tokens("<s>the")[0, 0] == theirs.bos_token_id
    assert model.to_single_token(" sat") == theirs(" sat", add_special_tokens=False)["input_ids"][0]


def test_ids_that_the_tokenizer_does_not_have_are_named_as_unused(folder: Path) -> None:
    model = load(folder)
    assert model.vocab is not None
    assert len(model.vocab) == len(model.vocab.words) == model.cfg.d_vocab == 49
    assert model.vocab.words[-1] == "<unused 48>"


def test_a_saved_model_keeps_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    save(model, tmp_path / "own")
    again = load(tmp_path / "own")
    assert again.vocab is not None
    assert again.vocab.ids("the dog") == model.vocab.ids("the dog")


def test_an_empty_text_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="a text must hold at least one token"):
        load(folder).encode([""])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    made = make_tokenizer(folder, 80, [f"<extra {i}>" for i in range(40)])
    assert len(made) > 49
    with pytest.raises(
        CheckpointError, match=rf"has {len(made)} tokens, but the model has d_vocab=49"
    ):
        load(folder)


def test_files_that_are_no_tokenizer_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        load(folder)


def test_a_model_without_a_tokenizer_runs_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this checkpoint has no vocabulary"):
        load(GOLDEN / "ouro").encode(["the cat"])
