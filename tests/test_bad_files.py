"""Bad input: each is one sentence that says the rule and what was found; no code in a file runs and nothing is left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.load import load, save
from release_files import D_VOCAB, FACTS, WORDS, files_under, release_tensors, toy_model, write_bomb, write_release

Tensors = dict[str, Tensor]
FC = "blocks.1.mlp.c_fc.weight"


def check_refused(source: Path | str, match: str, *, error: type[Exception] = CheckpointError, within: Path, **arguments: Any) -> str:
    """Check that loading is refused in one sentence and leaves the folder as it was; returns the sentence."""
    before = files_under(within)
    with pytest.raises(error, match=match) as caught:
        load(source, **arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert files_under(within) == before
    return sentence


def changed(**values: Tensor | None) -> Tensors:
    """Toy tensors with some replaced, added, or (None) left out; two underscores stand for a dot."""
    tensors: dict[str, Tensor | None] = {**release_tensors(), **{name.replace("__", "."): value for name, value in values.items()}}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder in our own format."""
    save(toy_model("learned", read_at="last_real"), tmp_path / "own")
    return tmp_path / "own"


# Not there, or not a checkpoint


@pytest.mark.parametrize("source", ["nothing_here", "no/such/checkpoint_epoch_1.pt", "ltg_trainde"])
def test_what_is_not_there_is_named_with_the_known_checkpoints(tmp_path: Path, source: str) -> None:
    match = rf"'{source}' is neither a shipped checkpoint \(.*ltg_trained.*\) nor a file or folder; .*available\(\)"
    check_refused(source, match, error=FileNotFoundError, within=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"P", b"weights for you\n", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), b"\x80\x04\x95", b"{}", bytes(4096)],
    ids=["empty", "one-byte", "text", "png", "pickle", "json", "zeros"],
)
def test_a_file_that_is_no_torch_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_epoch_1.pt"
    path.write_bytes(content)
    check_refused(path, r"checkpoint_epoch_1\.pt is not a checkpoint: .*torch file with a 'model_state_dict'", within=tmp_path, **FACTS)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(300), b"PK", b"\x80\x02", b"\x80\x02" + bytes(range(200))])
def test_a_file_that_only_begins_like_a_torch_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    check_refused(path, r"a\.pt (is damaged or cut short|holds code)", within=tmp_path, **FACTS)


@pytest.mark.parametrize("name", ["notes.txt", "model.bin", "model.safetensors"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    match = rf"{re.escape(name)} is not a checkpoint: expected a \.pt file, or a \.safetensors file with config\.json beside it"
    check_refused(tmp_path / name, match, within=tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    match = r"holds no checkpoint: expected model\.safetensors with config\.json, or a \.pt file"
    check_refused(tmp_path, match, within=tmp_path)


def test_weights_without_config_are_refused(own: Path, tmp_path: Path) -> None:
    (own / "config.json").unlink()
    check_refused(own, r"expected .*a \.safetensors file with config\.json beside it", within=tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 4}, r"\['epoch'\]"),
        ({"model_state_dict": {}}, r"\['model_state_dict'\]"),
        ({"model_state_dict": [1, 2]}, r"\['model_state_dict'\]"),
        ({"model_state_dict": {"token_embedding.weight": 3}}, r"\['model_state_dict'\]"),
        (torch.zeros(3), "Tensor"),
        ([1, 2], "list"),
    ],
)
def test_a_torch_file_without_a_model_is_refused(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    check_refused(tmp_path / "a.pt", rf"a\.pt holds no model: .*but this file holds {found}", within=tmp_path, **FACTS)


# Cut short


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_a_release_that_is_cut_short_is_refused(tmp_path: Path, share: float, legacy: bool) -> None:
    path = write_release(tmp_path / "a.pt", legacy=legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share) - 1])
    check_refused(path, r"a\.pt is damaged or cut short: .* reading it failed with \w+", within=tmp_path, **FACTS)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_our_own_weights_cut_short_are_refused(own: Path, tmp_path: Path, share: float) -> None:
    whole = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    check_refused(own, r"model\.safetensors is damaged or cut short", within=tmp_path)


