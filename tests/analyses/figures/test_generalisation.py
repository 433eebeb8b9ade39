"""The deepest hop count answered over the deepest learned, against single calls of the shipped
checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.figures.answers.generalisation import (
    Generalisation,
    GeneralisationConfig,
    figure,
    run,
)
from loopscope.checkpoints.locate import SHIPPED, shipped_names

TWO, SIX, END = "mini/multi_hop/r_dyn/2_hops", "mini/multi_hop/r_dyn/6_hops", "mini/multi_hop/r_dyn"


@pytest.fixture(scope="module")
def dynamic() -> Generalisation:
    return run(GeneralisationConfig(checkpoints=(END, TWO, SIX), n_loops=10))


@pytest.mark.slow
def test_the_ratio_is_one_after_two_hops_and_grows_with_the_curriculum(
    dynamic: Generalisation,
) -> None:
    assert dynamic.checkpoints == (TWO, SIX, END)
    assert dynamic.updates.tolist() == [2750, 11000, 25750]
    assert dynamic.learned.tolist() == [2, 6, 10]
    assert dynamic.answered.tolist() == [2, 9, 16]
    assert dynamic.ratio().tolist() == pytest.approx([1.0, 1.5, 1.6])
    assert dynamic.at_least().tolist() == [False, False, True]
    assert [dynamic.pair(i) for i in range(3)] == ["2 → 2", "6 → 9", "10 → ≥ 16"]
    assert dynamic.summary()["lower bound"].tolist() == ["", "", "yes"]


def test_the_best_accuracy_is_that_of_the_best_of_separate_calls(dynamic: Generalisation) -> None:
    subject = open_subject(SourceConfig(checkpoint=SIX))
    for hop in (4, 9):
        batch, answers = subject.encode(subject.questions[hop])
        shares = []
        for n_loops in range(1, 11):
            logits = subject.model(batch.tokens, n_loops=n_loops, mask=batch.mask)[
                torch.arange(len(batch)), batch.readout
            ]
            shares.append(float((logits.argmax(-1) == answers).double().mean()))
        assert float(dynamic.best[1, dynamic.hops.index(hop)]) == pytest.approx(
            max(shares), abs=1e-9
        )
    assert bool(dynamic.best[0, dynamic.hops.index(9) :].isnan().all())
    frame = dynamic.frame()
    assert len(frame) == 8 + 12 + 16
    assert frame["run"].unique().tolist() == ["mini/multi_hop/r_dyn"]


def test_the_default_is_every_shipped_multi_hop_checkpoint_and_none_may_reach_a_threshold() -> None:
    record = run(GeneralisationConfig(n_loops=1, per_hop=4, threshold=0.9))
    assert sorted(record.checkpoints) == [
        name for name in shipped_names() if name.startswith("mini/multi_hop/")
    ]
    assert record.labels[-1] == "R = 2 to 8, L = 2"
    nothing = run(
        GeneralisationConfig(
            checkpoints=("mini/multi_hop/r2",), n_loops=1, per_hop=4, threshold=0.9
        )
    )
    slow = [
        hop
        for hop, share in zip(nothing.hops, nothing.best[0].tolist(), strict=True)
        if share >= 0.9
    ]
    assert nothing.answered.tolist() == [max(slow, default=0)]


def test_what_cannot_be_placed_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="the threshold is an accuracy above 0 and at most 1, got 0"
    ):
        run(GeneralisationConfig(threshold=0.0))
    folder = tmp_path / "mine"
    shutil.copytree(SHIPPED / TWO, folder)
    card = json.loads((folder / "card.json").read_text())
    del card["updates"]
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="must say its recipe, updates and trained_hops"):
        run(GeneralisationConfig(checkpoints=(str(folder),)))


@pytest.mark.shapes
def test_the_figure_has_a_curve_per_run_and_marks_lower_bounds() -> None:
    record = Generalisation(
        checkpoints=("a/1", "a/2", "b"),
        runs=("a", "a", "b"),
        labels=("R = 2, L = 1", "R = 2, L = 1", "R = 4, L = 1"),
        updates=torch.tensor([100, 300, 200]),
        learned=torch.tensor([2, 4, 5]),
        answered=torch.tensor([2, 6, 7]),
        asked=torch.tensor([4, 6, 9]),
        hops=(1,),
        best=torch.ones(3, 1, dtype=torch.float64),
        threshold=0.6,
        n_loops=3,
    )
    first, second = figure(record).data
    assert (list(first.x), list(first.y)) == ([100, 300], [1.0, 1.5])
    assert list(first.marker.symbol) == ["circle", "triangle-up"]
    assert list(first.text) == ["2 → 2", "<b>R = 2, L = 1</b><br>4 → ≥ 6"]
    assert (list(second.x), list(second.y)) == ([200], pytest.approx([1.4]))
    assert list(second.text) == ["<b>R = 4, L = 1</b><br>5 → 7"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "generalisation",
            TWO,
            "--n-loops",
            "2",
            "--per-hop",
            "3",
            "--out",
            str(tmp_path),
            "--no-html",
        ]
    )
    assert "deepest learned" in capsys.readouterr().out
    assert (tmp_path / "generalisation.csv").exists()
