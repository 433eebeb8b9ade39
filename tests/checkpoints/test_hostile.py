"""Files that promise too much, hold odd values or name code: refused at once, in one line."""

from __future__ import annotations

import builtins
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden_cases import GOLDEN
from language_toys import make_tokenizer
from loopscope.checkpoints.errors import CheckpointError, MissingFacts
from loopscope.checkpoints.load import load, save
from loopscope.models.views import untied
from release_files import (
    FACTS,
    WORDS,
    check_refused,
    files_under,
    release_tensors,
    toy_model,
    write_release,
)

TOKENS = torch.tensor([[1, 6, 7], [2, 8, 6]])
DEEP = "[" * 100_000 + "]" * 100_000


def with_raw(path: Path, field: str, raw: str) -> None:
    """Write a field of a JSON file as raw text."""
    values = {**json.loads(path.read_text()), field: "@@"}
    path.write_text(json.dumps(values).replace('"@@"', raw))


@pytest.fixture
def ouro(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "ouro", tmp_path / "ouro")


# Sizes are compared with the weights before anything is built


@pytest.mark.parametrize("value", [10**9, 2**62])
@pytest.mark.parametrize(
    ("case", "field", "bound"),
    [
        ("ouro", "num_hidden_layers", "tensors"),
        ("ouro", "hidden_size", "elements"),
        ("ouro", "vocab_size", "elements"),
        ("ouro", "num_attention_heads", "elements"),
        ("ouro", "total_ut_steps", "more iterations"),
        ("albert", "num_hidden_groups", "tensors"),
        ("albert", "num_hidden_layers", "more iterations"),
        ("hrm_text", "L_cycles", "more iterations"),
        ("huginn", "n_layers_in_prelude", "tensors"),
        ("parcae", "n_layers_in_coda", "tensors"),
        ("spiral", "n_shared_blocks", "tensors"),
        ("smollm", "block_size", "32 bits|shape|at most 16777216"),
    ],
)
def test_a_size_that_the_weights_cannot_have_is_refused(
    tmp_path: Path, case: str, field: str, bound: str, value: int
) -> None:
    folder = shutil.copytree(GOLDEN / case, tmp_path / case)
    with_raw(folder / "config.json", field, str(value))
    check_refused(folder, bound, within=tmp_path)


@pytest.mark.parametrize(
    ("field", "bound"),
    [
        ("n_layers", r"config\.json: n_layers must be at most 28, got 1000000000, as .* tensors"),
        ("d_model", r"config\.json: d_model must be at most \d+, got 1000000000, as .* elements"),
        ("n_heads", r"config\.json: n_heads must be at most \d+, got"),
        ("n_loops", r"config\.json: n_loops must be at most 1024, got"),
    ],
)
def test_a_size_in_our_own_format_is_compared_with_the_weights_too(
    own: Path, tmp_path: Path, field: str, bound: str
) -> None:
    with_raw(own / "config.json", field, str(10**9))
    check_refused(own, bound, within=tmp_path)


def test_more_iterations_than_any_model_runs_are_refused_as_an_argument(own: Path) -> None:
    with pytest.raises(ValueError, match="n_loops must be at most 1024, got 1000000000"):
        load(own, n_loops=10**9)


def test_a_stray_block_makes_no_model_of_that_depth(tmp_path: Path) -> None:
    tensors = {**release_tensors(), "blocks.20000.ln_1.weight": torch.zeros(15)}
    match = r"a\.pt has keys of the block 20000, but it holds only \d+ tensors"
    check_refused(write_release(tmp_path / "a.pt", tensors), match, within=tmp_path, **FACTS)


# JSON


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ("NaN", r"config\.json: rope_theta must be a finite number of at most 64 bits"),
        ("-Infinity", r"config\.json: rope_theta must be a finite number"),
        ("1e400", r"config\.json: rope_theta must be a finite number"),
        (str(10**19), r"config\.json: rope_theta must be a finite number"),
        ("9" * 5000, r"config\.json: rope_theta must be a finite number"),
        ('{"a": [0, NaN]}', r"config\.json: rope_theta\.a\.1 must be a finite number"),
        (DEEP, r"config\.json is not valid JSON: it is nested too deeply"),
        ("null", r"config\.json: rope_theta must be a number, got None"),
        ('"10000"', r"config\.json: rope_theta must be a number, got '10000'"),
        ("[]", r"config\.json: rope_theta must be a number, got \[\]"),
    ],
)
def test_a_number_that_is_none_is_refused_by_its_field(
    ouro: Path, tmp_path: Path, raw: str, match: str
) -> None:
    with_raw(ouro / "config.json", "rope_theta", raw)
    check_refused(ouro, match, within=tmp_path)


