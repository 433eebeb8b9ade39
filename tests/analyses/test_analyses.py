"""The analyses on the shipped checkpoint: their numbers, figures and files."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from types import ModuleType

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from loopscope.analyses.common.by_hop import HopRun, run_by_hop
from loopscope.analyses.common.configs import OutputConfig, SourceConfig
from loopscope.analyses.common.records import Record, write, write_all
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.figures.answers import halting, overthinking, recurrence
from loopscope.analyses.figures.answers.halting import HaltingConfig
from loopscope.analyses.figures.answers.overthinking import OverthinkingConfig
from loopscope.analyses.figures.answers.recurrence import RecurrenceConfig
from loopscope.analyses.figures.circuit import lens, patch
from loopscope.analyses.figures.circuit.lens import LensConfig
from loopscope.analyses.figures.circuit.patch import PatchConfig
from loopscope.interp.common.metrics import margin
from loopscope.interp.exits.halting import HaltingRule
from loopscope.tasks.questions import by_hops, read_questions
from paths import SHIPPED

SMALL = {"per_hop": 4}
RUNS: list[tuple[ModuleType, SourceConfig]] = [
    (overthinking, OverthinkingConfig(n_loops=5, **SMALL)),
    (recurrence, RecurrenceConfig(n_loops=5, **SMALL)),
    (halting, HaltingConfig(n_loops=5, **SMALL)),
    (lens, LensConfig(n_loops=3, **SMALL)),
    (patch, PatchConfig(n_loops=2, hops=3, **SMALL)),
]


@cache
def full_runs() -> tuple[Subject, dict[int, HopRun]]:
    subject = open_subject(SourceConfig(checkpoint="ltg_trained"))
    return subject, run_by_hop(subject, 24)


@pytest.fixture(scope="module")
def full_margins() -> overthinking.Overthinking:
    return overthinking.measure(*full_runs())


@pytest.fixture(scope="module")
def full_grid() -> recurrence.RecurrenceGrid:
    subject, runs = full_runs()
    return recurrence.measure(subject, runs, HaltingRule(0.01, 3.0))


@pytest.mark.parametrize(("analysis", "config"), RUNS, ids=lambda x: getattr(x, "__name__", ""))
def test_config_record_figure_and_files(
    analysis: ModuleType, config: SourceConfig, tmp_path: Path
) -> None:
    record = analysis.run(config)
    assert isinstance(record, Record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.device = "cuda"  # type: ignore[misc]
    figure = analysis.figure(record)
    assert isinstance(figure, go.Figure)
    assert len(figure.data) > 0
    files = write("name", record, figure, OutputConfig(out=tmp_path), config)
    assert sorted(path.name for path in files) == [
        "name.csv",
        "name.html",
        "name.json",
        "name.settings.json",
    ]
    assert len(pd.read_csv(tmp_path / "name.csv")) == len(record.frame()) > 0
    assert set(json.loads((tmp_path / "name.json").read_text())) == {
        field.name for field in dataclasses.fields(record)
    }
    assert len(record.summary()) > 0
    with pytest.raises(
        FileExistsError,
        match=r"name\.csv is there already; pass --overwrite to replace it, or another --out",
    ):
        write("name", record, figure, OutputConfig(out=tmp_path), config)
    assert (
        write("name", record, figure, OutputConfig(out=tmp_path, overwrite=True), config) == files
    )


@pytest.mark.slow
def test_margins_of_13_and_14_hops_rise_peak_and_fall(
    full_margins: overthinking.Overthinking,
) -> None:
    for hop in (13, 14):
        curve = full_margins.margin[full_margins.hops.index(hop)]
        low = int(curve[:10].argmin())
        peak = low + int(curve[low:].argmax())
        assert curve[peak] > curve[low] + 0.5
        assert peak < len(curve) - 5
        assert curve[-1] < curve[peak] - 1.0


def test_accuracy_beyond_the_trained_hops(full_grid: recurrence.RecurrenceGrid) -> None:
    best = dict(zip(full_grid.hops, full_grid.accuracy.max(1).values.tolist(), strict=True))
    assert full_grid.trained_hops == 8
    assert all(best[hop] >= 0.98 for hop in range(1, 9))
    assert all(best[hop] >= 0.6 for hop in range(9, 14))


def test_the_grid_column_equals_a_call_with_that_many_loops(
    full_grid: recurrence.RecurrenceGrid,
) -> None:
    subject = open_subject(RecurrenceConfig(checkpoint="ltg_trained"))
    batch, answers = subject.encode(subject.questions[9])
    logits = subject.model(batch.tokens, n_loops=7, mask=batch.mask)[
        torch.arange(len(batch)), batch.readout
    ]
    assert float((logits.argmax(-1) == answers).float().mean()) == pytest.approx(
        float(full_grid.accuracy[8, 6])
    )


def test_the_margin_is_that_of_a_separate_call(full_margins: overthinking.Overthinking) -> None:
    subject = open_subject(OverthinkingConfig(checkpoint="ltg_trained"))
    batch, answers = subject.encode(subject.questions[5])
    with torch.no_grad():
        logits = subject.model(batch.tokens, n_loops=6, mask=batch.mask)[
            torch.arange(len(batch)), batch.readout
        ]
    assert float(full_margins.margin[4, 5]) == pytest.approx(
        float(margin(logits, answers).mean()), abs=1e-4
    )


@pytest.mark.slow
def test_the_patching_effect_walks_along_the_relations() -> None:
    record = patch.run(PatchConfig(hops=5))
    strongest = record.effect.argmax(1).tolist()
    assert record.names[:2] == ("hook_embed", "loops.0.blocks.0.hook_resid_post")
    assert strongest == sorted(strongest)
    assert set(strongest) == set(range(6))
    assert record.effect[0, 0] == pytest.approx(1.0, abs=1e-4)
    assert record.effect[-1, -1] == pytest.approx(1.0, abs=1e-4)


def test_patching_one_pair_and_its_refusals() -> None:
    record = patch.run(PatchConfig(clean="<e_3><r_1><r_2>", corrupted="<e_4><r_1><r_2>", n_loops=2))
    assert record.columns() == ["0 <e_3> / <e_4>", "1 <r_1>", "2 <r_2>"]
    with pytest.raises(ValueError, match="pass --clean"):
        patch.run(PatchConfig(corrupted="<e_4><r_1>"))
    with pytest.raises(
        ValueError, match="the pair has 2 tokens in the clean text and 3 in the corrupted"
    ):
        patch.run(PatchConfig(clean="<e_3><r_1>", corrupted="<e_4><r_1><r_2>"))


def test_lens_tracks_what_it_is_told() -> None:
    record = lens.run(LensConfig(text="<e_3><r_1>", track=("<e_5>", "<r_2>"), n_loops=2))
    assert record.tracked == ("<e_5>", "<r_2>")
    assert record.rank.shape == (2, 4, 2)
    assert record.frame().columns[-1] == "rank of <r_2>"


def test_a_checkpoint_without_questions_is_refused(tmp_path: Path) -> None:
    weights = SHIPPED / "ltg_trained" / "checkpoint_epoch_19559.pt"
    (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(ValueError, match="pass --data"):
        open_subject(SourceConfig(checkpoint=str(tmp_path), n_heads=3, input_injection=False))


def test_an_analysis_refuses_a_checkpoint_with_no_readout(tmp_path: Path) -> None:
    shipped = SHIPPED / "ltg_trained"
    for name in ("checkpoint_epoch_19559.pt", "vocab.json", "test.json"):
        (tmp_path / name).symlink_to(shipped / name)
    with pytest.raises(ValueError, match="does not say where its answers are read"):
        open_subject(SourceConfig(checkpoint=str(tmp_path), n_heads=3, input_injection=False))
    opened = open_subject(
        SourceConfig(
            checkpoint=str(tmp_path), n_heads=3, input_injection=False, readout="last_real"
        )
    )
    assert opened.questions.keys() == by_hops(read_questions(shipped / "test.json")).keys()


def test_nothing_is_written_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LensConfig(text="<e_3><r_1>", n_loops=1)
    record = lens.run(config)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write("name", record, lens.figure(record), OutputConfig(out=tmp_path), config)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = Path.write_bytes, [0]

    def fills_up(path: Path, content: bytes) -> int:
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    contents = {tmp_path / name: name.encode() for name in ("a.csv", "a.json", "a.html", "a.txt")}
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(OSError, match="No space left"):
        write_all(contents)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.csv": "mine"}
    write_all(contents)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.name for path in contents
    }
