"""Updates until each hop count was learned, against the lines of the logs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from log_files import line, write_run
from loopscope.analyses.cli import main
from loopscope.analyses.figures.training.hop_updates import HopUpdatesConfig, figure, run
from loopscope.checkpoints.locate import SHIPPED

RUN = "mini/multi_hop/r2"
HOPS = ("1", "2", "3")
LINES = [
    line(10, 0, (0.94, 0.2), HOPS[:2]),
    line(20, 0, (0.9, 0.935), HOPS[:2]),
    line(30, 1, (1.0, 0.9, 0.93), HOPS),
    line(40, 1, (1.0, 1.0, 0.94), HOPS),
    line(50, 1, (1.0, 1.0, 0.95), HOPS),
]


def test_a_hop_count_is_learned_at_its_first_evaluation_above_the_gate(tmp_path: Path) -> None:
    record = run(HopUpdatesConfig(runs=(str(write_run(tmp_path / RUN, LINES)),)))
    assert record.hops == (1, 2, 3)
    assert record.gates == (0.93,)
    assert record.updates.tolist() == [[10.0, 20.0, 40.0]]
    assert record.minutes.tolist() == [[1.0, 2.0, 4.0]]
    assert record.gated.tolist() == [[False, True, False]]
    higher = run(HopUpdatesConfig(runs=(str(tmp_path / RUN),), gate=0.945))
    assert higher.updates[0].tolist() == [30.0, 40.0, 50.0]
    assert math.isnan(run(HopUpdatesConfig(runs=(str(tmp_path / RUN),), gate=0.96)).updates[0, 2])


def test_the_shipped_runs_against_their_logs() -> None:
    record = run(HopUpdatesConfig())
    for i, name in enumerate(record.runs):
        path = SHIPPED / name / "log.jsonl"
        lines = (
            [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
        )
        for j, hop in enumerate(record.hops):
            above = [
                each["update"]
                for each in lines
                if each["accuracy"].get(str(hop), 0.0) > record.gates[i]
            ]
            if lines:
                assert [int(x) for x in record.updates[i, j : j + 1].tolist() if x == x] == above[
                    :1
                ]
    places = {name: i for i, name in enumerate(record.runs)}
    dynamic = record.updates[places["mini/multi_hop/r_dyn"], :10]
    assert dynamic.tolist() == [1000, 2750, 4250, 6250, 9000, 11000, 11750, 15750, 19750, 23500]
    assert record.gated[places["mini/multi_hop/r_dyn"], :10].tolist() == [
        False,
        *[True] * 7,
        False,
        False,
    ]
    table = record.summary().set_index("run")
    assert table["updates per further hop"]["mini/multi_hop/r_dyn"] == pytest.approx(
        (23500 - 2750) / 8
    )
    assert table["deepest learned"]["mini/multi_hop/r2"] == 4


def test_the_figure_has_a_curve_per_run_with_hollow_marks_where_no_gate_ended_a_stage(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / RUN, LINES)
    write_run(tmp_path / "mini/multi_hop/r4", LINES[:2])
    record = run(HopUpdatesConfig(runs=(str(tmp_path / RUN), str(tmp_path / "mini/multi_hop/r4"))))
    plot = figure(record)
    assert [trace.name for trace in plot.data] == ["R = 2, L = 2", "R = 4, L = 2"]
    first, second = plot.data
    assert (list(first.x), list(first.y)) == ([1, 2, 3], [10.0, 20.0, 40.0])
    assert [color == "white" for color in first.marker.color] == [True, False, True]
    assert (list(second.x), list(second.y)) == ([1, 2], [10.0, 20.0])
    assert [color == "white" for color in second.marker.color] == [True, True]
    assert first.text[-1].strip() == first.name
    assert len(record.frame()) == 5


def test_a_run_that_has_learned_nothing_has_no_marks(tmp_path: Path) -> None:
    write_run(tmp_path / RUN, LINES[:1])
    record = run(HopUpdatesConfig(runs=(str(tmp_path / RUN),), gate=0.97))
    assert record.frame().empty
    assert record.summary()["deepest learned"][0] == 0
    assert math.isnan(record.summary()["updates to it"][0])
    assert list(figure(record).data[0].x) == []


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a gate is an accuracy from 0 to below 1, got 1\.5"):
        run(HopUpdatesConfig(gate=1.5))
    with pytest.raises(ValueError, match="has no accuracy of '1'; its groups are id_atomic"):
        run(HopUpdatesConfig(runs=("mini/systematicity/r4_l2",)))
    folder = write_run(tmp_path / "ungated", LINES)
    recipe = {
        "name": "ungated",
        "loops": {"low": 2, "high": 2},
        "n_layers": 1,
        "stages": [{"name": "all", "gate_on": None, "gate": 0.5}],
    }
    (folder / "card.json").write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(
        ValueError, match="the stages of ungated have the gates none, not one; pass --gate"
    ):
        run(HopUpdatesConfig(runs=(str(folder),)))
    assert run(HopUpdatesConfig(runs=(str(folder),), gate=0.93)).updates.tolist() == [
        [10.0, 20.0, 40.0]
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["hop-updates", RUN, "--gate", "0.9", "--out", str(tmp_path), "--no-html"])
    assert "R = 2, L = 2" in capsys.readouterr().out
    assert (tmp_path / "hop-updates.csv").exists()