# Code in the file


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle2"])
def test_code_in_a_torch_file_is_refused_and_does_not_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "the_code_ran"
    path = write_bomb(tmp_path / "a.pt", marker, kind)
    check_refused(path, r"a\.pt holds code \((posix|nt)\.mkdir\), not only tensors; it is refused", within=tmp_path, **FACTS)
    assert not marker.exists()


def test_code_in_a_newer_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = write_bomb(tmp_path / "a.pt", tmp_path / "the_code_ran", "pickle4")
    check_refused(path, r"a\.pt is not a checkpoint", within=tmp_path, **FACTS)
    assert not (tmp_path / "the_code_ran").exists()


def test_the_code_would_have_run_in_an_unsafe_load(tmp_path: Path) -> None:
    marker = tmp_path / "the_code_ran"
    torch.load(write_bomb(tmp_path / "a.pt", marker, "zip"), weights_only=False)
    assert marker.exists(), "otherwise the two tests above show nothing"


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.pt")
    check_refused(tmp_path / "a.pt", r"a\.pt holds code \(torch\.nn\.modules\.linear\.Linear\)", within=tmp_path, **FACTS)


# Keys, shapes and values


@pytest.mark.parametrize("key", ["ln_f.bias", "blocks.0.attn.c_proj.weight", "blocks.1.mlp.c_proj.bias"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: None}))
    match = rf"a\.pt lacks 1 key\(s\) of a recurrent_depth model with 2 layers, first '{re.escape(key)}'"
    check_refused(path, match, within=tmp_path, **FACTS)


@pytest.mark.parametrize("key", ["token_embedding.weight", "blocks.0.mlp.c_fc.weight"])
def test_a_missing_key_that_the_sizes_are_told_from_is_named(tmp_path: Path, key: str) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: None}))
    check_refused(path, rf"a\.pt lacks the matrix '{re.escape(key)}', so the model's sizes cannot be told", within=tmp_path, **FACTS)


def test_a_whole_missing_block_is_noticed(tmp_path: Path) -> None:
    tensors = {key.replace("blocks.1.", "blocks.2."): value for key, value in release_tensors().items()}
    check_refused(
        write_release(tmp_path / "a.pt", tensors), r"lacks 12 key\(s\) .*with 3 layers, first 'blocks\.1\.ln_1", within=tmp_path, **FACTS
    )


@pytest.mark.parametrize("key", ["extra", "blocks.0.attn.rotary.freqs", "blocks.1.attn.bias2", "blocks.extra.weight", "module.ln_f.weight"])
def test_an_unexpected_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: torch.zeros(3)}))
    match = rf"a\.pt has 1 unexpected key\(s\), first '{re.escape(key)}'; a recurrent_depth model has none of that name"
    check_refused(path, match, within=tmp_path, **FACTS)


def test_two_position_tables_are_refused(tmp_path: Path) -> None:
    tables = {"pe": torch.zeros(7, 15), "position_embedding.weight": torch.zeros(7, 15)}
    check_refused(write_release(tmp_path / "a.pt", changed(**tables)), "unexpected key|pe.*position_embedding", within=tmp_path, **FACTS)


@pytest.mark.parametrize(
    ("key", "found", "expected"),
    [
        (FC, (15, 61), "[15, 60]"),
        (FC, (60, 15), "[15, 60]"),
        (FC, (1, 15, 60), "[15, 60]"),
        ("blocks.0.attn.c_attn.weight", (15, 44), "[15, 45]"),
        ("blocks.1.ln_2.bias", (16,), "[15]"),
        ("ln_f.weight", (), "[15]"),
        ("position_embedding.weight", (7, 14), "[7, 15]"),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(tmp_path: Path, key: str, found: tuple[int, ...], expected: str) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: torch.zeros(found)}))
    match = re.escape(f"{key!r} must have the shape {expected}, got {list(found)}")
    check_refused(path, match, within=tmp_path, **FACTS)


