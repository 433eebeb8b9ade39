"""A tokenizer beside the weights is read by transformers, and nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from golden_cases import GOLDEN
from language_toys import make_tokenizer
from loopscope.checkpoints.load import load, save
from loopscope.checkpoints.tokenizer import HubTokenizer


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


def check_unusable(folder: Path, reason: str) -> None:
    """The weights are loaded, with one warning that gives the reason; none where none is asked."""
    with pytest.warns(UserWarning, match=reason) as caught:
        model = load(folder)
    assert len(caught) == 1
    assert "vocab=False" in str(caught[0].message)
    tokens = torch.tensor([[1, 2, 40]])
    assert model.vocab is None
    assert torch.equal(model(tokens), load(GOLDEN / "ouro")(tokens))
    assert load(folder, vocab=False).vocab is None


def test_a_tokenizer_with_more_tokens_than_the_model_is_a_warning(folder: Path) -> None:
    made = make_tokenizer(folder, 80, [f"<extra {i}>" for i in range(40)])
    assert len(made) > 49
    check_unusable(folder, rf"has {len(made)} tokens, but the model has d_vocab=49")


def test_an_added_pad_token_without_an_embedding_is_a_warning(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "ouro", tmp_path / "ouro")
    made = make_tokenizer(tmp_path / "ouro", 49, [f"<extra {i}>" for i in range(30)])
    assert len(made) == 49
    assert load(tmp_path / "ouro").vocab is not None
    made.add_special_tokens({"pad_token": "<pad>"})
    made.save_pretrained(tmp_path / "ouro")
    check_unusable(tmp_path / "ouro", "has 50 tokens, but the model has d_vocab=49")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer.json": "{"}, "the tokenizer in .* cannot be read"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "is not valid JSON"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": 1}}'},
            r"names code of its own \(auto_map\), which is never run",
        ),
        (
            {"tokenizer.json": None, "tokenizer_config.json": None, "vocab.json": '{"a": 0}'},
            "the tokenizer in .* cannot be read",
        ),
        (
            {"tokenizer.json": None, "tokenizer_config.json": None, "merges.txt": "a b"},
            "the tokenizer in .* cannot be read",
        ),
    ],
)
def test_files_that_are_no_tokenizer_are_a_warning(
    folder: Path, files: dict[str, str | None], reason: str
) -> None:
    for name, text in files.items():
        (folder / name).write_text(text or "")
        if text is None:
            (folder / name).unlink()
    check_unusable(folder, reason)


@pytest.mark.parametrize("kind", ["ouro", "qwen3", "llama"])
def test_vocabulary_and_merges_alone_are_read(folder: Path, kind: str, tmp_path: Path) -> None:
    """By the class of the model type, where transformers has one, and else by GPT-2's."""
    source = folder
    if kind != "ouro":
        source = tmp_path / kind
        shutil.copytree(GOLDEN / f"training_free_{kind}", source)
    raw = json.loads((folder / "tokenizer.json").read_text())["model"]
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (source / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in raw["merges"]))
    model = load(source, **({} if kind == "ouro" else {"window": (1, 2)}))
    assert model.vocab is not None
    assert len(model.vocab.tokenizer) == len(raw["vocab"])  # type: ignore[attr-defined]
    for text in ("the cat", "a dog sat on the mat"):
        assert "".join(model.to_str_tokens(text)) == text
        assert (
            model.vocab.ids(text)
            == make_tokenizer(tmp_path / "again", 40)(text, add_special_tokens=False).input_ids
        )


def test_a_model_without_a_tokenizer_runs_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this checkpoint has no vocabulary"):
        load(GOLDEN / "ouro").encode(["the cat"])
