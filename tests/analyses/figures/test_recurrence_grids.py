"""Accuracy grids side by side, and what all figures of several checkpoints share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from loopscope.analyses.cli import main
from loopscope.analyses.common.panels import Panel
from loopscope.analyses.figures.answers import recurrence, recurrence_grids
from loopscope.analyses.figures.answers.margins import MarginsConfig
from loopscope.analyses.figures.answers.recurrence import RecurrenceConfig, RecurrenceGrid
from loopscope.analyses.figures.answers.recurrence_grids import (
    RecurrenceGrids,
    RecurrenceGridsConfig,
    leading,
    learned,
    reached,
)

PAIR = ("mini/multi_hop/r2", "mini/multi_hop/r4")


@pytest.fixture(scope="module")
def shipped() -> RecurrenceGrids:
    return recurrence_grids.run(RecurrenceGridsConfig(n_loops=12))


def made(accuracy: list[list[float]], trained_hops: int | None = None) -> RecurrenceGrid:
    """A grid with these accuracies, a list of iterations for each of the hop counts 1, 2, ..."""
    table = torch.tensor(accuracy)
    hops = tuple(range(1, len(table) + 1))
    return RecurrenceGrid(
        hops,
        (5,) * len(hops),
        table,
        table[:, -1],
        torch.full((len(hops),), 2.0),
        "KL<0.01",
        trained_hops,
        2,
    )


def test_each_grid_is_that_of_the_checkpoint_alone() -> None:
    both = recurrence_grids.run(
        RecurrenceGridsConfig(checkpoints=PAIR, n_loops=3, per_hop=7, kl=0.5)
    )
    for name, grid in zip(PAIR, both.grids, strict=True):
        alone = recurrence.run(RecurrenceConfig(checkpoint=name, n_loops=3, per_hop=7, kl=0.5))
        pd.testing.assert_frame_equal(grid.frame(), alone.frame())
        frame = both.frame()
        pd.testing.assert_frame_equal(
            frame[frame["checkpoint"] == name].drop(columns="checkpoint").reset_index(drop=True),
            alone.frame(),
        )


def test_learned_needs_training_and_every_hop_count_below() -> None:
    best = [[0.2, 1.0], [0.95, 0.3], [0.9, 0.1], [0.7, 0.0], [0.5, 0.6], [0.59, 0.1], [1.0, 1.0]]
    assert [learned(made(best, trained)) for trained in (None, 2, 3, 5)] == [3, 2, 3, 3]
    assert [reached(made(best, trained)) for trained in (None, 2)] == [5, 5]
    assert learned(made([[0.89, 0.8]])) == reached(made([[0.1, 0.2]])) == 0
    assert leading([0.9, 0.9, 0.1, 0.9], 0.9) == 2


@pytest.mark.slow
def test_what_the_shipped_models_learn_and_reach(shipped: RecurrenceGrids) -> None:
    summary = shipped.summary().set_index("checkpoint")
    assert summary["learned to"].tolist() == summary["trained to"].tolist() == [4, 8, 6, 10]
    assert summary["reaches"].tolist() == [4, 10, 11, 16]
    assert summary["least best accuracy"].min() >= 0.9
    r2, *others = summary["mean fall at the last r"]
    assert r2 > 0.3
    assert max(others) < 0.05


def test_the_panels_share_one_scale_and_mark_r_and_the_deepest_hop_learned(
    shipped: RecurrenceGrids,
) -> None:
    figure = recurrence_grids.figure(shipped)
    assert [trace.type for trace in figure.data] == ["heatmap"] * 8
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    upright = sorted(
        (shape.xref, shape.x0) for shape in figure.layout.shapes if shape.x0 == shape.x1
    )
    assert upright == [("x", 4.5), ("x2", 8.5), ("x3", 6.5), ("x4", 10.5)]
    level = sorted((shape.xref, shape.y0) for shape in figure.layout.shapes if shape.y0 == shape.y1)
    assert level == [("x", 2.5), ("x2", 4.5), ("x3", 6.5), ("x4", 8.5)]
    ranges = {tuple(axis.range) for axis in figure.select_yaxes()}
    assert ranges == {(0.4, 14.6)}
    r_star = figure.data[-1]
    assert list(r_star.y) == [14]
    assert r_star.z[0] == pytest.approx(shipped.grids[-1].halted.tolist())


def test_more_than_four_panels_go_on_in_a_second_row() -> None:
    record = RecurrenceGrids(
        tuple(Panel(f"run{i}", None, None) for i in range(5)),
        tuple(made([[1.0, 0.5]] * (i + 1)) for i in range(5)),
    )
    figure = recurrence_grids.figure(record)
    tops = [axis.domain[1] for axis in figure.select_yaxes()]
    assert tops[:4] == [1.0] * 4
    assert tops[4] < 0.5


def test_a_title_says_the_training_r_where_it_is_known() -> None:
    assert Panel("mini/x/r4", "4", 8).title() == "<b>r4</b>, R = 4"
    assert (
        Panel("r_dyn", "clip(Poisson(4), 2, 8)", 8).title("more")
        == "<b>r_dyn</b>, R = 2 to 8<br>more"
    )
    assert Panel("bare", None, None).title() == "<b>bare</b>"


def test_a_comparison_tells_every_checkpoint_the_same_settings() -> None:
    config = RecurrenceGridsConfig(
        checkpoints=PAIR, per_hop=3, readout="last_real", data=Path("q.json")
    )
    first, second = config.sources()
    assert (first.checkpoint, second.checkpoint) == PAIR
    assert replace(first, checkpoint="") == replace(second, checkpoint="")
    assert (first.per_hop, first.readout, first.data) == (3, "last_real", Path("q.json"))


def test_comparisons_refuse_no_checkpoint_and_an_unknown_one() -> None:
    with pytest.raises(ValueError, match="a comparison needs at least one checkpoint, got none"):
        recurrence_grids.run(RecurrenceGridsConfig(checkpoints=()))
    with pytest.raises(FileNotFoundError, match="neither a shipped checkpoint"):
        recurrence_grids.run(RecurrenceGridsConfig(checkpoints=("no/such/run",)))
    assert MarginsConfig().checkpoints[-1] == "mini/multi_hop/r_dyn"


@pytest.mark.parametrize("command", ["recurrence-grids", "halting-compare", "flips", "shortcut"])
def test_each_command_runs_on_the_named_checkpoints(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([command, *PAIR, "--n-loops", "2", "--per-hop", "2", "--out", str(tmp_path), "--no-json"])
    assert capsys.readouterr().out.count("wrote") == 3
    table, page, _ = sorted(tmp_path.iterdir())
    assert page.stat().st_size > 1_000_000
    assert set(pd.read_csv(table)["checkpoint"]) == set(PAIR)


def test_a_comparison_runs_again_from_its_settings(tmp_path: Path) -> None:
    main(
        [
            "margins",
            *PAIR,
            "--n-loops",
            "2",
            "--per-hop",
            "2",
            "--out",
            str(tmp_path / "a"),
            "--no-html",
        ]
    )
    main(
        [
            "margins",
            "--from-file",
            str(tmp_path / "a" / "margins.settings.json"),
            "--out",
            str(tmp_path / "b"),
            "--no-html",
        ]
    )
    for name in ("margins.csv", "margins.json", "margins.settings.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
