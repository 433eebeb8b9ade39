"""Vocabularies, cards and configs that are broken or impossible: each is refused in one sentence
that names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from release_files import D_VOCAB, FACTS, WORDS, check_refused, write_release

# Files beside the weights


@pytest.mark.parametrize(
    ("words", "found"), [(WORDS[:-1], D_VOCAB - 1), ([*WORDS, "<more>"], D_VOCAB + 1), ([], 1)]
)
def test_a_vocabulary_of_another_size_is_refused(
    tmp_path: Path, words: list[str], found: int
) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    match = rf"vocab\.json has {found} tokens with <pad>, but the model has d_vocab={D_VOCAB}"
    check_refused(write_release(tmp_path / "a.pt"), match, within=tmp_path, **FACTS)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"<pad>": 0}', "must be a JSON list of tokens, got dict"),
        ("[1, 2]", "must be a JSON list of tokens"),
        ('["<pad>", "<e_0>"', "is not valid JSON"),
        ("", "is not valid JSON"),
        ('["<e_0>", "<e_0>"]', "must hold each token once, but '<e_0>' occurs more often"),
        ('["<e_0>", "<pad>"]', "'<pad>' must have id 0, got 1"),
    ],
)
def test_a_broken_vocabulary_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    (tmp_path / "vocab.json").write_text(text)
    sentence = check_refused(write_release(tmp_path / "a.pt"), rule, within=tmp_path, **FACTS)
    assert "vocab.json" in sentence


def test_a_vocabulary_argument_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    check_refused(
        path,
        r"no_such_vocab\.json",
        error=FileNotFoundError,
        within=tmp_path,
        **FACTS,
        vocab=tmp_path / "no_such_vocab.json",
    )


@pytest.mark.parametrize("name", ["vocab.json", "card.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"not json", b"\xff\xfe\x00"], ids=["empty", "cut", "text", "bytes"]
)
def test_a_json_file_that_is_none_is_refused(
    own: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    (own / name).write_bytes(content)
    check_refused(own, rf"{re.escape(name)} is not valid JSON", within=tmp_path)


@pytest.mark.parametrize("name", ["card.json", "config.json"])
@pytest.mark.parametrize("text", ["[1]", "null"])
def test_a_json_file_that_is_no_object_is_refused(
    own: Path, tmp_path: Path, name: str, text: str
) -> None:
    (own / name).write_text(text)
    check_refused(own, rf"{re.escape(name)} must be a JSON object", within=tmp_path)


@pytest.mark.parametrize(
    ("card", "rule"),
    [
        (
            {"readout": "somewhere"},
            "readout must be 'last_real', 'first_pad' or 'column:K', got 'somewhere'",
        ),
        ({"n_heads": 4}, "4 heads do not divide d_model=15"),
        ({"n_heads": "five"}, "n_heads must be .*got 'five'"),
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
    ],
    ids=["readout", "heads", "type", "loops"],
)
def test_a_card_that_says_something_impossible_is_refused(
    tmp_path: Path, card: dict[str, Any], rule: str
) -> None:
    (tmp_path / "card.json").write_text(json.dumps({**FACTS, **card}))
    check_refused(write_release(tmp_path / "a.pt"), rule, error=ValueError, within=tmp_path)


# Our own config.json


def remove(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.pop(name)


def put(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({name: value})


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown family": (
        put("family", "elsewhere"),
        r"family must be one of \[.*'recurrent_depth'.*\], got 'elsewhere'",
    ),
    "no family": (put("family", None), "family must be one of .*got None"),
    "unknown key": (put("n_experts", 8), "has no field 'n_experts'; its fields are"),
    "missing key": (remove("d_model"), "needs the field 'd_model', which was not given"),
    "heads": (put("n_heads", 4), "4 heads do not divide d_model=15"),
    "no layers": (put("n_layers", 0), "n_layers must be at least 1, got 0"),
    "no loops": (put("n_loops", 0), "n_loops must be at least 1, got 0"),
    "length without positions": (
        put("positions", "none"),
        "n_ctx must be given with positions and only then, got n_ctx=7",
    ),
    "a word for a number": (put("n_layers", "two"), "n_layers must be .*got 'two'"),
}


@pytest.mark.parametrize(("damage", "rule"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_is_refused_and_named(
    own: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], rule: str
) -> None:
    values = json.loads((own / "config.json").read_text())
    damage(values)
    (own / "config.json").write_text(json.dumps(values))
    assert "config.json" in check_refused(own, rule, within=tmp_path)


@pytest.mark.parametrize("values", [{"model_type": "bloom", "n_layer": 12}, {"hidden_size": 8}])
def test_a_model_type_that_is_not_supported_is_named(
    own: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    (own / "config.json").write_text(json.dumps(values))
    match = (
        r"config\.json names no family that can be loaded \(its model_type is"
        rf" '{values.get('model_type', 'none')}'\)"
    )
    check_refused(own, match, within=tmp_path)