@pytest.mark.parametrize("raw", ["[]", "{}", "3", "true"])
def test_a_family_that_is_no_name_is_refused(own: Path, tmp_path: Path, raw: str) -> None:
    with_raw(own / "config.json", "family", raw)
    check_refused(own, r"config\.json: the family must be one of \[.*\], got", within=tmp_path)


@pytest.mark.parametrize("raw", ["[]", "{}", "[[1]]"])
def test_a_rope_type_that_is_no_word_is_refused(ouro: Path, tmp_path: Path, raw: str) -> None:
    with_raw(ouro / "config.json", "rope_scaling", f'{{"rope_type": {raw}, "factor": 2.0}}')
    match = r"config\.json: rope_scaling\.rope_type must be text, a number"
    check_refused(ouro, match, within=tmp_path)


@pytest.mark.parametrize(
    ("card", "match"),
    [
        ({"readout": 3}, r"card\.json: readout must be 'last_real', .*got '3'"),
        ({"readout": []}, r"card\.json: readout must be 'last_real'"),
        ({"n_heads": True}, r"card\.json: n_heads must be a number, got True"),
        ({"input_injection": "x"}, r"card\.json: input_injection must be true or false, got 'x'"),
        ({"input_injection": 1}, r"card\.json: input_injection must be true or false, got 1"),
        ({"n_heads": 0}, r"n_heads must be at least 1, got 0"),
        ({"n_heads": -1}, r"n_heads must be at least 1, got -1"),
    ],
)
def test_a_card_with_an_odd_value_is_refused(
    tmp_path: Path, card: dict[str, Any], match: str
) -> None:
    (tmp_path / "card.json").write_text(json.dumps({**FACTS, **card}))
    check_refused(write_release(tmp_path / "a.pt"), match, within=tmp_path)


@pytest.mark.parametrize(
    "where", [[], 3, "x", {}, {"a": 3}, {"a": []}, {"a": ""}, {"a": "x" * 999}]
)
def test_an_index_of_a_wrong_type_is_refused(ouro: Path, tmp_path: Path, where: Any) -> None:
    (ouro / "model.safetensors").rename(ouro / "one.safetensors")
    (ouro / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    check_refused(ouro, r"index\.json(: weight_map\.a)? must (map|be)", within=tmp_path)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "a\0b", ".."])
def test_a_shard_that_is_not_beside_its_index_is_refused(
    ouro: Path, tmp_path: Path, name: str
) -> None:
    (ouro / "model.safetensors").rename(tmp_path / "one.safetensors")
    (ouro / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    check_refused(ouro, r"index\.json names the shard .*, which is not beside it", within=tmp_path)


# Tensors


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.to("meta"), "must be a dense tensor with data, got .* on the device 'meta'"),
        (lambda t: t.to_sparse(), r"must be a dense tensor with data, got .*torch\.sparse_coo"),
        (
            lambda t: t[:1].clone().expand(15),
            "must have a stored number for each of its 15 elements",
        ),
        (lambda t: t.to(torch.float8_e4m3fn), "mixes the number formats .*float8"),
        (lambda t: t.double(), "mixes the number formats"),
        (lambda t: t * 1e30, r"holds 15 value\(s\) beyond 1e\+15, .* damaged"),
    ],
    ids=["meta", "sparse", "expanded", "float8", "double", "huge"],
)
def test_a_tensor_without_usable_numbers_is_refused_by_name(
    tmp_path: Path, change: Callable[[Tensor], Tensor], match: str
) -> None:
    tensors = release_tensors()
    tensors["ln_f.weight"] = change(tensors["ln_f.weight"])
    path = write_release(tmp_path / "a.pt", tensors, optimizer_state_dict={})
    assert "a.pt" in check_refused(path, match, within=tmp_path, **FACTS)


def test_a_buffer_of_another_format_is_refused_but_a_table_of_angles_is_not(tmp_path: Path) -> None:
    for case, key, fine in (
        ("spiral", "blocks.0.ffn.0.parametrizations.weight.0._v", False),
        ("huginn", "freqs_cis", True),
    ):
        folder = shutil.copytree(GOLDEN / case, tmp_path / case)
        tensors = load_file(folder / "model.safetensors")
        tensors[key] = tensors[key].double()
        save_file(tensors, folder / "model.safetensors")
        if fine:
            load(folder)
        else:
            check_refused(folder, "mixes the number formats", within=tmp_path)


# Archives


def zipped_again(path: Path, compression: int, **contents: bytes) -> None:
    with zipfile.ZipFile(path) as source:
        entries = {each.filename: source.read(each) for each in source.infolist()}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in entries.items():
            target.writestr(name, contents.get(name.rpartition("/")[2], content))


