"""The command line as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from analyses.cli import main

COMMANDS = ("overthinking", "recurrence", "halting", "lens", "patch")


def test_list_names_the_shipped_and_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    out = capsys.readouterr().out
    assert "ltg_trained" in out
    assert "multi_hop/final_models/r_dyn" in out
    assert "unknown" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_prints_its_numbers_and_writes_what_is_asked(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--n-loops", "2", "--per-hop", "2", "--out", str(tmp_path), "--no-html"])
    out = capsys.readouterr().out
    assert out.count("wrote") == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json"]


def test_report_ends_with_the_path_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    main(["report", "ltg_trained", "--n-loops", "2", "--per-hop", "1", "--out", str(page)])
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {page}"
    assert page.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["report", "no/such/thing"], "neither a shipped checkpoint"),
        (["overthinking", "--n-loops", "0", "--per-hop", "1"], "n_loops must be at least 1, got 0"),
        (["lens", "--text", "<e_99>"], "'<e_99>' is not one of the 47 tokens"),
        (["patch", "--site", "residual"], "this model has no site 'residual'"),
        (["report", "--readout", "middle"], "readout must be 'last_real'"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(args: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in error
    assert len(error.strip().splitlines()[-1]) > 20
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
