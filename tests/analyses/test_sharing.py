"""Commands whose work several processes share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loopscope import ActivationStore, TunedLens, train_tuned_lens, transfer_matrix
from loopscope.analyses.cli import main
from toy import padded, toy

PATCH = ["patch", "--per-hop", "1", "--n-loops", "2"]


def test_a_figure_in_shards_is_the_figure_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loopscope.interp.patching.packed._LEAST", 10)
    monkeypatch.chdir(tmp_path)
    work, out = "work", ["--out", str(tmp_path / "shards")]
    main([*PATCH, *out, "--work", work, "--shard", "1/2"])
    assert "wrote shard 1/2 of activation_patch" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["merge", work])
    assert "is not complete" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*PATCH[:-1], "3", "--work", work])
    assert "holds the work of another command, loopscope patch" in capsys.readouterr().err
    main([*PATCH, *out, "--work", work, "--shard=0/2"])
    assert f"all work items are there; loopscope merge {work}" in capsys.readouterr().out
    assert not (tmp_path / "shards").exists()
    (tmp_path / work).rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    main(["merge", str(tmp_path / "moved")])
    assert not list((tmp_path / "elsewhere").iterdir())
    main([*PATCH, "--out", str(tmp_path / "one")])
    found, expected = (
        json.loads((tmp_path / name / "patch.json").read_text()) for name in ("shards", "one")
    )
    assert found == expected
    with pytest.raises(SystemExit):
        main([*PATCH, "--shard", "0/2"])
    assert "add --work" in capsys.readouterr().err


def test_a_store_is_collected_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect = ["collect", "--to", str(tmp_path), "--per-hop", "2", "--n-loops", "3"]
    for shard in ("0/2", "1/2"):
        main([*collect, "--per-file", "2", "--stored", "bfloat16", "--shard", shard])
    main(["merge", str(tmp_path)])
    assert "wrote" in capsys.readouterr().out
    store = ActivationStore(tmp_path)
    lines = (tmp_path / "merged.csv").read_text().splitlines()
    assert (lines[0], len(lines)) == ("example,position,token", len(store) + 1)


def test_a_training_and_a_probe_in_shards_are_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, batch, trained, read = toy("learned"), padded().repeat(2), tmp_path / "t", tmp_path / "p"
    targets = torch.arange(len(batch)) % 2
    for shard in ((0, 2), (1, 2)):
        train_tuned_lens(model, batch, 3, steps=1, save_to=trained, shard=shard)
        transfer_matrix(model, batch, targets, 2, batch_size=2, save_to=read, shard=shard)
    main(["merge", str(trained)])
    main(["merge", str(read), "--out", str(tmp_path / "matrix.csv")])
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote ")]
    assert written == [
        f"wrote {trained / 'merged.csv'}",
        f"wrote {trained / 'merged.safetensors'}",
        f"wrote {tmp_path / 'matrix.csv'}",
    ]
    assert len(TunedLens.load(trained / "merged.safetensors", model).names) == 6
    assert len((tmp_path / "matrix.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