def test_an_archive_that_was_zipped_again_with_compression_is_refused(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    zipped_again(path, zipfile.ZIP_DEFLATED)
    match = r"a\.pt was zipped again with compression \('a/.*'\); unzip it"
    check_refused(path, match, within=tmp_path, **FACTS)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    zipped_again(path, zipfile.ZIP_DEFLATED, **{"data.pkl": bytes(1 << 27)})
    assert path.stat().st_size < 1 << 20
    check_refused(path, "was zipped again with compression", within=tmp_path, **FACTS)


# No code is run, and nobody is asked


@pytest.mark.parametrize("answer", ["y", "n"])
def test_the_code_of_a_tokenizer_is_not_run_and_nobody_is_asked(
    ouro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    make_tokenizer(ouro, 40)
    (ouro / "tokenizer.json").unlink()
    marker = tmp_path / "ran"
    (ouro / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    code = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (ouro / "tokenizer_config.json").write_text(json.dumps(code))
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or answer)
    match = r"tokenizer_config\.json names code of its own \(auto_map\), which is never run"
    before = files_under(tmp_path)
    with pytest.warns(UserWarning, match=match):
        assert load(ouro).vocab is None
    assert (asked, marker.exists()) == ([], False)
    assert files_under(tmp_path) == before


def test_a_tokenizer_json_is_read_without_the_class_that_its_config_names(
    ouro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer(ouro, 40)
    with_raw(ouro / "tokenizer_config.json", "auto_map", '{"AutoTokenizer": ["evil.Evil", null]}')
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")
    assert load(ouro).vocab is not None
    assert asked == []


def test_a_tokenizer_with_an_id_beyond_the_model_is_not_used(ouro: Path) -> None:
    make_tokenizer(ouro, 40)
    values = json.loads((ouro / "tokenizer.json").read_text())
    last = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"]["vocab"][last] = 1000
    (ouro / "tokenizer.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="has the id 1000, but the model has d_vocab=49"):
        assert load(ouro).vocab is None


# Wrappers


class Wrapper(nn.Module):
    """A module that holds another one, as data-parallel training does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize(
    "wrap", [torch.compile, Wrapper, lambda model: Wrapper(torch.compile(model))]
)
def test_a_wrapped_model_is_saved_as_the_model_in_it(
    tmp_path: Path, wrap: Callable[[nn.Module], Any]
) -> None:
    model = toy_model(read_at="last_real")
    save(wrap(model), tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again(TOKENS, n_loops=3), model(TOKENS, n_loops=3))
    assert (again.read_at, again.vocab is not None) == (model.read_at, True)


def test_what_is_no_looped_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a looped model can be saved, got Linear"):
        save(nn.Linear(3, 2), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_with_untied_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected key\(s\), first 'visit_blocks\.0"):
        save(untied(toy_model(), 3), tmp_path / "new" / "saved")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_load_refuses_are_not_saved(tmp_path: Path) -> None:
    model = toy_model()
    with torch.no_grad():
        model.embedding[3, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"'embedding' holds 1 value\(s\) that are NaN"):
        save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(toy_model(), tmp_path / "saved", card={"accuracy": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefixes_of_wrappers_are_known_in_every_format(ouro: Path, prefix: str) -> None:
    plain = load(ouro)(TOKENS, n_loops=2)
    tensors = load_file(ouro / "model.safetensors")
    save_file({prefix + key: t for key, t in tensors.items()}, ouro / "model.safetensors")
    assert torch.equal(load(ouro)(TOKENS, n_loops=2), plain)


def test_a_block_that_was_compiled_alone_is_known(tmp_path: Path) -> None:
    plain = load(write_release(tmp_path / "a.pt"), **FACTS)
    tensors = {
        key.replace("blocks.1.", "blocks.1._orig_mod."): t for key, t in release_tensors().items()
    }
    inner = load(write_release(tmp_path / "b.pt", tensors), **FACTS)
    assert torch.equal(inner(TOKENS, n_loops=2), plain(TOKENS, n_loops=2))


# Facts that a bare pickle lacks


def test_all_facts_that_a_bare_pickle_lacks_are_asked_for_at_once(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    with pytest.raises(MissingFacts) as caught:
        load(path)
    assert caught.value.names == ("n_heads", "input_injection", "readout", "vocab")
    assert str(caught.value) == (
        f"{path} does not say into how many heads its d_model=15 is split, and whether the"
        " embedding is added again before each later iteration; pass n_heads= and"
        " input_injection=True or input_injection=False; to ask questions of the model, pass"
        " readout= and vocab= too"
    )
    flags = caught.value.spelled(lambda argument: f"--{argument.name}")
    assert flags.endswith(
        "pass --n_heads and --input_injection or --input_injection; to ask questions of the model,"
        " pass --readout and --vocab too"
    )


def test_facts_that_are_known_are_not_asked_for(tmp_path: Path) -> None:
    path = write_release(tmp_path / "final_models" / "r6" / "a.pt")
    (path.parent / "vocab.json").write_text(json.dumps(WORDS))
    with pytest.raises(MissingFacts) as caught:
        load(path)
    assert caught.value.names == ("n_heads",)
