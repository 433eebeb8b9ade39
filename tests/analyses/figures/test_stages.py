"""Where bridge and target are decodable in several checkpoints, against the final norm and head of
cached states.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.common.two_hop import GROUPS, ask, shape_of, with_other_start
from loopscope.analyses.figures.circuit.stages import StageDepths, StagesConfig, figure, run
from loopscope.checkpoints.locate import SHIPPED
from loopscope.tasks.graphs import TableGraph
from loopscope.tasks.questions import Question
from toy import LAYERS, ShortEnding, odd_one, toy

OOD, VANILLA = "mini/systematicity/r4_l2/ood", "mini/systematicity/r1_l8/id"


@pytest.fixture(scope="module")
def shipped() -> StageDepths:
    return run(StagesConfig())


def slow_accuracy(name: str, group: str, entity: int, position: int) -> list[float]:
    """The share of questions whose entity tops the final norm and head of the state after each
    block, question by question.
    """
    subject = open_subject(SourceConfig(checkpoint=name))
    model, asked = (
        subject.model,
        [question for question in subject.questions[2] if question.kind == group],
    )
    batch, _ = subject.encode(asked)
    _, cache = model.run_with_cache(
        batch.tokens, mask=batch.mask, names_filter="**.hook_resid_post"
    )
    weights = model.state_dict()
    shares = []
    for state in cache.stack("resid_post").flatten(0, 1)[:, :, position]:
        normed = F.layer_norm(
            state,
            (state.shape[-1],),
            weights["final_norm.w"],
            weights["final_norm.b"],
            model.cfg.eps,
        )
        words = model.to_str_tokens((normed @ weights["embedding"].T).argmax(-1))
        rights = [
            word == subject.graph.walk(question.text)[entity]
            for word, question in zip(words, asked, strict=True)
        ]
        shares.append(sum(rights) / len(rights))
    return shares


# The record


@pytest.mark.parametrize(("name", "group"), [(OOD, GROUPS[2]), (VANILLA, GROUPS[1])])
@pytest.mark.slow
def test_shares_are_those_of_the_final_norm_and_head_on_the_cached_states(
    name: str, group: str, shipped: StageDepths
) -> None:
    found = shipped.accuracy[shipped.checkpoints.index(name)][GROUPS.index(group)]
    assert found[:, 0].tolist() == pytest.approx(slow_accuracy(name, group, 1, 1))
    assert found[:, 1].tolist() == pytest.approx(slow_accuracy(name, group, 2, 2))


def test_the_shipped_stages_show_the_bridge_before_the_target_and_ood_facts_last(
    shipped: StageDepths,
) -> None:
    assert shipped.stages == ("train", "id", "ood", "train", "id")
    assert shipped.shapes == ((4, 2),) * 3 + ((1, 8),) * 2
    assert shipped.questions == ((200, 200, 168),) * 5
    train, inside, ood, early_vanilla, vanilla = (
        found.max(1).values for found in shipped.accuracy
    )  # group target
    assert float(inside[1].min()) >= 0.95
    assert float(ood[2, 0]) == 1.0
    assert float(train[2, 1]) < float(inside[2, 1]) < float(ood[2, 1])
    assert float(ood[2, 1]) > 0.6
    assert float(early_vanilla[0, 1]) > 0.95
    assert float(early_vanilla[1, 1]) < 0.25
    assert float(vanilla[2, 0]) == 1.0
    assert float(vanilla[2, 1]) < 0.05
    for checkpoint in range(5):
        for group in range(3):
            bridge, target = (shipped.first(checkpoint, group, k) for k in range(2))
            assert target is None or (bridge is not None and bridge < target)


def test_places_count_from_zero_and_depth_counts_blocks(shipped: StageDepths) -> None:
    frame = shipped.frame()
    assert len(frame) == 5 * 3 * 8 * 2
    row = frame[
        (frame.checkpoint == OOD)
        & (frame.group == GROUPS[2])
        & (frame.depth == 6)
        & (frame.target == "target")
    ].iloc[0]
    assert (row.visit, row.loop, row.layer) == ("loops.2.blocks.1", 2, 1)
    assert row.accuracy == float(shipped.accuracy[2][2, 5, 1])
    table = shipped.summary()
    assert len(table) == 15
    assert table["target from depth"].tolist()[8] == 8
    assert table["target from depth"].tolist()[14] == "never"


def test_checkpoints_of_unequal_depth_stand_side_by_side(shipped: StageDepths) -> None:
    record = StageDepths(
        ("a", "b"), ("train", "b"), ((3, 1), (1, 5)), GROUPS[:1], ((7,), (9,)),
        (torch.rand(1, 3, 2, dtype=torch.float64), torch.rand(1, 5, 2, dtype=torch.float64)),
    )  # fmt: skip
    plot = figure(record)
    assert [len(trace.x) for trace in plot.data] == [3, 3, 5, 5]
    assert [list(trace.y) for trace in plot.data] == [
        found[0, :, k].tolist() for found in record.accuracy for k in range(2)
    ]
    assert [(shape.x0, shape.x1) for shape in plot.layout.shapes] == [(1.5, 2.5)] * 2
    assert plot.data[2].customdata[4] == "loops.0.blocks.4"


def test_the_figure_has_a_column_per_checkpoint_and_one_legend(shipped: StageDepths) -> None:
    plot = figure(shipped)
    assert len(plot.data) == 5 * 2 * 3
    assert [trace.name for trace in plot.data if trace.showlegend] == [
        "training facts",
        "ID facts",
        "OOD facts",
    ]
    titles = [note.text for note in plot.layout.annotations]
    assert titles[:2] == ["R = 4, L = 2<br>stage train", "R = 4, L = 2<br>stage id"]


# Refusals


def test_what_is_no_two_hop_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a comparison needs at least one checkpoint, got none"):
        run(StagesConfig(checkpoints=()))
    with pytest.raises(ValueError, match="have no two-hop questions of the group 'train_inferred'"):
        run(StagesConfig(checkpoints=("mini/multi_hop/r2",)))
    shutil.copytree(SHIPPED / OOD, tmp_path / "bare")
    (tmp_path / "bare" / "graph.json").unlink()
    with pytest.raises(
        ValueError, match=r"bare has no graph\.json, without which the bridge entities"
    ):
        run(StagesConfig(checkpoints=(str(tmp_path / "bare"),)))


def test_the_shape_needs_iterations_and_all_blocks_in_the_loop() -> None:
    subject = open_subject(SourceConfig(checkpoint=VANILLA))
    assert shape_of(subject) == (1, 8)
    assert shape_of(replace(subject, model=toy()), 3) == (3, LAYERS)
    with pytest.raises(ValueError, match="records no number of iterations"):
        shape_of(replace(subject, model=toy(n_loops=None)))
    with pytest.raises(ValueError, match="id has blocks outside its loop"):
        shape_of(replace(subject, model=odd_one(ShortEnding)), 3)


# Questions


def test_questions_come_with_bridge_and_target_and_corrupted_ones_share_neither() -> None:
    subject = open_subject(SourceConfig(checkpoint=OOD))
    asked = ask(subject, GROUPS[2], 40)
    assert len(asked.questions) == len(asked.batch) == 40
    for text, question, targets in zip(
        with_other_start(subject, asked.questions),
        asked.questions,
        asked.targets.tolist(),
        strict=True,
    ):
        path, other = subject.graph.walk(question.text), subject.graph.walk(text)
        assert subject.model.to_str_tokens(torch.tensor(targets)) == path[1:]
        assert all(a != b for a, b in zip(path, other, strict=True))
        mine, its = re.findall("<r_[0-9]+>", question.text), re.findall("<r_[0-9]+>", text)
        assert (mine[0] != its[0], mine[1] == its[1]) == (True, True)


def test_a_start_whose_bridge_lacks_the_relation_is_passed_over() -> None:
    subject = open_subject(SourceConfig(checkpoint=OOD))
    graph = TableGraph(((1, -1, 3, 0), (-1, 2, -1, 1), (2, 0, 3, -1)), ood=())
    small = replace(subject, graph=graph)
    questions = [
        Question(text, "", 2) for text in ("<e_0><r_0><r_1>", "<e_1><r_2><r_2>", "<e_2><r_2><r_1>")
    ]
    assert with_other_start(small, questions) == [
        "<e_2><r_2><r_1>",
        "<e_0><r_0><r_2>",
        "<e_0><r_0><r_1>",
    ]
    with pytest.raises(
        ValueError, match="no other question of the group gives '<e_0><r_0><r_1>' another head"
    ):
        with_other_start(small, questions[:2])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["stages", OOD, "--per-group", "3", "--out", str(tmp_path), "--no-html"])
    assert "best bridge" in capsys.readouterr().out
    assert (tmp_path / "stages.csv").exists()
