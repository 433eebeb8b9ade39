"""Training logs, and the figure of accuracy along training that is drawn from them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from log_files import line, write_run
from loopscope.analyses.cli import main
from loopscope.analyses.common import training_logs
from loopscope.analyses.common.training_logs import TrainingLog, read_log, read_logs
from loopscope.analyses.figures.training.grokking import (
    GROUPS,
    Grokking,
    GrokkingConfig,
    figure,
    run,
)
from loopscope.checkpoints.locate import SHIPPED

RUN = "mini/systematicity/r2_l2"


LINES = [
    line(20, 0, (0.3, 0.1, 0.0)),
    line(40, 0, (0.96, 0.2, 0.1)),
    line(60, 1, (0.97, 0.91, 0.2)),
    line(80, 1, (1.0, 0.99, 0.1)),
]


def log_of(loops: tuple[int, int], n_layers: int, **accuracy: Sequence[float]) -> TrainingLog:
    n = len(next(iter(accuracy.values())))
    return TrainingLog(
        name=f"r{loops[0]}_l{n_layers}",
        loops=loops,
        n_layers=n_layers,
        stages=("train", "id"),
        gates={},
        stage=torch.tensor([0] * (n - 1) + [1]),
        updates=torch.arange(1, n + 1) * 100,
        minutes=torch.arange(1, n + 1).double() * 7,
        accuracy={
            group: torch.tensor(shares, dtype=torch.float64) for group, shares in accuracy.items()
        },
    )


# Logs


def test_a_log_holds_its_lines_and_what_the_recipe_of_its_folder_says(tmp_path: Path) -> None:
    log = read_log(write_run(tmp_path / RUN, LINES) / "log.jsonl")
    assert (log.name, log.loops, log.n_layers, log.label) == (RUN, (2, 2), 2, "R = 2, L = 2")
    assert log.stages == ("train", "id", "ood")
    assert log.gates == {"train_inferred": 0.95, "test_inferred_iid": 0.95}
    assert log.updates.tolist() == [20, 40, 60, 80]
    assert log.minutes.tolist() == [2.0, 4.0, 6.0, 8.0]
    assert log.stage.tolist() == [0, 0, 1, 1]
    assert {group: curve.tolist() for group, curve in log.accuracy.items()} == {
        "train_inferred": [0.3, 0.96, 0.97, 1.0],
        "test_inferred_iid": [0.1, 0.2, 0.91, 0.99],
        "test_inferred_ood": [0.0, 0.1, 0.2, 0.1],
    }


def test_a_card_below_the_log_wins_over_the_name_of_the_folder(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / RUN, [line(5, 0, (0.5,), ("2",)), line(9, 1, (0.9, 0.25), ("2", "3"))]
    )
    stages = [
        {"name": "two", "gate_on": "2", "gate": 0.8},
        {"name": "end", "gate_on": None, "gate": 0.95},
    ]
    card = {
        "recipe": {
            "name": "mine",
            "loops": {"low": 3, "high": 7, "mean": 5.0},
            "n_layers": 1,
            "stages": stages,
        }
    }
    (folder / "two").mkdir()
    (folder / "two" / "card.json").write_text(json.dumps(card))
    log = read_log(folder / "log.jsonl")
    assert (log.name, log.label, log.stages, log.gates) == (
        "mine",
        "R = 3 to 7, L = 1",
        ("two", "end"),
        {"2": 0.8},
    )
    assert math.isnan(log.accuracy["3"][0])
    assert float(log.accuracy["3"][1]) == 0.25


def test_shipped_logs_are_found_beside_checkpoints_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {path.parent.name for path in training_logs.shipped_logs("mini/systematicity")} >= {
        "r1_l8",
        "r4_l2",
    }
    write_run(tmp_path / "logs" / RUN, LINES)
    beside = write_run(tmp_path / "mini/systematicity/r8_l2", LINES)
    monkeypatch.setattr(training_logs, "_ROOTS", (tmp_path, tmp_path / "logs"))
    assert training_logs.shipped_logs("mini/systematicity") == [
        tmp_path / "logs" / RUN / "log.jsonl",
        beside / "log.jsonl",
    ]
    assert run(GrokkingConfig(runs=(RUN,))).runs[0].updates.tolist() == [20, 40, 60, 80]
    assert [log.label for log in run(GrokkingConfig()).runs] == ["R = 2, L = 2", "R = 8, L = 2"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty: the run was not evaluated yet"),
        ("{", "is not a log of a training run"),
        ('{"update": 3}\n', "is not a log of a training"),
    ],
)
def test_a_file_that_is_no_log_is_refused(content: str, sentence: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / RUN, [])
    (folder / "log.jsonl").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_log(folder / "log.jsonl")


def test_runs_that_are_not_there_unknown_or_of_another_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"'nowhere' is neither a shipped run with a log, nor a folder with a log\.jsonl",
    ):
        run(GrokkingConfig(runs=("nowhere",)))
    with pytest.raises(ValueError, match="is of no known recipe"):
        run(GrokkingConfig(runs=(str(write_run(tmp_path / "mine", LINES)),)))
    with pytest.raises(
        ValueError, match="has no accuracy of 'train_inferred'; its groups are 1, 2"
    ):
        run(GrokkingConfig(runs=("mini/multi_hop/r2",)))
    with pytest.raises(ValueError, match="no log of a run of paper/systematicity is shipped"):
        read_logs((), "paper/systematicity", GROUPS)
    with pytest.raises(
        ValueError, match=r"stages_of must be one of mini/systematicity/r1_l8, got 'r4_l2'"
    ):
        run(GrokkingConfig(runs=("mini/systematicity/r1_l8",), stages_of="r4_l2"))


# The record and the figure


@pytest.mark.shapes
def test_the_shipped_runs_show_that_only_the_looped_one_generalises() -> None:
    record = run(GrokkingConfig(runs=("mini/systematicity/r4_l2", "mini/systematicity/r1_l8")))
    assert [log.label for log in record.runs] == ["R = 1, L = 8", "R = 4, L = 2"]
    assert record.stages_of == 1
    lines = [
        json.loads(text)
        for text in (SHIPPED / "mini/systematicity/r4_l2/log.jsonl").read_text().splitlines()
    ]
    for group in GROUPS:
        assert record.curve(1, group).tolist() == [each["accuracy"][group] for each in lines]
    ends = {each["stage"]: each["update"] for each in lines}
    assert record.ends(1) == list(zip(("train", "id", "ood"), ends.values(), strict=True))
    table = record.summary()
    assert table["OOD at the end"].tolist() == pytest.approx([0.0298, 0.6667])
    assert table["training facts known at"].tolist() == ["1,500", "3,250"]
    assert table["ID facts known at"].tolist() == ["6,750", "5,000"]
    frame = record.frame()
    assert len(frame) == 3 * sum(len(log.updates) for log in record.runs)
    row = frame[
        (frame["run"] == "mini/systematicity/r4_l2")
        & (frame["update"] == 7500)
        & (frame["group"] == "test_inferred_iid")
    ].iloc[0]
    assert (row["stage"], row["iterations"], row["layers"]) == ("id", 4, 2)
    assert row["minutes"] == pytest.approx(lines[29]["seconds"] / 60)


def test_what_is_never_reached_is_said() -> None:
    shares = {
        "train_inferred": (0.95, 1.0),
        "test_inferred_iid": (0.2, 0.89),
        "test_inferred_ood": (math.nan, math.nan),
    }
    table = Grokking((log_of((1, 1), 2, **shares),), 0).summary()
    assert table["training facts known at"][0] == "100"
    assert table["ID facts known at"][0] == "never"
    assert math.isnan(table["best OOD"][0])


def test_the_figure_has_each_run_by_updates_and_minutes_and_the_stages_of_one() -> None:
    groups = dict.fromkeys(GROUPS, (0.1, 0.7, 0.9)) | {"test_inferred_ood": (0.0, 0.2, 0.4)}
    record = Grokking(
        tuple(log_of((n, n), layers, **groups) for n, layers in ((1, 8), (2, 2), (4, 2))), 2
    )
    plot = figure(record)
    panels = {(trace.xaxis, trace.yaxis) for trace in plot.data}
    assert len(panels) == 5
    ood = [trace for trace in plot.data if trace.yaxis == "y3"]
    assert [trace.name for trace in ood] == ["R = 1, L = 8", "R = 2, L = 2", "R = 4, L = 2"]
    assert list(ood[0].x) == [100, 200, 300]
    assert list(next(trace for trace in plot.data if trace.yaxis == "y4").x) == [7.0, 14.0, 21.0]
    assert len({trace.line.color for trace in ood}) == 3
    assert [trace.name for trace in plot.data if trace.showlegend] == [
        log.label for log in record.runs
    ]
    below = [trace for trace in plot.data if trace.yaxis == "y5"]
    assert [list(trace.y) for trace in below] == [
        record.curve(2, group).tolist() for group in GROUPS
    ]
    assert plot.layout.xaxis5.type == "log"
    assert [(shape.x0, shape.x1) for shape in plot.layout.shapes] == [(100, 200), (200, 300)]
    texts = {note.text: note for note in plot.layout.annotations}
    assert texts["stage id"].x == pytest.approx(math.log10(200 * 300) / 2)
    assert {"training facts", "ID facts", "OOD facts", "stage train"} <= texts.keys()


def test_the_command_takes_runs_by_name_and_by_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_run(tmp_path / RUN, LINES)
    main(
        [
            "grokking",
            "mini/systematicity/r1_l8",
            str(own),
            "--stages-of",
            "r2_l2",
            "--out",
            str(tmp_path / "out"),
            "--no-html",
        ]
    )
    assert "R = 2, L = 2" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grokking.csv",
        "grokking.json",
        "grokking.settings.json",
    ]
    assert json.loads((tmp_path / "out" / "grokking.json").read_text())["stages_of"] == 1
