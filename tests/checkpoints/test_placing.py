"""Number formats, devices, and weights in several pickles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, save
from loopscope.models.core.base import LoopedModel
from paths import GOLDEN
from release_files import FACTS, files_under, release_tensors, write_release

TOKENS = torch.tensor([[1, 5, 17, 40, 8]])


def formats(model: LoopedModel) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.state_dict().values()}


@pytest.fixture
def ouro(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "ouro", tmp_path / "ouro"))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_all_weights_get_the_format_that_is_asked(name: str) -> None:
    kind, plain = getattr(torch, name), load(GOLDEN / "ouro")
    model = load(GOLDEN / "ouro", dtype=name)
    assert formats(model) == {kind} == formats(load(GOLDEN / "ouro", dtype=kind))
    assert torch.equal(model(TOKENS), plain.to(kind)(TOKENS))


def test_tables_of_angles_keep_their_format() -> None:
    state = load(GOLDEN / "huginn", dtype="bfloat16").state_dict()
    kinds = {name: tensor.dtype for name, tensor in state.items()}
    assert kinds.pop("rotation.freqs_cis") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


def test_weights_that_need_no_change_stay_in_the_file(ouro: Path) -> None:
    model = load(ouro, dtype=torch.float32, device="cpu")
    assert model.W_E.untyped_storage().filename or model.W_E.is_cpu  # mapped, where the system can
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(
        model.W_E, load_file(ouro / "model.safetensors")["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dtype": "float8"}, "dtype must be one of float16, bfloat16, float32, float64, got"),
        ({"dtype": torch.int64}, r"dtype must be one of .*, got torch\.int64"),
        ({"device": "tpu9"}, "device must be one of this machine, such as .* got 'tpu9'"),
        ({"device": "meta"}, "device must be one that keeps numbers, got 'meta'"),
    ],
)
def test_no_such_format_or_device(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(GOLDEN / "ouro", **arguments)  # type: ignore[arg-type]


def test_a_weight_that_float16_cannot_hold_is_named(ouro: Path) -> None:
    tensors = load_file(ouro / "model.safetensors")
    tensors["lm_head.weight"][3, 2] = -7e4
    save_file(tensors, ouro / "model.safetensors")
    with pytest.raises(CheckpointError, match="'head' holds the magnitude 70000, which float16"):
        load(ouro, dtype="float16")
    assert float(load(ouro, dtype="bfloat16").W_U.detach().min()) == float(
        torch.tensor(-7e4).bfloat16()
    )


# Several formats in one file


def mixed(folder: Path) -> dict[str, torch.Tensor]:
    """bfloat16 weights with float32 norms."""
    tensors = {
        key: tensor.clone() if "norm" in key else tensor.bfloat16()  # nothing of the file's own
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_mixed_formats_are_widened_with_one_warning(ouro: Path) -> None:
    tensors = mixed(ouro)
    with pytest.warns(UserWarning, match=r"mixes the number formats torch\.bfloat16, torch\.f"):
        model = load(ouro)
    assert formats(model) == {torch.float32}
    mixed_logits = model(TOKENS)  # before its file is written over
    save_file({key: tensor.float() for key, tensor in tensors.items()}, ouro / "model.safetensors")
    assert torch.equal(mixed_logits, load(ouro)(TOKENS))


def test_a_format_that_is_asked_needs_no_warning(ouro: Path) -> None:
    mixed(ouro)
    assert formats(load(ouro, dtype="bfloat16")) == {torch.bfloat16}


def test_a_model_of_several_formats_is_not_saved(ouro: Path, tmp_path: Path) -> None:
    model = load(ouro)
    model.final_norm.bfloat16()  # type: ignore[union-attr, operator]
    with pytest.raises(CheckpointError, match=r"mixes the number formats .* must have one$"):
        save(model, tmp_path / "own")
    assert not (tmp_path / "own").exists()


# Pickles


def test_pickles_in_shards_are_read(ouro: Path) -> None:
    tensors = load_file(ouro / "model.safetensors")
    (ouro / "model.safetensors").unlink()
    shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": list(tensors)[i::3] for i in range(3)}
    for name, keys in shards.items():
        torch.save({key: tensors[key] for key in keys}, ouro / name)
    where = {key: name for name, keys in shards.items() for key in keys}
    index = ouro / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    before = files_under(ouro)
    assert torch.equal(load(ouro)(TOKENS), load(GOLDEN / "ouro")(TOKENS))
    assert files_under(ouro) == before
    first = next(iter(shards))
    torch.save([1], ouro / first)
    with pytest.raises(CheckpointError, match=rf"{first} holds no model"):
        load(ouro)
    (ouro / first).unlink()
    with pytest.raises(CheckpointError, match=rf"names the shard '{first}', which is missing"):
        load(ouro)


def test_a_shard_with_code_is_refused(ouro: Path) -> None:
    (ouro / "model.safetensors").unlink()
    torch.save({"a": Path("x")}, ouro / "shard.bin")
    index = ouro / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "shard.bin"}}))
    with pytest.raises(CheckpointError, match=r"shard\.bin holds code"):
        load(ouro)


def test_a_release_of_the_paper_takes_a_format_too(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt", release_tensors())
    assert formats(load(path, **FACTS, dtype="float64")) == {torch.float64}