@pytest.mark.parametrize("key", ["pe", "position_embedding.weight"])
@pytest.mark.parametrize("found", [(), (7,), (7, 15, 1)])
def test_a_position_table_that_is_no_matrix_is_named(tmp_path: Path, key: str, found: tuple[int, ...]) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: torch.zeros(found)}))
    check_refused(path, rf"'{re.escape(key)}' must have the shape \[.*15\], got {re.escape(str(list(found)))}", within=tmp_path, **FACTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [FC, "ln_f.bias", "token_embedding.weight"])
def test_weights_that_are_not_finite_are_counted(tmp_path: Path, key: str, value: float) -> None:
    tensors = release_tensors()
    tensors[key].view(-1)[[0, 4]] = value
    match = re.escape(f"{key!r} holds 2 value(s) that are NaN or infinite")
    check_refused(write_release(tmp_path / "a.pt", tensors), match, within=tmp_path, **FACTS)


def test_the_last_value_of_a_large_matrix_is_looked_at_too(tmp_path: Path) -> None:
    tensors = release_tensors(d_mlp=80_000, n_layers=1)
    tensors["blocks.0.mlp.c_fc.weight"][-1, -1] = float("nan")
    path = write_release(tmp_path / "a.pt", tensors, optimizer_state_dict={})
    check_refused(path, r"'blocks\.0\.mlp\.c_fc\.weight' holds 1 value\(s\) that are NaN or infinite", within=tmp_path, **FACTS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{FC: torch.ones(15, 60, dtype=dtype)}))
    check_refused(path, re.escape(f"{FC!r} must hold floating-point numbers, got {dtype}"), within=tmp_path, **FACTS)


@pytest.mark.parametrize("n_heads", [2, 4, 7, 16])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path, n_heads: int) -> None:
    match = rf"n_heads must divide d_model: {n_heads} heads do not divide d_model=15; pass one of \[1, 3, 5, 15\]"
    check_refused(write_release(tmp_path / "a.pt"), match, error=ValueError, within=tmp_path, n_heads=n_heads, input_injection=False)


# Files beside the weights


@pytest.mark.parametrize(("words", "found"), [(WORDS[:-1], D_VOCAB - 1), ([*WORDS, "<more>"], D_VOCAB + 1), ([], 1)])
def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, words: list[str], found: int) -> None:
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
    check_refused(path, r"no_such_vocab\.json", error=FileNotFoundError, within=tmp_path, **FACTS, vocab=tmp_path / "no_such_vocab.json")


