"""Files in SAELens's format: what SAELens 6.54 wrote opens here, and what is written here has its
fields. Where SAELens is installed in a folder of its own, it opens ours too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dictionary_toys import dictionary, states
from loopscope.interp.dictionaries.dictionary import KINDS, Kind
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.dictionaries.sae_files import load_dictionary, save_dictionary

WRITTEN = Path(__file__).parent / "sae_lens"  # by SAELens 6.54.12
READING = Reading("blocks.0.hook_resid_post", "blocks.0.hook_resid_post", 1)
THEIRS = os.environ.get("SAE_LENS_FOLDER", "")
ENCODES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
sae = SAE.load_from_disk(sys.argv[2])
x = load_file(sys.argv[3])["x"]
codes = sae.encode(x)
found = {"codes": codes.detach().contiguous(), "decoded": sae.decode(codes).detach()}
save_file(found, sys.argv[4])
"""


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
    return read


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "standard", "jumprelu_transcoder"])
def test_what_sae_lens_wrote_opens_here(kind: str) -> None:
    golden = load_file(WRITTEN / kind / "golden.safetensors")
    own = load_dictionary(WRITTEN / kind, READING)
    codes = own.encode(golden["x"][:, None])
    torch.testing.assert_close(codes[:, 0], golden["codes"], rtol=0, atol=1e-5)
    torch.testing.assert_close(own.decode(codes)[:, 0], golden["decoded"], rtol=0, atol=1e-5)
    assert own.kind == ("transcoder" if kind == "jumprelu_transcoder" else "shared")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [np.int64(5), None])
def test_a_saved_dictionary_is_read_back(kind: Kind, k: int | None, tmp_path: Path) -> None:
    own = dictionary(kind, k)
    if kind == "transcoder" and k is not None:
        with pytest.raises(ValueError, match="SAELens has no transcoder that keeps the k largest"):
            save_dictionary(own, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []
        return
    save_dictionary(own, tmp_path / "saved")
    back = load_dictionary(tmp_path / "saved")
    assert (back.kind, back.reading) == (own.kind, own.reading)
    assert torch.equal(back.encode(states()), own.encode(states()))
    assert torch.equal(back.decode(back.encode(states())), own.decode(own.encode(states())))
    with pytest.raises(FileExistsError, match="is there already"):
        save_dictionary(own, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "saved" / "loop_0_old").mkdir()
    assert len(load_dictionary(tmp_path / "saved").coders) == len(own.coders)


@pytest.mark.parametrize(
    ("kind", "k", "theirs"),
    [("shared", 5, "topk"), ("crosscoder", None, "jumprelu"),
     ("transcoder", None, "jumprelu_transcoder")],
)  # fmt: skip
def test_files_have_the_fields_of_sae_lens(
    kind: Kind, k: int | None, theirs: str, tmp_path: Path
) -> None:
    own = dictionary(kind, k)
    save_dictionary(own, tmp_path / "saved")
    ours, golden = config(tmp_path / "saved"), config(WRITTEN / theirs)
    assert set(ours) == set(golden)
    assert ours["architecture"] == golden["architecture"] == theirs
    assert set(golden["metadata"]) <= set(ours["metadata"])
    assert ours["metadata"]["sae_lens_version"] == golden["metadata"]["sae_lens_version"]
    tensors = load_file(tmp_path / "saved" / "sae_weights.safetensors")
    expected = load_file(WRITTEN / theirs / "sae_weights.safetensors")
    assert set(tensors) == set(expected)
    assert list(tensors["W_enc"].shape) == [ours["d_in"], ours["d_sae"]]
    assert list(tensors["W_dec"].shape) == [ours["d_sae"], ours.get("d_out", ours["d_in"])]


def changed(tmp_path: Path, **fields: Any) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(WRITTEN / "topk", folder, dirs_exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config(WRITTEN / "topk") | fields))
    return folder


def test_files_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say which hook points"):
        load_dictionary(WRITTEN / "topk")
    with pytest.raises(ValueError, match=r"architecture must be one of topk, .* got 'gated'"):
        load_dictionary(changed(tmp_path, architecture="gated"), READING)
    with pytest.raises(ValueError, match="normalize_activations must be 'none', got 'layer_norm'"):
        load_dictionary(changed(tmp_path, normalize_activations="layer_norm"), READING)
    with pytest.raises(ValueError, match=r"must hold .*'W_enc': \[8, 13\]"):
        load_dictionary(changed(tmp_path, d_in=8), READING)
    for fields, why in (
        ({"d_in": None}, "d_in in .* must be an integer, got None"),
        ({"k": "8"}, "k in .* must be an integer, got '8'"),
        ({"metadata": {"loopscope": {"reading": {"hook": 3}}}}, r"must have the fields hook \(str"),
    ):
        with pytest.raises(ValueError, match=why):
            load_dictionary(changed(tmp_path, **fields))
    for metadata in (None, [], "none"):
        with pytest.raises(ValueError, match="does not say which hook points"):
            load_dictionary(changed(tmp_path, metadata=metadata))
    cut = changed(tmp_path) / "sae_weights.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no dictionary in SAELens's format"):
        load_dictionary(cut.parent, READING)
    with pytest.raises(ValueError, match="is no dictionary in SAELens's format"):
        load_dictionary(tmp_path / "absent", READING)


@pytest.mark.slow
@pytest.mark.skipif(not THEIRS, reason="SAE_LENS_FOLDER names no folder with SAELens 6 in it")
@pytest.mark.parametrize("kind", ["shared", "crosscoder", "transcoder"])
def test_sae_lens_encodes_to_the_same_numbers(kind: Kind, tmp_path: Path) -> None:
    own = dictionary(kind, None if kind == "transcoder" else 5)
    single = replace(
        own,
        coders=tuple(
            replace(
                each,
                **{
                    name: value.float()
                    for name, value in vars(each).items()
                    if isinstance(value, torch.Tensor)
                },
            )
            for each in own.coders
        ),
    )
    save_dictionary(single, tmp_path / "ours")
    x = torch.randn(9, own.coders[0].d_in, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x")
    arguments = [THEIRS, str(tmp_path / "ours"), str(tmp_path / "x"), str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", ENCODES, *arguments], check=True, capture_output=True)
    found, coder = load_file(tmp_path / "found"), single.coders[0]
    torch.testing.assert_close(coder.encode(x), found["codes"], rtol=0, atol=1e-5)
    torch.testing.assert_close(coder.decode(coder.encode(x)), found["decoded"], rtol=0, atol=1e-4)
