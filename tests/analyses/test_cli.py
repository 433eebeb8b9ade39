"""The command line as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from loopscope.analyses import cli
from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import OutputConfig, as_flags
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.records import files_of, refuse_unwritable
from loopscope.analyses.figures.circuit import lens
from loopscope.analyses.pages import families
from loopscope.analyses.report import page as report
from loopscope.analyses.report.page import TABS
from loopscope.checkpoints.load import load
from loopscope.models.basis.arguments import Argument, ArgumentError, parts_of
from loopscope.training.catalog import RECIPES
from paths import ROOT, SHIPPED
from tiny_run import TINY

COMMANDS = ("overthinking", "recurrence", "halting", "lens", "patch")


def test_list_names_the_shipped_and_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    out = capsys.readouterr().out
    assert "ltg_trained" in out
    assert "multi_hop/final_models/r_dyn" in out
    assert "unknown" in out
    assert "additive_residual" in out
    assert "training_free_gpt2" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_prints_its_numbers_and_writes_what_is_asked(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([command, "--n-loops", "2", "--per-hop", "2", "--out", str(tmp_path), "--no-html"])
    out = capsys.readouterr().out
    assert out.count("wrote") == 3
    assert sorted("".join(path.suffixes) for path in tmp_path.iterdir()) == [
        ".csv",
        ".json",
        ".settings.json",
    ]


def test_a_run_again_from_its_settings_file_gives_the_same_numbers_and_flags_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "recurrence",
            "ltg_trained",
            "--n-loops",
            "2",
            "--per-hop",
            "2",
            "--out",
            str(tmp_path / "a"),
            "--no-html",
        ]
    )
    saved = tmp_path / "a" / "recurrence.settings.json"
    assert json.loads(saved.read_text())["checkpoint"] == "ltg_trained"
    main(["recurrence", "--from-file", str(saved), "--out", str(tmp_path / "b"), "--no-html"])
    first, second = ((tmp_path / folder / "recurrence.csv").read_text() for folder in "ab")
    assert first == second
    main(
        [
            "recurrence",
            "--from-file",
            str(saved),
            "--n-loops",
            "3",
            "--out",
            str(tmp_path / "c"),
            "--no-html",
        ]
    )
    assert len((tmp_path / "c" / "recurrence.csv").read_text().splitlines()) > len(
        first.splitlines()
    )
    capsys.readouterr()
    for content, sentence in (
        ('{"loops": 3}', "has the setting 'loops'"),
        ("[1]", "must be a JSON object"),
        ("{", "is not valid JSON"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SystemExit):
            main(["recurrence", "--from-file", str(tmp_path / "bad.json")])
        assert sentence in capsys.readouterr().err


def test_results_that_are_there_are_not_replaced_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(SystemExit):
        main(["report", "ltg_trained", "--out", str(page)])
    assert "page.html is there already; pass --overwrite to replace it" in capsys.readouterr().err
    assert page.read_text() == "mine"


@pytest.mark.slow
def test_report_ends_with_the_path_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    main(["report", "ltg_trained", "--n-loops", "2", "--per-hop", "1", "--out", str(page)])
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {page}"
    assert page.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("args", "facts"),
    [
        (
            [
                "multi-hop",
                "--n-entities",
                "11",
                "--n-relations",
                "3",
                "--max-hops",
                "4",
                "--train",
                "47",
                "--test",
                "13",
            ],
            33 + 3 * 47,
        ),
        (
            [
                "multi-hop",
                "--graph",
                "random",
                "--n-entities",
                "7",
                "--max-hops",
                "3",
                "--train",
                "15",
                "--test",
                "5",
            ],
            70 + 2 * 15,
        ),
        (
            [
                "two-hop",
                "--n-entities",
                "31",
                "--n-relations",
                "13",
                "--out-degree",
                "9",
                "--phi",
                "3",
            ],
            279 + 3 * 265,
        ),
    ],
)
def test_data_writes_a_folder_and_says_what(
    args: list[str], facts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    main(["data", *args, "--out", str(folder)])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"wrote {folder / 'train.json'}: {facts:,} facts"
    assert out[-1] == f"wrote {folder / 'vocab.json'} and {folder / 'graph.json'}"
    assert len(json.loads((folder / "train.json").read_text())) == facts
    assert all(str(path) in "\n".join(out) for path in folder.iterdir())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(SystemExit):
        main(["data", *args, "--out", str(folder)])
    assert "data are written into a new or empty folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["report", "no/such/thing"], "neither a shipped checkpoint"),
        (["overthinking", "--n-loops", "0", "--per-hop", "1"], "n_loops must be at least 1, got 0"),
        (["overthinking", "--per-hop", "0"], "one question of each hop count is needed, got --per"),
        (["stages", "--per-group", "0"], "at least one question of each group is needed, got 0"),
        (["lens", "--text", ""], "a text must hold at least one token"),
        (["patch", "--clean", ""], "a text must hold at least one token"),
        (["patch", "--corrupted", ""], "a corrupted text needs its clean one; pass --clean"),
        (["steps", "--text", ""], "a text must hold at least one token"),
        (["lens", "--device", "cuda"], "device must be one of this machine, such as 'cpu'"),
        (["report", "--device", "nowhere"], "'cpu' or 'cuda', got 'nowhere'"),
        (["steps", "--device", "meta"], "must be one that keeps numbers, got 'meta'"),
        (["lens", "--text", "<e_99>"], "'<e_99>' is not one of the 57 tokens"),
        (["patch", "--site", "residual"], "this model has no site 'residual'"),
        (["report", "--readout", "middle"], "readout must be 'last_real'"),
        (
            ["data", "multi-hop", "--n-entities", "7"],
            "15,750 distinct facts of 2 hops were asked for, but this graph has only 700",
        ),
        (["data", "two-hop", "--out-degree", "201"], "out_degree is at most 200, got 201"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    args: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in error
    assert len(error.strip().splitlines()[-1]) > 20
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_train_runs_a_recipe_resumes_it_and_refuses_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    run = tmp_path / "run"
    main(["train", "tiny", "--out", str(run), "--release"])
    assert capsys.readouterr().out.splitlines()[-1] == f"Finished {run / 'final'}"
    assert (
        str(load(run / "final").read_at)
        == str(load(run / "released" / "final").read_at)
        == "last_real"
    )
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--out", str(run)])
    assert "pass --resume to go on with it" in capsys.readouterr().err
    main(["train", "tiny", "--out", str(run), "--resume"])
    with pytest.raises(SystemExit):
        main(["train", "huge"])
    assert (
        "there is no recipe 'huge'; the recipes are mini/multi_hop/r_dyn" in capsys.readouterr().err
    )


def test_an_argument_that_a_lone_file_needs_is_named_as_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = next((SHIPPED / "ltg_trained").glob("*.pt"))
    (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(SystemExit):
        main(["lens", str(tmp_path / weights.name), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "--n-heads" in error
    assert not re.search(r"\b(n_heads|input_injection|readout|vocab)=", error)


def test_arguments_of_a_call_are_spelled_as_flags() -> None:
    parts = (
        *("n_heads=5 is a word; pass ", Argument("n_heads"), ", ", Argument("window", (2, 3))),
        *(" and ", Argument("input_injection", False)),
    )
    assert str(ArgumentError(*parts)) == (
        "n_heads=5 is a word; pass n_heads=, window=(2, 3) and input_injection=False"
    )
    assert as_flags(ArgumentError(*parts)) == (
        "n_heads=5 is a word; pass --n-heads, --window 2 3 and --input-injection False"
    )
    quoted = ArgumentError("row 3: ", *parts_of(ArgumentError(*parts)))
    assert as_flags(quoted) == "row 3: " + as_flags(ArgumentError(*parts))
    spaced = ArgumentError("pass ", Argument("columns", ("my text", "b")))
    assert as_flags(spaced) == "pass --columns 'my text' b"
    assert as_flags(KeyError("no 'x'")) == "no 'x'"
    assert parts_of(ValueError("plain")) == ("plain",)


@pytest.mark.parametrize("command", ["lens", "report", "families", "data"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    (tmp_path / "file").write_text("mine")
    for module in (lens, report, families):
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail("it ran"))
    arguments = {"data": ["multi-hop", "--n-entities", "11"]}.get(command, [])
    with pytest.raises(SystemExit):
        main([command, *arguments, "--out", str(tmp_path / "file" / "below")])
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def full(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match=r"nothing can be written into .*out \(Read-only file system"):
        refuse_unwritable([tmp_path / "out" / "x.csv"], overwrite=False)
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(FileExistsError, match=r"x\.csv is a folder; pass --out"):
        refuse_unwritable([tmp_path / "x.csv"], overwrite=True)


def test_a_folder_named_like_a_file_says_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="names a folder") as caught:
        files_of("lens", OutputConfig(out=tmp_path / "a.pdf"))
    said = as_flags(caught.value)
    assert said.endswith(f"for lens.pdf in it pass --out {tmp_path / 'a'} and --pdf")
    assert not (tmp_path / "a.pdf").exists()


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_one_file_with_its_config_its_run_and_its_drawing(name: str) -> None:
    file = FIGURES[name]
    module, config = file.module(), file.config()
    assert Path(module.__file__ or "").name == f"{file.stem}.py"
    assert file.about() == " ".join((config.__doc__ or "").split())
    assert callable(module.run)
    assert callable(module.figure)
    parsed = tyro.cli(cli._command(file), args=["x"] if name == "exit-gate" else [])
    assert isinstance(parsed.config, config)


def test_every_file_in_a_room_is_a_figure_and_no_list_names_them() -> None:
    files = {path.stem.replace("_", "-") for path in ROOT.glob("analyses/figures/*/*.py")}
    assert set(FIGURES) == files - {"--init--"}
    assert set().union(*map(set, TABS.values())) <= set(FIGURES)


def test_the_gate_needs_a_checkpoint_that_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["exit-gate", "--per-hop", "1"])
    assert stop.value.code == 2
    assert "A checkpoint file or folder of a family with an exit gate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["exit-gate", "ltg_trained", "--per-hop", "1"])
    assert "has no exit gate to read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_ends_the_command_without_a_word() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loopscope", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (141, b"")