@pytest.mark.parametrize("name", ["vocab.json", "card.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\x00"], ids=["empty", "cut", "text", "bytes"])
def test_a_json_file_that_is_none_is_refused(own: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (own / name).write_bytes(content)
    check_refused(own, rf"{re.escape(name)} is not valid JSON", within=tmp_path)


@pytest.mark.parametrize("name", ["card.json", "config.json"])
@pytest.mark.parametrize("text", ["[1]", "null"])
def test_a_json_file_that_is_no_object_is_refused(own: Path, tmp_path: Path, name: str, text: str) -> None:
    (own / name).write_text(text)
    check_refused(own, rf"{re.escape(name)} must be a JSON object", within=tmp_path)


@pytest.mark.parametrize(
    ("card", "rule"),
    [
        ({"readout": "somewhere"}, "readout must be 'last_real', 'first_pad' or 'column:K', got 'somewhere'"),
        ({"n_heads": 4}, "4 heads do not divide d_model=15"),
        ({"n_heads": "five"}, "n_heads must be .*got 'five'"),
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
    ],
    ids=["readout", "heads", "type", "loops"],
)
def test_a_card_that_says_something_impossible_is_refused(tmp_path: Path, card: dict[str, Any], rule: str) -> None:
    (tmp_path / "card.json").write_text(json.dumps({**FACTS, **card}))
    check_refused(write_release(tmp_path / "a.pt"), rule, error=ValueError, within=tmp_path)


# Our own config.json


def remove(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.pop(name)


def put(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({name: value})


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown family": (put("family", "elsewhere"), r"family must be one of \[.*'recurrent_depth'.*\], got 'elsewhere'"),
    "no family": (put("family", None), "family must be one of .*got None"),
    "unknown key": (put("n_experts", 8), "has no field 'n_experts'; its fields are"),
    "missing key": (remove("d_model"), "needs the field 'd_model', which was not given"),
    "heads": (put("n_heads", 4), "4 heads do not divide d_model=15"),
    "no layers": (put("n_layers", 0), "n_layers must be at least 1, got 0"),
    "no loops": (put("n_loops", 0), "n_loops must be at least 1, got 0"),
    "length without positions": (put("positions", "none"), "n_ctx must be given with positions and only then, got n_ctx=7"),
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


@pytest.mark.parametrize("values", [{"model_type": "gpt2", "n_layer": 12}, {"hidden_size": 8}])
def test_a_model_type_that_is_not_supported_is_named(own: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    (own / "config.json").write_text(json.dumps(values))
    match = rf"config\.json names no family that can be loaded \(its model_type is '{values.get('model_type', 'none')}'\)"
    check_refused(own, match, within=tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_layers": 3}, r"model\.safetensors lacks 12 key\(s\) .* with 3 layers, first 'blocks\.2\.ln1\.w'"),
        ({"n_layers": 1}, r"has 12 unexpected key\(s\), first 'blocks\.1\."),
        ({"d_mlp": 61}, r"'blocks\.0\.mlp\.W_in' must have the shape \[15, 61\], got \[15, 60\]"),
        ({"d_vocab": 12}, r"'embedding' must have the shape \[12, 15\], got \[11, 15\]"),
        ({"n_ctx": 8}, r"'W_pos' must have the shape \[8, 15\], got \[7, 15\]"),
        ({"positions": "none", "n_ctx": None}, r"has 1 unexpected key\(s\), first 'W_pos'"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(own: Path, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**values, **changes}))
    check_refused(own, match, within=tmp_path)


# Bad calls of a good checkpoint


@pytest.mark.parametrize(("token", "found"), [(D_VOCAB, D_VOCAB), (-1, -1)])
def test_tokens_out_of_range_are_refused(token: int, found: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens must be in 0\.\.{D_VOCAB - 1} \(d_vocab={D_VOCAB}\), got {found}"):
        toy_model()(torch.tensor([[1, token, 2]]))


@pytest.mark.parametrize("n_loops", [0, -3])
def test_a_call_with_fewer_than_one_iteration_is_refused(n_loops: int) -> None:
    with pytest.raises(ValueError, match=f"n_loops must be at least 1, got {n_loops}"):
        toy_model()(torch.tensor([[1, 2]]), n_loops=n_loops)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_an_input_longer_than_the_positions_is_refused(positions: str) -> None:
    model = toy_model(positions)
    assert model(torch.ones(1, 7, dtype=torch.int64)).shape == (1, 7, D_VOCAB)
    with pytest.raises(ValueError, match="inputs may have at most n_ctx=7 positions in this model, got 8"):
        model(torch.ones(1, 8, dtype=torch.int64))


def test_a_left_padded_mask_is_named() -> None:
    with pytest.raises(ValueError, match=r"row 1 starts with padding; left padding is not supported, pad on the right"):
        toy_model()(torch.tensor([[1, 2, 3], [0, 1, 2]]), mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))


def test_a_mask_with_a_hole_is_named() -> None:
    with pytest.raises(ValueError, match="must be ones then zeros along pos, but row 0 has real tokens after padding"):
        toy_model()(torch.tensor([[1, 0, 2]]), mask=torch.tensor([[1, 0, 1]]))


def test_a_mixture_of_number_formats_is_refused(tmp_path: Path) -> None:
    tensors = release_tensors()
    tensors["ln_f.bias"] = tensors["ln_f.bias"].double()
    path = write_release(tmp_path / "a.pt", tensors)
    check_refused(path, r"a\.pt mixes the number formats \['torch.float32', 'torch.float64'\]", within=tmp_path, **FACTS)


def test_a_key_with_and_without_its_prefix_is_refused(tmp_path: Path) -> None:
    tensors = release_tensors()
    path = write_release(tmp_path / "a.pt", {**tensors, "_orig_mod.ln_f.bias": tensors["ln_f.bias"]})
    check_refused(path, r"a\.pt holds some keys both with and without the prefix", within=tmp_path, **FACTS)
